"""The two losses of verl's actor, and the advantages of its trainer.

Shapes: B responses, T positions of the audit, L positions of the longest response, N tokens of all
sequences, V vocabulary, K ids.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.objectives.audit.verl.batches import Rows, package, token_logp

DISTILLATION = "distillation"
"""Advantage of a token: log-probability of the teacher minus that of the student, constant."""
NO_ADVANTAGE = "none"
"""Advantages of 0, which leave the penalties."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What verl's loss of a run is made of."""

    actor: Any
    """verl's ActorConfig."""
    algorithm: Any
    """verl's AlgoConfig; its estimator may also be DISTILLATION or NO_ADVANTAGE."""
    distillation: Any
    """verl's DistillationConfig; None for a policy loss alone."""
    use_topk: bool
    """Whether the distillation loss reads the teacher's top-K."""
    old_is_student: bool
    """Whether verl recomputes the log-probabilities of the rollouts with the student."""
    micro_batches: int
    """Parts of a mini-batch."""

    @property
    def distillation_loss(self) -> Any:
        """The DistillationLossConfig of verl; None for a policy loss alone."""
        return None if self.distillation is None else self.distillation.distillation_loss

    @property
    def has_policy(self) -> bool:
        """Whether a policy loss is part of the loss."""
        return self.distillation is None or self.distillation_loss.use_task_rewards

    @property
    def asks(self) -> tuple[str, ...]:
        """Names of `opd.objectives.user_loss.PARAMETERS` that the loss is called with."""
        names = ["student_logits", "tokens", "mask", "sampler_logp"]
        algorithm, estimator = self.algorithm, self.algorithm.adv_estimator
        reads_teacher = self.distillation is not None or estimator == DISTILLATION
        if reads_teacher or self.actor.use_kl_loss or algorithm.use_kl_in_reward:
            names.append("teacher_logits")
        if self.has_policy and estimator not in (DISTILLATION, NO_ADVANTAGE):
            names += ["reward", "prompt"]
        return tuple(names)


def verl_loss(settings: Settings, values: dict[str, Any]) -> Tensor:
    """Return the loss of verl's actor on a batch of the audit, which is one mini-batch.

    The trainer's part sees the mini-batch; the losses of its micro-batches are added, as verl's
    engines do.

    Args:
        settings: What the loss is made of.
        values: Value of each of `settings.asks`.

    Returns:
        Scalar.
    """
    values = values | {"student_logp": token_logp(values["student_logits"], values["tokens"])}
    values |= trainer_fields(settings, Rows(values))
    parts = torch.arange(len(values["mask"])).chunk(settings.micro_batches)
    losses = [
        micro_batch_loss(settings, Rows({name: x[part] for name, x in values.items()}), values)
        for part in parts
    ]
    return torch.stack(losses).sum()


def micro_batch_loss(settings: Settings, rows: Rows, whole: dict[str, Any]) -> Tensor:
    """Return the loss of verl's actor on a micro-batch.

    Args:
        settings: What the loss is made of.
        rows: Its responses.
        whole: Values of the mini-batch, whose tokens and rows the loss divides by.

    Returns:
        Scalar.
    """
    values, loss = rows.values, settings.distillation_loss
    data = package("tensordict").TensorDict(actor_fields(settings, rows), batch_size=len(rows))
    package("verl.utils.tensordict_utils").assign_non_tensor(
        data,
        dp_size=1,
        batch_num_tokens=int(whole["mask"].sum()),
        global_batch_size=len(whole["mask"]),
        temperature=1.0,
        distillation_only=settings.use_topk
        and not (loss.use_task_rewards or loss.use_policy_gradient),
    )
    output = {"log_probs": rows.sequences(values["student_logp"])}
    if settings.actor.entropy_coeff:
        logp = values["student_logits"].log_softmax(-1)
        output["entropy"] = rows.sequences(-(logp.exp() * logp).sum(-1))
    if settings.distillation is None:
        result, _ = package("verl.workers.utils.losses").ppo_loss(settings.actor, output, data)
        return scalar(result)
    call = package("verl.trainer.distillation.losses").distillation_ppo_loss
    configs = settings.actor, settings.distillation
    if settings.use_topk:
        packed: Any = rows.sequences(values["student_logits"])
        parts = call(*configs, data=data, student_logits=packed.values()[None])
        output |= {
            name: torch.nested.nested_tensor_from_jagged(x[0], packed.offsets())
            for name, x in parts.items()
        }
    result, _ = call(*configs, model_output=output, data=data)
    return scalar(result)


def scalar(loss: Tensor) -> Tensor:
    """Return a loss of one element without dimensions."""
    return loss.reshape(())


def actor_fields(settings: Settings, rows: Rows) -> dict[str, Tensor]:
    """Return the fields of a micro-batch.

    Args:
        settings: What the loss is made of.
        rows: The responses.

    Returns:
        Field of verl's batch -> nested tensor.
    """
    values = rows.values
    names = {
        "old_log_probs": "old_logp",
        "rollout_log_probs": "sampler_logp",
        "advantages": "advantages",
        "ref_log_prob": "teacher_logp",
        "rollout_is_weights": "rollout_is_weights",
        "response_mask": "response_mask",
    }
    fields = rows.token_fields()
    fields |= {name: rows.responses(values[x]) for name, x in names.items() if x in values}
    return fields | (teacher_fields(settings, rows) if settings.distillation is not None else {})


