"""Properties of every metric: merging, padding, edge cases, groups, names and the page."""

import math
import re
from dataclasses import replace
from functools import reduce
from importlib import import_module

import pytest
import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.catalogue import CATALOGUE, CODES, FULL, MAKERS, PANEL, Metric, page
from diagnostics.core.optional_fields import MissingField
from diagnostics.core.totals import Accumulator, compute, merge
from diagnostics.metrics.divergence import sampled_divergence
from diagnostics.metrics.groupby import by, without
from diagnostics.metrics.repetition import compression, repeated_ngram_mask, repetition
from diagnostics.metrics.response import length
from diagnostics.metrics.signal import sign_shares
from diagnostics.metrics.token_attribution import coverage, impossible_table, token_table
from diagnostics.monitor import Monitor
from tests.helpers.dense_batches import B, V, make_dense_batch
from tests.helpers.paths import ROOT

ALL_METRICS: dict[str, Metric] = {
    **FULL,
    "token_table": token_table(V),
    "impossible_table": impossible_table(V),
    "coverage": coverage([1, 2], "some"),
    "compression": compression(str, tail=20, threshold=1.5),
    "by_task": by(repetition, "task", {0: "a", 1: "b", 2: "c"}),
    "without": without(sampled_divergence, [3, 4]),
}


def compute_all(batch: ScoredRollouts) -> dict[str, Accumulator]:
    accumulators: dict[str, Accumulator] = {}
    for metric in ALL_METRICS.values():
        accumulators |= metric(batch)
    return accumulators


