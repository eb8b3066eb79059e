"""Loss and gradient of a micro-batch, and the step of the optimizer.

Shapes: B rows of a pass, P prompt and T response positions, L = P + T - 1 positions that a model
reads, N = B T response tokens, n tokens of a chunk, D hidden size, V shared vocabulary, K ids.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd.analysis.plan.counts import Counts, OperationCounter
from opd.analysis.plan.machines import Machine
from opd.analysis.plan.networks import MetaNetwork
from opd.analysis.plan.passes.model import (
    Rows,
    make_states,
    over_layers,
    response_states,
    split_model,
)
from opd.config.settings import Config
from opd.models.contexts import activation_checkpointing
from opd.models.lm_head import chunk_elements
from opd.models.model import CausalLM
from opd.models.planned_device import planned_device
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import Objective
from opd.objectives.support import JOINT_SUPPORTS
from opd.scoring.chunked_loss import chunked_loss
from opd.scoring.loss import loss_from_hidden
from opd.training.optimizer import make_optimizer

ADAMW_TENSORS = 7
"""Tensors of a weight that AdamW moves: reads weight, gradient and moments, writes all but one."""
FEW_TOKENS = 512
"""Tokens of a loss on gathered head rows that are counted in half precision, where a CPU works in a
loop over tokens; the others are extrapolated."""


def count_update(
    student: MetaNetwork,
    teacher: MetaNetwork | None,
    objective: Objective,
    rows: Rows,
    vocabulary: int,
    config: Config,
    machine: Machine,
    *,
    has_gradients: bool,
) -> Counts:
    """Count forward pass, loss and backward pass of a micro-batch.

    Args:
        student: The student.
        teacher: The teacher in this process; None if the loss does not read its head.
        objective: The objective.
        rows: Shape of the micro-batch.
        vocabulary: V.
        config: Settings.
        machine: Machine whose time is counted.
        has_gradients: Whether gradients of an earlier micro-batch are there.

    Returns:
        The counts; `kept_bytes` are the activations after the forward pass, and `gradients` is a
        part of the peak.
    """

    def count() -> Counts:
        return _count_update(
            student, teacher, objective, rows, vocabulary, config, machine, has_gradients
        )

    return over_layers(student, count)


def _count_update(
    student: MetaNetwork,
    teacher: MetaNetwork | None,
    objective: Objective,
    rows: Rows,
    vocabulary: int,
    config: Config,
    machine: Machine,
    has_gradients: bool,
) -> Counts:
    model, needs = split_model(student, vocabulary), objective.requirements
    teacher_model = None if teacher is None else split_model(teacher, vocabulary)
    is_gathered = not needs.normalised and needs.support not in ("none", "full")
    max_elements, device = config.hardware.max_logits_per_chunk, torch.device(machine.kind)
    chunk = max(1, chunk_elements(max_elements, vocabulary, device) // vocabulary)
    num_tokens = rows.tokens
    num_counted = num_tokens
    if not is_gathered and objective.user_loss is None:
        num_counted = min(num_tokens, 2 * chunk)
    elif is_gathered and student.dtype.itemsize < 4:
        num_counted = min(num_tokens, FEW_TOKENS)
    optimizer = make_optimizer(student.network.parameters(), (0.9, 0.999), 0.0)
    counter = OperationCounter(machine)
    hooks = [
        weight.register_post_accumulate_grad_hook(_gradient_hook(counter, master))
        for weight, master in zip(optimizer.model_weights, optimizer.master_weights, strict=True)
        if not has_gradients
    ]
    with counter, planned_device(machine.kind):
        if has_gradients:
            for master in optimizer.master_weights:
                master.grad = torch.zeros_like(master)
                counter.add_gradient(master.grad)
        inputs, teacher_states = loss_inputs(objective, num_counted, teacher_model, teacher)
        is_checkpointed = config.hardware.gradient_checkpointing
        with activation_checkpointing(student.network, is_checkpointed):
            hidden = response_states(model, student, rows, num_counted)
            counter.mark_kept()
            counts_before = counter.counts()
            if objective.user_loss is None:
                loss = loss_from_hidden(
                    model,
                    objective,
                    hidden,
                    inputs,
                    teacher=teacher_model,
                    teacher_hidden=teacher_states,
                    temperature=config.rollout.temperature,
                    max_logits_per_chunk=config.hardware.max_logits_per_chunk,
                )
            else:
                loss = dense_loss(model, hidden)
            counts_after = counter.counts()
            loss.backward()
            del loss, hidden
    optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    _remove_hooks(optimizer.model_weights)
    counts = counter.counts()
    repeats = num_tokens / num_counted - 1
    width = make_states(model, student, 1).shape[1]
    missing_states = (num_tokens - num_counted) * width * student.dtype.itemsize
    return Counts(
        counts.flops + repeats * (counts_after.flops - counts_before.flops),
        counts.moved_bytes + repeats * (counts_after.moved_bytes - counts_before.moved_bytes),
        counts.operations + repeats * (counts_after.operations - counts_before.operations),
        counts.seconds + repeats * (counts_after.seconds - counts_before.seconds),
        counts.peak + 2 * missing_states,
        counts.kept_bytes + missing_states,
        counts.gradients,
    )


def _gradient_hook(counter: OperationCounter, master: Tensor) -> Any:
    """Return a hook that tells the counter about the gradient of a weight."""

    def hook(_: Tensor) -> None:
        if master.grad is not None:
            counter.add_gradient(master.grad)

    return hook


def _remove_hooks(weights: list[Tensor]) -> None:
    """Remove the hooks by which the optimizer's float32 gradients are summed."""
    for weight in weights:
        if weight._post_accumulate_grad_hooks:
            weight._post_accumulate_grad_hooks.clear()