def teacher_fields(settings: Settings, rows: Rows) -> dict[str, Tensor]:
    """Return what verl's teacher server sends: its top-K, or the sampled token's log-probability.

    Args:
        settings: What the loss is made of.
        rows: The responses.

    Returns:
        `teacher_ids` and `teacher_logprobs`.
    """
    logp = rows.values["teacher_logits"].detach().log_softmax(-1)
    ids = rows.values["tokens"][..., None]
    if settings.use_topk:
        ids = logp.topk(settings.distillation_loss.topk, -1).indices
    return {
        "teacher_ids": rows.sequences(ids),
        "teacher_logprobs": rows.sequences(logp.gather(-1, ids)),
    }


@torch.no_grad()
def trainer_fields(settings: Settings, rows: Rows) -> dict[str, Tensor]:
    """Return what verl's trainer computes before an update.

    Args:
        settings: What the loss is made of.
        rows: The responses of the mini-batch; the values hold `student_logp`, too.

    Returns:
        (B, T or L) `old_logp`, `advantages`, and `teacher_logp` if the loss reads the teacher; with
        a correction of rollouts also its weights and the mask that it leaves.
    """
    values, algorithm = rows.values, settings.algorithm
    estimator = algorithm.adv_estimator
    student_logp = values["student_logp"]
    old_logp = student_logp if settings.old_is_student else values["sampler_logp"]
    fields: dict[str, Tensor] = {"old_logp": old_logp.clone()}
    if "teacher_logits" in settings.asks:
        fields["teacher_logp"] = token_logp(values["teacher_logits"], values["tokens"])
    data = package("verl.protocol").DataProto.from_dict(
        tensors={
            "response_mask": rows.padded(values["mask"].long()),
            "old_log_probs": rows.padded(old_logp),
            "rollout_log_probs": rows.padded(values["sampler_logp"]),
        }
    )
    if algorithm.rollout_correction is not None:
        helper = package("verl.trainer.ppo.rollout_corr_helper")
        correct = helper.compute_rollout_correction_and_add_to_batch
        data, _ = correct(data, algorithm.rollout_correction)
        names = {"response_mask", "rollout_is_weights"} & {*data.batch.keys()}
        fields |= {name: data.batch[name] for name in names}
    if not settings.has_policy or estimator == NO_ADVANTAGE:
        fields["advantages"] = torch.zeros_like(student_logp)
    elif estimator == DISTILLATION:
        fields["advantages"] = fields["teacher_logp"] - student_logp
    else:
        if algorithm.use_kl_in_reward:
            data.batch["ref_log_prob"] = rows.padded(fields["teacher_logp"])
        fields["advantages"] = reward_advantages(settings, rows, data)
    return fields


def reward_advantages(settings: Settings, rows: Rows, data: Any) -> Tensor:
    """Return the advantages of the rewards by verl's estimator.

    Args:
        settings: What the loss is made of.
        rows: The responses.
        data: Batch of verl's trainer; receives the fields that the estimators read.

    Returns:
        (B, L) advantages.
    """
    algorithm, trainer = settings.algorithm, package("verl.trainer.ppo.ray_trainer")
    add_reward_fields(data, rows, algorithm.adv_estimator)
    data.batch["token_level_rewards"] = data.batch["token_level_scores"]
    if algorithm.use_kl_in_reward:
        controller = package("verl.trainer.ppo.core_algos").get_kl_controller(algorithm.kl_ctrl)
        data, _ = trainer.apply_kl_penalty(data, controller, algorithm.kl_penalty)
    data = trainer.compute_advantage(
        data,
        algorithm.adv_estimator,
        gamma=algorithm.gamma,
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
        config=algorithm,
    )
    advantages: Tensor = data.batch["advantages"]
    return advantages


def add_reward_fields(data: Any, rows: Rows, estimator: str) -> None:
    """Add what an estimator of advantages reads.

    The greedy response of each prompt, ReMax's baseline, has the reward 0.

    Args:
        data: Batch of verl's trainer; receives the fields.
        rows: The responses.
        estimator: Its name.
    """
    values = rows.values
    probabilities = values["student_logits"].detach().softmax(-1)
    data.batch["token_level_scores"] = rows.rewards()
    if estimator == "remax":
        data.batch["reward_baselines"] = torch.zeros_like(values["reward"])
    data.batch["sum_pi_squared"] = rows.padded(probabilities.square().sum(-1))
    data.batch["prompts"] = torch.zeros_like(values["tokens"][:, :1])
    is_prompt = torch.ones_like(rows.inside[:, :1])
    data.batch["attention_mask"] = torch.cat([is_prompt, rows.inside], 1).long()
    data.non_tensor_batch["uid"] = values["prompt"].numpy().astype(object)
    data.non_tensor_batch["reward"] = values["reward"].numpy()
