"""Every number of the panel, with its standard error, against loops in plain Python."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from diagnostics.batch import ScoredRollouts
from diagnostics.monitor import Monitor
from tests.helpers.batches import batch as make_batch

Token = tuple[int, int]
BINS = {"": (0, 10**9), "@0-1": (0, 2), "@2-3": (2, 4), "@4-7": (4, 8), "@8-15": (8, 16)}
BINS |= {"@16-31": (16, 32), "@32-63": (32, 64)}


@pytest.fixture(scope="module")
def batch() -> ScoredRollouts:
    """Build a batch with a loop in two responses, one graded half and a slightly wrong sampler."""
    from dataclasses import replace

    import torch

    b = make_batch(seed=3)
    tokens = b.tokens.clone()
    tokens[[0, 5], :30] = torch.tensor([1, 2, 3]).repeat(10)
    reward = torch.tensor([1.0, 0.0, float("nan"), 1.0] * 3)
    return replace(b, tokens=tokens, reward=reward, sampler_logp=b.sampler_logp * 1.01)


@pytest.fixture(scope="module")
def row(batch: ScoredRollouts) -> dict[str, float]:
    return Monitor()(0, [batch])


def supervised(batch: ScoredRollouts) -> list[Token]:
    mask = batch.mask.tolist()
    return [(i, j) for i, row in enumerate(mask) for j, sampled in enumerate(row) if sampled]


def ratio(pairs: list[tuple[int, float, float]]) -> tuple[float, float]:
    """Return sum x / sum y of (cluster, x, y) and its linearised standard error over clusters."""
    n: dict[int, float] = {}
    d: dict[int, float] = {}
    for cluster, x, y in pairs:
        n[cluster] = n.get(cluster, 0.0) + x
        d[cluster] = d.get(cluster, 0.0) + y
    value = sum(n.values()) / sum(d.values())
    spread = sum((n[c] - value * d[c]) ** 2 for c in n)
    count = sum(x != 0 for x in d.values())
    return value, math.sqrt(count / (count - 1) * spread) / sum(d.values())


def token_metrics(b: ScoredRollouts) -> dict[str, Callable[[int, int], float]]:
    """Return name to a function of the value at one token, by definition."""
    p, s, repeated = b.prefix, b.support, repeated_tokens(b)

    def r(i: int, t: int) -> float:
        return float(b.student_logp[i, t]) - float(b.teacher_logp[i, t])

    def sampler_log_ratio(i: int, t: int) -> float:
        return float(b.student_logp[i, t] - b.sampler_logp[i, t])

    def out(i: int, t: int) -> float:
        return float(int(b.tokens[i, t]) not in s.ids[i, t].tolist())

    def mass(x, i: int, t: int) -> float:
        return sum(math.exp(v) for v in x[i, t].tolist())

    def field(name: str) -> Callable[[int, int], float]:
        return lambda i, t: float(getattr(p, name)[i, t])

    return {
        "signal/negative_share": lambda i, t: float(r(i, t) > 0),
        "signal/positive_share": lambda i, t: float(r(i, t) < 0),
        "signal/negative_mass": lambda i, t: max(r(i, t), 0),
        "signal/positive_mass": lambda i, t: max(-r(i, t), 0),
        "signal/negative_share_null": field("overrated"),
        "signal/negative_share_excess": lambda i, t: (r(i, t) > 0) - float(p.overrated[i, t]),
        "divergence/k1": r,
        "divergence/abs_ratio": lambda i, t: abs(r(i, t)),
        "divergence/teacher_prob": lambda i, t: math.exp(float(b.teacher_logp[i, t])),
        "divergence/reverse_kl": field("reverse_kl"),
        "divergence/teacher_rank_1": lambda i, t: float(p.teacher_rank[i, t] == 1),
        "divergence/teacher_rank_over_8": lambda i, t: float(p.teacher_rank[i, t] > 8),
        "divergence/outside_topk": out,
        "divergence/outside_topk_expected": lambda i, t: 1 - mass(s.student_logp, i, t),
        "divergence/outside_topk_excess": lambda i, t: out(i, t) - 1 + mass(s.student_logp, i, t),
        "divergence/topk_teacher_mass": lambda i, t: mass(s.teacher_logp, i, t),
        "divergence/topk_student_mass": lambda i, t: mass(s.student_logp, i, t),
        "divergence/teacher_entropy": field("teacher_entropy"),
        "divergence/student_entropy": field("student_entropy"),
        "divergence/entropy_gap": lambda i, t: float(
            p.teacher_entropy[i, t] - p.student_entropy[i, t]
        ),
        "divergence/teacher_max": field("teacher_max"),
        "consistency/sampler_log_ratio": lambda i, t: float(
            b.student_logp[i, t] - b.sampler_logp[i, t]
        ),
        "consistency/sampler_log_ratio_square": lambda i, t: (
            float(b.student_logp[i, t] - b.sampler_logp[i, t]) ** 2
        ),
        "repetition/repeated_share": lambda i, t: float((i, t) in repeated),
    }


def repeated_tokens(b: ScoredRollouts) -> set[Token]:
    """Return the tokens that end a repeated 8-gram of sampled tokens, by a set of tuples."""
    repeated = set()
    tokens = supervised(b)
    for i in range(len(b)):
        positions = [t for j, t in tokens if j == i]
        ids = [int(b.tokens[i, t]) for t in positions]
        ngrams = set()
        for end in range(8, len(ids) + 1):
            gram = tuple(ids[end - 8 : end])
            if gram in ngrams:
                repeated.add((i, positions[end - 1]))
            ngrams.add(gram)
    return repeated


def test_every_token_metric_equals_its_definition(
    batch: ScoredRollouts, row: dict[str, float]
) -> None:
    repeated = repeated_tokens(batch)
    assert len(repeated) > 10
    checked, tokens = 0, supervised(batch)
    for name, value_of in token_metrics(batch).items():
        for label, (low, high) in BINS.items():
            if label and f"{name}{label}" not in row:
                continue
            use = {(i, t): value_of(i, t) for i, t in tokens if low <= t < high}
            pairs = [(int(batch.prompt[i]), x, 1.0) for (i, _), x in use.items()]
            value, error = ratio(pairs)
            assert row[f"{name}{label}"] == pytest.approx(value, rel=2e-5, abs=1e-7), name
            assert row[f"{name}{label}_se"] == pytest.approx(error, rel=1e-3, abs=1e-6), name
            checked += 1
    assert checked > 80


def test_ratios_of_sums(batch: ScoredRollouts, row: dict[str, float]) -> None:
    repeated, r = repeated_tokens(batch), batch.log_ratio.double()
    for name, numerator, denominator in (
        ("signal/signed_balance", lambda x, _: max(-x, 0), lambda x, _: abs(x)),
        ("signal/repeated_cost", lambda x, rep: x * rep, lambda _, rep: float(rep)),
        ("signal/regular_cost", lambda x, rep: x * (1 - rep), lambda _, rep: 1.0 - rep),
        ("signal/repeated_signal_share", lambda x, rep: abs(x) * rep, lambda x, _: abs(x)),
    ):
        pairs = []
        for i, t in supervised(batch):
            x, rep = float(r[i, t]), (i, t) in repeated
            pairs.append((int(batch.prompt[i]), numerator(x, rep), denominator(x, rep)))
        value, error = ratio(pairs)
        assert row[name] == pytest.approx(value, rel=1e-5), name
        assert row[f"{name}_se"] == pytest.approx(error, rel=1e-4), name


def test_numbers_by_response(batch: ScoredRollouts, row: dict[str, float]) -> None:
    b = batch
    tokens = supervised(b)
    lengths = [sum(1 for j, _ in tokens if j == i) for i in range(len(b))]
    prompt = [int(x) for x in b.prompt]
    ended = [bool(x) for x in b.ended]
    costs = [sum(float(b.log_ratio[j, t]) for j, t in tokens if j == i) for i in range(12)]
    graded = [not math.isnan(float(x)) for x in b.reward]
    all_rows = range(len(b))
    for name, pairs in {
        "response/length": [(prompt[i], lengths[i], 1) for i in all_rows],
        "response/length_ended": [(prompt[i], lengths[i] * ended[i], ended[i]) for i in all_rows],
        "response/truncated_share": [(prompt[i], not ended[i], 1) for i in all_rows],
        "response/graded_share": [(prompt[i], graded[i], 1) for i in all_rows],
        "divergence/k1_per_response": [(prompt[i], costs[i], 1) for i in all_rows],
        "divergence/k1_response_mean": [(prompt[i], costs[i] / lengths[i], 1) for i in all_rows],
    }.items():
        value, error = ratio(pairs)
        assert row[name] == pytest.approx(value, rel=1e-5), name
        assert row[f"{name}_se"] == pytest.approx(error, rel=1e-4), name
    rewards = [float(b.reward[i]) for i in all_rows if graded[i]]
    assert row["response/reward"] == pytest.approx(np.mean(rewards))


def test_concentration_by_sorting(batch: ScoredRollouts, row: dict[str, float]) -> None:
    p = batch.prefix
    signal, energy = [], []
    for i, t in supervised(batch):
        r, y = abs(float(batch.log_ratio[i, t])), math.exp(float(batch.student_logp[i, t]))
        signal.append(r)
        energy.append(r * math.sqrt(max(1 - 2 * y + float(p.collision[i, t]), 0)))
    for name, values in (("signal", signal), ("energy", energy)):
        x = np.sort(np.array(values))
        n, total = len(x), x.sum()
        eff = total**2 / (x**2).sum()
        assert row[f"signal/{name}_n_eff"] == pytest.approx(eff, rel=1e-5)
        assert row[f"signal/{name}_n_eff_share"] == pytest.approx(eff / n, rel=1e-5)
        num_full = int(n / 100)
        top = x[n - num_full :].sum() + (n / 100 - num_full) * x[n - num_full - 1]
        assert row[f"signal/{name}_top1_share"] == pytest.approx(top / total, rel=0.09)
        gini = ((2 * np.arange(1, n + 1) - n - 1) * x).sum() / (n * total)
        assert gini - 0.022 < row[f"signal/{name}_gini"] <= gini + 1e-9


def test_martingales_by_hand(batch: ScoredRollouts, row: dict[str, float]) -> None:
    p = batch.prefix
    h = hv = k = kv = 0.0
    for i, t in supervised(batch):
        entropy, kl = float(p.student_entropy[i, t]), float(p.reverse_kl[i, t])
        h += -float(batch.student_logp[i, t]) - entropy
        hv += max(float(p.surprise_square[i, t]) - entropy**2, 0)
        k += float(batch.log_ratio[i, t]) - kl
        kv += max(float(p.ratio_square[i, t]) - kl**2, 0)
    assert row["consistency/z_H"] == pytest.approx(h / math.sqrt(hv), rel=1e-4)
    assert row["consistency/z_K"] == pytest.approx(k / math.sqrt(kv), rel=1e-4)