def assert_same_row(a: dict[str, float], b: dict[str, float], near: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert b[name] == pytest.approx(value, rel=near, abs=1e-9, nan_ok=True), name


def test_no_two_metrics_share_a_name() -> None:
    batch = make_dense_batch(1, "union").batch
    names = [name for metric in ALL_METRICS.values() for name in metric(batch)]
    assert len(names) == len(set(names))
    row = compute(compute_all(batch))
    assert len(row) > 900
    assert all(name.split("/")[0] and "/" in name for name in row)


@pytest.mark.parametrize("source", ["union", "full"])
def test_parts_merge_to_the_whole(source: str) -> None:
    batch = make_dense_batch(2, source).batch
    expected = compute(compute_all(batch))
    parts = [compute_all(batch.rows(selected)) for selected in ([4, 5, 0, 1], [2, 3], slice(6, B))]
    assert_same_row(expected, compute(reduce(merge, parts)))


def test_padding_and_what_the_mask_hides_change_nothing() -> None:
    batch = make_dense_batch(3, "union").batch

    def pad(x: torch.Tensor) -> torch.Tensor:
        return x if x.dim() < 2 else torch.cat([x, torch.zeros_like(x[:, :7])], 1)

    expected = compute(compute_all(batch))
    assert_same_row(expected, compute(compute_all(batch._map(pad))), 1e-12)
    g = torch.Generator().manual_seed(0)
    wild = torch.randn(batch.mask.shape, generator=g).double()
    prefix = {k: torch.where(batch.mask, x, wild) for k, x in batch.prefix._tensors().items()}
    dirty = replace(
        batch,
        tokens=torch.where(batch.mask, batch.tokens, 5),
        student_logp=torch.where(batch.mask, batch.student_logp, -0.01),
        teacher_logp=torch.where(batch.mask, batch.teacher_logp, -20.0),
        sampler_logp=torch.where(batch.mask, batch.sampler_logp, -3.0),
        prefix=replace(batch.prefix, **prefix),
    )
    assert_same_row(expected, compute(compute_all(dirty)), 1e-12)


@pytest.mark.parametrize("rows", [[], [0], [1]])
def test_nothing_and_one_token(rows: list[int]) -> None:
    """No response, a response without tokens, a response with one token: no error, no inf."""
    row = compute(compute_all(make_dense_batch(4, "union").batch.rows(rows)))
    assert not [name for name, x in row.items() if math.isinf(x)]
    if rows == [1]:
        assert row["divergence/prefix_ess"] == pytest.approx(1)
        assert row["signal/signal_n_eff"] == pytest.approx(1)
        assert row["signal/signal_entropy_n_eff"] == pytest.approx(1)
        assert (
            row["divergence/log_ratios_q1"]
            == row["divergence/log_ratios_q99"]
            == row["divergence/k1"]
        )
    else:
        assert math.isnan(row["divergence/k1"])
        assert math.isnan(row["divergence/prefix_ess"])


def test_a_teacher_that_is_the_student() -> None:
    row = compute(compute_all(make_dense_batch(5, "union", gap=0.0).batch))
    for name in ("k1", "reverse_kl", "union_kl_parts", "union_kl_tail", "overlap_kl"):
        assert row[f"divergence/{name}"] == pytest.approx(0, abs=1e-9), name
    for name in ("divergence/overlap_ratio", "divergence/prefix_ess", "divergence/prefix_abs_ess"):
        assert row[name] == pytest.approx(1), name
    assert row["divergence/overlap_student_mass"] == row["divergence/overlap_teacher_mass"]
    assert row["noise/token_signal"] + row["noise/token_noise"] < 1e-20
    assert row["divergence/agreeing_share"] > 0
    assert row["signal/negative_share"] == row["tokens/confident_impossible_share"] == 0


def test_a_support_of_everything() -> None:
    row = compute(compute_all(make_dense_batch(6, "full", k=V).batch))
    assert (
        row["divergence/outside_topk"]
        == row["divergence/kl_tail"]
        == row["divergence/kl_binary"]
        == 0
    )
    assert row["divergence/kl_head"] == pytest.approx(row["divergence/reverse_kl"])
    assert row["divergence/overlap_teacher_mass"] <= 1
    assert row["divergence/top_teacher_max"] == pytest.approx(row["divergence/teacher_max"])


def test_what_a_batch_lacks_is_missing_and_not_wrong() -> None:
    batch = make_dense_batch(7).batch
    bare = replace(batch, support=None, prefix=None)
    monitor = Monitor(FULL)
    row = monitor(0, [bare])
    need = {e.name for e in CATALOGUE if e.level != "L0"}
    assert monitor.missing.keys() == need
    full = Monitor(FULL)(0, [batch])
    assert row.keys() < full.keys()
    assert_same_row(row, {k: full[k] for k in row}, 1e-12)
    for e in CATALOGUE:
        if e.level == "L1":
            e.metric(replace(make_dense_batch(7, "union").batch, prefix=None))
            with pytest.raises(MissingField):
                e.metric(replace(batch, support=None))


def test_groups_are_the_metric_on_their_rows() -> None:
    batch = make_dense_batch(8).batch
    parts = {0: "a", 1: "b", 7: "nobody"}
    row = compute(by(length, "task", parts)(batch))
    for value, label in parts.items():
        rows = [i for i in range(B) if int(batch.task[i]) == value]
        alone = compute(length(batch.rows(rows)))
        assert_same_row(
            {f"task={label}/{k}": x for k, x in alone.items()},
            {k: x for k, x in row.items() if k.startswith(f"task={label}/")},
        )
    right = compute(by(length, "reward", {1: "right", 0: "wrong"})(batch))
    rows = [i for i in range(B) if float(batch.reward[i]) == 1]
    want = float(batch.lengths[rows].double().mean())
    assert right["reward=right/response/length"] == pytest.approx(want)
    assert len(rows) == 4
    with pytest.raises(ValueError, match="cannot group by 'mask'"):
        by(length, "mask", {})


@pytest.mark.parametrize("source", ["union", "teacher"])
def test_what_is_over_the_sampled_tokens_does_not_ask_for_the_mask(source: str) -> None:
    """Metrics over the supervised tokens do not depend on values at other tokens."""
    batch = make_dense_batch(11, source, sharpness=1.0).batch
    g = torch.Generator().manual_seed(1)
    narrow = batch.restrict_mask(batch.tokens % 3 != 1)
    assert 20 < int(narrow.mask.sum()) < int(batch.mask.sum()) - 20
    assert torch.equal(narrow.lengths, batch.lengths)
    scrambled = {
        name: torch.where(narrow.mask, getattr(narrow, name), -3 * noise * narrow.sampled)
        for name in ("student_logp", "teacher_logp", "sampler_logp")
        for noise in [torch.rand(narrow.mask.shape, generator=g).double()]
    }
    scrambled_batch = replace(narrow, **scrambled)
    changed_names = set()
    for entry in CATALOGUE:
        try:
            row = compute(entry.metric(narrow))
        except MissingField:
            continue
        if entry.token_set == "sampled":
            assert_same_row(row, compute(entry.metric(batch)), 1e-12)
        if entry.token_set == "supervised":
            assert_same_row(row, compute(entry.metric(scrambled_batch)), 1e-12)
        if row != pytest.approx(compute(entry.metric(batch)), rel=1e-9, nan_ok=True):
            changed_names.add(entry.name)
    supervised = {entry.name for entry in CATALOGUE if entry.token_set == "supervised"}
    assert supervised - changed_names <= {"confident_impossible"}
    assert changed_names - supervised == {
        entry.name for entry in CATALOGUE if entry.token_set == "both"
    }
    assert {entry.token_set for entry in CATALOGUE} == {"sampled", "supervised", "both"}


def test_numbers_of_both_sets_of_tokens_by_hand() -> None:
    """Repetition, EOS, lengths and tenths: text over the sampled tokens, costs over supervised."""
    batch = make_dense_batch(12).batch
    loop = (torch.arange(batch.mask.shape[1]) % 5 + 2).expand_as(batch.mask)
    batch = replace(batch, tokens=torch.where(batch.mask, loop, 0))
    narrow = batch.restrict_mask(batch.tokens % 4 != 1)
    rep = repeated_ngram_mask(narrow.tokens, narrow.sampled)
    row, r, mask = {}, narrow.log_ratio, narrow.mask
    for e in CATALOGUE:
        if e.token_set == "both":
            row |= compute(e.metric(narrow))
    share = float(rep[narrow.sampled].double().mean())
    assert row["repetition/repeated_share"] == pytest.approx(share)
    assert 0 < share < 1
    assert not torch.equal(rep, repeated_ngram_mask(narrow.tokens, mask)), (
        "the loop runs through masked ones"
    )
    want = float(r[mask & ~rep].mean())
    assert row["signal/regular_cost"] == pytest.approx(want)
    prefix, sampled = narrow.prefix, narrow.sampled
    end = sampled & (prefix.ending > 0)
    assert 0 < int((end & mask).sum()) < int(end.sum())
    wish = (prefix.teacher_end - prefix.student_end)[end].mean()
    assert row["divergence/end_wish"] == pytest.approx(float(wish))
    name = (prefix.teacher_end - narrow.teacher_logp)[end & mask].mean()
    assert row["divergence/end_name"] == pytest.approx(float(name))
    push = -(r * ((prefix.ending > 0).double() - prefix.student_end.exp()))[mask].mean()
    assert row["divergence/end_push"] == pytest.approx(float(push))
    hazard = prefix.teacher_end.exp()[sampled].mean()
    assert row["divergence/teacher_hazard"] == pytest.approx(float(hazard))
    count = mask.sum(1)
    alive = count > 0
    advantage = -(r * mask).sum(1)[alive] / count[alive]
    columns = torch.stack([sampled.sum(1)[alive].double(), advantage])
    assert row["response/length_advantage_cov"] == pytest.approx(float(columns.cov()[0, 1]))
    last = [max(t for t in range(len(m)) if m[t]) if m.any() else -1 for m in sampled]
    for tenth in (0, 9):
        cost, entropy = (
            [
                float(x[i, t])
                for i, t in tokens.nonzero().tolist()
                if 10 * t // (last[i] + 1) == tenth
            ]
            for x, tokens in ((r, mask), (prefix.student_entropy, sampled))
        )
        label = f"%{10 * tenth}-{10 * tenth + 10}"
        assert row[f"divergence/k1_tenth{label}"] == pytest.approx(sum(cost) / len(cost))
        mean = sum(entropy) / len(entropy)
        assert row[f"divergence/student_entropy_tenth{label}"] == pytest.approx(mean)


def test_without_some_ids_they_do_not_count() -> None:
    batch = make_dense_batch(9).batch
    row = compute(without(sign_shares, [3, 4])(batch))
    remaining = [
        (i, t) for i, t in batch.mask.nonzero().tolist() if int(batch.tokens[i, t]) not in (3, 4)
    ]
    assert len(remaining) < int(batch.mask.sum())
    want = sum(float(batch.log_ratio[i, t] > 0) for i, t in remaining) / len(remaining)
    assert row["content/signal/negative_share"] == pytest.approx(want)


def test_every_metric_says_what_it_is() -> None:
    makers = {maker.__name__: maker for maker in MAKERS}
    for name, function in [(e.name, e.metric) for e in CATALOGUE] + list(makers.items()):
        described = makers.get(name, function)
        text = described.__doc__ or ""
        if described in (by, without):
            continue
        for word in ("Access:", "Source:", "Healthy:"):
            assert word in text, f"{name} lacks {word}"
    assert PANEL.keys() < FULL.keys()
    assert len(FULL) == len(CATALOGUE)
    assert {e.level for e in CATALOGUE} == {"L0", "L1", "L2"}


def test_every_code_names_what_exists() -> None:
    pattern = r"\b(?:metrics|gradients|alarms)\.[a-z_]+\.[A-Za-z_]+"
    paths = [path for _, sources in CODES for path in re.findall(pattern, sources)]
    assert len(paths) > 50
    for name in paths:
        module, _, function = name.rpartition(".")
        assert hasattr(import_module(f"diagnostics.{module}"), function), name
    codes = {code for quantity, _ in CODES for code in re.findall(r"[A-F]-\d+", quantity)}
    last = {"A": 8, "B": 12, "C": 6, "D": 8, "E": 10, "F": 5}
    assert codes == {f"{letter}-{i}" for letter, n in last.items() for i in range(1, n + 1)}


def test_the_page_is_up_to_date() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert text == page(), "python -m diagnostics.catalogue > docs/metrics.md"


@pytest.mark.parametrize("peaked", [1.0, 8.0])
def test_single_precision_is_enough(peaked: float) -> None:
    """Batches are float32; for peaked distributions the list holds all mass at most tokens."""
    batch = make_dense_batch(10, "union", k=6, sharpness=peaked).batch
    single = batch._map(lambda x: x.float() if x.is_floating_point() else x)
    exact = compute(compute_all(batch))
    for name, value in compute(compute_all(single)).items():
        if "_gini" in name or "_top1_share" in name or "_q" in name:
            continue  # a value near a bin edge may fall into the neighbouring bin
        assert value == pytest.approx(exact[name], rel=2e-3, abs=2e-5, nan_ok=True), name
