"""Our objectives as loss modes of verl's distillation trainer (verl 0.9).

verl scores rollouts with a teacher on a server, which sends one log-probability a token, or its
top-K; the student's logits are whole. `register` puts an objective into verl's registry under a
loss mode; `opd.integrations.verl.register` does so for all that verl can supply. The losses are those of
`opd.objectives.catalogue`: here are only the ways from verl's tensors to them and back. Denominators, and
the sum over micro-batches and ranks, are verl's (`actor.loss_agg_mode`).

Top-K modes need one rebinding: verl computes every one of them by `compute_topk_loss`, which knows
its own forward KL alone. Shapes: B responses, T response positions, N packed tokens of prompts and
responses, K teacher ids.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.verl import Loss, batch_of, observed
from diagnostics.core.partial import changed
from diagnostics.errors import BrokenPackage, InvalidInput, MissingPackage
from opd.integrations.verl.topk_loss import TOPK, compute_topk_loss, held
from opd.objectives.factory import Objective, make

PREFIX = "opdlab_"
"""A loss mode is this and the objective's name, unless `register` is given another."""

_ARGUMENTS = ["config", "distillation_config", "data", "student_logits", "data_format"]


def register(name: str, mode: str = "", **choices: Any) -> str:
    """Register the objective `name` of `opd.objectives.factory.make`, observed by the panel's token means.

    Args:
      mode: the loss mode, PREFIX and the name if empty. choices: gamma, ratio, clip, ratio_clip,
        mask_scope.

    Returns:
      The loss mode, for `distillation.distillation_loss.loss_mode`.

    Raises:
      ValueError: no such objective, a choice that `make` refuses, or something that verl's data
        cannot supply. ImportError: no verl, or one that computes its losses in another way.
    """
    losses = verl_losses()
    objective, mode = make(name, **choices), mode or PREFIX + name
    topk = objective.support == "teacher"
    why = unsupplied(objective) or unsupplied_choice(choices, topk)
    if why:
        raise InvalidInput(f"{name} in verl: {why}")
    settings = losses.DistillationLossSettings(names=mode, use_topk=topk, use_estimator=not topk)
    loss: Loss = partial(topk_loss if topk else sampled_loss, objective)
    losses.register_distillation_loss(settings)(observed(loss))
    if topk:
        TOPK[mode] = objective
    return mode


def refuse(name: str, why: str) -> None:
    """Register a loss mode that no run gets past its configuration with: it says why."""
    losses = verl_losses()
    settings = _Refused(PREFIX + name, f"{PREFIX}{name} is no loss mode: {why}")
    losses.register_distillation_loss(settings)(settings.refusal)


class _Refused:
    """Settings that raise when verl asks whether the mode needs a top-K, before anything starts."""

    def __init__(self, mode: str, why: str) -> None:
        self.names, self.why = [mode], why

    @property
    def use_topk(self) -> bool:
        raise InvalidInput(self.why)

    def refusal(self, *args: Any, **kwargs: Any) -> None:
        raise InvalidInput(self.why)


def unsupplied(objective: Objective) -> str:
    """What the objective reads and verl does not supply; empty if it supplies everything."""
    if objective.support == "full" or objective.distributions:
        return "its teacher sends no whole next-token distributions, at most its top-K"
    if objective.support in ("student", "union", "intersection"):
        return "its teacher sends its own top-K, not the log-probabilities of the student's ids"
    if objective.support == "teacher" and objective.sampled:
        return "with a top-K its teacher does not send the sampled token's log-probability"
    return ""


def unsupplied_choice(choices: dict[str, Any], topk: bool) -> str:
    """The same for what `make` may add to an objective."""
    if topk and choices.get("ratio", "none") != "none":
        return f"ratio {choices['ratio']!r} is not known where it computes losses from logits"
    if choices.get("baseline", "none") != "none":
        return f"baseline {choices['baseline']!r} needs the whole step, a loss sees a micro-batch"
    if choices.get("reward_weight", 0.0):
        return "an outcome needs whole groups of rollouts; set distillation_loss.use_task_rewards"
    return ""


# --- the two losses, as verl calls them ----------------------------------------------------------


