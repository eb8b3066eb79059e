"""The loss of an optimizer step, computed independently from the scored batch.

The update computes its loss from hidden states, micro-batch by micro-batch. For the first optimizer
step on a set of rollouts, the same number follows from the scored log-probabilities, so that a
wrong divergence, sign or denominator shows as a difference, without a forward pass. Nothing here is
used for training, and no code is shared with `opd.objectives.surrogates` or
`opd.objectives.reduction`: this module has to be independent of their errors.

Shapes: B responses, T positions, K support ids, M micro-batches. p student, q teacher, S support.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.io.user_functions import is_function_name
from diagnostics.missing import missing_fields
from opd.config.settings import Config
from opd.objectives import factory
from opd.objectives.credit import RATIOS
from opd.runtime import distributed

ROUNDING = {"float32": 2e-5, "float16": 7e-3, "bfloat16": 5e-2}
"""Difference in nats that two forward passes of the same weights may show in a log-probability.

Half a unit in the last place of a logit near 30; for float32, the sums of some dozens of layers."""
FLOAT32_FLOOR = 2e-6
"""Error in nats of a divergence in float32, however small: rounding of a few probabilities."""
SAMPLED = ("sampled_token", "sampled_token_weighted", "sampled_token_clipped")
MAX_STANDARD_ERRORS = 4.0
"""Tolerance between loss and expected loss, in standard errors of the accumulated rounding."""

ValuePair = tuple[Tensor, Tensor]


def rounding_unit(config: Config) -> float:
    """Return `ROUNDING` for the run's precision; quantised layers round as bfloat16 does."""
    quantised = config.hardware.teacher_weights != "saved"
    return max(ROUNDING[config.hardware.dtype], ROUNDING["bfloat16"] if quantised else 0.0)


def expected_loss(
    config: Config,
    batch: ScoredRollouts,
    credit: Tensor,
    ratio: Tensor,
    *,
    rows: Sequence[int],
    micro_batches: Sequence[Sequence[int]],
    all_ranks_batch: ScoredRollouts,
    positions: Sequence[int],
) -> Tensor | None:
    """Compute this rank's part of the expected loss and of likely wrong losses.

    Args:
        config: Settings of the task.
        batch: Responses of this rank with their support and the final loss mask.
        credit: (B, T) result of `credit_from_settings`.
        ratio: (B, T) result of `ratio_from_settings`.
        rows: Rows of `batch` that belong to the optimizer step.
        micro_batches: `rows`, split into micro-batches.
        all_ranks_batch: Rows of the optimizer step on all ranks.
        positions: Positions of `rows` in `all_ranks_batch`.

    Returns:
        (C + 2,) sums that add up over ranks, in this order: the loss; the loss with the two models
        exchanged; the loss under each other denominator; the mean and the sum of micro-batch means;
        the variance and the bias that rounding gives the loss. None if there is no formula for the
        objective.
    """
    values = token_values(config, batch, credit)
    if values is None:
        return None
    device, mask = batch.mask.device, batch.mask.double()
    value, exchanged, slope = (x * ratio.double() * mask for x in values)
    row_index, position = (torch.as_tensor(list(x), device=device) for x in (rows, positions))
    weights = {name: weight[position] for name, weight in row_weights(all_ranks_batch).items()}
    weight = weights.pop(config.objective.denominator)
    sums = value.sum(1)[row_index]
    losses = [(sums * weight).sum(), (exchanged.sum(1)[row_index] * weight).sum()]
    losses += [(sums * other_weight).sum() for other_weight in weights.values()]
    means = [
        value[list(group)].sum() / mask[list(group)].sum().clamp(min=1) for group in micro_batches
    ]
    total = torch.stack(means).sum()
    losses += [total / len(means), total]
    rounding_error = rounding_unit(config)
    variance = (rounding_error * weight[:, None] * slope[row_index]).square().sum()
    size = (value.abs() + slope)[row_index].sum(1)
    floor = (rounding_error**2 + FLOAT32_FLOOR) * mask[row_index].sum(1)
    bias = (weight * (floor + 1e-5 * size)).sum()
    return torch.stack([*losses, variance, bias])


def row_weights(batch: ScoredRollouts) -> dict[str, Tensor]:
    """Return the (B,) weight of a token of each response, by denominator, from the definitions."""
    length = batch.mask.double().sum(1)
    responses = batch.sampled.any(1).double()  # a row without a token is none
    num_responses, same_prompt = responses.sum(), batch.prompt[:, None] == batch.prompt[None]
    group = (same_prompt * length).sum(1)
    prompts = (responses / (same_prompt.double() @ responses).clamp(min=1)).sum()
    return {
        "token_mean": torch.ones_like(length) / length.sum(),
        "sequence_sum": torch.ones_like(length) / num_responses,
        "sequence_mean": 1 / (num_responses * length.clamp(min=1)),
        "group_mean": 1 / (prompts * group.clamp(min=1)),
    }


