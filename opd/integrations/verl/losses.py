"""The objectives as loss modes of verl's distillation trainer (verl 0.9).

verl scores rollouts with a teacher server that sends one log-probability per token, or its top-K;
the student's logits cover the vocabulary. `register` adds an objective to verl's registry under a
loss mode; `opd.integrations.verl.register` does so for all that verl can supply. The losses are
those of `opd.objectives.catalogue`; this module only converts verl's tensors to their inputs and
back. Denominators, and the sum over micro-batches and ranks, are verl's (`actor.loss_agg_mode`).

Top-K modes replace one function of verl: it computes all of them with `compute_topk_loss`, which
implements verl's own forward KL only.

Shapes: B responses, T response positions, N packed tokens of prompts and responses, K teacher ids.
"""

import inspect
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.verl import Loss, batch_from_verl, observe_loss
from diagnostics.errors import BrokenPackage, InvalidInput, MissingPackage
from opd.integrations.verl.topk_loss import TOPK_OBJECTIVES, batch_setting, compute_topk_loss
from opd.objectives.factory import make_objective
from opd.objectives.objective import Objective, batch_losses
from opd.objectives.requirements import Requirements

PREFIX = "opdlab_"
"""Prefix of a loss mode, followed by the objective's name, unless `register` is given a mode."""

_ARGUMENTS = ["config", "distillation_config", "data", "student_logits", "data_format"]


def register(
    name: str,
    mode: str = "",
    *,
    gamma: float = 0.0,
    baseline: str = "none",
    ratio: str = "none",
    clip: tuple[float, float, float] | None = None,
    ratio_clip: float = math.inf,
    reward_weight: float = 0.0,
    mask_scope: str = "cost",
    allow_collapse: bool = False,
) -> str:
    """Register the objective `name` as a loss mode, with the token-level metrics of the panel.

    Args:
        name: Objective of `opd.objectives.factory.make_objective`, as are the other arguments.
        mode: The loss mode; PREFIX and the name if empty.
        gamma: Discount of later costs.
        baseline: Refused unless "none": verl's batches lack what the others read.
        ratio: Importance ratio; "none" for a top-K objective.
        clip: PPO's clip of sampled_token_clipped.
        ratio_clip: Nats within which log-ratios are clipped.
        reward_weight: Refused unless 0; verl adds rewards itself.
        mask_scope: What a mask removes.
        allow_collapse: Accept a form that collapses.

    Returns:
        The loss mode, for `distillation.distillation_loss.loss_mode`.

    Raises:
        InvalidInput: The objective is unknown, an option is refused, or verl lacks data that it
            needs.
        ImportError: verl is missing, or computes its losses in another way.
    """
    losses = verl_losses()
    objective = make_objective(
        name,
        gamma=gamma,
        baseline=baseline,
        ratio=ratio,
        clip=clip,
        ratio_clip=ratio_clip,
        reward_weight=reward_weight,
        mask_scope=mask_scope,
        allow_collapse=allow_collapse,
    )
    mode, topk = mode or PREFIX + name, objective.support == "teacher"
    problem = missing_inputs(objective.requirements)
    if not problem and topk and ratio != "none":
        problem = f"ratio {ratio!r} is not available where verl computes losses from logits"
    if not problem and baseline == "given":
        problem = "its batches have no baseline column"
    if problem:
        raise InvalidInput(f"{name} in verl: {problem}")
    settings = losses.DistillationLossSettings(names=mode, use_topk=topk, use_estimator=not topk)
    loss: Loss = partial(topk_loss if topk else sampled_loss, objective)
    losses.register_distillation_loss(settings)(observe_loss(loss))
    if topk:
        TOPK_OBJECTIVES[mode] = objective
    return mode


def register_unsupported(name: str, reason: str) -> None:
    """Register a loss mode that raises an explanation when a run is configured with it.

    Args:
        name: Objective.
        reason: Why verl cannot supply it.
    """
    losses = verl_losses()
    settings = _UnsupportedSettings(
        PREFIX + name, f"{PREFIX}{name} is not supported as a loss mode: {reason}"
    )
    losses.register_distillation_loss(settings)(settings.refusal)


class _UnsupportedSettings:
    """Settings that raise when verl asks whether the mode needs a top-K, before a run starts."""

    def __init__(self, mode: str, reason: str) -> None:
        self.names, self.reason = [mode], reason

    @property
    def use_topk(self) -> bool:
        raise InvalidInput(self.reason)

    def refusal(self, *args: Any, **kwargs: Any) -> None:
        raise InvalidInput(self.reason)


def missing_inputs(needs: Requirements) -> str:
    """Return what an objective needs and verl does not supply, or an empty string."""
    if needs.support == "full" or needs.distributions:
        return "verl's teacher sends no full next-token distributions, only its top-K"
    if needs.support in ("student", "union", "intersection"):
        return "verl's teacher sends its own top-K, not the log-probabilities of the student's ids"
    if needs.whole_groups:
        return (
            "a baseline over other responses or a reward needs the whole step, but a loss sees a "
            "micro-batch; for rewards set distillation_loss.use_task_rewards"
        )
    if needs.support == "teacher" and needs.sampled_logp:
        return "with a top-K verl's teacher does not send the sampled token's log-probability"
    return ""


