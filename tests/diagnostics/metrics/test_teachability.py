"""Teachability, EOS, diversity and retokenization metrics against loops."""

import math
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from diagnostics.core.optional_fields import MissingField
from diagnostics.core.totals import compute
from diagnostics.metrics import consistency, diversity, eos, retokenization, teachability
from tests.helpers.dense_batches import (
    STUDENT_ENDS,
    TEACHER_ENDS,
    B,
    DenseBatch,
    V,
    make_dense_batch,
    mean,
)


def level_stats(d: DenseBatch, i: int, t: int) -> dict[str, float]:
    """Compute entropy, KL, |r|, energy, signal and noise at a token by explicit sums."""
    p, l = d.p[i, t].exp(), d.p[i, t] - d.q[i, t]
    y = int(d.batch.tokens[i, t])
    kl, r = float((p * l).sum()), float(l[y])
    eye = torch.eye(V).double()
    gradients = l[:, None] * (eye - p)  # (V, V) of each token of the vocabulary
    expected = p @ gradients
    signal = float(expected.square().sum())
    return {
        "entropy": float(-(p * d.p[i, t]).sum()),
        "kl": kl,
        "signal": abs(r),
        "energy": float((r * (eye[y] - p)).square().sum()),
        "clean": signal,
        "noise": float(p @ gradients.square().sum(1)) - signal,
    }


def test_quadrants_are_sums_over_their_tokens() -> None:
    d = make_dense_batch(11, gap=0.5, sharpness=3.0)
    row = compute(teachability.quadrants(d.batch))
    tokens = [level_stats(d, i, t) for i, t in d.tokens()]
    num_nonempty = 0
    for first, torn in (("decided", False), ("torn", True)):
        for second, divergent in (("near", False), ("apart", True)):
            selected = [
                x for x in tokens if (x["entropy"] > 1) == torn and (x["kl"] > 0.1) == divergent
            ]
            num_nonempty += bool(selected)
            name = f"signal/{first}_{second}"
            assert row[f"{name}_tokens"] == pytest.approx(len(selected) / len(tokens))
            for part in ("signal", "energy"):
                total = sum(x[part] for x in tokens)
                assert row[f"{name}_{part}"] == pytest.approx(
                    sum(x[part] for x in selected) / total
                )
            if selected:
                ratio = sum(x["clean"] for x in selected) / sum(x["noise"] for x in selected)
                assert row[f"{name}_signal_to_noise"] == pytest.approx(ratio)
    assert num_nonempty == 4


def level(x: float) -> int:
    edges = teachability.EDGES.double().tolist()
    return max(i for i in range(len(edges) - 1) if x >= edges[i])


def selected_share(x: list[float], y: list[float], weight: list[float]) -> float:
    """Return the weight share of the fifth with the largest soft-or of bin ranks, by sorting."""
    n = len(x)
    ranks = []
    for values in (x, y):
        count = Counter(map(level, values))
        ranks.append(
            {k: (sum(v for j, v in count.items() if j < k) + count[k] / 2) / n for k in count}
        )
    cells = defaultdict(list)
    for i in range(n):
        cells[level(x[i]), level(y[i])].append(weight[i])
    scored = []
    for (i, j), cell_values in cells.items():
        a, b = ranks[0][i], ranks[1][j]
        scored.append((a + b - a * b, cell_values))
    scored.sort(key=lambda pair: -pair[0])
    assert len({round(s, 9) for s, _ in scored}) == len(scored), (
        "a tie would make the selection ambiguous"
    )
    remaining, selected_sum = 0.2 * n, 0.0
    for _, cell_values in scored:
        take = min(remaining, len(cell_values))
        selected_sum += sum(cell_values) * take / len(cell_values)
        remaining -= take
    return selected_sum / sum(weight)


def test_a_fifth_chosen_by_ranks_holds_what_a_sorted_list_says() -> None:
    d = make_dense_batch(12, gap=0.7, sharpness=3.0)
    row = compute(teachability.teachability(d.batch))
    tokens = [level_stats(d, i, t) for i, t in d.tokens()]
    columns = {name: [x[name] for x in tokens] for name in tokens[0]}
    for part in ("signal", "energy"):
        want = selected_share(columns["entropy"], columns["kl"], columns[part])
        assert row[f"signal/teachable_selected_{part}"] == pytest.approx(want)


def test_the_soft_or_is_no_sum() -> None:
    """On independent axes, where the product changes the selection."""
    g = torch.Generator().manual_seed(1)
    x, y = (torch.exp(2 * torch.randn(1, 4000, generator=g).double() - 3) for _ in range(2))
    weight = (x * y).sqrt()
    mask = torch.ones_like(x, dtype=torch.bool)
    joint = teachability.JointHistogram.from_tokens(x, y, [weight, x], mask).values()
    lists = [v[0].tolist() for v in (x, y, weight)]
    assert joint["_selected_signal"] == pytest.approx(selected_share(*lists))
    assert joint["_selected_energy"] == pytest.approx(selected_share(*lists[:2], lists[0]))


