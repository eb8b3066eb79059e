"""One forward pass of the student for the scores and for the gradient of a micro-batch.

Where the loss of a response needs no other response of the step, its gradient is computed as soon
as its micro-batch is scored. An objective on the full vocabulary without credit also shares the
products with both heads: the columns are read from the distributions that the loss compares.
Otherwise a batch is scored first and read again by the update (`opd.training.update`).

Shapes: B responses of this rank, T response positions, n sampled tokens of a micro-batch.
"""

import time

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.gradients.distributed import gather_rollouts
from opd.config.settings import Config
from opd.data.prompts import Prompts
from opd.models.contexts import activation_checkpointing
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import Objective, token_weights
from opd.objectives.reduction import DENOMINATORS
from opd.runtime import distributed
from opd.scoring.columns import TokenColumns, full_columns
from opd.scoring.loss import loss_from_hidden
from opd.scoring.request import ScoreRequest, check_request
from opd.scoring.score import (
    MicroBatch,
    ScoredBatch,
    asks_student_ids,
    assemble_batch,
    score_micro_batch,
    teacher_micro_batches,
)
from opd.tokens.masking import apply_mask_rules
from opd.training.checks.update import has_leftover_gradient, sampled_gradients
from opd.training.state import TaskState, TrainState, is_due
from opd.training.update import SummedGradient


def allows_shared_pass(config: Config, objective: Objective) -> bool:
    """Return whether settings and objective allow scores and gradient to share a forward pass.

    Weights must be the same for both, which rules out several updates of a batch and shards that
    are gathered twice; the loss of a response must be known from its own tokens, which rules out
    baselines and rewards over the rollouts of a prompt, and tokens chosen by their entropy among
    all of the step; an offloaded teacher would be on the device beside the gradients.

    Args:
        config: Settings of the task.
        objective: The objective.

    Returns:
        Whether they do.
    """
    hardware = config.hardware
    return (
        hardware.share_forward_pass
        and hardware.sharding == "none"
        and not hardware.offload_teacher
        and config.optimizer.updates_per_batch == 1
        and config.objective.entropy_top_fraction == 1
        and objective.user_loss is None
        and not objective.requirements.whole_groups
    )


def shares_heads(config: Config, objective: Objective) -> bool:
    """Return whether the columns can be read from the distributions that the loss compares.

    The loss is computed before the columns are known, so that neither credit nor ratio may be read.
    """
    needs_no_scores = not objective.has_credit and config.objective.ratio == "none"
    return objective.support == "full" and needs_no_scores


def uses_shared_pass(task: TaskState, task_step: int) -> bool:
    """Return whether a step of a task shares its forward pass.

    The gradient probe reads the loss before its gradient is computed.

    Args:
        task: The task.
        task_step: Number of the task's previous steps.

    Returns:
        Whether it does.
    """
    if asks_student_ids(task.pair.teacher, task.request):
        return False
    is_probed = is_due(task_step, task.config.record.probe_every)
    return not is_probed and allows_shared_pass(task.config, task.objective)


def step_denominator(name: str, rollouts: Rollouts) -> Tensor:
    """Return the (B,) loss denominators of this rank's responses, which count those of all ranks.

    Args:
        name: One of `opd.objectives.reduction.DENOMINATORS`.
        rollouts: B responses of this rank, with the final loss mask.

    Returns:
        (B,) long denominators.

    Raises:
        InvalidInput: No token of any rank is supervised.
    """
    if distributed.world_size() == 1:
        return DENOMINATORS[name](rollouts)
    all_ranks, local_rows = gather_rollouts(rollouts)
    return DENOMINATORS[name](all_ranks)[local_rows]


