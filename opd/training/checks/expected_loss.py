"""The loss of an optimizer step from the scored batch, by formulas of its own.

The update computes its loss from hidden states, micro-batch by micro-batch. Before the first
optimizer step on a set of rollouts the same number follows from the log-probabilities that were
scored, so that a wrong divergence, sign or denominator shows as a difference, at no forward pass.
Nothing here is used for training, and nothing here is shared with `opd.objectives.surrogates` or
`opd.objectives.reduction`, of whose errors it is to be independent.

Shapes: B responses, T positions, K support ids, M micro-batches. p student, q teacher, S support.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from opd.config.settings import Config
from opd.objectives import factory
from opd.objectives.credit import RATIOS

ROUNDING = {"float32": 2e-5, "float16": 7e-3, "bfloat16": 5e-2}
"""Nats by which two forward passes of the same weights may differ in a log-probability: half a unit
in the last place of a logit near 30, and for float32 the sums of some dozens of layers."""
FLOOR = 2e-6
"""Nats by which float32 errs in a divergence, however small: some roundings of probabilities."""
SAMPLED = ("sampled_token", "sampled_token_weighted", "sampled_token_clipped")
ERRORS = 4.0
"""Standard errors of the accumulated rounding within which the loss must be the expected one."""

ModelPair = tuple[Tensor, Tensor]


def rounding(config: Config) -> float:
    """Nats of `ROUNDING` for the run's precision; quantised layers round as bfloat16 does."""
    quantised = config.teacher_weights != "saved"
    return max(ROUNDING[config.dtype], ROUNDING["bfloat16"] if quantised else 0.0)


def expected_loss(
    config: Config,
    batch: ScoredRollouts,
    credit: Tensor,
    ratio: Tensor,
    *,
    rows: Sequence[int],
    micro_batches: Sequence[Sequence[int]],
    counted: ScoredRollouts,
    places: Sequence[int],
) -> Tensor | None:
    """(C + 2,) this process's share of the expected loss and of its rivals, which add.

    In this order: the loss; with the two models exchanged; under each other denominator; as the
    mean and as the sum of the means of micro-batches; then the variance and the bias that rounding
    gives the loss. None where no formula for the objective is known.

    Args:
      batch: this process's responses with their support, the tokens of the loss alone.
      credit, ratio: (B, T), `credit_of` and `ratio_of` the settings.
      rows: of `batch`, those of the optimizer step; micro_batches: the same, split.
      counted: the responses of the step of all processes; places: of `rows` among them.
    """
    values = token_values(config, batch, credit)
    if values is None:
        return None
    device, mask = batch.mask.device, batch.mask.double()
    value, exchanged, slope = (x * ratio.double() * mask for x in values)
    index, place = (torch.as_tensor(list(x), device=device) for x in (rows, places))
    weights = {name: weight[place] for name, weight in row_weights(counted).items()}
    weight = weights.pop(config.denominator)
    sums = value.sum(1)[index]
    losses = [(sums * weight).sum(), (exchanged.sum(1)[index] * weight).sum()]
    losses += [(sums * other).sum() for other in weights.values()]
    means = [
        value[list(group)].sum() / mask[list(group)].sum().clamp(min=1) for group in micro_batches
    ]
    total = torch.stack(means).sum()
    losses += [total / len(means), total]
    unit = rounding(config)
    variance = (unit * weight[:, None] * slope[index]).square().sum()
    size = (value.abs() + slope)[index].sum(1)
    floor = (unit**2 + FLOOR) * mask[index].sum(1)
    bias = (weight * (floor + 1e-5 * size)).sum()
    return torch.stack([*losses, variance, bias])


