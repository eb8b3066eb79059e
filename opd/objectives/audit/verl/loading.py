"""`verl:MODE[,setting=value...]`: a policy loss or a distillation loss of the installed verl.

Modes have the names of verl's registries. Settings are fields of its configurations, with the
values of its trainer's configuration files.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.audit.verl.batches import package
from opd.objectives.audit.verl.losses import DISTILLATION, NO_ADVANTAGE, Settings, verl_loss
from opd.objectives.user_loss import UserLoss

OURS = "opdlab_"
"""Prefix of the modes that `opd.integrations.verl.register` adds."""

ACTOR = (
    *("loss_agg_mode", "loss_scale_factor", "clip_ratio", "clip_ratio_low", "clip_ratio_high"),
    *("clip_ratio_c", "entropy_coeff", "tau_pos", "tau_neg"),
    *("use_kl_loss", "kl_loss_coef", "kl_loss_type"),
)
POLICY = (
    *("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta"),
)
CORRECTION = (
    *("loss_type", "rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize"),
    *("rollout_rs", "rollout_rs_threshold"),
)
ALGORITHM = (
    *("adv_estimator", "gamma", "norm_adv_by_std_in_grpo", "use_kl_in_reward", "kl_penalty"),
)
LOSS = (
    *("topk", "use_task_rewards", "distillation_loss_coef", "use_policy_gradient"),
    *("loss_max_clamp", "log_prob_min_clamp", "use_chunked_topk", "clip_ratio"),
    *("clip_ratio_low", "clip_ratio_high"),
)
OTHER = ("kl_coef", "old_log_probs", "micro_batches")
"""Settings by the configuration that holds them. OTHER: the coefficient of verl's KL controller;
whose log-probabilities verl calls old, "rollout" or "student"; parts of a mini-batch."""

OUT_OF_REACH = {
    "strategy": "the audit calls the loss of FSDP, which VeOmni shares; Megatron's is a kernel of "
    "parallel ranks, written for the same loss",
    "use_fused_kernels": "the kernels run on a GPU only",
    "lam": "GAE needs the values of a critic",
    "policy_loss_mode": "verl takes no other than vanilla",
    "loss_mode": "it is the mode, verl:MODE",
    "chunked_topk_chunk_size": "it changes the memory, not the loss",
}
"""Fields that cannot be set -> why."""
NO_ESTIMATOR = {"gae": "it needs the values of a critic, a second model"}
"""Estimators that cannot be reached -> why."""


def load(name: str, settings: dict[str, str]) -> UserLoss:
    """Return a loss of verl.

    Args:
        name: A distillation loss or a policy loss as verl registers it, or one of ours there.
        settings: Fields of verl's configurations, as texts.

    Returns:
        The loss.

    Raises:
        InvalidInput: The mode or a setting is unknown or cannot be reached, or verl refuses it.
        MissingPackage: verl is not installed.
    """
    target = ",".join([f"verl:{name}", *(f"{key}={value}" for key, value in settings.items())])
    with contextlib.redirect_stdout(sys.stderr):  # verl prints warnings
        package("verl")
        distillation = package("verl.trainer.distillation.losses")
        algorithms = package("verl.trainer.ppo.core_algos")
        if name.startswith(OURS):
            package("opd.integrations.verl.register")
        is_policy = name in algorithms.POLICY_LOSS_REGISTRY
        if not is_policy and name not in distillation.DISTILLATION_LOSS_REGISTRY:
            raise InvalidInput(
                f"{target}: unknown mode {name!r}; distillation losses: "
                f"{', '.join(distillation.DISTILLATION_LOSS_REGISTRY)}; policy losses: "
                f"{', '.join(algorithms.POLICY_LOSS_REGISTRY)}; ours: {OURS}NAME of `opd train`"
            )
        try:
            made = make_settings(target, name, is_policy, settings)
        except InvalidInput as error:
            raise error if str(error).startswith(target) else _refused(target, error) from error
        except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
            raise _refused(target, error) from error

    def function(**values: Any) -> Tensor:
        return verl_loss(made, values)

    return UserLoss(target, function, made.asks)


def _refused(target: str, error: Exception) -> InvalidInput:
    """Return the error of a configuration that verl refuses, or one of our modes there."""
    if target.startswith(f"verl:{OURS}"):
        return InvalidInput(f"{target}: {error}")
    is_k1 = target.startswith("verl:k1")
    hint = " (with use_policy_gradient=true it is the reward of a policy loss)" if is_k1 else ""
    return InvalidInput(f"{target}: verl refuses it: {error}{hint}")


def make_settings(target: str, mode: str, is_policy: bool, texts: dict[str, str]) -> Settings:
    """Return verl's configurations of a loss.

    Args:
        target: Name for messages.
        mode: Its mode.
        is_policy: Whether it is a policy loss alone.
        texts: Settings, as texts.

    Returns:
        The configurations, checked by verl.

    Raises:
        InvalidInput: A setting is unknown or has no such value.
    """
    configs, algorithms = package("verl.workers.config"), package("verl.trainer.config.algorithm")
    known = (*ACTOR, *(POLICY if is_policy else LOSS), *CORRECTION, *ALGORITHM, *OTHER)
    check_names(target, texts, known)

    def chosen(kind: type, names: tuple[str, ...]) -> dict[str, Any]:
        fields = {x.name: x for x in dataclasses.fields(kind)}
        return {x: _value(target, fields[x], texts[x]) for x in names if x in texts and x in known}

    correction = algorithms.RolloutCorrectionConfig(
        **{"rollout_is": None} | chosen(algorithms.RolloutCorrectionConfig, CORRECTION)
    )
    policy = {"loss_mode": mode} if is_policy else {}
    actor = configs.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=configs.PolicyLossConfig(
            **policy, **chosen(configs.PolicyLossConfig, POLICY), rollout_correction=correction
        ),
        **chosen(configs.ActorConfig, ACTOR),
    )
    is_bypass = mode == "bypass_mode"
    corrects = not is_bypass and any(x in texts for x in CORRECTION)
    algorithm = algorithms.AlgoConfig(
        **{"adv_estimator": DISTILLATION if is_policy else "grpo"}
        | chosen(algorithms.AlgoConfig, ALGORITHM),
        kl_ctrl=algorithms.KLControlConfig(kl_coef=_number(target, "kl_coef", texts, 0.001)),
        rollout_correction=correction if corrects else None,
        gdpo_reward_keys=["reward"],
    )
    check_estimator(target, algorithm.adv_estimator)
    distillation, use_topk = None, False
    if not is_policy:
        distillation, use_topk = make_distillation(
            mode, chosen(configs.DistillationLossConfig, LOSS)
        )
    old = texts.get("old_log_probs", "student" if corrects else "rollout")
    if old not in ("student", "rollout"):
        raise InvalidInput(f"{target}: old_log_probs is {old!r}; expected student or rollout")
    micro_batches = texts.get("micro_batches", "1")
    if not micro_batches.isdecimal() or int(micro_batches) < 1:
        raise InvalidInput(f"{target}: micro_batches is {micro_batches!r}; expected 1 or more")
    return Settings(
        actor=actor,
        algorithm=algorithm,
        distillation=distillation,
        use_topk=use_topk,
        old_is_student=old == "student",
        micro_batches=int(micro_batches),
    )


def check_names(target: str, texts: dict[str, str], known: tuple[str, ...]) -> None:
    """Refuse settings that the loss does not read.

    Args:
        target: Name for messages.
        texts: The settings.
        known: Names of those that it reads.

    Raises:
        InvalidInput: One of them is unknown.
    """
    for key in texts:
        if key not in known:
            why = f"unknown setting {key!r}"
            if key in OUT_OF_REACH:
                why = f"{key} cannot be set: {OUT_OF_REACH[key]}"
            elif key in (*POLICY, *LOSS):
                why = f"{key} cannot be set: this loss does not read it"
            raise InvalidInput(f"{target}: {why}; known: {', '.join(dict.fromkeys(known))}")


def check_estimator(target: str, name: str) -> None:
    """Refuse an estimator of advantages that cannot be reached.

    Args:
        target: Name for messages.
        name: Its name.

    Raises:
        InvalidInput: It is unknown, or needs more than a batch.
    """
    if name in NO_ESTIMATOR:
        raise InvalidInput(
            f"{target}: adv_estimator {name} cannot be audited: {NO_ESTIMATOR[name]}"
        )
    registry = package("verl.trainer.ppo.core_algos").ADV_ESTIMATOR_REGISTRY
    reachable = [x for x in registry if x not in NO_ESTIMATOR]
    if name not in (DISTILLATION, NO_ADVANTAGE, *reachable):
        raise InvalidInput(
            f"{target}: unknown adv_estimator {name!r}; known: {DISTILLATION}, {NO_ADVANTAGE}, "
            f"{', '.join(reachable)}"
        )


def make_distillation(mode: str, chosen: dict[str, Any]) -> tuple[Any, bool]:
    """Return verl's configuration of a distillation loss, and whether it reads the top-K.

    Defaults are those of the trainer's file, which differ from those of the class, but for K, which
    is 2, and for rewards, which are left out.

    Args:
        mode: The mode.
        chosen: Fields that are set.

    Returns:
        The configuration of which the loss reads one part, and whether it reads the top-K.
    """
    configs = package("verl.workers.config")
    path = Path(package("verl").__file__).parent / "trainer/config/distillation/distillation.yaml"
    stored = package("omegaconf").OmegaConf.load(path).distillation_loss
    defaults = {
        x.name: stored[x.name]
        for x in dataclasses.fields(configs.DistillationLossConfig)
        if x.name in stored and x.name != "_target_"
    }
    values = defaults | {"topk": 2, "use_task_rewards": False} | chosen | {"loss_mode": mode}
    loss = configs.DistillationLossConfig(**values)
    config = configs.DistillationConfig.__new__(configs.DistillationConfig)
    object.__setattr__(config, "distillation_loss", loss)  # without teachers, which it would start
    return config, loss.loss_settings.use_topk


def _number(target: str, key: str, texts: dict[str, str], default: float) -> float:
    """Return a setting's number."""
    try:
        return float(texts.get(key, default))
    except ValueError as error:
        raise InvalidInput(f"{target}: {key} is {texts[key]!r}, expected a number") from error


def _value(target: str, setting: "dataclasses.Field[Any]", text: str) -> Any:
    """Return a setting's value, read as its annotation says."""
    kind = setting.type
    annotation = kind.__name__ if isinstance(kind, type) else str(kind)
    if text.lower() in ("none", "null") and setting.name != "adv_estimator":
        return None
    try:
        if annotation == "bool":
            return {"true": True, "false": False}[text.lower()]
        if "float" in annotation:
            with contextlib.suppress(ValueError):
                return float(text)
        if "str" in annotation:
            return text
        return int(text) if "int" in annotation else float(text)
    except (KeyError, ValueError) as error:
        raise InvalidInput(
            f"{target}: {setting.name} is {text!r}, expected {annotation}"
        ) from error
