"""The update: loss inputs from the scored rollouts, backward passes, optimizer steps.

`prepare_loss` computes what a loss needs beside the models, over the whole batch and all ranks:
credit, importance ratios, denominators and micro-batches. `update_student` takes the optimizer
steps.

Shapes: B responses of this rank, T response positions.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.gradients.distributed import gather_batch
from opd.models.contexts import activation_checkpointing
from opd.models.forward import micro_batches
from opd.models.fsdp import unsharded
from opd.objectives.objective import Objective, token_weights
from opd.objectives.reduction import DENOMINATORS
from opd.objectives.token_selection import highest_entropy_tokens
from opd.runtime import distributed
from opd.scoring.loss import micro_batch_loss
from opd.scoring.score import ScoredBatch
from opd.training.checks.expected_loss import (
    credit_from_settings,
    expected_loss,
    loss_check_columns,
    ratio_from_settings,
)
from opd.training.checks.update import (
    columns_after_step,
    has_leftover_gradient,
    lost_gradient_share,
    sample_before_step,
    sampled_gradients,
)
from opd.training.optimizer import learning_rate
from opd.training.state import TaskState, TrainState, is_due

MicroBatch = tuple[list[int], float]
"""Rows, and the weight of their loss: 1, the rows' share of what a loss of the user's own divides
by, or 0 for rows that fill up a rank's last micro-batches.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedLoss:
    """The loss of a task's batch as a sum over responses, with everything that updates use."""

    objective: Objective
    """The objective."""
    batch: ScoredBatch
    """Scored batch of this rank, with the final loss mask."""
    credit: Tensor
    """(B, T) credit per token."""
    weight: Tensor
    """(B, T) loss weight per token: importance ratio / loss denominator."""
    denominator: Tensor
    """(B,) long, loss denominator of each response's update."""
    rows: list[list[int]]
    """Rows of this rank, by update."""
    micro_batches: list[list[MicroBatch]]
    """The rows of each update, split into micro-batches, equally many on every rank under FSDP."""
    expected: Tensor | None = None
    """What the first update's loss should be (`opd.training.checks.expected_loss`)."""


@dataclass(frozen=True, eq=False)
class SummedGradient:
    """The part of an update that a task's gradient was added to, in `grad` of the weights."""

    loss: Tensor
    """0-d weighted loss, detached."""
    first_gradients: list[tuple[Tensor, Tensor]] | None
    """Sampled gradients after the first micro-batch (`sampled_gradients`)."""
    leftover: float = 0.0
    """1 if a weight had a gradient before the first backward pass of a shared pass, otherwise 0."""
    seconds: float = 0.0
    """Seconds of the student's passes and of the loss while the batch was scored."""


