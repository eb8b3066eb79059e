"""Masks do not change what was sampled; compared with enumeration and loops."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.concatenation import concatenate
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.core.totals import Mean, compute
from diagnostics.metrics.consistency import martingales, sampler_weights
from diagnostics.metrics.divergence import support_mass
from diagnostics.metrics.groupby import without
from diagnostics.metrics.kl_decomposition import kl_anatomy
from diagnostics.metrics.signal import sign_null, sign_shares
from diagnostics.records.batch_files import load_batch
from diagnostics.records.token_dumps import load_dump, save_dump
from opd.objectives import factory as o
from opd.objectives.objective import batch_losses
from opd.tokens.masking import ResolvedMaskRules, apply_mask_rules
from opd.tokens.token_bytes import pack_token_bytes
from tests.helpers.dense_batches import make_dense_batch
from tests.opd.objectives.test_oracle import SEQUENCES, every_sequence, seeded, states, tables

# --- ratio and credit under a mask, by enumeration of every sequence ------------------------------


def by_id(tokens: Tensor) -> Tensor:
    return tokens != 1


def by_first_occurrence(tokens: Tensor) -> Tensor:
    earlier = torch.nn.functional.pad((tokens == 2).long().cumsum(1), (1, 0))[:, :-1] > 0
    return (tokens != 2) | earlier


def by_prefix(tokens: Tensor) -> Tensor:
    """Mask every token after token 1; the mask does not depend on the token itself."""
    return torch.nn.functional.pad(tokens[:, :-1], (1, 0)) != 1


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "id": by_id,
    "first occurrence": by_first_occurrence,
    "prefix": by_prefix,
}


def stale_table() -> Tensor:
    return tables()[0] + torch.randn(tables()[0].shape, generator=seeded(9), dtype=torch.float64)


def mean_gradient(mask: Tensor, sampler: Tensor, objective: o.Objective) -> Tensor:
    """Return the mean of the estimator over all sequences, weighted by sampling probability."""
    student, teacher = (table.requires_grad_() for table in tables())
    batch = every_sequence(student, teacher, "none", 3)
    sampler_logp = sampler.log_softmax(-1)[states()].gather(-1, SEQUENCES[..., None])[..., 0]
    batch = replace(batch, sampler_logp=sampler_logp).restrict_mask(mask)
    losses = batch_losses(objective, batch, batch.student_logp)
    weight = sampler_logp.sum(1).exp()[:, None]
    return torch.autograd.grad((weight * torch.where(mask, losses, 0.0)).sum(), student)[0]


@pytest.mark.parametrize("scope", ["cost", "loss"])
@pytest.mark.parametrize("name", MASKS)
def test_the_sequence_ratio_makes_up_for_another_sampler_under_a_mask(
    name: str, scope: str
) -> None:
    mask = MASKS[name](SEQUENCES)
    assert 0 < int((~mask).sum()) < mask.numel() / 2
    for gamma in (0.5, 1.0):
        plain = o.make_objective("sampled_token", gamma=gamma, mask_scope=scope)
        corrected = o.make_objective(
            "sampled_token", gamma=gamma, ratio="sequence", mask_scope=scope
        )
        want = mean_gradient(mask, tables()[0], plain)
        gradient = mean_gradient(mask, stale_table(), corrected)
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-12)
        assert (mean_gradient(mask, stale_table(), plain) - want).norm() > 0.05 * want.norm()


@pytest.mark.parametrize("scope", ["cost", "loss"])
def test_a_mask_of_prefixes_gives_the_gradient_at_the_supervised_ones(scope: str) -> None:
    """At gamma 1: "loss" gives the sequence KL, "cost" the supervised tokens' costs."""
    mask = by_prefix(SEQUENCES)
    student, teacher = tables()
    student.requires_grad_()
    student_logp, teacher_logp = (
        x.log_softmax(-1)[states()].gather(-1, SEQUENCES[..., None])[..., 0]
        for x in (student, teacher)
    )
    cost = (student_logp - teacher_logp) * (mask if scope == "cost" else 1.0)
    total = (student_logp.sum(1).exp() * cost.sum(1)).sum()
    (want,) = torch.autograd.grad(total, student)
    supervised = torch.zeros(len(student), dtype=torch.bool)
    supervised[states()[mask]] = True
    assert 0 < int((~supervised).sum()) < len(student)
    gradient = mean_gradient(
        mask, tables()[0], o.make_objective("sampled_token", gamma=1.0, mask_scope=scope)
    )
    torch.testing.assert_close(gradient, want * supervised[:, None])
    other_scope = "cost" if scope == "loss" else "loss"
    other_gradient = mean_gradient(
        mask, tables()[0], o.make_objective("sampled_token", gamma=1.0, mask_scope=other_scope)
    )
    assert (other_gradient - gradient).norm() > 0.01


