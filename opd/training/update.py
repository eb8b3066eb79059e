"""Optimizer steps on the scored rollouts: update slices, credit, loss weights, backward passes.

Shapes: B responses of this rank, T response positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.gradients.distributed import gather_batch
from diagnostics.ragged import flat_index
from opd.data.prompts import Prompts
from opd.models.contexts import activation_checkpointing, on_device
from opd.models.forward import micro_batches, response_hidden_states
from opd.models.fsdp import unsharded
from opd.objectives.factory import DENOMINATORS
from opd.objectives.token_selection import highest_entropy_tokens
from opd.runtime import distributed
from opd.scoring.loss import loss_from_hidden
from opd.teachers.factory import update_ema_teacher
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
from opd.training.gradient_probe import TrainedLoss
from opd.training.optimizer import learning_rate
from opd.training.state import ScoredTaskBatch, TaskRun


def run_updates(task_batches: Sequence[ScoredTaskBatch], step: int) -> dict[str, Tensor | float]:
    """Take `updates_per_batch` optimizer steps, each on its slice of every task batch.

    The loss is the weighted mean of the task losses, each with its own denominator, which counts
    the tokens of that optimizer step. Credit, ratio and token selection are computed once, on all
    rollouts.

    Args:
        task_batches: Scored batches of the step.
        step: Step of the run.

    Returns:
        Columns of the row. loss and grad_norm are means over the updates; skipped counts updates
        whose gradient was not finite.
    """
    run = task_batches[0].run
    config, optimizer = run.config, run.optimizer
    rate = learning_rate(config.lr, step, config.steps, config.warmup, config.schedule)
    weights = [
        task_batch.run.weight / sum(task_batch.run.weight for task_batch in task_batches)
        for task_batch in task_batches
    ]
    slices_by_task = [make_update_slices(task_batch) for task_batch in task_batches]
    losses, norms, skipped = [], [], 0
    checks: dict[str, Tensor | float] = {}
    for update_index in range(config.updates_per_batch):
        optimizer.zero_grad()
        leftover_gradient = has_leftover_gradient(optimizer)
        loss, gradients = torch.zeros((), device=run.pair.student.device), None
        for task_batch, weight, task_slices in zip(
            task_batches, weights, slices_by_task, strict=True
        ):
            task_loss, first_gradients = accumulate_gradients(
                task_batch, task_slices[update_index], weight
            )
            loss, gradients = loss + task_loss, gradients or first_gradients
        lost_gradient = lost_gradient_share(gradients or [])
        optimizer.all_reduce_gradients()
        weights_before = sample_before_step(optimizer) if update_index == 0 else None
        norm, applied = optimizer.step(rate, config.max_grad_norm)
        if weights_before is not None:
            checks |= columns_after_step(optimizer, weights_before, applied)
            checks |= {
                "update/leftover_gradient": leftover_gradient,
                "update/lost_gradient": lost_gradient,
            }
            checks |= expected_loss_columns(
                task_batches, weights, slices_by_task, distributed.all_reduce_sum(loss.clone())
            )
        if applied and config.teacher == "ema":
            with unsharded(run.pair.student):
                update_ema_teacher(run.pair.teacher, run.pair.student, config.ema_decay)
        losses.append(distributed.all_reduce_sum(loss))
        norms.append(norm)
        skipped += not applied
    means = {"loss": torch.stack(losses).mean(), "grad_norm": torch.stack(norms).mean()}
    return {**means, **checks, "lr": rate, "skipped": float(skipped)}


@dataclass(frozen=True, eq=False)
class UpdateSlice:
    """One optimizer step's slice of a task batch, with the loss inputs of the whole batch."""

    rows: list[int]
    """Rows of this rank that belong to the optimizer step."""
    batch: ScoredRollouts
    """The whole task batch, with the final loss mask."""
    credit: Tensor
    """(B, T) credit per token."""
    ratio: Tensor
    """(B, T) importance ratio per token."""
    denominator: Tensor
    """(B,) loss denominator per response, valid only for `rows`."""
    all_ranks_batch: ScoredRollouts
    """Rows of the optimizer step on all ranks, without support."""
    positions: list[int]
    """Positions of `rows` in `all_ranks_batch`."""
    expected_credit: Tensor
    """(B, T) credit computed from the settings instead of the run's objective."""
    expected_ratio: Tensor
    """(B, T) importance ratio computed from the settings instead of the run's objective."""

    @property
    def weight(self) -> Tensor:
        """(B, T) loss weight per token: importance ratio / loss denominator."""
        return self.ratio / self.denominator[:, None]