def score_and_sum_gradient(
    state: TrainState,
    task: TaskState,
    prompts: Prompts,
    rollouts: Rollouts,
    request: ScoreRequest,
    *,
    share: float,
    is_first: bool,
) -> tuple[ScoredBatch, SummedGradient]:
    """Score the rollouts of a task, and add the gradient of `share` times its loss.

    Args:
        state: State of the run.
        task: The task.
        prompts: B prompts.
        rollouts: B responses, before any mask.
        request: What is needed.
        share: Weight of the task's loss among those of the step.
        is_first: Whether this is the step's first task, before which old gradients are removed.

    Returns:
        The scored batch, before any mask, and what was added.

    Raises:
        InvalidInput: As `opd.scoring.score.score_batch`, or no token is supervised.
    """
    config, student, teacher = task.config, state.student, task.pair.teacher
    check_request(student, teacher, request)
    masked = apply_mask_rules(rollouts, task.masks)
    denominator = step_denominator(config.objective.denominator, masked)
    if is_first:
        state.optimizer.zero_grad()
    leftover = has_leftover_gradient(state.optimizer) if is_first else 0.0
    store = TokenColumns(int(rollouts.sampled.sum()))
    total, first_gradients = torch.zeros((), device=student.device), None
    seconds, shared_heads = 0.0, shares_heads(config, task.objective)
    with activation_checkpointing(student.network, config.hardware.gradient_checkpointing):
        for micro_batch in teacher_micro_batches(student, teacher, prompts, rollouts, request):
            if not len(micro_batch.positions):  # rows that fill a batch
                continue
            clock = [time.perf_counter()]
            states = micro_batch.student_states(student)
            clock.append(time.perf_counter())
            rows = micro_batch.rows
            mask = masked.mask[rows][:, : micro_batch.rollouts.mask.shape[1]]
            sizes = (mask, denominator[rows], request, share)
            if shared_heads:
                clock.append(time.perf_counter())
                loss, columns = _loss_with_columns(state, task, micro_batch, states, *sizes)
            else:
                columns = score_micro_batch(student, teacher, micro_batch, states, request)
                clock.append(time.perf_counter())
                loss = _loss_of_columns(state, task, micro_batch, states, columns, *sizes)
            loss.backward()
            clock.append(time.perf_counter())
            seconds += clock[1] - clock[0] + clock[3] - clock[2]
            store.put(micro_batch.positions, columns)
            total = total + loss.detach()
            first_gradients = first_gradients or sampled_gradients(state.optimizer)
    batch = assemble_batch(student, teacher, prompts, rollouts, store.columns, request)
    batch.scored.validate()
    return batch, SummedGradient(total, first_gradients, leftover, seconds)


def _loss_with_columns(
    state: TrainState,
    task: TaskState,
    micro_batch: MicroBatch,
    states: Tensor,
    mask: Tensor,
    denominator: Tensor,
    request: ScoreRequest,
    share: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a micro-batch on the full vocabulary, and the columns of its n tokens.

    Args:
        state: State of the run.
        task: The task.
        micro_batch: The micro-batch.
        states: (n, D) states of the student, with gradient.
        mask: (rows, T) bool, its supervised tokens; others have weight 0.
        denominator: (rows,) loss denominators.
        request: What is needed.
        share: Factor of the loss.

    Returns:
        Scalar loss with gradient, and the columns by name.
    """
    tokens = micro_batch.tokens
    store = TokenColumns(len(tokens))

    def observe(block: slice, p: Tensor, q: Tensor) -> None:
        store.put(block, full_columns(p, q, tokens[block], request))

    weight = share * token_weights(mask.float(), denominator)[micro_batch.rollouts.sampled]
    loss = loss_from_hidden(
        state.student,
        task.objective,
        states,
        TokenInputs(credit=torch.zeros_like(weight), weight=weight, tokens=tokens),
        teacher=task.pair.teacher.model,
        teacher_hidden=micro_batch.teacher_states,
        temperature=request.temperature,
        max_logits_per_chunk=request.max_logits_per_chunk,
        observe=observe,
    )
    return loss, store.columns


def _loss_of_columns(
    state: TrainState,
    task: TaskState,
    micro_batch: MicroBatch,
    states: Tensor,
    columns: dict[str, Tensor],
    mask: Tensor,
    denominator: Tensor,
    request: ScoreRequest,
    share: float,
) -> Tensor:
    """Return the loss of a scored micro-batch.

    Args:
        state: State of the run.
        task: The task.
        micro_batch: The micro-batch.
        states: (n, D) states of the student, with gradient.
        columns: Columns of its n tokens.
        mask: (rows, T) bool, its supervised tokens.
        denominator: (rows,) loss denominators.
        request: What is needed.
        share: Factor of the loss.

    Returns:
        Scalar loss with gradient.
    """
    student, teacher, objective = state.student, task.pair.teacher, task.objective
    prompts, rollouts = micro_batch.prompts, micro_batch.rollouts
    with torch.no_grad():
        batch = assemble_batch(student, teacher, prompts, rollouts, columns, request)
        scored = batch.scored.restrict_mask(mask)
        weight = share * token_weights(objective.ratio(scored), denominator)
        inputs = TokenInputs.of(scored, objective.support, objective.credit(scored), weight)
    supervised, teacher_states = mask[rollouts.sampled], None
    if objective.support == "full" and micro_batch.teacher_states is not None:
        teacher_states = micro_batch.teacher_states[supervised]
    return loss_from_hidden(
        student,
        objective,
        states[supervised],
        inputs,
        teacher=None if teacher_states is None else teacher.model,
        teacher_hidden=teacher_states,
        temperature=request.temperature,
        max_logits_per_chunk=request.max_logits_per_chunk,
    )