@pytest.mark.parametrize("scope", ["cost", "loss"])
def test_leave_one_out_leaves_the_mean_under_a_mask_of_prefixes(scope: str) -> None:
    """Every pair of sequences is a group; a baseline independent of the token has no bias."""
    mask = by_prefix(SEQUENCES)
    want = mean_gradient(
        mask, tables()[0], o.make_objective("sampled_token", gamma=1.0, mask_scope=scope)
    )
    student, teacher = (table.requires_grad_() for table in tables())
    sequences = every_sequence(student, teacher, "none", 3).restrict_mask(mask)
    pairs = torch.cartesian_prod(*[torch.arange(len(SEQUENCES))] * 2)
    batch = replace(
        sequences.rows(pairs.flatten()), prompt=torch.arange(len(pairs)).repeat_interleave(2)
    )
    objective = o.make_objective(
        "sampled_token", gamma=1.0, baseline="leave_one_out", mask_scope=scope
    )
    losses = batch_losses(objective, batch, batch.student_logp) * batch.mask
    weight = sequences.student_logp.sum(1).exp().detach()[pairs].prod(1)
    total = (weight * losses.sum(1).view(-1, 2).mean(1)).sum()
    torch.testing.assert_close(torch.autograd.grad(total, student)[0], want)


# --- the credit, by a loop ------------------------------------------------------------------------


def credit_by_hand(batch: ScoredRollouts, gamma: float, scope: str) -> list[list[float]]:
    """Return the published credit ("loss"): all sampled tokens' costs discounted, then masked."""
    columns = (batch.mask, batch.sampled, batch.student_logp - batch.teacher_logp)
    credits = []
    for mask, sampled, cost in zip(*(x.tolist() for x in columns), strict=True):
        row = [0.0] * len(mask)
        sampled_positions = [t for t in range(len(mask)) if sampled[t]]
        for place, t in enumerate(sampled_positions):
            for distance, u in enumerate(sampled_positions[place:]):
                if mask[t] and (scope == "loss" or mask[u]):
                    row[t] += gamma**distance * cost[u]
        credits.append(row)
    return credits


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scope", ["cost", "loss"])
def test_masked_tokens_advance_gamma_and_count_as_their_scope_says(
    gamma: float, scope: str
) -> None:
    """Positions at which nothing was sampled (an environment's text) do not advance gamma."""
    batch = make_dense_batch(3).batch
    keep = (batch.tokens % 3 != 1).clone()
    keep[4] = False  # nothing of this response is supervised
    batch = batch.restrict_mask(keep)
    objective = replace(o.make_objective("sampled_token", gamma=gamma), mask_scope=scope)
    want = torch.tensor(credit_by_hand(batch, gamma, scope), dtype=torch.float64)
    torch.testing.assert_close(objective.credit(batch), want)
    assert objective.credit(batch)[4].eq(0).all()
    if gamma:
        other_credit = credit_by_hand(batch, gamma, "cost" if scope == "loss" else "loss")
        assert (torch.tensor(other_credit) - want).abs().max() > 0.1


