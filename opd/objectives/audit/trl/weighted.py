"""TRL's IW-OPD, SDFT and SDPO: per-token losses of sampled tokens or on a support.

A trainer's models are given the audit's logits times its temperature, so that the student that it
scores is the one that sampled. Shapes: B responses, T positions, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from opd.objectives.audit.trl.stand_ins import (
    LogitsModel,
    TeacherClient,
    bare_trainer,
    generated_batch,
    labelled_batch,
    with_prompt,
)

ASKS = ("student_logits", "teacher_logits", "tokens", "mask", "sampler_logp")
"""What these losses ask for."""


def iw_opd(kind: type, args: Any, values: dict[str, Any]) -> Tensor:
    """Return the loss of IWOPDTrainer; with vLLM it reads the sampler's log-probabilities.

    Args:
        kind: Class of the trainer.
        args: Its configuration.
        values: Value of each of ASKS.

    Returns:
        Scalar.
    """
    settings = (
        *("beta", "temperature", "distillation_objective", "iw_opd_gamma", "iw_opd_epsilon"),
        *("reverse_kl_top_1_mode", "loss_top_k", "loss_add_tail", "use_teacher_server"),
    )
    student, teacher = (
        LogitsModel(values[name] * args.temperature)
        for name in ("student_logits", "teacher_logits")
    )
    trainer = bare_trainer(
        kind,
        args,
        **{name: getattr(args, name) for name in settings},
        teacher_model=None if args.use_teacher_server else teacher,
        teacher_client=TeacherClient(values["teacher_logits"], values["mask"]),
        _local_teacher_tokenizer_matches_student=True,
    )
    batch = labelled_batch(values["tokens"], values["mask"])
    if args.use_teacher_server:
        batch["prompt_attention_mask"] = torch.ones_like(batch["input_ids"][:, :1])
    if args.use_vllm:
        batch["rollout_logprobs"] = with_prompt(values["sampler_logp"], 0)
    count = values["mask"].sum()
    loss: Tensor = trainer.compute_loss(student, batch, num_items_in_batch=count)
    return loss


def sdft(kind: type, args: Any, values: dict[str, Any]) -> Tensor:
    """Return the loss of SDFTTrainer, with the audit's teacher in place of its own.

    Args:
        kind: Class of the trainer.
        args: Its configuration.
        values: Value of each of ASKS.

    Returns:
        Scalar.
    """
    skipped = args.num_loss_tokens_to_skip
    return _self_distillation(kind, args, values, num_loss_tokens_to_skip=skipped)


def sdpo(kind: type, args: Any, values: dict[str, Any]) -> Tensor:
    """Return the distillation loss of SDPOTrainer, with the audit's teacher in place of its own.

    Args:
        kind: Class of the trainer.
        args: Its configuration.
        values: Value of each of ASKS.

    Returns:
        Scalar.
    """
    return _self_distillation(kind, args, values)


def _self_distillation(kind: type, args: Any, values: dict[str, Any], **attributes: Any) -> Tensor:
    """Return the loss of either trainer.

    With more than one iteration the rollouts are older than the student, and the loss reads their
    log-probabilities.
    """
    student, teacher = (
        LogitsModel(values[name] * args.temperature)
        for name in ("student_logits", "teacher_logits")
    )
    trainer = bare_trainer(
        kind,
        args,
        temperature=args.temperature,
        use_teacher_server=False,
        teacher_model=teacher,
        **attributes,
    )
    batch = generated_batch(values["tokens"], values["mask"])
    batch |= {
        "teacher_input_ids": with_prompt(values["tokens"], 0),
        "teacher_attention_mask": with_prompt(values["mask"].long(), 1),
    }
    if args.num_iterations > 1:
        batch["old_per_token_logps"] = values["sampler_logp"]
    loss: Tensor = trainer.compute_loss(student, batch)
    return loss