@torch.no_grad()
def prepare_loss(task: TaskState, batch: ScoredBatch) -> PreparedLoss:
    """Compute credit, ratios and denominators from the tokens of all ranks.

    Credit, ratio and token selection are computed once, on all rollouts; each update has a
    denominator of its own, which counts the tokens of that update.

    Args:
        task: The task.
        batch: Scored batch with the loss mask.

    Returns:
        The loss.

    Raises:
        InvalidInput: An update has no supervised token.
    """
    config, objective, scored = task.config, task.objective, batch.scored
    all_ranks, local_rows = (
        (scored, slice(None)) if distributed.world_size() == 1 else gather_batch(scored)
    )
    local_index = (local_rows, slice(scored.mask.shape[1]))
    credit, ratio = objective.credit(all_ranks), objective.ratio(all_ranks)
    expected_credit = credit_from_settings(config, all_ranks)
    expected_ratio = ratio_from_settings(config, all_ranks)
    if config.objective.entropy_top_fraction < 1:
        selected_tokens = highest_entropy_tokens(all_ranks, config.objective.entropy_top_fraction)
        scored = scored.restrict_mask(selected_tokens[local_index])
        all_ranks = all_ranks.restrict_mask(selected_tokens)
    all_ranks = all_ranks.with_fields(support=None, prefix=None)
    local_positions = torch.arange(len(all_ranks))[local_rows].tolist()
    denominator = all_ranks.prompt.new_ones(len(all_ranks))
    rows_by_update: list[list[int]] = []
    groups_by_update: list[list[MicroBatch]] = []
    expected: Tensor | None = None
    all_rows_by_update = split_rows(all_ranks.prompt.tolist(), config.optimizer.updates_per_batch)
    for number, all_rows in enumerate(all_rows_by_update, 1):
        if bool(all_ranks.mask.any()) and not bool(all_ranks.mask[all_rows].any()):
            raise InvalidInput(
                f"update {number} of {config.optimizer.updates_per_batch} has no supervised token "
                f"(the step has {int(all_ranks.mask.sum())}); lower updates_per_batch, raise "
                f"entropy_top_fraction ({config.objective.entropy_top_fraction:g}), or check the "
                "mask rules"
            )
        update_batch = all_ranks.rows(all_rows)
        denominator[all_rows] = DENOMINATORS[config.objective.denominator](update_batch)
        position = {row: i for i, row in enumerate(all_rows)}
        rows = [i for i, row in enumerate(local_positions) if row in position]
        divisor = config.objective.loss_divisor
        groups = [rows]
        if objective.user_loss is None or divisor != "update":
            groups = [
                [rows[i] for i in group]
                for group in micro_batches(
                    batch.prompts.rows(rows),
                    scored.rows(rows),
                    config.hardware.max_tokens_per_microbatch,
                )
            ]
        if number == 1:
            expected = expected_loss(
                config,
                scored,
                expected_credit[local_index],
                expected_ratio[local_index],
                rows=rows,
                micro_batches=groups,
                all_ranks_batch=update_batch,
                positions=[position[local_positions[i]] for i in rows],
            )
        rows_by_update.append(rows)
        weights = [1.0] * len(groups)
        if objective.user_loss is not None and divisor != "update":
            weights = divisor_shares(scored, groups, divided_by(update_batch, divisor), divisor)
        groups_by_update.append(list(zip(groups, weights, strict=True)))
    if config.hardware.sharding == "full":
        lengths = scored.lengths.tolist()
        shortest = [min(range(len(lengths)), key=lengths.__getitem__)]
        for update_groups in groups_by_update:
            num_missing = distributed.all_reduce_max(len(update_groups)) - len(update_groups)
            update_groups += [(shortest, 0.0)] * num_missing
    return PreparedLoss(
        objective=objective,
        batch=replace(batch, scored=scored),
        credit=credit[local_index],
        weight=token_weights(ratio[local_index], denominator[local_rows]),
        denominator=denominator[local_rows],
        rows=rows_by_update,
        micro_batches=groups_by_update,
        expected=expected,
    )


def divided_by(batch: ScoredRollouts, divisor: str) -> float:
    """Return what a loss of the user's own divides the sum over a batch by.

    Args:
        batch: The batch.
        divisor: "one", or "tokens", "rows" or "prompts" with a supervised token.

    Returns:
        1, or their number.
    """
    if divisor == "one":
        return 1.0
    if divisor == "tokens":
        return float(batch.mask.sum())
    supervised = batch.mask.any(1)
    if divisor == "rows":
        return float(supervised.sum())
    return float(len(batch.prompt[supervised].unique()))


def divisor_shares(
    batch: ScoredRollouts, groups: list[list[int]], total: float, divisor: str
) -> list[float]:
    """Return the weights that make the losses of micro-batches add up to that of their update.

    Args:
        batch: Scored rollouts of this rank.
        groups: Rows of each micro-batch.
        total: What the loss of the whole update divides by.
        divisor: As in `divided_by`.

    Returns:
        One weight per micro-batch.
    """
    return [divided_by(batch.rows(group), divisor) / total for group in groups]


def task_shares(tasks: Sequence[TaskState]) -> list[float]:
    """Return the weight of each task's loss in a step; they add up to 1."""
    return [task.weight / sum(task.weight for task in tasks) for task in tasks]