def row_weights(counted: ScoredRollouts) -> dict[str, Tensor]:
    """(B,) what a token of each response weighs, by denominator, from their definitions."""
    length = counted.mask.double().sum(1)
    count, same = len(length), counted.prompt[:, None] == counted.prompt[None]
    group = (same * length).sum(1)
    prompts = (1 / same.double().sum(1)).sum()
    return {
        "token_mean": torch.ones_like(length) / length.sum(),
        "sequence_sum": torch.full_like(length, 1 / count),
        "sequence_mean": 1 / (count * length.clamp(min=1)),
        "group_mean": 1 / (prompts * group.clamp(min=1)),
    }


def loss_numbers(loss: Tensor, vector: Tensor) -> dict[str, Tensor]:
    """Columns of the row from the loss that was computed and the summed `expected_loss`.

    loss_expected; loss_error: distance in whole multiples of what rounding explains, healthy 0.
    Where it is above, loss_negated, loss_exchanged and loss_denominator are 1 if the loss is the
    expected one with another sign, with the models exchanged, or over another denominator; else 0.
    """
    losses, allowed = vector[:-2], ERRORS * vector[-2].sqrt() + vector[-1]
    expected, away = losses[0], (loss.double() - losses).abs() <= allowed
    error = ((loss.double() - expected).abs() / allowed.clamp(min=1e-30)).floor()
    wrong = error >= 1
    negated = (loss.double() + expected).abs() <= allowed
    return {
        "consistency/loss_expected": expected,
        "consistency/loss_error": error,
        "consistency/loss_negated": (wrong & negated).double(),
        "consistency/loss_exchanged": (wrong & away[1]).double(),
        "consistency/loss_denominator": (wrong & away[2:].any()).double(),
    }


# --- values of tokens ---------------------------------------------------------------------------