def loss_check_columns(
    loss: Tensor, expected_losses: Sequence[Tensor | None], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Compare the loss of the first update with the expected loss.

    Args:
        loss: 0-d loss of the update, summed over ranks.
        expected_losses: Result of `expected_loss` on this rank, for each task.
        weights: Weight of each task's loss.

    Returns:
        Columns of the row; empty if there is no formula for the objective. loss_expected: expected
        loss. loss_error: difference in multiples of what rounding explains, rounded down; healthy
        0. If it is positive, loss_negated, loss_exchanged and loss_denominator are 1 if the loss is
        the expected one with the opposite sign, with the models exchanged, or with another
        denominator; otherwise 0.
    """
    parts = []
    for vector, weight in zip(expected_losses, weights, strict=True):
        if vector is None:
            return {}
        scale = torch.full_like(vector, weight)
        scale[-2] = weight**2  # the variance scales with the square of the weight
        parts.append(vector * scale)
    expected = distributed.all_reduce_sum(torch.stack(parts).sum(0))
    losses, tolerance = expected[:-2], MAX_STANDARD_ERRORS * expected[-2].sqrt() + expected[-1]
    expected_value, within_tolerance = losses[0], (loss.double() - losses).abs() <= tolerance
    error = ((loss.double() - expected_value).abs() / tolerance.clamp(min=1e-30)).floor()
    is_wrong = error >= 1
    matches_negated = (loss.double() + expected_value).abs() <= tolerance
    return {
        "consistency/loss_expected": expected_value,
        "consistency/loss_error": error,
        "consistency/loss_negated": (is_wrong & matches_negated).double(),
        "consistency/loss_exchanged": (is_wrong & within_tolerance[1]).double(),
        "consistency/loss_denominator": (is_wrong & within_tolerance[2:].any()).double(),
    }


# --- values of tokens ---------------------------------------------------------------------------


def token_values(
    config: Config, batch: ScoredRollouts, credit: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute each token's loss, the same with the models exchanged, and its sensitivity.

    Args:
        config: Settings of the task.
        batch: Scored rollouts.
        credit: (B, T) credit.

    Returns:
        Three (B, T) tensors, or None if there is no formula for the objective. The sensitivity is
        the largest first-order change of the value per nat of error in one log-probability.
    """
    local = _direct_terms(config, batch)
    if local is None:
        return None
    score, r = credit.double(), _log_ratio(batch)
    if config.objective.objective not in ("sampled_token_weighted", "sampled_token_clipped"):
        score = score * batch.student_logp.double()
    spread = r.abs()
    if batch.prefix is not None:
        variance = batch.prefix.ratio_square.double() - batch.prefix.reverse_kl.double().square()
        spread = torch.maximum(spread, variance.clamp(min=0).sqrt())
    if config.objective.objective == "negative_log_likelihood":
        spread = torch.ones_like(r)
    slope = spread + local[0].abs() + (1 + batch.student_logp.abs()) * credit.double().abs()
    return local[0] + score, local[1] + score, slope


def ratio_from_settings(config: Config, batch: ScoredRollouts) -> Tensor:
    """Return the (B, T) importance ratio that the settings ask for."""
    return RATIOS[config.objective.ratio](batch)


def credit_from_settings(config: Config, batch: ScoredRollouts) -> Tensor:
    """Return the (B, T) credit that the settings ask for; 0 without a score-function term."""
    limit = math.inf if config.objective.ratio_clip is None else config.objective.ratio_clip
    is_immediate = not config.objective.gamma and not config.objective.reward_weight
    if (
        config.objective.objective in SAMPLED
        and is_immediate
        and config.objective.baseline == "none"
    ):
        return batch.log_ratio.clamp(-limit, limit)
    if is_immediate and config.objective.objective not in (*SAMPLED, "mean_future"):
        return torch.zeros_like(batch.student_logp)
    objective = factory.make_objective(
        config.objective.objective,
        gamma=config.objective.gamma,
        baseline=config.objective.baseline,
        ratio=config.objective.ratio,
        beta=config.objective.beta,
        clip=config.objective.ppo_clip,
        ratio_clip=limit,
        reward_weight=config.objective.reward_weight,
        reward_baseline=config.objective.reward_baseline,
        mask_scope=config.objective.mask_scope,
        allow_collapse=config.objective.allow_collapse,
    )
    return objective.credit(batch)


def _direct_terms(config: Config, batch: ScoredRollouts) -> ValuePair | None:
    """Return the (B, T) part of the loss that does not depend on credit, as is and exchanged."""
    name, r = config.objective.objective, _log_ratio(batch)
    if is_function_name(name):
        return None
    if name == "negative_log_likelihood":
        return -batch.student_logp.double(), -batch.student_logp.double()
    if name in (*SAMPLED, "mean_future", "reward_only"):
        return torch.zeros_like(r), torch.zeros_like(r)
    if name == "k2":
        return r.square() / 2, r.square() / 2
    if name == "k3":
        return (-r).exp() - 1 + r, r.exp() - 1 - r
    if name.startswith("full_"):
        return _full_vocabulary(config, batch)
    source, _, form = name.partition("_topk")
    if batch.support is None or batch.support.source != source or form not in FORMS:
        return None
    limit = math.inf if config.objective.ratio_clip is None else config.objective.ratio_clip
    return FORMS[form](batch, limit)


def _log_ratio(batch: ScoredRollouts) -> Tensor:
    """Return (B, T) log student - log teacher of the sampled token; 0 without a teacher."""
    if "teacher_logp" in missing_fields(batch):
        return torch.zeros_like(batch.student_logp).double()
    return batch.log_ratio.double()


def _full_vocabulary(config: Config, batch: ScoredRollouts) -> ValuePair | None:
    """Return the full-vocabulary divergence, as is and exchanged; None without a formula."""
    prefix = batch.prefix
    if prefix is None or prefix.forward_kl is None or config.objective.ratio_clip is not None:
        return None
    reverse, forward = prefix.reverse_kl.double(), prefix.forward_kl.double()
    if config.objective.objective in ("full_reverse_kl", "full_sampled_future"):
        return reverse, forward
    beta = 0.5 if config.objective.beta is None else config.objective.beta
    if config.objective.objective == "full_forward_kl" or beta == 0:
        return forward, reverse
    return (reverse, forward) if beta == 1 else None


def _support_tensors(batch: ScoredRollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, T, K) log p, log q and whether an id is present (1 or 0)."""
    support = batch.support
    assert support is not None
    present = torch.ones_like(support.student_logp, dtype=torch.float64)
    present = present if support.present is None else support.present.double()
    return support.student_logp.double(), support.teacher_logp.double(), present


def _sum(p: Tensor, student_logp: Tensor, teacher_logp: Tensor, limit: float) -> Tensor:
    """Return the sum over K of p (log p - log q), each log-ratio clamped to the limit."""
    return (p * (student_logp - teacher_logp).clamp(-limit, limit)).sum(-1)


def _forward_and_reverse(
    student_logp: Tensor, teacher_logp: Tensor, present: Tensor, limit: float
) -> ValuePair:
    """Return the divergence as is and with the models exchanged."""
    p, q = student_logp.exp() * present, teacher_logp.exp() * present
    return _sum(p, student_logp, teacher_logp, limit), _sum(q, teacher_logp, student_logp, limit)


def _renormalise(logp: Tensor, present: Tensor) -> Tensor:
    """Renormalise log-probabilities over the ids present."""
    return logp - (logp.exp() * present).sum(-1, keepdim=True).clamp(min=1e-300).log()


def _renormalised(batch: ScoredRollouts, limit: float) -> ValuePair:
    """Return the divergence of the distributions renormalised over the support."""
    student_logp, teacher_logp, present = _support_tensors(batch)
    return _forward_and_reverse(
        _renormalise(student_logp, present), _renormalise(teacher_logp, present), present, limit
    )


def _outside(batch: ScoredRollouts) -> Tensor:
    """Return (B, T) whether the sampled token is outside the support."""
    assert batch.support is not None
    return ~batch.support.contains(batch.tokens)


def _with_sampled(batch: ScoredRollouts, limit: float) -> ValuePair:
    """Return the renormalised divergence over the support and the sampled token."""
    student_logp, teacher_logp, present = _support_tensors(batch)
    student_logp = torch.cat([student_logp, batch.student_logp.double()[..., None]], -1)
    teacher_logp = torch.cat([teacher_logp, batch.teacher_logp.double()[..., None]], -1)
    present = torch.cat([present, _outside(batch).double()[..., None]], -1)
    return _forward_and_reverse(
        _renormalise(student_logp, present), _renormalise(teacher_logp, present), present, limit
    )


def _unnormalised(batch: ScoredRollouts, limit: float) -> ValuePair:
    """Return the divergence over the support without renormalisation."""
    return _forward_and_reverse(*_support_tensors(batch), limit)


def _bucket(batch: ScoredRollouts, limit: float) -> ValuePair:
    """Return the divergence with one extra outcome for all ids outside the support."""
    student_logp, teacher_logp, present = _support_tensors(batch)
    reverse, forward = _forward_and_reverse(student_logp, teacher_logp, present, limit)
    outside_mass = [
        (1 - (logp.exp() * present).sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
        for logp in (student_logp, teacher_logp)
    ]
    log_mass_ratio = outside_mass[0].log() - outside_mass[1].log()
    return reverse + outside_mass[0] * log_mass_ratio, forward - outside_mass[1] * log_mass_ratio


def _tail(batch: ScoredRollouts, limit: float) -> ValuePair:
    """Return the unnormalised divergence plus a score-function term outside the support."""
    reverse, forward = _unnormalised(batch, limit)
    score = _outside(batch) * batch.log_ratio.double() * batch.student_logp.double()
    return reverse + score, forward + score


FORMS: dict[str, Callable[[ScoredRollouts, float], ValuePair]] = {
    "": _renormalised,
    "_and_sampled": _with_sampled,
    "_unnormalised": _unnormalised,
    "_stopped": _unnormalised,
    "_bucket": _bucket,
    "_sampled_tail": _tail,
    "_published_tail": _tail,
}
"""Divergence by the suffix of the objective's name, such as "_bucket" in teacher_topk_bucket."""
