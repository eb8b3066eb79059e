"""What a view changes: sums by plain loops over dense distributions, and copies counted by hand."""

import math

import pytest
import torch

from diagnostics.core.totals import compute
from diagnostics.metrics.consistency import martingales
from diagnostics.metrics.teacher_view import (
    COPY_LENGTH,
    copied_tokens,
    longest_run,
    novel_sequences,
    view_copying,
    view_effect,
)
from tests.helpers.dense_batches import make_dense_batch, mean


def test_effects_are_sums_over_supervised_tokens() -> None:
    dense = make_dense_batch(seed=1)
    noise = torch.randn(dense.q.shape, generator=torch.Generator().manual_seed(2)).double()
    plain = (dense.q + noise).log_softmax(-1)
    tokens, mask = dense.batch.tokens, dense.batch.mask
    plain_logp = plain.gather(-1, tokens[..., None])[..., 0] * mask
    kl = (dense.q.exp() * (dense.q - plain)).sum(-1) * mask
    row = compute(view_effect(dense.batch, plain_logp, kl))
    added, products, squares, kls, early = [], [], [], [], []
    for i, t in dense.tokens():
        y = int(tokens[i, t])
        signal = float(dense.q[i, t, y] - dense.p[i, t, y])
        added.append(float(dense.q[i, t, y] - plain[i, t, y]))
        products.append(signal * added[-1])
        squares.append(signal**2)
        kls.append(
            sum(
                math.exp(dense.q[i, t, v]) * float(dense.q[i, t, v] - plain[i, t, v])
                for v in range(dense.q.shape[-1])
            )
        )
        early += [kls[-1]] * (t < 2)
    assert row["view/log_ratio"] == pytest.approx(mean(added))
    assert row["view/signal_share"] == pytest.approx(sum(products) / sum(squares))
    assert row["view/kl"] == pytest.approx(mean(kls))
    assert row["view/kl@0-1"] == pytest.approx(mean(early))
    assert row["view/kl_se"] > 0
    assert "view/kl" not in compute(view_effect(dense.batch, plain_logp, None))


def test_the_whole_signal_is_the_views_if_the_teacher_without_it_is_the_student() -> None:
    batch = make_dense_batch(seed=1).batch
    row = compute(view_effect(batch, batch.student_logp, None))
    assert row["view/signal_share"] == pytest.approx(1)
    assert compute(view_effect(batch, batch.teacher_logp, None))["view/signal_share"] == 0


def test_copies_are_long_sequences_that_only_the_teacher_reads() -> None:
    n = COPY_LENGTH
    shown = list(range(100, 120))
    prompt = shown[10:]  # the student reads the second half too
    response = [1, *shown[: n + 2], 2, *shown[11:], 3, *shown[: n - 1]]
    copied = copied_tokens(response, novel_sequences(prompt, [7, *shown]))
    assert copied == [False] + [True] * (n + 2) + [False] * (len(response) - n - 3)
    assert copied_tokens(shown[:n], novel_sequences([], [7, *shown, 7])) == [True] * n
    assert copied_tokens(shown[: n - 1], novel_sequences([], shown)) == [False] * (n - 1)
    assert copied_tokens([], novel_sequences([], shown)) == []
    across = shown[6:14]  # begins in the half that only the teacher reads
    assert all(copied_tokens(across, novel_sequences(prompt, shown)))
    assert longest_run([True, False, True, True, False]) == 2
    responses = [response, [5] * 10, [], shown[:n]]  # the last one has a view without the copy
    teacher_prompts = [shown, shown, shown, prompt]
    row = compute(
        view_copying(responses, [prompt] * 4, teacher_prompts, torch.tensor([0, 0, 1, 1]))
    )
    assert row["view/copied_share"] == pytest.approx((n + 2) / (len(response) + 10 + n))
    assert row["view/longest_copy"] == pytest.approx((n + 2) / 3)


def test_the_test_of_the_teacher_is_left_out_where_it_reads_the_response() -> None:
    batch = make_dense_batch().batch
    assert martingales(batch).keys() == {"consistency/z_H", "consistency/z_K"}
    hindsight = batch.with_fields(teacher_reads="response")
    assert martingales(hindsight).keys() == {"consistency/z_H"}