# --- the two losses, as verl calls them ----------------------------------------------------------


def sampled_loss(
    objective: Objective,
    config: Any,
    distillation_config: Any,
    model_output: dict[str, Any],
    data: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Compute (B, T) losses of an objective of the sampled tokens.

    The credit is that of the student at scoring time, verl's old_log_probs, and constant over the
    updates of a step. Tokens that a rule removes from response_mask advance gamma and are part of
    the sequence ratio, where rollout_log_probs tell them apart from a tool's text.

    Args:
        objective: The objective.
        config: Unused; verl passes its actor's configuration.
        distillation_config: verl's distillation configuration.
        model_output: verl's log_probs, with gradient.
        data: verl's batch.

    Returns:
        (B, T) losses with gradient to log_probs, and no metrics.

    Raises:
        InvalidInput: A setting of verl would change the loss, old_log_probs are missing, or the
            teacher scored other tokens than the student's.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    check_settings(distillation_config.distillation_loss, data)
    if "old_log_probs" not in data:
        raise InvalidInput("the batch has no old_log_probs, which the credit is computed from")
    batch = batch_from_verl(model_output, data, unsupervised=True)
    scored_ids = no_padding_2_padding(data["teacher_ids"], data)[..., 0].long()
    num_mismatched = int(((scored_ids != batch.tokens) & batch.mask).sum())
    if num_mismatched:
        raise InvalidInput(
            f"the teacher scored ids other than the student's at {num_mismatched} of "
            f"{int(batch.mask.sum())} supervised tokens"
        )
    old_logp = torch.where(batch.sampled, to_padded(data["old_log_probs"]).float(), 0.0)
    batch = batch.with_fields(student_logp=old_logp)
    logp = no_padding_2_padding(model_output["log_probs"], data)
    return batch_losses(objective, batch, logp), {}


def topk_loss(
    objective: Objective,
    config: Any,
    distillation_config: Any,
    model_output: dict[str, Any],
    data: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the (B, T) losses that `logit_losses` computed, and the student's mass on the support.

    Args:
        objective: Unused here; `logit_losses` applied it.
        config: Unused; verl passes its actor's configuration.
        distillation_config: verl's distillation configuration.
        model_output: Outputs of `logit_losses` for the packed tokens.
        data: verl's batch.

    Returns:
        (B, T) losses and a metric.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    check_settings(distillation_config.distillation_loss, data)
    mask = to_padded(data["response_mask"]).bool()
    mass = no_padding_2_padding(model_output["student_mass"], data)
    scale = float(data["dp_size"]) / float(data["batch_num_tokens"])
    total = torch.where(mask, mass, 0.0).sum() * scale
    metrics = {"divergence/topk_student_mass": Metric(AggregationType.SUM, total)}
    return no_padding_2_padding(model_output["distillation_losses"], data), metrics


def check_settings(loss: Any, data: Any) -> None:
    """Refuse settings of verl that would change the objective.

    Args:
        loss: verl's distillation_loss configuration.
        data: verl's batch.

    Raises:
        InvalidInput: Names the setting, its value and what to set instead.
    """
    conflicts = {
        name: getattr(loss, name)
        for name, neutral in (
            ("use_policy_gradient", False),
            ("loss_max_clamp", None),
            ("log_prob_min_clamp", None),
        )
        if getattr(loss, name) != neutral
    }
    for name, value in conflicts.items():
        neutral = "False: it has its own score function" if value is True else "null"
        raise InvalidInput(
            f"distillation_loss.{name} is {value} with an opdlab loss; set {neutral}"
        )
    temperature = batch_setting(data, "temperature", 1.0)
    if bool((torch.as_tensor(temperature) != 1).any()):
        raise InvalidInput(
            f"rollout.temperature is {temperature}: verl divides the student's logits by it but "
            "reads the teacher at 1, which compares two different distributions; set 1"
        )


# --- verl ---------------------------------------------------------------------------------------


def verl_losses() -> Any:
    """Return verl's module of distillation losses, with `compute_topk_loss` replaced once.

    Returns:
        The module.

    Raises:
        ImportError: verl is missing, or is not the supported version.
    """
    try:
        import verl
        from verl.trainer.distillation import losses
    except ImportError as error:
        kind = MissingPackage if getattr(error, "name", None) == "verl" else BrokenPackage
        raise kind(f"verl 0.9 with distillation losses is required: {error}") from error
    original = losses.compute_topk_loss
    if isinstance(original, partial):
        return losses
    parameters = list(inspect.signature(original).parameters)
    if not verl.__version__.startswith("0.9.") or parameters != _ARGUMENTS:
        raise MissingPackage(
            f"verl is {verl.__version__}, whose compute_topk_loss takes {', '.join(parameters)}; "
            f"expected 0.9 and {', '.join(_ARGUMENTS)}: install verl==0.9.1"
        )
    losses.compute_topk_loss = partial(compute_topk_loss, original)
    return losses


def to_padded(x: Tensor) -> Tensor:
    """Convert a nested tensor to (B, T) with zeros after each row."""
    return x.to_padded_tensor(0) if x.is_nested else x