def expected_loss_columns(
    task_batches: Sequence[ScoredTaskBatch],
    weights: Sequence[float],
    slices_by_task: Sequence[list[UpdateSlice]],
    loss: Tensor,
) -> dict[str, Tensor]:
    """Compare the first update's loss with `opd.training.checks.expected_loss`.

    Args:
        task_batches: Scored batches of the step.
        weights: Weight of each task's loss.
        slices_by_task: Update slices of each task.
        loss: 0-d loss, summed over ranks.

    Returns:
        Columns of the row; empty if the expected loss of the objective is unknown.
    """
    vectors = []
    for task_batch, weight, task_slices in zip(task_batches, weights, slices_by_task, strict=True):
        first_slice = task_slices[0]
        groups = [
            rows
            for rows, is_counted in synchronized_micro_batches(
                task_batch.run, task_batch.prompts, first_slice
            )
            if is_counted
        ]
        vector = expected_loss(
            task_batch.run.config,
            first_slice.batch,
            first_slice.expected_credit,
            first_slice.expected_ratio,
            rows=first_slice.rows,
            micro_batches=groups,
            all_ranks_batch=first_slice.all_ranks_batch,
            positions=first_slice.positions,
        )
        if vector is None:
            return {}
        scale = torch.full_like(vector, weight)
        scale[-2] = weight**2  # the variance scales with the square of the weight
        vectors.append(vector * scale)
    return loss_check_columns(loss, distributed.all_reduce_sum(torch.stack(vectors).sum(0)))


def make_update_slices(task_batch: ScoredTaskBatch) -> list[UpdateSlice]:
    """Split a task batch into updates, with credit and denominators from the tokens of all ranks.

    Args:
        task_batch: Scored batch.

    Returns:
        One slice per update.

    Raises:
        InvalidInput: An update has no supervised token.
    """
    config, objective = task_batch.run.config, task_batch.run.objective
    is_single_process = distributed.world_size() == 1
    batch, local_rows = (
        (task_batch.scored, slice(None)) if is_single_process else gather_batch(task_batch.scored)
    )
    local_index = (local_rows, slice(task_batch.scored.mask.shape[1]))
    credit, ratio = objective.credit(batch)[local_index], objective.ratio(batch)[local_index]
    expected_credit, expected_ratio = (
        credit_from_settings(config, batch)[local_index],
        ratio_from_settings(config, batch)[local_index],
    )
    loss_batch = task_batch.scored
    if config.entropy_top_fraction < 1:
        selected_tokens = highest_entropy_tokens(batch, config.entropy_top_fraction)
        loss_batch, batch = (
            loss_batch.restrict_mask(selected_tokens[local_index]),
            batch.restrict_mask(selected_tokens),
        )
    batch_without_support = replace(batch, support=None, prefix=None)
    slices, local_positions = [], torch.arange(len(batch))[local_rows].tolist()
    for update_number, rows in enumerate(
        split_rows(batch.prompt.tolist(), config.updates_per_batch), 1
    ):
        if bool(batch.mask.any()) and not bool(batch.mask[rows].any()):
            raise InvalidInput(
                f"update {update_number} of {config.updates_per_batch} has no supervised token "
                f"(the step has {int(batch.mask.sum())}); lower updates_per_batch, raise "
                f"entropy_top_fraction ({config.entropy_top_fraction:g}), or check the mask rules"
            )
        row_denominator = batch.student_logp.new_ones(len(batch))
        slice_batch = batch_without_support.rows(rows)
        row_denominator[rows] = DENOMINATORS[config.denominator](slice_batch)
        position_in_slice = {row: i for i, row in enumerate(rows)}
        slice_rows = [i for i, row in enumerate(local_positions) if row in position_in_slice]
        slices.append(
            UpdateSlice(
                rows=slice_rows,
                batch=loss_batch,
                credit=credit,
                ratio=ratio,
                denominator=row_denominator[local_rows],
                all_ranks_batch=slice_batch,
                positions=[position_in_slice[local_positions[i]] for i in slice_rows],
                expected_credit=expected_credit,
                expected_ratio=expected_ratio,
            )
        )
    return slices