def test_a_rule_that_knows_nothing_selects_a_fifth() -> None:
    d = make_dense_batch(13)
    flat = torch.where(d.batch.mask, 0.5, 0.0).double()
    joint = teachability.JointHistogram.from_tokens(flat, flat, [flat, flat], d.batch.mask)
    assert joint.values() == pytest.approx({"_selected_signal": 0.2, "_selected_energy": 0.2})


def test_compatibility_and_acceptance() -> None:
    d = make_dense_batch(14, "union", k=8)
    row = compute(teachability.compatibility(d.batch))
    masses, first = [], []
    for i, t in d.tokens():
        student_ids = d.p[i, t].topk(8).indices
        masses.append(float(d.q[i, t][student_ids].exp().sum()))
        first.append(int(student_ids[0]) in d.q[i, t].topk(5).indices.tolist())
    assert row["divergence/compatibility"] == pytest.approx(mean(masses))
    assert row["divergence/first_accepted"] == pytest.approx(mean([float(x) for x in first]))
    assert 0.05 < mean([float(x) for x in first]) < 0.95
    with pytest.raises(MissingField):
        teachability.compatibility(make_dense_batch(14, "teacher").batch)


def test_ends_by_a_loop() -> None:
    d = make_dense_batch(15)
    row = compute(eos.endings(d.batch))
    wish, name, wish_before, push = [], [], [], []

    def masses(i: int, t: int) -> tuple[float, float]:
        student_mass = sum(math.exp(d.p[i, t, v]) for v in STUDENT_ENDS)
        teacher_mass = sum(math.exp(d.q[i, t, v]) for v in TEACHER_ENDS)
        return math.log(student_mass), math.log(teacher_mass)

    for i in range(B):
        positions, ended = [t for j, t in d.tokens() if j == i], False
        for place, t in enumerate(positions):
            student_mass, teacher_mass = masses(i, t)
            end = int(d.batch.tokens[i, t]) in STUDENT_ENDS
            push.append(-float(d.batch.log_ratio[i, t]) * (end - math.exp(student_mass)))
            if not end:
                continue
            wish.append(teacher_mass - student_mass)
            name.append(teacher_mass - float(d.batch.teacher_logp[i, t]))
            if not ended:
                pairs = [masses(i, u) for u in positions[max(0, place - 5) : place]]
                wish_before += [y - x for x, y in pairs]
            ended = True
    assert len(wish) >= 3
    assert row["divergence/end_wish"] == pytest.approx(mean(wish))
    assert row["divergence/end_name"] == pytest.approx(mean(name))
    assert row["divergence/end_wish_before"] == pytest.approx(mean(wish_before))
    assert row["divergence/end_push"] == pytest.approx(mean(push))
    hazard = mean([sum(math.exp(d.q[i, t, v]) for v in TEACHER_ENDS) for i, t in d.tokens()])
    assert row["divergence/teacher_hazard"] == pytest.approx(hazard)
    masked = replace(d.batch, mask=d.batch.mask & (d.batch.prefix.ending == 0))
    row = compute(eos.endings(masked))
    assert math.isnan(row["divergence/end_name"])
    assert math.isnan(row["divergence/end_wish_before"])
    bare = replace(d.batch.prefix, student_end=None)
    with pytest.raises(MissingField, match="EOS log-masses"):
        eos.endings(replace(d.batch, prefix=bare))


def test_distinct_grams_by_sets() -> None:
    d = make_dense_batch(16)
    small_vocabulary = replace(d.batch, tokens=d.batch.tokens % 3)
    row = compute(diversity.distinct(small_vocabulary))
    grams = defaultdict(list)
    for i in range(B):
        row_ids = [int(small_vocabulary.tokens[i, t]) for j, t in d.tokens() if j == i]
        grams[int(small_vocabulary.prompt[i])] += [
            tuple(row_ids[a : a + 4]) for a in range(len(row_ids) - 3)
        ]
    new, num_grams = sum(len(set(x)) for x in grams.values()), sum(map(len, grams.values()))
    assert new < num_grams
    assert row["diversity/distinct_4"] == pytest.approx(new / num_grams)
    alone = replace(small_vocabulary, prompt=torch.arange(B))
    assert math.isnan(compute(diversity.distinct(alone))["diversity/distinct_4"])


