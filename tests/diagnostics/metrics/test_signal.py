"""Concentration, token attribution, response and consistency metrics against loops."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from diagnostics.core.totals import compute
from diagnostics.metrics import consistency, response, signal, token_attribution
from diagnostics.metrics.divergence import prefix_weights
from diagnostics.metrics.repetition import compression, is_compressible
from diagnostics.metrics.token_attribution import TokenAttribution
from tests.helpers.dense_batches import B, DenseBatch, V, make_dense_batch, mean


def costs(d: DenseBatch) -> list[float]:
    return [float(d.batch.log_ratio[i, t]) for i, t in d.tokens()]


def effective(x: list[float]) -> tuple[float, float]:
    total = sum(x)
    shares = [v / total for v in x if v > 0]
    return total**2 / sum(v * v for v in x), math.exp(-sum(s * math.log(s) for s in shares))


def test_concentration_by_entropy_and_by_sign() -> None:
    d = make_dense_batch(1)
    b = d.batch
    row = compute(signal.signal_concentration(b) | signal.signed_concentration(b))
    for name, x in {
        "signal": [abs(r) for r in costs(d)],
        "negative_signal": [r for r in costs(d) if r > 0],
        "positive_signal": [-r for r in costs(d) if r < 0],
    }.items():
        size, by_entropy = effective(x)
        assert row[f"signal/{name}_n_eff"] == pytest.approx(size)
        assert row[f"signal/{name}_entropy_n_eff"] == pytest.approx(by_entropy)
        assert row[f"signal/{name}_n_eff_share"] == pytest.approx(size / len(x))
        assert by_entropy >= size
        n, sorted_values = len(x), sorted(x)
        gini = sum((2 * j - n - 1) * v for j, v in enumerate(sorted_values, 1)) / (n * sum(x))
        assert gini - 0.022 < row[f"signal/{name}_gini"] <= gini + 1e-12


def test_lorenz_curve_lies_on_the_sorted_sums() -> None:
    d = make_dense_batch(1)
    (total,) = signal.signal_concentration(d.batch).values()
    tokens, cumulative_share = total.lorenz()
    x = np.sort(np.abs(costs(d)))
    exact = np.concatenate([[0], np.cumsum(x)]) / x.sum()
    assert [tokens[0], cumulative_share[0], tokens[-1], cumulative_share[-1]] == pytest.approx(
        [0, 0, 1, 1]
    )
    counts = np.round(tokens * len(x)).astype(int)
    np.testing.assert_allclose(cumulative_share, exact[counts], atol=1e-12)


def test_action_dependence() -> None:
    d = make_dense_batch(2)
    within = []
    for i, t in d.tokens():
        p, l = d.p[i, t].exp(), d.p[i, t] - d.q[i, t]
        within.append(float((p * (l - (p * l).sum()) ** 2).sum()))
    row = compute(signal.action_dependence(d.batch))
    want = mean(within) / float(np.var(costs(d)))
    assert row["signal/action_dependence"] == pytest.approx(want)


def test_a_cost_of_the_prefix_alone_depends_on_no_action() -> None:
    d = make_dense_batch(2)
    flat = d.batch.prefix
    cost = torch.where(d.batch.mask, torch.linspace(0, 1, 40).double(), 0.0)
    only = replace(flat, reverse_kl=cost, ratio_square=cost.square())
    batch = replace(d.batch, teacher_logp=d.batch.student_logp - cost, prefix=only)
    row = compute(signal.action_dependence(batch))
    assert row["signal/action_dependence"] == pytest.approx(0.0, abs=1e-12)


def test_the_share_of_one_id_by_a_count() -> None:
    d = make_dense_batch(3)
    big = replace(d.batch, tokens=d.batch.tokens % 5 + 4096 * (d.batch.tokens % 2))
    sums: dict[int, float] = {}
    for i, t in d.tokens():
        y = int(big.tokens[i, t]) % 4096
        sums[y] = sums.get(y, 0.0) + abs(float(big.log_ratio[i, t]))
    row = compute(token_attribution.one_id(big))
    assert row["tokens/one_id_signal"] == pytest.approx(max(sums.values()) / sum(sums.values()))
    signs = sum(float(big.log_ratio[i, t]) for i, t in d.tokens())
    assert abs(signs) < 0.9 * sum(sums.values()), "a sum without the bars would not differ"
    no_signal = replace(big, teacher_logp=big.student_logp)
    assert math.isnan(compute(token_attribution.one_id(no_signal))["tokens/one_id_signal"])


def poisoned() -> DenseBatch:
    """Build a batch with tokens of a confident student to which the teacher gives no mass."""
    d = make_dense_batch(3)
    b = d.batch
    student, teacher = b.student_logp.clone(), b.teacher_logp.clone()
    for place, (x, y) in {
        (9, 3): (-0.05, -12.0),  # both conditions
        (8, 7): (-0.01, -9.3),
        (9, 9): (-0.2, -12.0),  # student not confident enough
        (9, 11): (-0.05, -9.0),  # teacher probability too high
    }.items():
        student[place], teacher[place] = x, y
    mask = b.mask.clone()
    mask[9, [3, 9, 11]] = mask[8, 7] = True
    return replace(d, batch=replace(b, student_logp=student, teacher_logp=teacher, mask=mask))


def test_blame_by_token() -> None:
    d = poisoned()
    b = d.batch
    table = token_attribution.token_table(V)(b)["tokens/all"]
    bad = token_attribution.impossible_table(V)(b)["tokens/impossible"]
    want, wrong = np.zeros((V, 5)), np.zeros((V, 5))
    for i, t in d.tokens():
        r, y = float(b.log_ratio[i, t]), int(b.tokens[i, t])
        p = math.exp(float(b.student_logp[i, t]))
        w = max(1 - 2 * p + float(b.prefix.collision[i, t]), 0)
        line = np.array([1, r, abs(r), r * r, r * r * w])
        want[y] += line
        if p > 0.9 and math.exp(float(b.teacher_logp[i, t])) < 1e-4:
            wrong[y] += line
    np.testing.assert_allclose(table.sums.numpy(), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bad.sums.numpy(), wrong, rtol=1e-9, atol=1e-12)
    assert wrong[:, 0].sum() == 2
    row = compute({"tokens/all": table} | token_attribution.confident_impossible(b))
    signal = np.sort(want[:, 2])[::-1]
    assert row["tokens/all_top1"] == pytest.approx(signal[0] / signal.sum())
    assert row["tokens/all_top10"] == pytest.approx(signal[:10].sum() / signal.sum())
    assert row["tokens/confident_impossible_share"] == pytest.approx(2 / want[:, 0].sum())
    share = wrong[:, 2].sum() / signal.sum()
    assert row["tokens/confident_impossible_signal"] == pytest.approx(share)
    half = TokenAttribution.from_batch(b.rows([0, 1, 2]), b.mask[:3], V)
    remaining = TokenAttribution.from_batch(b.rows(slice(3, B)), b.mask[3:], V)
    torch.testing.assert_close((half + remaining).sums, table.sums)


def test_the_printed_table_names_the_largest_first() -> None:
    b = poisoned().batch
    bad = token_attribution.impossible_table(V)(b)["tokens/impossible"]
    lines = bad.lines(lambda i: f"<{i}>", special=[int(b.tokens[9, 3])])
    assert len(lines) == 1 + len({int(b.tokens[9, 3]), int(b.tokens[8, 7])})
    first = lines[1].split()
    assert first[:2] == [str(int(b.tokens[9, 3])), f"'<{int(b.tokens[9, 3])}>'*"]
    assert float(first[3]) == pytest.approx(12 - 0.05, abs=1e-3)
    assert sum(float(x.split()[5]) for x in lines[1:]) == pytest.approx(100, abs=0.02)
    assert len(token_attribution.token_table(V)(b)["tokens/all"].lines(str, top=3)) == 4
    with pytest.raises(ValueError, match="no column 'loss'; choose one of count, cost"):
        bad.lines(str, sort_by="loss")
    bare = TokenAttribution.from_batch(replace(b, prefix=None), b.mask, V)
    used = bare.sums[:, 0] > 0
    assert torch.equal(bare.sums[:, 4].isnan(), used)


def test_coverage_of_ids() -> None:
    d = make_dense_batch(4)
    b = d.batch
    row = compute(token_attribution.coverage([3, 5, 7], "special")(b))
    sums = np.zeros((2, 3))
    for i, t in d.tokens():
        r = float(b.log_ratio[i, t])
        w = 1 - 2 * math.exp(float(b.student_logp[i, t])) + float(b.prefix.collision[i, t])
        line = np.array([1, abs(r), r * r * w])
        sums[0] += line
        sums[1] += line * (int(b.tokens[i, t]) in (3, 5, 7))
    for j, name in enumerate(("share", "signal", "energy")):
        assert row[f"tokens/special_{name}"] == pytest.approx(sums[1, j] / sums[0, j])
    assert compute(token_attribution.coverage([], "none")(b))["tokens/none_share"] == 0
    assert "tokens/x_energy" not in compute(
        token_attribution.coverage([1], "x")(replace(b, prefix=None))
    )


def test_what_length_pays() -> None:
    d = make_dense_batch(5)
    x, y = [], []
    for i in range(B):
        values = [float(d.batch.log_ratio[j, t]) for j, t in d.tokens() if j == i]
        if values:
            x.append(len(values))
            y.append(-mean(values))
    row = compute(response.length_incentive(d.batch))
    assert row["response/length_advantage_cov"] == pytest.approx(np.cov(x, y)[0, 1])
    assert row["response/length_advantage_corr"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    equal = replace(d.batch, mask=torch.ones_like(d.batch.mask))
    assert math.isnan(compute(response.length_incentive(equal))["response/length_advantage_corr"])
    single_row = compute(response.length_incentive(d.batch.rows([9])))
    assert math.isnan(single_row["response/length_advantage_cov"])


def test_compressible_tails() -> None:
    d = make_dense_batch(6)
    words = {True: "ab" * 40, False: "the quick brown fox jumps over a lazy dog, then rests; why"}
    decoded_ids: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        decoded_ids.append(list(ids))
        return words[len(ids) % 2 == 0]

    row = compute(compression(decode, tail=50, threshold=3.0)(d.batch))
    row_ids = [[int(d.batch.tokens[j, t]) for j, t in d.tokens() if j == i] for i in range(B)]
    assert decoded_ids == row_ids
    assert row["repetition/compressible_share"] == mean([float(len(x) % 2 == 0) for x in row_ids])
    text = "x" * 60 + "".join(chr(33 + (i * i) % 90) for i in range(50))
    assert not is_compressible(text, 50, 3.0)
    assert is_compressible(text[::-1], 50, 3.0)
    assert not is_compressible("x" * 49, 50, 3.0)
    assert 50 / len(zlib.compress(b"x" * 50)) > 3


def test_martingales_by_position() -> None:
    d = make_dense_batch(7)
    row = compute(consistency.martingales(d.batch))
    for label, (low, high) in {"": (0, 99), "@0-1": (0, 2), "@8-15": (8, 16)}.items():
        sums = np.zeros(4)
        for i, t in d.tokens():
            if low <= t < high:
                p, l, lp = d.p[i, t].exp(), d.p[i, t] - d.q[i, t], d.p[i, t]
                for j, x in enumerate((-lp, l)):
                    m = (p * x).sum()
                    sums[2 * j] += float(x[d.batch.tokens[i, t]] - m)
                    sums[2 * j + 1] += float((p * (x - m) ** 2).sum())
        assert row[f"consistency/z_H{label}"] == pytest.approx(sums[0] / sums[1] ** 0.5)
        assert row[f"consistency/z_K{label}"] == pytest.approx(sums[2] / sums[3] ** 0.5)
    age = torch.arange(len(d.batch)) % 2  # sampled from older weights
    aged, fresh = replace(d.batch, age=age), d.batch.rows((age == 0).nonzero()[:, 0])
    assert compute(consistency.martingales(aged)) == compute(consistency.martingales(fresh))


def test_weights_of_a_sampler_that_is_off() -> None:
    d = make_dense_batch(8)
    b = d.batch
    row = compute(consistency.sampler_weights(b))
    log_ratios = {(i, t): float(b.student_logp[i, t] - b.sampler_logp[i, t]) for i, t in d.tokens()}
    w = [math.exp(x) for x in log_ratios.values()]
    want = sum(w) ** 2 / len(w) / sum(x * x for x in w)
    assert row["consistency/sampler_ess"] == pytest.approx(want)
    assert want < 0.95
    want = np.percentile(list(log_ratios.values()), 95, method="inverted_cdf")
    assert row["consistency/sampler_log_ratios_q95"] == pytest.approx(want, rel=0.091)
    response_weights = [
        math.exp(sum(x for (j, _), x in log_ratios.items() if j == i)) for i in range(1, B)
    ]
    want = sum(response_weights) ** 2 / len(response_weights) / sum(x * x for x in response_weights)
    assert row["consistency/sampler_prefix_ess"] == pytest.approx(want)
    soft = replace(b, softmax_logp=b.student_logp)
    assert compute(consistency.sampler_weights(soft))["consistency/sampler_ess"] == pytest.approx(1)


def test_weights_far_beyond_floating_point() -> None:
    b = make_dense_batch(9).batch
    for shift in (-200.0, 200.0):  # thousands of nats a response
        far = replace(b, teacher_logp=torch.where(b.mask, b.student_logp - shift, 0.0))
        l = -shift * b.lengths[b.lengths > 0].double()
        want = float((2 * l.logsumexp(0) - (2 * l).logsumexp(0)).exp()) / len(l)
        assert compute(prefix_weights(far))["divergence/prefix_ess"] == pytest.approx(want)


def test_teacher_noise_between_two_scorings() -> None:
    d = make_dense_batch(3)
    b = d.batch
    noise = torch.where(b.mask, 0.01 * torch.randn(b.mask.shape).double(), 0.0)
    row = compute(consistency.rescoring(b, replace(b, teacher_logp=b.teacher_logp + noise)))
    x = [abs(float(noise[i, t])) for i, t in d.tokens()]
    assert row["consistency/teacher_noise"] == pytest.approx(mean(x))
    assert row["consistency/teacher_noise_square"] == pytest.approx(mean([v * v for v in x]))
    share = sum(x) / sum(abs(r) for r in costs(d))
    assert row["consistency/teacher_noise_share"] == pytest.approx(share)
    with pytest.raises(ValueError, match="different tokens"):
        consistency.rescoring(b, replace(b, tokens=(b.tokens + 1) * b.mask))
    with pytest.raises(ValueError, match="different shapes or masks"):
        consistency.rescoring(b, b.rows([1, 2]))