def make_trained_loss(task_batch: ScoredTaskBatch) -> TrainedLoss:
    """Build the loss of the step's updates, response by response, for the gradient probe.

    The weights of each update, before ratios, are scaled to a mean of 1 over its tokens: with equal
    weights, a response's loss is the sum over its tokens. The scale changes neither the
    signal-to-noise ratio nor the noise scale.

    Args:
        task_batch: Scored batch.

    Returns:
        The loss.
    """
    slices = make_update_slices(task_batch)
    batch = slices[0].batch
    weight = torch.zeros_like(slices[0].ratio)
    for update_slice in slices:
        tokens = batch.mask[update_slice.rows].sum(1).to(weight.dtype)
        shares_of_loss = tokens / update_slice.denominator[update_slice.rows]
        total, loss_total = (distributed.all_reduce_sum(x.sum()) for x in (tokens, shares_of_loss))
        weight[update_slice.rows] = update_slice.weight[update_slice.rows] * total / loss_total
    teacher_hidden = task_batch.teacher_hidden
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden[batch.mask[task_batch.scored.sampled]]
    return TrainedLoss(
        objective=task_batch.run.objective,
        prompts=task_batch.prompts,
        batch=batch,
        credit=slices[0].credit,
        weight=weight,
        teacher_hidden=teacher_hidden,
    )


def accumulate_gradients(
    task_batch: ScoredTaskBatch, update_slice: UpdateSlice, task_weight: float
) -> tuple[Tensor, list[tuple[Tensor, Tensor]] | None]:
    """Add the gradient of `task_weight` times the loss of an update slice.

    Args:
        task_batch: Scored batch.
        update_slice: Its slice of the update.
        task_weight: Weight of the task's loss.

    Returns:
        The weighted loss, detached, and sampled gradients after the first micro-batch.
    """
    run, config, token_rows = (
        task_batch.run,
        task_batch.run.config,
        flat_index(task_batch.scored.sampled),
    )
    loss, first_gradients = torch.zeros((), device=task_batch.scored.tokens.device), None
    is_offloaded = config.offload_teacher and run.objective.support == "full"
    with on_device(run.pair.teacher, run.pair.student.device, is_offloaded):
        for rows, row_weight in synchronized_micro_batches(run, task_batch.prompts, update_slice):
            batch = update_slice.batch.rows(rows).trim()
            width = batch.mask.shape[1]
            teacher_hidden = task_batch.teacher_hidden
            if teacher_hidden is not None:
                teacher_hidden = teacher_hidden[token_rows[rows][:, :width][batch.mask]]
            with activation_checkpointing(run.pair.student.network, config.gradient_checkpointing):
                micro_loss = loss_from_hidden(
                    run.pair,
                    run.objective,
                    response_hidden_states(run.pair.student, task_batch.prompts.rows(rows), batch),
                    teacher_hidden,
                    batch,
                    update_slice.credit[rows][:, :width],
                    task_weight * row_weight * update_slice.weight[rows][:, :width][batch.mask],
                    max_logits_per_chunk=config.max_logits_per_chunk,
                )
                micro_loss.backward()
            loss = loss + micro_loss.detach()
            first_gradients = first_gradients or sampled_gradients(run.optimizer)
    return loss, first_gradients


def synchronized_micro_batches(
    run: TaskRun, prompts: Prompts, update_slice: UpdateSlice
) -> list[tuple[list[int], float]]:
    """Split an update slice into micro-batches, equally many on every rank under FSDP.

    Under FSDP every rank must run the same number of micro-batches. A rank with fewer repeats its
    shortest row with loss weight 0.

    Args:
        run: The task.
        prompts: Prompts of the batch.
        update_slice: Slice to split.

    Returns:
        Pairs of (rows, loss weight 1 or 0).
    """
    groups = micro_batches(
        prompts.rows(update_slice.rows),
        update_slice.batch.rows(update_slice.rows),
        run.config.max_tokens_per_microbatch,
    )
    weighted_groups = [([update_slice.rows[i] for i in group], 1.0) for group in groups]
    if run.config.sharding == "none":
        return weighted_groups
    lengths = update_slice.batch.lengths.tolist()
    filler = [min(range(len(lengths)), key=lengths.__getitem__)]
    num_missing = distributed.all_reduce_max(len(weighted_groups)) - len(weighted_groups)
    return weighted_groups + [(filler, 0.0)] * num_missing


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
