"""`trl:TRAINER[,setting=value...]`: the loss of a trainer of the installed TRL.

Settings are those fields of the trainer's configuration that its loss reads, with TRL's defaults.
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.audit.trl import divergences, policy_gradient, weighted
from opd.objectives.audit.trl.stand_ins import package
from opd.objectives.user_loss import UserLoss

Function = Callable[[type, Any, dict[str, Any]], Tensor]
"""Function of a trainer's class, its configuration and the audit's values to its loss."""


@dataclass(frozen=True, kw_only=True)
class TrlLoss:
    """A trainer whose loss can be audited."""

    module: str
    """Where its class is."""
    trainer: str
    """Its class."""
    config: str
    """Class of its configuration."""
    settings: tuple[str, ...]
    """Fields of the configuration that the loss reads."""
    function: Function
    """How it is called."""
    asks: tuple[str, ...]
    """Names of `opd.objectives.user_loss.PARAMETERS`."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration that are needed and are not read."""


POLICY_SETTINGS = ("beta", "temperature", "num_iterations", "epsilon", "epsilon_high")
SELF_SETTINGS = (
    *("temperature", "num_iterations", "distillation_mode", "distillation_alpha"),
    *("distillation_topk", "distillation_add_tail", "distillation_is_clip"),
)
GRPO_SETTINGS = (
    *(*POLICY_SETTINGS, "loss_type", "scale_rewards", "importance_sampling_level", "delta"),
    *("reward_weights", "use_bias_correction_kl", "off_policy_mask_threshold"),
    *("top_entropy_quantile", "entropy_coef", "max_completion_length"),
    *("multi_objective_aggregation", "sapo_temperature_neg", "sapo_temperature_pos"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "use_vllm"),
    *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"),
)

LOSSES = {
    "GKD": TrlLoss(
        module="trl.experimental.gkd",
        trainer="GKDTrainer",
        config="GKDConfig",
        settings=("beta",),
        function=divergences.gkd,
        asks=divergences.ASKS,
    ),
    "GOLD": TrlLoss(
        module="trl.experimental.gold",
        trainer="GOLDTrainer",
        config="GOLDConfig",
        settings=(
            *("beta", "temperature", "use_uld_loss", "use_extended_uld", "uld_use_hybrid_loss"),
            *("uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight"),
            *("uld_token_merge_strategy", "uld_crossentropy_weight", "uld_distillation_weight"),
            *("uld_student_temperature", "uld_teacher_temperature"),
            *("uld_skip_student_eos", "uld_skip_teacher_eos"),
        ),
        function=divergences.gold,
        asks=divergences.ASKS,
    ),
    "Distillation": TrlLoss(
        module="trl",
        trainer="DistillationTrainer",
        config="DistillationConfig",
        settings=("beta", "temperature"),
        function=divergences.distillation,
        asks=divergences.ASKS,
    ),
    "ServerDistillation": TrlLoss(
        module="trl.experimental.server_distillation",
        trainer="ServerDistillationTrainer",
        config="ServerDistillationConfig",
        settings=("beta", "temperature", "loss_top_k", "loss_add_tail", "reverse_kl_top_1_mode"),
        function=divergences.server_distillation,
        asks=divergences.ASKS,
        fixed={"teacher_model_server_url": "unused"},
    ),
    "AsyncDistillation": TrlLoss(
        module="trl.experimental.async_distillation",
        trainer="AsyncDistillationTrainer",
        config="AsyncDistillationConfig",
        settings=("beta", "teacher_temperature", "teacher_top_k", "add_tail_bucket"),
        function=divergences.async_distillation,
        asks=divergences.ASKS,
    ),
    "IW-OPD": TrlLoss(
        module="trl.experimental.iw_opd",
        trainer="IWOPDTrainer",
        config="IWOPDConfig",
        settings=(
            *("beta", "temperature", "distillation_objective", "iw_opd_gamma", "iw_opd_epsilon"),
            *("reverse_kl_top_1_mode", "loss_top_k", "loss_add_tail", "use_teacher_server"),
            "use_vllm",
        ),
        function=weighted.iw_opd,
        asks=weighted.ASKS,
        fixed={"teacher_model_server_url": "unused"},
    ),
    "SDFT": TrlLoss(
        module="trl.experimental.sdft",
        trainer="SDFTTrainer",
        config="SDFTConfig",
        settings=(*SELF_SETTINGS, "num_loss_tokens_to_skip"),
        function=weighted.sdft,
        asks=weighted.ASKS,
    ),
    "SDPO": TrlLoss(
        module="trl.experimental.sdpo",
        trainer="SDPOTrainer",
        config="SDPOConfig",
        settings=SELF_SETTINGS,
        function=weighted.sdpo,
        asks=weighted.ASKS,
    ),
    "GRPO": TrlLoss(
        module="trl",
        trainer="GRPOTrainer",
        config="GRPOConfig",
        settings=GRPO_SETTINGS,
        function=policy_gradient.policy_gradient,
        asks=policy_gradient.ASKS,
    ),
    "GMPO": TrlLoss(
        module="trl.experimental.gmpo",
        trainer="GMPOTrainer",
        config="GMPOConfig",
        settings=(
            *(*POLICY_SETTINGS, "scale_rewards", "reward_weights", "top_entropy_quantile"),
            "multi_objective_aggregation",
        ),
        function=policy_gradient.policy_gradient,
        asks=policy_gradient.ASKS,
    ),
    "RLOO": TrlLoss(
        module="trl",
        trainer="RLOOTrainer",
        config="RLOOConfig",
        settings=(*POLICY_SETTINGS, "normalize_advantages", "reward_clip_range", "reward_weights"),
        function=policy_gradient.policy_gradient,
        asks=policy_gradient.ASKS,
    ),
}
"""Name -> the trainer."""

