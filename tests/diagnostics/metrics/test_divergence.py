"""Nested lists, overlap, KL decomposition, quantiles, weights, tenths and runs against loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diagnostics.core.optional_fields import MissingField
from diagnostics.core.position_bins import LABELS
from diagnostics.core.totals import compute
from diagnostics.metrics import divergence, topk
from diagnostics.metrics.kl_decomposition import agreement, decompose_kl, kl_anatomy
from diagnostics.metrics.own_prefix import own_prefix_gap
from diagnostics.metrics.repetition import repeated_ngram_mask
from diagnostics.metrics.response import length_quantiles
from tests.helpers.dense_batches import B, DenseBatch, make_dense_batch, mean

BINS = {"": (0, 10**9), "@0-1": (0, 2), "@2-3": (2, 4), "@16-31": (16, 32), "@32-63": (32, 64)}


def top(x: torch.Tensor, k: int) -> list[int]:
    return sorted(range(len(x)), key=lambda v: -float(x[v]))[:k]


def places(d: DenseBatch, label: str) -> list[tuple[int, int]]:
    low, high = BINS[label]
    return [(i, t) for i, t in d.tokens() if low <= t < high]


@pytest.mark.parametrize("source", ["teacher", "union", "full"])
def test_nested_lists(source: str) -> None:
    d = make_dense_batch(1, source)
    row = compute(topk.nested_outside(d.batch) | topk.tail_share(d.batch))
    for k in (1, 8) + ((16,) if source == "full" else ()):
        for label in BINS:
            out, outside_mass = [], []
            for i, t in places(d, label):
                best = top(d.q[i, t], k)
                out.append(float(int(d.batch.tokens[i, t]) not in best))
                outside_mass.append(1 - sum(math.exp(float(d.p[i, t, v])) for v in best))
            assert row[f"divergence/outside_top{k}{label}"] == pytest.approx(mean(out))
            assert row[f"divergence/outside_top{k}_expected{label}"] == pytest.approx(
                mean(outside_mass)
            )
        cost = signal = all_cost = all_signal = 0.0
        for i, t in d.tokens():
            r, out = float(d.batch.log_ratio[i, t]), int(d.batch.tokens[i, t])
            outside = out not in top(d.q[i, t], k)
            cost, signal = cost + r * outside, signal + abs(r) * outside
            all_cost, all_signal = all_cost + r, all_signal + abs(r)
        assert row[f"signal/tail{k}_cost_share"] == pytest.approx(cost / all_cost)
        assert row[f"signal/tail{k}_signal_share"] == pytest.approx(signal / all_signal)
    assert ("divergence/outside_top16" in row) == (source == "full")


def test_lists_that_a_support_does_not_hold_are_missing() -> None:
    for source in ("student", "intersection"):
        with pytest.raises(MissingField, match=f"support has source '{source}'"):
            topk.nested_outside(make_dense_batch(1, source).batch)
    with pytest.raises(MissingField, match="the student's top-K ids"):
        topk.overlap(make_dense_batch(1, "teacher").batch)


@pytest.mark.parametrize(("source", "k"), [("union", 3), ("union", 10), ("full", 16)])
def test_overlap_in_both_definitions(source: str, k: int) -> None:
    d = make_dense_batch(2, source, k, gap=4.0)
    row = compute(topk.overlap(d.batch))
    for label in BINS:
        expected_values: dict[str, list[float]] = {}
        for i, t in places(d, label):
            p, q = d.p[i, t].exp().tolist(), d.q[i, t].exp().tolist()
            shared_ids = sorted(set(top(d.p[i, t], k)) & set(top(d.q[i, t], k)))
            mp, mq = sum(p[v] for v in shared_ids), sum(q[v] for v in shared_ids)
            n = len(shared_ids)
            values = {"ratio": n / k, "student_mass": mp, "teacher_mass": mq}
            values["empty_share"] = float(n == 0)
            if n:
                kl = sum(p[v] / mp * math.log(p[v] / mp / (q[v] / mq)) for v in shared_ids)
                values |= {"kl": kl, "advantage": -kl / n}
                values["advantage_verl"] = (
                    -sum(q[v] * math.log(q[v] / p[v]) for v in shared_ids) / n
                )
            for name, x in values.items():
                expected_values.setdefault(name, []).append(x)
        for name, x in expected_values.items():
            want = pytest.approx(mean(x), rel=1e-9, abs=1e-12)
            assert row[f"divergence/overlap_{name}{label}"] == want, name
        if k == 3 and not label:
            assert mean(expected_values["empty_share"]) > 0


def test_bounds_from_a_list() -> None:
    d = make_dense_batch(3)
    row = compute(topk.top_uncertainty(d.batch))
    bound = []
    for i, t in d.tokens():
        q = d.q[i, t].exp().tolist()
        inside = [q[v] for v in top(d.q[i, t], 10)]
        outside_mass = 1 - sum(inside)
        bound.append(-sum(x * math.log(x) for x in [*inside, outside_mass]))
        entropy = float(d.batch.prefix.teacher_entropy[i, t])
        assert bound[-1] <= entropy <= bound[-1] + outside_mass * math.log(24 - 10) + 1e-9
    assert row["divergence/top_teacher_entropy_least"] == pytest.approx(mean(bound))
    exact = compute(divergence.uncertainty(d.batch))
    assert row["divergence/top_teacher_max"] == pytest.approx(exact["divergence/teacher_max"])
    over = mean([float(d.batch.prefix.teacher_entropy[i, t] > 1) for i, t in d.tokens()])
    assert exact["divergence/teacher_entropy_over_1"] == pytest.approx(over)


@pytest.mark.parametrize("source", ["teacher", "student", "union", "intersection", "full"])
def test_anatomy_is_the_chain_rule(source: str) -> None:
    d = make_dense_batch(4, source, k=4, gap=2.0)
    row = compute(kl_anatomy(d.batch))
    parts: dict[str, list[float]] = {"binary": [], "head": [], "tail": []}
    ids, present = d.batch.support.ids, d.batch.support.present
    for i, t in d.tokens():
        s = {int(v) for j, v in enumerate(ids[i, t]) if present is None or present[i, t, j]}
        p, q = d.p[i, t].exp().tolist(), d.q[i, t].exp().tolist()
        mp, mq = sum(p[v] for v in s), sum(q[v] for v in s)
        escape = 0.0 if source == "full" else math.log((1 - mp) / (1 - mq))
        between = mp * math.log(mp / mq) if s else 0.0
        parts["binary"].append(0.0 if source == "full" else between + (1 - mp) * escape)
        parts["head"].append(
            sum(p[v] * math.log((p[v] / mp) / (q[v] / mq)) for v in s) if s else 0.0
        )
        y = int(d.batch.tokens[i, t])
        parts["tail"].append(0.0 if y in s else float(d.batch.log_ratio[i, t]) - escape)
    name = "kl" if source in ("teacher", "full") else f"{source}_kl"
    total = sum(map(sum, parts.values()))
    for part, x in parts.items():
        near = pytest.approx(mean(x), rel=1e-8, abs=1e-10)
        assert row[f"divergence/{name}_{part}"] == near, part
        assert row[f"divergence/{name}_{part}_share"] == pytest.approx(sum(x) / total, abs=1e-10)
    assert row[f"divergence/{name}_parts"] == pytest.approx(total / len(parts["head"]))


def test_the_sampled_tail_has_no_bias() -> None:
    """The mean over y, enumerated, of binary + head + tail is the KL of every prefix."""
    d = make_dense_batch(5, "teacher", k=3)
    p = d.p.exp()
    expected = torch.zeros_like(p[..., 0])
    for v in range(p.shape[-1]):
        y = torch.full_like(d.batch.tokens, v)
        resampled = replace(
            d.batch,
            tokens=y * d.batch.mask,
            student_logp=d.p[..., v] * d.batch.mask,
            teacher_logp=d.q[..., v] * d.batch.mask,
        )
        expected += p[..., v] * sum(decompose_kl(resampled).values())
    mask = d.batch.mask
    torch.testing.assert_close(expected[mask], d.batch.prefix.reverse_kl[mask], rtol=1e-9, atol=0)


def test_quantiles_by_position() -> None:
    d = make_dense_batch(6)
    row = compute(divergence.ratio_quantiles(d.batch) | divergence.rank_quantiles(d.batch))
    for label in BINS:
        r = [float(d.batch.log_ratio[i, t]) for i, t in places(d, label)]
        rank = [float(d.batch.prefix.teacher_rank[i, t]) for i, t in places(d, label)]
        for percent in (5, 50, 95) if label else (1, 5, 25, 50, 75, 95, 99):
            want = np.percentile(r, percent, method="inverted_cdf")
            actual = row[f"divergence/log_ratios_q{percent}{label}"]
            assert actual == pytest.approx(want, rel=0.091, abs=2**-20)
            assert (actual > 0) == (want > 0)
            want = np.percentile(rank, percent, method="inverted_cdf")
            assert row[f"divergence/teacher_ranks_q{percent}{label}"] == pytest.approx(
                want, rel=0.06
            )
            if want < 12:
                assert row[f"divergence/teacher_ranks_q{percent}{label}"] == want
    lengths = compute(length_quantiles(d.batch))
    want = np.percentile(d.batch.lengths.numpy(), 50, method="inverted_cdf")
    assert lengths["response/lengths_q50"] == pytest.approx(want, rel=0.06)
    assert "divergence/log_ratios_q25@0-1" not in row


def test_effective_size_of_prefixes() -> None:
    d = make_dense_batch(7)
    row = compute(divergence.prefix_weights(d.batch))
    for name, transform in (("prefix_ess", lambda x: x), ("prefix_abs_ess", abs)):
        for label in LABELS[1:7]:
            stop = int(label.split("-")[1]) + 1
            weights = []
            for i in range(B):
                positions = [t for j, t in d.tokens() if j == i]
                if positions and positions[-1] + 1 >= stop:
                    cost = sum(
                        transform(float(d.batch.log_ratio[i, t])) for t in positions if t < stop
                    )
                    weights.append(math.exp(-cost))
            if not weights:
                assert f"divergence/{name}{label}" not in row
                continue
            want = sum(weights) ** 2 / len(weights) / sum(w * w for w in weights)
            assert row[f"divergence/{name}{label}"] == pytest.approx(want, rel=1e-9)
        response_weights = []
        for i in range(B):
            positions = [float(d.batch.log_ratio[j, t]) for j, t in d.tokens() if j == i]
            if positions:
                response_weights.append(math.exp(-sum(map(transform, positions))))
        want = (
            sum(response_weights) ** 2
            / len(response_weights)
            / sum(w * w for w in response_weights)
        )
        assert row[f"divergence/{name}"] == pytest.approx(want, rel=1e-9)


def test_tenths_of_the_response() -> None:
    d = make_dense_batch(8)
    row = compute(divergence.cost_by_tenth(d.batch) | divergence.entropy_by_tenth(d.batch))
    values_by_tenth: dict[int, list[tuple[float, float, int]]] = {}
    for i, t in d.tokens():
        extent = 1 + max(u for j, u in d.tokens() if j == i)
        entropy = float(d.batch.prefix.student_entropy[i, t])
        r = float(d.batch.log_ratio[i, t])
        values_by_tenth.setdefault(10 * t // extent, []).append(
            (r, entropy, int(d.batch.prompt[i]))
        )
    assert len(values_by_tenth) == 10
    for k, values in values_by_tenth.items():
        label = f"_tenth%{10 * k}-{10 * k + 10}"
        r = [x for x, _, _ in values]
        assert row[f"divergence/k1{label}"] == pytest.approx(mean(r))
        want = mean([x for _, x, _ in values])
        assert row[f"divergence/student_entropy{label}"] == pytest.approx(want)
        sums = [
            sum(x - mean(r) for x, _, c in values if c == prompt)
            for prompt in {c for _, _, c in values}
        ]
        n = len(sums)
        error = math.sqrt(n / (n - 1) * sum(s * s for s in sums)) / len(r)
        assert row[f"divergence/k1{label}_se"] == pytest.approx(error)


@pytest.mark.parametrize(("threshold", "run"), [(0.5, 3), (0.3, 2), (10.0, 5), (0.4, 1), (0.0, 1)])
def test_runs_of_agreement(threshold: float, run: int) -> None:
    d = make_dense_batch(9)
    tokens = d.batch.tokens.clone()
    tokens[8, :] = torch.arange(5).repeat(8) * d.batch.mask[8]
    batch = replace(d.batch, tokens=tokens)
    row = compute(agreement(threshold, run)(batch))
    repeated = repeated_ngram_mask(batch.tokens, batch.mask)
    assert bool(repeated.any())
    in_runs: list[tuple[int, int]] = []
    lengths, per_response = [], []
    for i in range(B):
        positions = [t for j, t in d.tokens() if j == i]
        current: list[int] = []
        started = len(lengths)
        for t in [*positions, -1]:
            if t >= 0 and float(batch.prefix.reverse_kl[i, t]) < threshold:
                current.append(t)
                continue
            if len(current) >= run:
                lengths.append(len(current))
                in_runs += [(i, u) for u in current]
            current = []
        if positions:
            per_response.append(float(len(lengths) - started))
    total = len(list(d.tokens()))
    assert row["divergence/agreeing_share"] == pytest.approx(len(in_runs) / total)
    assert row["divergence/agreeing_runs"] == pytest.approx(mean(per_response))
    if lengths:
        assert row["divergence/agreeing_run_length"] == pytest.approx(mean(lengths))
        share = mean([float(repeated[i, t]) for i, t in in_runs])
        assert row["divergence/agreeing_repeated_share"] == pytest.approx(share)
    else:
        assert math.isnan(row["divergence/agreeing_run_length"])


def test_own_prefix_control() -> None:
    d, teacher_batch = make_dense_batch(1), make_dense_batch(2)
    row = own_prefix_gap(d.batch, teacher_batch.batch)
    for label in BINS:
        a, b = (
            [float(x.batch.prefix.teacher_max[place]) for place in places(x, label)]
            for x in (teacher_batch, d)
        )
        assert row[f"divergence/own_prefix_teacher_max{label}"] == pytest.approx(mean(a) - mean(b))
        errors = [
            compute(divergence.uncertainty(x.batch))[f"divergence/teacher_entropy{label}_se"]
            for x in (teacher_batch, d)
        ]
        error = row[f"divergence/own_prefix_teacher_entropy{label}_se"]
        assert error == pytest.approx(math.sqrt(errors[0] ** 2 + errors[1] ** 2))
    short = d.batch.positions(2)
    assert "divergence/own_prefix_teacher_max@2-3" not in own_prefix_gap(short, teacher_batch.batch)
    assert all(x == 0 for k, x in own_prefix_gap(d.batch, d.batch).items() if "_se" not in k)


def test_an_id_that_is_not_present_is_not_on_the_list() -> None:
    """As after mapping the student's EOS token to the teacher's."""
    d = make_dense_batch(3)
    support = d.batch.support
    first = torch.arange(10) == 0
    absent = replace(support, present=~first.expand(support.ids.shape))
    batch = replace(d.batch, support=absent)
    row = compute(topk.nested_outside(batch) | topk.top_uncertainty(batch))
    assert row["divergence/outside_top1"] == row["divergence/outside_top1_expected"] == 1
    out, second = [], []
    for i, t in d.tokens():
        best = top(d.q[i, t], 8)
        out.append(float(int(d.batch.tokens[i, t]) not in best[1:]))
        second.append(math.exp(float(d.q[i, t, best[1]])))
    assert row["divergence/outside_top8"] == pytest.approx(mean(out))
    assert row["divergence/top_teacher_max"] == pytest.approx(mean(second))