def sampled_loss(
    objective: Objective,
    config: Any,
    distillation_config: Any,
    model_output: dict[str, Any],
    data: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """(B, T) losses of an objective of the sampled tokens, with gradient to verl's log_probs.

    The credit is that of the student at the time of scoring, verl's old_log_probs, and constant
    over the updates of a step. Tokens that a rule takes out of response_mask advance gamma and are
    part of the sequence ratio, where rollout_log_probs tell them from a tool's text.

    Raises:
      ValueError: a setting of verl would change the loss, old_log_probs are missing, or the teacher
        scored other tokens than the student's.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    check_settings(distillation_config.distillation_loss, data)
    if "old_log_probs" not in data:
        raise InvalidInput("the batch has no old_log_probs, of which the credit is made")
    batch = batch_of(model_output, data, unsupervised=True)
    read = no_padding_2_padding(data["teacher_ids"], data)[..., 0].long()
    strange = int(((read != batch.tokens) & batch.mask).sum())
    if strange:
        raise InvalidInput(
            f"the teacher scored other ids than the student's at {strange} of "
            f"{int(batch.mask.sum())} supervised tokens"
        )
    old = torch.where(batch.sampled, padded(data["old_log_probs"]).float(), 0.0)
    batch = changed(batch, student_logp=old)
    logp = no_padding_2_padding(model_output["log_probs"], data)
    return objective.loss(logp, None, batch), {}


def topk_loss(
    objective: Objective,
    config: Any,
    distillation_config: Any,
    model_output: dict[str, Any],
    data: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """(B, T) losses that `logit_losses` left for the packed tokens, and the student's mass on S."""
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    check_settings(distillation_config.distillation_loss, data)
    mask = padded(data["response_mask"]).bool()
    mass = no_padding_2_padding(model_output["student_mass"], data)
    scale = float(data["dp_size"]) / float(data["batch_num_tokens"])
    total = torch.where(mask, mass, 0.0).sum() * scale
    metrics = {"divergence/topk_student_mass": Metric(AggregationType.SUM, total)}
    return no_padding_2_padding(model_output["distillation_losses"], data), metrics


def check_settings(loss: Any, data: Any) -> None:
    """Refuse settings of verl under which the objective would be another one.

    Raises:
      ValueError: the setting, its value and what to set instead.
    """
    wrong = {
        name: getattr(loss, name)
        for name, neutral in (
            ("use_policy_gradient", False),
            ("loss_max_clamp", None),
            ("log_prob_min_clamp", None),
        )
        if getattr(loss, name) != neutral
    }
    for name, value in wrong.items():
        neutral = "False: it has its own score function" if value is True else "null"
        raise InvalidInput(
            f"distillation_loss.{name} is {value} with an opdlab loss; set {neutral}"
        )
    temperature = held(data, "temperature", 1.0)
    if bool((torch.as_tensor(temperature) != 1).any()):
        raise InvalidInput(
            f"rollout.temperature is {temperature}: verl divides the student's logits by it and "
            "reads the teacher at 1, two different distributions; set 1"
        )


# --- verl ---------------------------------------------------------------------------------------


def verl_losses() -> Any:
    """verl's module of distillation losses, with `compute_topk_loss` rebound once.

    Raises:
      ImportError: it is missing, or not the one that this was written for.
    """
    try:
        import verl
        from verl.trainer.distillation import losses
    except ImportError as error:
        kind = MissingPackage if getattr(error, "name", None) == "verl" else BrokenPackage
        raise kind(f"verl with distillation losses (0.9) is needed here: {error}") from error
    theirs = losses.compute_topk_loss
    if isinstance(theirs, partial):
        return losses
    found = list(inspect.signature(theirs).parameters)
    if not verl.__version__.startswith("0.9.") or found != _ARGUMENTS:
        raise MissingPackage(
            f"verl is {verl.__version__}, whose compute_topk_loss takes {', '.join(found)}; this "
            f"was written for 0.9 and {', '.join(_ARGUMENTS)}: install verl==0.9.1"
        )
    losses.compute_topk_loss = partial(compute_topk_loss, theirs)
    return losses


def padded(x: Tensor) -> Tensor:
    """(B, T) with zeros behind the rows of a nested tensor."""
    return x.to_padded_tensor(0) if x.is_nested else x
