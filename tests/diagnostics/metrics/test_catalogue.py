"""What holds for every metric there is: merging, padding, limits, groups, names and the page."""

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
from diagnostics.core.totals import Accumulator, merge, read
from diagnostics.metrics.divergence import sampled_divergence
from diagnostics.metrics.groupby import by, without
from diagnostics.metrics.repetition import compression, repeated, repetition
from diagnostics.metrics.response import length
from diagnostics.metrics.signal import sign_shares
from diagnostics.metrics.token_attribution import coverage, impossible_table, token_table
from diagnostics.monitor import Monitor
from tests.helpers.dense_batches import B, V, dense
from tests.helpers.paths import ROOT

EVERY: dict[str, Metric] = {
    **FULL,
    "token_table": token_table(V),
    "impossible_table": impossible_table(V),
    "coverage": coverage([1, 2], "some"),
    "compression": compression(str, tail=20, threshold=1.5),
    "by_task": by(repetition, "task", {0: "a", 1: "b", 2: "c"}),
    "without": without(sampled_divergence, [3, 4]),
}


def measured(batch: ScoredRollouts) -> dict[str, Accumulator]:
    found: dict[str, Accumulator] = {}
    for metric in EVERY.values():
        found |= metric(batch)
    return found


def same(a: dict[str, float], b: dict[str, float], near: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert b[name] == pytest.approx(value, rel=near, abs=1e-9, nan_ok=True), name


def test_no_two_metrics_share_a_name() -> None:
    batch = dense(1, "union").batch
    names = [name for metric in EVERY.values() for name in metric(batch)]
    assert len(names) == len(set(names))
    row = read(measured(batch))
    assert len(row) > 900
    assert all(name.split("/")[0] and "/" in name for name in row)


@pytest.mark.parametrize("source", ["union", "full"])
def test_parts_merge_to_the_whole(source: str) -> None:
    batch = dense(2, source).batch
    whole = read(measured(batch))
    parts = [measured(batch.rows(some)) for some in ([4, 5, 0, 1], [2, 3], slice(6, B))]
    same(whole, read(reduce(merge, parts)))


def test_padding_and_what_the_mask_hides_change_nothing() -> None:
    batch = dense(3, "union").batch

    def pad(x: torch.Tensor) -> torch.Tensor:
        return x if x.dim() < 2 else torch.cat([x, torch.zeros_like(x[:, :7])], 1)

    whole = read(measured(batch))
    same(whole, read(measured(batch._map(pad))), 1e-12)
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
    same(whole, read(measured(dirty)), 1e-12)


@pytest.mark.parametrize("rows", [[], [0], [1]])
def test_nothing_and_one_token(rows: list[int]) -> None:
    """No response, one without a token, one with one token: nothing fails, nothing is infinite."""
    row = read(measured(dense(4, "union").batch.rows(rows)))
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
    row = read(measured(dense(5, "union", gap=0.0).batch))
    for name in ("k1", "reverse_kl", "union_kl_parts", "union_kl_tail", "overlap_kl"):
        assert row[f"divergence/{name}"] == pytest.approx(0, abs=1e-9), name
    for name in ("divergence/overlap_ratio", "divergence/prefix_ess", "divergence/prefix_abs_ess"):
        assert row[name] == pytest.approx(1), name
    assert row["divergence/overlap_student_mass"] == row["divergence/overlap_teacher_mass"]
    assert row["noise/token_signal"] + row["noise/token_noise"] < 1e-20
    assert row["divergence/agreeing_share"] > 0
    assert row["signal/negative_share"] == row["tokens/confident_impossible_share"] == 0


def test_a_support_of_everything() -> None:
    row = read(measured(dense(6, "full", k=V).batch))
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
    batch = dense(7).batch
    bare = replace(batch, support=None, prefix=None)
    monitor = Monitor(FULL)
    row = monitor(0, [bare])
    need = {e.name for e in CATALOGUE if e.level != "L0"}
    assert monitor.missing.keys() == need
    full = Monitor(FULL)(0, [batch])
    assert row.keys() < full.keys()
    same(row, {k: full[k] for k in row}, 1e-12)
    for e in CATALOGUE:
        if e.level == "L1":
            e.metric(replace(dense(7, "union").batch, prefix=None))
            with pytest.raises(MissingField):
                e.metric(replace(batch, support=None))


def test_groups_are_the_metric_on_their_rows() -> None:
    batch = dense(8).batch
    parts = {0: "a", 1: "b", 7: "nobody"}
    row = read(by(length, "task", parts)(batch))
    for value, label in parts.items():
        rows = [i for i in range(B) if int(batch.task[i]) == value]
        alone = read(length(batch.rows(rows)))
        same(
            {f"task={label}/{k}": x for k, x in alone.items()},
            {k: x for k, x in row.items() if k.startswith(f"task={label}/")},
        )
    right = read(by(length, "reward", {1: "right", 0: "wrong"})(batch))
    rows = [i for i in range(B) if float(batch.reward[i]) == 1]
    want = float(batch.lengths[rows].double().mean())
    assert right["reward=right/response/length"] == pytest.approx(want)
    assert len(rows) == 4
    with pytest.raises(ValueError, match="cannot group by 'mask'"):
        by(length, "mask", {})


@pytest.mark.parametrize("source", ["union", "teacher"])
def test_what_is_over_the_sampled_tokens_does_not_ask_for_the_mask(source: str) -> None:
    """And what is over the supervised ones does not see the numbers of the others."""
    batch = dense(11, source, sharpness=1.0).batch
    g = torch.Generator().manual_seed(1)
    narrow = batch.supervise(batch.tokens % 3 != 1)
    assert 20 < int(narrow.mask.sum()) < int(batch.mask.sum()) - 20
    assert torch.equal(narrow.lengths, batch.lengths)
    scrambled = {
        name: torch.where(narrow.mask, getattr(narrow, name), -3 * noise * narrow.sampled)
        for name in ("student_logp", "teacher_logp", "sampler_logp")
        for noise in [torch.rand(narrow.mask.shape, generator=g).double()]
    }
    other = replace(narrow, **scrambled)
    changed = set()
    for e in CATALOGUE:
        try:
            seen = read(e.metric(narrow))
        except MissingField:
            continue
        if e.over == "sampled":
            same(seen, read(e.metric(batch)), 1e-12)
        if e.over == "supervised":
            same(seen, read(e.metric(other)), 1e-12)
        if seen != pytest.approx(read(e.metric(batch)), rel=1e-9, nan_ok=True):
            changed.add(e.name)
    supervised = {e.name for e in CATALOGUE if e.over == "supervised"}
    assert supervised - changed <= {"confident_impossible"}
    assert changed - supervised == {e.name for e in CATALOGUE if e.over == "both"}
    assert {e.over for e in CATALOGUE} == {"sampled", "supervised", "both"}


def test_numbers_of_both_sets_of_tokens_by_hand() -> None:
    """Repetition, ends, lengths and tenths: what was written of all tokens, costs of the loss's."""
    batch = dense(12).batch
    loop = (torch.arange(batch.mask.shape[1]) % 5 + 2).expand_as(batch.mask)
    batch = replace(batch, tokens=torch.where(batch.mask, loop, 0))
    narrow = batch.supervise(batch.tokens % 4 != 1)
    rep = repeated(narrow.tokens, narrow.sampled)
    row, r, mask = {}, narrow.log_ratio, narrow.mask
    for e in CATALOGUE:
        if e.over == "both":
            row |= read(e.metric(narrow))
    share = float(rep[narrow.sampled].double().mean())
    assert row["repetition/repeated_share"] == pytest.approx(share)
    assert 0 < share < 1
    assert not torch.equal(rep, repeated(narrow.tokens, mask)), "the loop runs through masked ones"
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
    both = torch.stack([sampled.sum(1)[alive].double(), advantage])
    assert row["response/length_advantage_cov"] == pytest.approx(float(both.cov()[0, 1]))
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
    batch = dense(9).batch
    row = read(without(sign_shares, [3, 4])(batch))
    kept = [
        (i, t) for i, t in batch.mask.nonzero().tolist() if int(batch.tokens[i, t]) not in (3, 4)
    ]
    assert len(kept) < int(batch.mask.sum())
    want = sum(float(batch.log_ratio[i, t] > 0) for i, t in kept) / len(kept)
    assert row["content/signal/negative_share"] == pytest.approx(want)


def test_every_metric_says_what_it_is() -> None:
    for function in [e.metric for e in CATALOGUE] + list(MAKERS):
        described = next((m for m in MAKERS if m.__name__ == function.__name__), function)
        text = described.__doc__ or ""
        if described in (by, without):
            continue
        for word in ("Access:", "Source:", "Healthy:"):
            assert word in text, f"{function.__name__} lacks {word}"
    assert PANEL.keys() < FULL.keys()
    assert len(FULL) == len(CATALOGUE)
    assert {e.level for e in CATALOGUE} == {"L0", "L1", "L2"}


def test_every_code_names_what_exists() -> None:
    named = [name for _, where in CODES for name in re.findall(r"\b([a-z]+\.[A-Za-z_]+)", where)]
    assert len(named) > 50
    for name in named:
        module, _, function = name.partition(".")
        assert hasattr(import_module(f"diagnostics.{module}"), function), name
    codes = {code for quantity, _ in CODES for code in re.findall(r"[A-F]-\d+", quantity)}
    last = {"A": 8, "B": 12, "C": 6, "D": 8, "E": 10, "F": 5}
    assert codes == {f"{letter}-{i}" for letter, n in last.items() for i in range(1, n + 1)}


def test_the_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text()
    assert written == page(), "python -m diagnostics.catalogue > docs/metrics.md"


@pytest.mark.parametrize("peaked", [1.0, 8.0])
def test_single_precision_is_enough(peaked: float) -> None:
    """Batches come in float32; with peaked distributions most tokens have all mass on the list."""
    batch = dense(10, "union", k=6, sharpness=peaked).batch
    single = batch._map(lambda x: x.float() if x.is_floating_point() else x)
    exact = read(measured(batch))
    for name, value in read(measured(single)).items():
        if "_gini" in name or "_top1_share" in name or "_q" in name:
            continue  # a value next to the edge of a level may fall into the other one
        assert value == pytest.approx(exact[name], rel=2e-3, abs=2e-5, nan_ok=True), name