SAMPLING = {
    "lmbda": "the audit's responses are always sampled from the student",
    "seq_kd": "the audit's responses are always sampled from the student",
    "use_vllm": "the loss needs an engine; use num_iterations=2 for responses of another policy",
    "use_liger_kernel": "the kernels run on a GPU only",
    "use_liger_loss": "the kernels run on a GPU only",
    "distillation_weight": "the distillation part is audited; for the policy part see trl:GRPO",
}
"""Fields of a configuration that cannot be set -> why."""
LARGEST_SUPPORT = 32
"""Largest K: the vocabulary of the audit's worlds grows with it, and so does the time."""
SUPPORT_SIZES = ("distillation_topk", "teacher_top_k", "loss_top_k")
"""Fields of configurations that are a K."""
OUT_OF_REACH = {
    "MINILLM": "TRL 1.16 has no such trainer; its paper's target is sequence_reverse_kl, that of "
    "ours:full_reverse_kl,gamma=1",
    "A2PO": "it needs the values of its first stage, which generates for every prompt beforehand",
    "ASYNCGRPO": "its advantages are computed by a worker process beside vLLM; see trl:GRPO",
    "ONLINEDPO": "it compares pairs of responses by a judge: no distillation or policy loss",
}
"""Trainers that cannot be audited -> why."""


def load(name: str, settings: dict[str, str]) -> UserLoss:
    """Return the loss of a trainer of TRL.

    Args:
        name: Key of LOSSES, in any case, with or without hyphens.
        settings: Fields of the trainer's configuration, as texts.

    Returns:
        The loss.

    Raises:
        InvalidInput: The trainer or a setting is unknown or cannot be reached, or TRL refuses it.
        MissingPackage: TRL is not installed.
        BrokenPackage: It cannot be imported.
    """
    target = ",".join([f"trl:{name}", *(f"{key}={value}" for key, value in settings.items())])
    found = {_plain(key): loss for key, loss in LOSSES.items()}
    if _plain(name) in OUT_OF_REACH:
        raise InvalidInput(f"{target}: {OUT_OF_REACH[_plain(name)]}")
    if _plain(name) not in found:
        raise InvalidInput(f"{target}: unknown trainer {name!r}; known: {', '.join(LOSSES)}")
    loss = found[_plain(name)]
    module = package(loss.module)
    kind = getattr(module, loss.trainer)
    args = make_config(target, loss, getattr(module, loss.config), settings)
    for size in {*SUPPORT_SIZES} & {*loss.settings}:
        if (vars(args)[size] or 0) > LARGEST_SUPPORT and _reads_support(args):
            raise InvalidInput(
                f"{target}: {size} is {vars(args)[size]}, and an audit of so many ids takes too "
                f"long; set {size}=2, or at most {LARGEST_SUPPORT}"
            )
    asks = loss.asks
    if loss.function is policy_gradient.policy_gradient and args.beta:
        asks = (*asks, "teacher_logits")

    def function(**values: Any) -> Tensor:
        return loss.function(kind, args, values)

    return UserLoss(target, function, asks)


def _reads_support(args: Any) -> bool:
    """Return whether a configuration's loss is on a support."""
    return vars(args).get("distillation_mode", "topk_logits") == "topk_logits"


def _plain(name: str) -> str:
    """Return a name without case and hyphens."""
    return name.replace("-", "").replace("_", "").upper()


def make_config(target: str, loss: TrlLoss, kind: type, settings: dict[str, str]) -> Any:
    """Return a trainer's configuration.

    Args:
        target: Name for messages.
        loss: The trainer.
        kind: Class of its configuration.
        settings: Fields, as texts.

    Returns:
        The configuration, checked by TRL.

    Raises:
        InvalidInput: A setting is unknown, is not read by the loss, or has no such value.
    """
    fields = {x.name: x for x in dataclasses.fields(kind)}
    values = {}
    for key, text in settings.items():
        if key not in loss.settings:
            why = f"unknown setting {key!r}"
            if key in fields:
                default = f"the loss of {loss.trainer} does not read it"
                why = f"{key} cannot be set: {SAMPLING.get(key, default)}"
            raise InvalidInput(f"{target}: {why}; known: {', '.join(loss.settings)}")
        values[key] = _value(target, fields[key], text)
    usual = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of fields that were not set here
            return kind(**usual, **loss.fixed, **values)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{target}: TRL refuses it: {error}") from error


def _value(target: str, setting: "dataclasses.Field[Any]", text: str) -> Any:
    """Return a setting's value, read as its default and its annotation say."""
    default, annotation = setting.default, str(setting.type)
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, str) and default != "auto":
            return text
        if text.lower() == "none":
            return None
        if "list" in annotation or "tuple" in annotation:
            return [float(x) for x in text.split("/")]
        return int(text) if isinstance(default, int) or "int" in annotation else float(text)
    except (KeyError, ValueError) as error:
        raise InvalidInput(
            f"{target}: {setting.name} is {text!r}, expected {annotation}"
        ) from error