def loss_inputs(
    objective: Objective, count: int, teacher_model: CausalLM | None, teacher: MetaNetwork | None
) -> tuple[TokenInputs, Tensor | None]:
    """Return what a loss reads of `count` tokens, on the meta device."""
    needs, k = objective.requirements, objective.support_k
    number = partial(torch.zeros, device="meta")
    ids = teacher_support = present = inside = None
    if needs.support not in ("none", "full"):
        k = 2 * k if needs.support == "union" else k
        ids = number(count, k, dtype=torch.long)
        teacher_support, inside = number(count, k), number(count, dtype=torch.bool)
        if needs.support in JOINT_SUPPORTS:
            present = number(count, k, dtype=torch.bool)
    inputs = TokenInputs(
        credit=number(count),
        weight=number(count),
        teacher_logp=number(count),
        old_logp=number(count),
        tokens=number(count, dtype=torch.long),
        ids=ids,
        teacher_support_logp=teacher_support,
        present=present,
        inside=inside,
    )
    states = None
    if needs.support == "full" and teacher_model is not None and teacher is not None:
        states = make_states(teacher_model, teacher, count)
    return inputs, states


def dense_loss(model: CausalLM, hidden: Tensor) -> Tensor:
    """Return a loss that holds the log-softmax of all tokens, in the place of the user's own."""
    head = model.head

    def loss(products: Tensor, _: slice) -> Tensor:
        logits = head.shape_products(products[:, : head.vocabulary])
        return torch.zeros_like(logits).copy_(logits).log_softmax(-1).sum()

    num_products = max(1, len(hidden) * head.num_products(hidden))
    return chunked_loss(hidden, head, lambda _: loss, num_products)


def count_optimizer(student: MetaNetwork, machine: Machine) -> Counts:
    """Count clipping and a step of AdamW on gradients that are there.

    On a GPU torch updates all weights together, which needs a temporary copy of them; on a CPU its
    fused kernel, which the meta device lacks, reads four tensors of each weight and writes three.

    Args:
        student: The student.
        machine: Machine whose time is counted.

    Returns:
        The counts, without gradients and moments.
    """

    def count() -> Counts:
        optimizer = make_optimizer(student.network.parameters(), (0.9, 0.999), 0.01)
        for master in optimizer.master_weights:
            master.grad = torch.zeros_like(master)
        with OperationCounter(machine) as counter:
            torch.nn.utils.clip_grad_norm_(optimizer.master_weights, 1.0)
            if machine.kind == "cuda":
                optimizer.adamw.param_groups[0]["foreach"] = True
                optimizer.adamw.step()
            else:
                num_bytes = float(sum(master.nbytes for master in optimizer.master_weights))
                counter.add_operation(ADAMW_TENSORS * num_bytes)
            optimizer.copy_to_model()
        optimizer.zero_grad()
        _remove_hooks(optimizer.model_weights)
        return counter.counts()

    return over_layers(student, count)