def test_a_tag_of_many_nats_teaches_earlier_tokens_nothing_with_the_scope_cost() -> None:
    batch = make_dense_batch(3).batch
    batch = batch.restrict_mask(batch.tokens != 2)
    hole = batch.sampled & ~batch.mask
    changed_batch = replace(batch, teacher_logp=torch.where(hole, -30.0, batch.teacher_logp))
    for scope in ("cost", "loss"):
        for baseline in ("none", "leave_one_out"):
            objective = o.make_objective(
                "sampled_token", gamma=0.9, baseline=baseline, mask_scope=scope
            )
            max_change = (objective.credit(changed_batch) - objective.credit(batch)).abs().max()
            assert (float(max_change) > 1) == (scope == "loss")


def test_a_scope_without_an_effect_is_refused() -> None:
    o.make_objective("sampled_token", gamma=0.5, mask_scope="loss")
    o.make_objective("sampled_token", gamma=0.0, baseline="leave_one_out", mask_scope="loss")
    for name, baseline in (("sampled_token", "none"), ("sampled_token", "local_kl")):
        with pytest.raises(ValueError, match="mask_scope 'loss' would have no effect"):
            o.make_objective(name, gamma=0.0, baseline=baseline, mask_scope="loss")
    with pytest.raises(ValueError, match="mask_scope 'loss' would have no effect"):
        o.make_objective("teacher_topk", mask_scope="loss")
    with pytest.raises(ValueError, match="unknown mask scope 'all'; known: cost, loss"):
        o.make_objective("sampled_token", mask_scope="all")


# --- tests of sampling stay right under every kind of mask ----------------------------------------

SIZE = (400, 60)
WORDS = [bytes([97 + i]) for i in range(12)]


@lru_cache
def healthy(seed: int, temperature: float = 1.0) -> ScoredRollouts:
    """Return (400, 60) tokens sampled from the scored student, and the teacher's top 3 ids."""
    g = torch.Generator().manual_seed(seed)
    often = torch.tensor([-1.5, 0.0, 1.0, 2.5, *[0.0] * 8]).double()
    liked = torch.tensor([1.0, 0.0, 0.0, -1.5, *[0.0] * 8]).double()
    p = (often + torch.randn(*SIZE, len(WORDS), generator=g).double()).log_softmax(-1)
    q = (p + liked + torch.randn(p.shape, generator=g).double()).log_softmax(-1)
    sampler_probs = (p / temperature).softmax(-1)
    tokens = torch.multinomial(sampler_probs.view(-1, len(WORDS)), 1, generator=g).view(SIZE)
    mask = torch.arange(SIZE[1]) < torch.randint(1, SIZE[1] + 1, (SIZE[0], 1), generator=g)

    def zero_padding(x: Tensor) -> Tensor:
        return torch.where(mask if x.dim() == 2 else mask[..., None], x, 0.0)

    tokens = tokens * mask
    ids = q.topk(3, -1).indices
    y = tokens[..., None]
    return ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=zero_padding(sampler_probs.log().gather(-1, y)[..., 0]),
        prompt=torch.arange(SIZE[0]) // 4,
        ended=torch.ones(SIZE[0], dtype=torch.bool),
        student_logp=zero_padding(p.gather(-1, y)[..., 0]),
        teacher_logp=zero_padding(q.gather(-1, y)[..., 0]),
        support=Support(
            ids=ids,
            student_logp=zero_padding(p.gather(-1, ids)),
            teacher_logp=zero_padding(q.gather(-1, ids)),
            source="teacher",
        ),
        prefix=DistributionStats(
            **{k: zero_padding(x) for k, x in compute_distribution_stats(p, q, tokens).items()}
        ),
    ).validate()


RULES = {
    "no rule": [],
    "a frequent id": [ResolvedMaskRules("id:3", False, (3,), (), pack_token_bytes(WORDS))],
    "first occurrences": [
        ResolvedMaskRules("first", True, (0, 1, 2, 3, 4), (), pack_token_bytes(WORDS))
    ],
    "a string": [ResolvedMaskRules("string:a", False, (), (b"a", b"dd"), pack_token_bytes(WORDS))],
    "unlikely tokens": None,
}
EXCESSES = ("signal/negative_share_excess", "divergence/outside_topk_excess")