def update_student(
    state: TrainState,
    tasks: Sequence[TaskState],
    losses: Sequence[PreparedLoss],
    step: int,
    summed: Sequence[SummedGradient] = (),
) -> dict[str, Tensor | float]:
    """Take `updates_per_batch` optimizer steps, each on its part of every task's batch.

    The loss is the weighted mean of the task losses, each with its own denominator.

    Args:
        state: State of the run.
        tasks: Tasks of the step.
        losses: Loss of each task.
        step: Step of the run.
        summed: Gradients of the tasks that were added while they were scored
            (`opd.training.shared_pass`); none if they have yet to be computed.

    Returns:
        Columns of the row. loss and grad_norm are means over the updates; skipped counts updates
        whose gradient was not finite.
    """
    config, student, optimizer = state.config, state.student, state.optimizer
    rate = learning_rate(
        config.optimizer.lr, step, config.steps, config.optimizer.warmup, config.optimizer.schedule
    )
    weights = task_shares(tasks)
    teachers = {id(task.pair.teacher): task.pair.teacher for task in tasks}
    following = [teacher for teacher in teachers.values() if teacher.follows_student]
    loss_sums, norms, skipped = [], [], 0
    checks: dict[str, Tensor | float] = {}
    for update_index in range(config.optimizer.updates_per_batch):
        if summed:
            parts, leftover_gradient = summed, summed[0].leftover
        else:
            optimizer.zero_grad()
            leftover_gradient = has_leftover_gradient(optimizer)
            parts = [
                accumulate_gradients(state, task, loss, update_index, weight)
                for task, loss, weight in zip(tasks, losses, weights, strict=True)
            ]
        total = torch.stack([part.loss for part in parts]).sum()
        gradients = next((x.first_gradients for x in parts if x.first_gradients), [])
        lost_gradient = lost_gradient_share(gradients)
        optimizer.all_reduce_gradients()
        weights_before = sample_before_step(optimizer) if update_index == 0 else None
        norm, applied = optimizer.step(rate, config.optimizer.max_grad_norm)
        if weights_before is not None:
            checks |= columns_after_step(optimizer, weights_before, applied)
            if config.objective.objective == "reward_only":
                # without a gradient where no response is better than the others to its prompt
                reached = checks["update/reached_share"]
                checks["update/reached_share"] = torch.where(norm > 0, reached, math.nan)
            checks |= {
                "update/leftover_gradient": leftover_gradient,
                "update/lost_gradient": lost_gradient,
            }
            checks |= loss_check_columns(
                distributed.all_reduce_sum(total.clone()),
                [loss.expected for loss in losses],
                weights,
            )
        if applied and following:
            with unsharded(student):
                for teacher in following:
                    teacher.update(student)
        loss_sums.append(distributed.all_reduce_sum(total))
        norms.append(norm)
        skipped += not applied
    if following and is_due(step + 1, config.optimizer.ema_resync_every):
        with unsharded(student):
            for teacher in following:
                teacher.resync(student)
    means = {"loss": torch.stack(loss_sums).mean(), "grad_norm": torch.stack(norms).mean()}
    return {**means, **checks, "lr": rate, "skipped": float(skipped)}


def accumulate_gradients(
    state: TrainState, task: TaskState, loss: PreparedLoss, update_index: int, task_weight: float
) -> SummedGradient:
    """Add the gradient of `task_weight` times the loss of one update.

    Args:
        state: State of the run.
        task: The task.
        loss: Its loss.
        update_index: Number of the update.
        task_weight: Weight of the task's loss.

    Returns:
        The weighted loss, and sampled gradients after the first micro-batch.
    """
    student, config = state.student, task.config
    total, first_gradients = torch.zeros((), device=loss.weight.device), None
    with ExitStack() as stack:
        if loss.batch.teacher_hidden is not None:  # the loss reads the teacher's head
            stack.enter_context(task.pair.teacher.on_device(student.device))
        for rows, row_weight in loss.micro_batches[update_index]:
            with activation_checkpointing(student.network, config.hardware.gradient_checkpointing):
                micro_loss = micro_batch_loss(
                    student,
                    loss.objective,
                    loss.batch,
                    rows,
                    loss.credit,
                    loss.weight,
                    scale=task_weight * row_weight,
                    teacher=task.pair.teacher,
                    max_logits_per_chunk=config.hardware.max_logits_per_chunk,
                )
                micro_loss.backward()
            total = total + micro_loss.detach()
            first_gradients = first_gradients or sampled_gradients(state.optimizer)
    return SummedGradient(total, first_gradients)


def split_rows(prompts: list[int], updates: int) -> list[list[int]]:
    """Split rows into updates with equally many prompts, in the order of prompt indices.

    All rollouts of a prompt are in the same update. Where games failed, the numbers of prompts may
    differ by one.

    Args:
        prompts: Prompt index of each row.
        updates: Number of updates.

    Returns:
        Rows of each update.

    Raises:
        InvalidInput: There are fewer prompts than updates.
    """
    order = sorted(set(prompts))
    if len(order) < updates:
        raise InvalidInput(
            f"only {len(order)} games were played, fewer than updates_per_batch ({updates})"
        )
    update_of_prompt = {
        prompt_index: i * updates // len(order) for i, prompt_index in enumerate(order)
    }
    return [
        [
            row
            for row, prompt_index in enumerate(prompts)
            if update_of_prompt[prompt_index] == update
        ]
        for update in range(updates)
    ]