def token_values(
    config: Config, batch: ScoredRollouts, credit: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(B, T) value of each token's loss, the same with both models exchanged, and its slope.

    slope: by how much a nat of error in one log-probability changes the value at most, to first
    order. None for an objective without a formula here.
    """
    local = _local(config, batch)
    if local is None:
        return None
    score, r = credit.double(), batch.log_ratio.double()
    if config.objective not in ("sampled_token_weighted", "sampled_token_clipped"):
        score = score * batch.student_logp.double()
    spread = r.abs()
    if batch.prefix is not None:
        variance = batch.prefix.ratio_square.double() - batch.prefix.reverse_kl.double().square()
        spread = torch.maximum(spread, variance.clamp(min=0).sqrt())
    slope = spread + local[0].abs() + (1 + batch.student_logp.abs()) * credit.double().abs()
    return local[0] + score, local[1] + score, slope


def ratio_of(config: Config, batch: ScoredRollouts) -> Tensor:
    """(B, T) importance ratio that the settings ask for."""
    return RATIOS[config.ratio](batch)


def credit_of(config: Config, batch: ScoredRollouts) -> Tensor:
    """(B, T) credit that the settings ask for; 0 for objectives without a score function."""
    limit = math.inf if config.ratio_clip is None else config.ratio_clip
    simple = not config.gamma and not config.reward_weight
    if config.objective in SAMPLED and simple and config.baseline == "none":
        return batch.log_ratio.clamp(-limit, limit)
    if simple and config.objective not in (*SAMPLED, "mean_future"):
        return torch.zeros_like(batch.student_logp)
    made = factory.make(
        config.objective,
        config.gamma,
        config.baseline,
        config.ratio,
        beta=config.beta,
        clip=config.ppo_clip,
        ratio_clip=limit,
        reward_weight=config.reward_weight,
        reward_baseline=config.reward_baseline,
        mask_scope=config.mask_scope,
        allow_collapse=config.allow_collapse,
    )
    return made.credit(batch)


def _local(config: Config, batch: ScoredRollouts) -> ModelPair | None:
    """(B, T) the part of the value that does not hang on the credit, and it exchanged."""
    name, r = config.objective, batch.log_ratio.double()
    if name in (*SAMPLED, "mean_future"):
        return torch.zeros_like(r), torch.zeros_like(r)
    if name == "k2":
        return r.square() / 2, r.square() / 2
    if name == "k3":
        return (-r).exp() - 1 + r, r.exp() - 1 - r
    if name.startswith("full_"):
        return _whole_vocabulary(config, batch)
    source, _, form = name.partition("_topk")
    if batch.support is None or batch.support.source != source or form not in FORMS:
        return None
    limit = math.inf if config.ratio_clip is None else config.ratio_clip
    return FORMS[form](batch, limit)


def _whole_vocabulary(config: Config, batch: ScoredRollouts) -> ModelPair | None:
    prefix = batch.prefix
    if prefix is None or prefix.forward_kl is None or config.ratio_clip is not None:
        return None
    reverse, forward = prefix.reverse_kl.double(), prefix.forward_kl.double()
    if config.objective in ("full_reverse_kl", "full_sampled_future"):
        return reverse, forward
    beta = 0.5 if config.beta is None else config.beta
    if config.objective == "full_forward_kl" or beta == 0:
        return forward, reverse
    return (reverse, forward) if beta == 1 else None


def _lists(batch: ScoredRollouts) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, K) log p, log q and 0 or 1 for ids that are absent or present."""
    support = batch.support
    assert support is not None
    present = torch.ones_like(support.student_logp, dtype=torch.float64)
    present = present if support.present is None else support.present.double()
    return support.student_logp.double(), support.teacher_logp.double(), present


def _sum(p: Tensor, ours: Tensor, theirs: Tensor, limit: float) -> Tensor:
    """sum over K of p (log p - log q), each log-ratio within the limit."""
    return (p * (ours - theirs).clamp(-limit, limit)).sum(-1)


def _both(ours: Tensor, theirs: Tensor, present: Tensor, limit: float) -> ModelPair:
    """The divergence as it stands and exchanged."""
    p, q = ours.exp() * present, theirs.exp() * present
    return _sum(p, ours, theirs, limit), _sum(q, theirs, ours, limit)


def _normal(logp: Tensor, present: Tensor) -> Tensor:
    """Log-probabilities over the ids present, divided by their sum."""
    return logp - (logp.exp() * present).sum(-1, keepdim=True).clamp(min=1e-300).log()


def _renormalised(batch: ScoredRollouts, limit: float) -> ModelPair:
    ours, theirs, present = _lists(batch)
    return _both(_normal(ours, present), _normal(theirs, present), present, limit)


def _outside(batch: ScoredRollouts) -> Tensor:
    assert batch.support is not None
    return ~batch.support.contains(batch.tokens)


def _with_sampled(batch: ScoredRollouts, limit: float) -> ModelPair:
    ours, theirs, present = _lists(batch)
    ours = torch.cat([ours, batch.student_logp.double()[..., None]], -1)
    theirs = torch.cat([theirs, batch.teacher_logp.double()[..., None]], -1)
    present = torch.cat([present, _outside(batch).double()[..., None]], -1)
    return _both(_normal(ours, present), _normal(theirs, present), present, limit)


def _plain(batch: ScoredRollouts, limit: float) -> ModelPair:
    return _both(*_lists(batch), limit)


def _bucket(batch: ScoredRollouts, limit: float) -> ModelPair:
    ours, theirs, present = _lists(batch)
    reverse, forward = _both(ours, theirs, present, limit)
    rest = [
        (1 - (logp.exp() * present).sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
        for logp in (ours, theirs)
    ]
    gap = rest[0].log() - rest[1].log()
    return reverse + rest[0] * gap, forward - rest[1] * gap


def _tail(batch: ScoredRollouts, limit: float) -> ModelPair:
    reverse, forward = _plain(batch, limit)
    score = _outside(batch) * batch.log_ratio.double() * batch.student_logp.double()
    return reverse + score, forward + score


FORMS: dict[str, Callable[[ScoredRollouts, float], ModelPair]] = {
    "": _renormalised,
    "_and_sampled": _with_sampled,
    "_unnormalised": _plain,
    "_stopped": _plain,
    "_bucket": _bucket,
    "_sampled_tail": _tail,
    "_published_tail": _tail,
}