def test_a_second_try_by_all_pairs() -> None:
    reward = torch.tensor([1, 0, 1, 1, 0, 0, 0, torch.nan, 1, 1.0]).double()
    prompt = torch.tensor([4, 4, 4, 7, 7, 7, 7, 7, 9, 2])
    d = replace(make_dense_batch(17).batch, reward=reward, prompt=prompt)
    row = compute(diversity.second_try(d))
    first, second = [], []
    for p in (4, 7):
        rewards = [float(x) for x, q in zip(reward, prompt, strict=True) if q == p and x == x]
        first.append(mean(rewards))
        second.append(mean([float(max(pair)) for pair in combinations(rewards, 2)]))
    assert row["diversity/pass_1"] == pytest.approx(mean(first))
    assert row["diversity/pass_2"] == pytest.approx(mean(second))
    assert row["diversity/second_try"] == pytest.approx(mean(second) - mean(first))


def test_early_entropy_and_staleness() -> None:
    d = make_dense_batch(18)
    wide = d.batch._map(lambda x: torch.cat([x, x], 1) if x.dim() > 1 else x)  # 80 positions
    row = compute(diversity.branching(wide))
    entropy = [
        float(wide.prefix.student_entropy[i, t]) for i, t in wide.mask.nonzero().tolist() if t < 64
    ]
    assert len(entropy) < int(wide.mask.sum())
    assert row["diversity/early_entropy"] == pytest.approx(mean(entropy))
    aged = replace(d.batch, age=torch.tensor([0, 0, 3, 0, 1, 0, 0, 0, 0, 2]))
    row = compute(consistency.staleness(aged))
    assert row["consistency/age"] == pytest.approx(0.6)
    assert row["consistency/stale_share"] == pytest.approx(0.3)


def split_at(text: bytes, ends: list[int]) -> list[bytes]:
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def test_spans_by_brute_force() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        size = int(torch.randint(2, 30, (1,), generator=g))
        text = bytes(torch.randint(256, (size,), generator=g).tolist())
        cuts = [
            sorted(set(torch.randint(1, size, (size // 2,), generator=g).tolist()))
            for _ in range(2)
        ]
        student_tokens, teacher_tokens = split_at(text, cuts[0]), split_at(text, cuts[1])
        spans = retokenization.common_spans(student_tokens, teacher_tokens)
        boundaries = [0, *sorted(set(cuts[0]) & set(cuts[1])), size]
        assert len(spans) == len(boundaries) - 1
        logp = [torch.rand(len(x), generator=g).tolist() for x in (student_tokens, teacher_tokens)]
        ratios = retokenization.span_ratios(spans, *logp)
        for span, a, b, ratio in zip(spans, boundaries, boundaries[1:], ratios, strict=False):
            assert b"".join(student_tokens[slice(*span.student)]) == text[a:b]
            assert b"".join(teacher_tokens[slice(*span.teacher)]) == text[a:b]
            want = sum(logp[0][slice(*span.student)]) - sum(logp[1][slice(*span.teacher)])
            assert ratio == pytest.approx(want)
        agreement = retokenization.boundary_agreement(student_tokens, teacher_tokens)
        inner = set(cuts[0])
        if inner:
            assert agreement["boundaries"] == pytest.approx(len(inner & set(cuts[1])) / len(inner))
        single_spans = [
            s
            for s in spans
            if s.student[1] - s.student[0] == 1 and s.teacher[1] - s.teacher[0] == 1
        ]
        assert agreement["coverage"] == pytest.approx(
            sum(len(student_tokens[s.student[0]]) for s in single_spans) / size
        )


def test_a_spelled_tag_is_one_span_and_hardly_a_cost() -> None:
    student_tokens, teacher_tokens = [b"<", b"think", b">", b"7"], [b"<think>", b"7"]
    spans = retokenization.common_spans(student_tokens, teacher_tokens)
    assert spans == [
        retokenization.TokenSpan((0, 3), (0, 1)),
        retokenization.TokenSpan((3, 4), (1, 2)),
    ]
    assert retokenization.span_ratios(spans, [-0.1, 0.0, 0.0, -0.2], [-0.1, -0.2]) == [0.0, 0.0]
    with pytest.raises(ValueError, match="different bytes"):
        retokenization.common_spans([b"a"], [b"b"])
    with pytest.raises(ValueError, match="has no bytes"):
        retokenization.common_spans([b"a", b""], [b"a"])


def test_responses_that_the_tokenizer_would_not_make() -> None:
    def decode(ids: list[int]) -> str:
        return "".join("ab"[i] if i < 2 else "ab" for i in ids)

    def encode(text: str) -> list[int]:
        ids, remaining = [], text
        while remaining:
            ids.append(2 if remaining.startswith("ab") else "ab".index(remaining[0]))
            remaining = remaining[2:] if ids[-1] == 2 else remaining[1:]
        return ids

    assert (
        retokenization.noncanonical_share([[2, 0], [0, 1], [1, 1], [0, 1, 2]], decode, encode)
        == 0.5
    )
    assert math.isnan(retokenization.noncanonical_share([], decode, encode))
