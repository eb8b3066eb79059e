"""TRL's trainers that match distributions: GKD, GOLD, Distillation and its two server variants.

A trainer's models are given the audit's logits times its temperature, so that the student that it
scores is the one that sampled. Shapes: B responses, T positions, L = T + 1, V vocabulary, K ids.
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
    package,
    with_prompt,
)

ASKS = ("student_logits", "teacher_logits", "tokens", "mask")
"""What these losses ask for."""


def gkd(kind: type, args: Any, values: dict[str, Any]) -> Tensor:
    """Return the loss of GKDTrainer, whose divergence does not read the temperature.

    Args:
        kind: Class of the trainer.
        args: Its configuration.
        values: Value of each of ASKS.

    Returns:
        Scalar.
    """
    teacher = LogitsModel(values["teacher_logits"])
    trainer = bare_trainer(kind, args, beta=args.beta, teacher_model=teacher)
    student = LogitsModel(values["student_logits"])
    batch = labelled_batch(values["tokens"], values["mask"])
    loss: Tensor = trainer.compute_loss(student, batch, num_items_in_batch=values["mask"].sum())
    return loss


def gold(kind: type, args: Any, values: dict[str, Any]) -> Tensor:
    """Return the loss of GOLDTrainer: the divergence of one vocabulary, or that of two (ULD).

    Args:
        kind: Class of the trainer.
        args: Its configuration.
        values: Value of each of ASKS.

    Returns:
        Scalar.
    """
    batch = labelled_batch(values["tokens"], values["mask"])
    temperature = 1.0 if args.use_uld_loss else args.temperature
    student, teacher = (
        LogitsModel(values[name] * temperature) for name in ("student_logits", "teacher_logits")
    )
    if args.use_uld_loss:
        return _uld(args, student.states, teacher.states.detach(), batch)
    trainer = bare_trainer(
        kind,
        args,
        beta=args.beta,
        temperature=args.temperature,
        teacher_model=teacher,
        use_uld_loss=False,
        teacher_tokenizer=None,
    )
    loss: Tensor = trainer.compute_loss(student, batch, num_items_in_batch=values["mask"].sum())
    return loss


def _uld(args: Any, student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return GOLD's loss for two tokenizers, on two equal ones whose tokens have one byte each."""
    labels, ids = batch["labels"], batch["input_ids"]
    tokenizer = _Tokenizer(student.shape[-1])
    loss_function = package("trl.experimental.gold.gold_trainer").ULDLoss(
        args, student_tokenizer=tokenizer, teacher_tokenizer=tokenizer, device=student.device
    )
    start = torch.arange(labels.shape[1]).expand_as(labels)
    offsets = torch.stack([start, start + 1], -1)
    loss: Tensor = loss_function(
        student, teacher, labels, labels, ids, ids, offsets, teacher_byte_offsets=offsets
    )
    return loss


class _Tokenizer:
    """A vocabulary of numbers."""

    def __init__(self, size: int) -> None:
        """Keep V."""
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return {str(i): i for i in range(self.size)}


def distillation(kind: type, args: Any, values: dict[str, Any]) -> Tensor:
    """Return the loss of DistillationTrainer.

    Args:
        kind: Class of the trainer.
        args: Its configuration.
        values: Value of each of ASKS.

    Returns:
        Scalar.
    """
    student, teacher = (
        LogitsModel(values[name] * args.temperature)
        for name in ("student_logits", "teacher_logits")
    )
    trainer = bare_trainer(
        kind, args, beta=args.beta, temperature=args.temperature, teacher_model=teacher
    )
    batch = generated_batch(values["tokens"], values["mask"])
    batch["num_items_in_batch"] = values["mask"].sum()
    loss: Tensor = trainer.compute_loss(student, batch)
    return loss


def server_distillation(kind: type, args: Any, values: dict[str, Any]) -> Tensor:
    """Return the loss of ServerDistillationTrainer, with the server's answer from the logits.

    Args:
        kind: Class of the trainer.
        args: Its configuration.
        values: Value of each of ASKS.

    Returns:
        Scalar.
    """
    trainer = bare_trainer(
        kind,
        args,
        beta=args.beta,
        temperature=args.temperature,
        reverse_kl_top_1_mode=args.reverse_kl_top_1_mode,
        loss_top_k=args.loss_top_k,
        loss_add_tail=args.loss_add_tail,
        teacher_client=TeacherClient(values["teacher_logits"], values["mask"]),
    )
    student = LogitsModel(values["student_logits"] * args.temperature)
    batch = generated_batch(values["tokens"], values["mask"])
    loss: Tensor = trainer.compute_loss(student, batch)
    return loss


def async_distillation(kind: type, args: Any, values: dict[str, Any]) -> Tensor:
    """Return the loss of AsyncDistillationTrainer on one packed row.

    As from vLLM, the teacher's answer holds the sampled token beside its K most probable ones.

    Args:
        kind: Class of the trainer.
        args: Its configuration.
        values: Value of each of ASKS.

    Returns:
        Scalar.
    """
    trainer = bare_trainer(kind, args, _teacher_ids=["teacher"])
    for name in ("forward_tokens", "trained_tokens", "seq_len_weighted", "samples", "forward_s"):
        object.__setattr__(trainer, f"_step_{name}", 0.0)
    tokens, mask = values["tokens"], values["mask"]
    logp = values["teacher_logits"].detach().log_softmax(-1)
    ids = logp.topk(args.teacher_top_k, -1).indices
    is_among = (ids == tokens[..., None]).any(-1)
    ids = torch.cat([ids, torch.where(is_among, -1, tokens)[..., None]], -1)
    logp = logp.gather(-1, ids.clamp(min=0)).float()
    absent = (ids < 0) | ~mask[..., None]
    logits = values["student_logits"] * args.teacher_temperature
    student = LogitsModel(logits, is_packed=True)
    input_ids = with_prompt(tokens, 0)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "completion_mask": with_prompt(mask.long(), 0),
        "position_ids": torch.arange(input_ids.shape[1]).expand_as(input_ids),
        "teacher_topk_ids": with_prompt(ids.masked_fill(absent, -1), -1),
        "teacher_topk_logprobs": with_prompt(logp.masked_fill(absent, -torch.inf), -torch.inf),
    }
    packed = {name: x.flatten(0, 1)[None] for name, x in batch.items()}
    packed["global_n_tokens"] = mask.sum()[None].float()
    packed["global_n_forward_tokens"] = torch.tensor([float(input_ids.numel())])
    packed["mean_seq_len"] = torch.tensor([float(input_ids.shape[1])])
    loss: Tensor = trainer.compute_loss(student, packed)
    return loss