def supervised_by(batch: ScoredRollouts, rule: str) -> ScoredRollouts:
    if RULES[rule] is None:
        return batch.restrict_mask(batch.student_logp > -1.5)
    return apply_mask_rules(batch, RULES[rule])


def worst(batch: ScoredRollouts) -> dict[str, float]:
    """Return standardised sampling tests, each about N(0, 1) on a healthy batch."""
    row = compute(martingales(batch) | sign_null(batch) | support_mass(batch))
    scores = {name: row[name] for name in ("consistency/z_H", "consistency/z_K")}
    return scores | {name: row[name] / row[f"{name}_se"] for name in EXCESSES}


@pytest.mark.parametrize("rule", RULES)
def test_sampling_tests_hold_on_healthy_rollouts_under_every_mask(rule: str) -> None:
    batch = supervised_by(healthy(5), rule)
    assert int(batch.mask.sum()) >= int(batch.sampled.sum()) / 4
    worst_score = worst(batch)
    assert max(map(abs, worst_score.values())) < 4, worst_score
    if rule not in ("no rule", "first occurrences"):  # what is supervised is no fair sample
        alone = worst(replace(batch, sampled_mask=None))
        assert max(map(abs, alone.values())) > 6, alone


@pytest.mark.parametrize("rule", RULES)
def test_faults_of_the_sampler_still_fire_under_every_mask(rule: str) -> None:
    hot = worst(supervised_by(healthy(6, temperature=1.3), rule))
    assert min(abs(hot["consistency/z_H"]), abs(hot[EXCESSES[1]])) > 6, hot
    batch = healthy(7)
    shifted = {name: getattr(batch, name).roll(1, 1) for name in ("tokens", "student_logp")}
    shifted_mask = batch.sampled & batch.sampled.roll(1, 1)
    shifted_batch = supervised_by(replace(batch, mask=shifted_mask, **shifted), rule)
    assert max(abs(x) for x in worst(shifted_batch).values()) > 6, (
        "token t scored by the prefix before it"
    )


def test_rows_that_are_declared_stale_are_not_tested_and_the_others_are() -> None:
    """Half of the rows come from another distribution and are declared, so they are skipped."""
    fresh, old = healthy(8), healthy(9, temperature=1.5)
    mixed_batch = concatenate([fresh, replace(old, temperature=1.0)])
    age = torch.cat([torch.zeros(SIZE[0]), torch.ones(SIZE[0])]).long()
    declared = compute(martingales(replace(mixed_batch, age=age)))
    alone = compute(martingales(fresh))
    assert declared == pytest.approx(alone)
    assert abs(compute(martingales(mixed_batch))["consistency/z_H"]) > 10
    assert abs(compute(martingales(replace(mixed_batch, age=1 - age)))["consistency/z_H"]) > 10


def test_the_tail_of_the_kl_is_unbiased_over_what_was_sampled() -> None:
    """Compare with the exact tail, (1-P) KL(p_out || q_out), averaged over the same prefixes."""
    for rule in ("a frequent id", "unlikely tokens"):
        batch = supervised_by(healthy(10), rule)
        row = compute(kl_anatomy(batch))
        exact = batch.prefix.reverse_kl[batch.sampled].mean()
        kl_error = row["divergence/kl_parts"] - float(exact)
        assert abs(kl_error) < 4 * row["divergence/kl_parts_se"]
        narrow = compute(kl_anatomy(replace(batch, sampled_mask=None)))
        kl_error = narrow["divergence/kl_parts"] - float(batch.prefix.reverse_kl[batch.mask].mean())
        assert abs(kl_error) > 6 * narrow["divergence/kl_parts_se"]


def test_prefix_weights_multiply_over_all_sampled_tokens() -> None:
    batch = apply_mask_rules(healthy(11, temperature=1.2), RULES["a frequent id"])
    weight = (batch.student_logp - batch.sampler_logp).sum(1).exp()
    want = float(weight.sum() ** 2 / (len(weight) * weight.square().sum()))
    metrics = compute(sampler_weights(batch))
    assert metrics["consistency/sampler_prefix_ess"] == pytest.approx(want)
    part = ((batch.student_logp - batch.sampler_logp) * batch.mask).sum(1).exp()
    supervised = float(part.sum() ** 2 / (len(part) * part.square().sum()))
    assert want != pytest.approx(supervised, rel=0.05)


# --- the batch ------------------------------------------------------------------------------------


def test_a_narrowed_batch_survives_files_selection_and_joining(tmp_path: Path) -> None:
    full_batch = make_dense_batch(2).batch
    batch = full_batch.restrict_mask(full_batch.tokens % 2 == 0, "odd ids")
    assert batch.mask_rule == "response - odd ids"
    batch.save(tmp_path / "batch.safetensors")
    save_dump(tmp_path / "batch.parquet", batch)
    for loaded in (
        load_batch(tmp_path / "batch.safetensors"),
        load_dump(tmp_path / "batch.parquet"),
    ):
        width = loaded.tokens.shape[1]
        assert torch.equal(loaded.mask, batch.mask[:, :width])
        assert torch.equal(loaded.sampled, full_batch.mask[:, :width])
        assert torch.equal(loaded.student_logp, full_batch.student_logp[:, :width])
        assert torch.equal(loaded.lengths, full_batch.lengths)
    concatenated = concatenate([batch, full_batch])
    assert torch.equal(concatenated.sampled, torch.cat([full_batch.mask, full_batch.mask]))
    assert torch.equal(concatenated.mask, torch.cat([batch.mask, full_batch.mask]))
    assert torch.equal(batch.rows([3, 1]).sampled, full_batch.mask[[3, 1]])
    assert batch.trim().tokens.shape == full_batch.trim().tokens.shape
    unsupervised = full_batch.restrict_mask(torch.zeros_like(full_batch.mask))
    assert torch.equal(unsupervised.validate().lengths, full_batch.lengths)
    assert unsupervised.trim().tokens.shape == full_batch.trim().tokens.shape


def test_a_batch_without_sampled_mask_reads_as_before(tmp_path: Path) -> None:
    full_batch = make_dense_batch(2).batch
    full_batch.save(tmp_path / "old.safetensors")
    old = load_batch(tmp_path / "old.safetensors")
    assert old.sampled_mask is None
    assert old.sampled is old.mask


def test_numbers_are_refused_where_nothing_was_sampled() -> None:
    full_batch = make_dense_batch(2).batch
    batch = full_batch.restrict_mask(full_batch.tokens % 2 == 0)
    wrong = replace(batch, mask=torch.ones_like(batch.mask))
    with pytest.raises(ValueError, match=r"mask: \d+ of 400 values supervised where sampled_mask"):
        wrong.validate()
    with pytest.raises(ValueError, match=r"sampler_logp: .* not 0 where sampled_mask is False"):
        replace(batch, sampled_mask=batch.mask).validate()
    with pytest.raises(ValueError, match=r"sampler_logp: .* not 0 where the mask is False"):
        replace(full_batch, mask=batch.mask).validate()
    with pytest.raises(ValueError, match="sampled_mask has shape"):
        replace(full_batch, sampled_mask=full_batch.mask[:, 1:])


def test_a_metric_without_some_ids_keeps_the_batch_whole() -> None:
    """The batch passed to the metric holds zeros where nothing was sampled."""
    batches_read: list[ScoredRollouts] = []

    def keeping(batch: ScoredRollouts) -> dict[str, Mean]:
        batches_read.append(batch.validate())
        return sign_shares(batch)

    batch = make_dense_batch(9).batch
    without(keeping, [3, 4])(batch)
    assert torch.equal(batches_read[0].sampled, batch.mask)
    assert torch.equal(batches_read[0].mask, batch.mask & (batch.tokens != 3) & (batch.tokens != 4))
    assert math.isclose(float(batches_read[0].log_ratio.sum()), float(batch.log_ratio.sum()))
