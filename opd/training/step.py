"""The parts of a training step that use neither loss nor optimizer: its rollouts and its row.

`opd.training.train.run_step` has their order. A step depends on (config, weights, optimizer, step)
alone: prompts and random numbers are derived from (seed, step), so a killed run resumes from its
last checkpoint as if it had not been interrupted. Up to rounding, a step does not depend on the
number of ranks either: each rank rolls out and scores its shard of the prompts, while credit, token
selection and denominators use the tokens of all ranks, and gradients and metrics are summed over
ranks.

Shapes: B responses of this rank, T response positions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import TEACHER, Rollouts
from diagnostics.concatenation import concatenate
from diagnostics.core.totals import Accumulator, Mean, compute
from diagnostics.gradients.distributed import all_gather_batches
from diagnostics.io.atomic import write_text
from diagnostics.metrics.teacher_view import view_copying
from diagnostics.records.rows import Row
from opd.config.prefixes import ON_POLICY, parse_prefixes
from opd.config.settings import Config
from opd.data.chain_task import Problem
from opd.data.grading.graders import grade_responses
from opd.data.grading.unread_answers import READABLE_SHARE
from opd.data.prompts import Prompts, encode_prompts
from opd.data.tasks import Task
from opd.data.teacher_view.values import graded_attempts
from opd.data.teacher_view.view import with_teacher_prompts
from opd.envs.packing import episode_accumulators, pack_rows
from opd.envs.rollout import play_episodes
from opd.envs.task import GameTask
from opd.envs.teacher_view import with_game_views
from opd.rollouts.base import BatchSlice, Engine
from opd.runtime import distributed
from opd.runtime.seeds import ROLLOUT, derive_seed
from opd.scoring.score import ScoredBatch
from opd.scoring.view_effect import measure_view
from opd.teachers.teacher import CachedTeacher
from opd.tokens.masking import mask_rule_metrics
from opd.training.multitask import tasks_of_step
from opd.training.prefetch import TaskRollouts
from opd.training.responses import draw_responses, writers
from opd.training.state import TaskState, is_due


def save_batch(tasks: Sequence[TaskState], batches: Sequence[ScoredBatch], path: Path) -> None:
    """Write the rollouts of all tasks and ranks, with the loss mask, and their prompts as text.

    Args:
        tasks: Tasks of the step.
        batches: Their batches.
        path: File of the batch. The prompts are written beside it, if there is a single rank: a
            rank has only its own prompts. Those of the teacher are in a file of their own where it
            reads others.
    """
    scored = [batch.scored for batch in batches]
    if distributed.world_size() > 1:
        scored = [rank_batch for batch in scored for rank_batch in all_gather_batches(batch)]
    if distributed.rank() == 0:
        (scored[0] if len(scored) == 1 else concatenate(scored)).save(path)
    if distributed.world_size() == 1:
        texts = [
            text
            for task, batch in zip(tasks, batches, strict=True)
            for text in prompt_texts(task.pair.tokenizer, batch.prompts)
        ]
        write_text(path.with_suffix(".prompts.json"), json.dumps(texts))
        if any(batch.prompts.view is not None for batch in batches):
            texts = [
                text
                for task, batch in zip(tasks, batches, strict=True)
                for text in prompt_texts(task.pair.tokenizer, batch.prompts.teacher_prompts)
            ]
            write_text(path.with_suffix(".teacher_prompts.json"), json.dumps(texts))


def prompt_texts(tokenizer: Any, prompts: Prompts) -> list[str]:
    """Return the text of each prompt, with its special tokens."""
    rows = zip(prompts.tokens.cpu(), prompts.mask.cpu(), strict=True)
    return [tokenizer.decode(tokens[mask].tolist()) for tokens, mask in rows]


def make_row(
    tasks: Sequence[TaskState],
    sampled: Sequence[TaskRollouts],
    batches: Sequence[ScoredBatch],
    step: int,
    numbers: Mapping[str, Tensor | float],
    checks: Sequence[Mapping[str, Tensor]],
) -> Row:
    """Build the step's row.

    Metrics pool the tasks of a mixed step; `TaskState.monitor` reports some of them per task too.

    Args:
        tasks: Tasks of the step.
        sampled: Their rollouts, with metrics of their own.
        batches: Their batches, with the loss mask.
        step: Step of the run.
        numbers: Numbers of the update, by column.
        checks: Health checks of each task (`opd.training.checks.step.check_batch`); the row has the
            largest of all tasks.

    Returns:
        The row.
    """
    row, several = Row(step=step), len(tasks) > 1
    if not several and tasks[0].name:
        row["task"] = tasks[0].name
    values: dict[str, Tensor | float] = dict(numbers)
    for task, batch in zip(tasks, batches, strict=True):
        if task.masks:
            removed = mask_rule_metrics(batch.scored, task.masks)
            columns = compute(distributed.all_reduce_accumulators(removed))
            values |= task.columns(columns, several)
    largest: dict[str, Tensor] = {}
    for task_checks in checks:
        for name, value in task_checks.items():
            largest[name] = torch.maximum(largest[name], value) if name in largest else value
    values |= largest
    row |= tasks[0].monitor(step, [batch.scored for batch in batches], **values)
    for task, task_rollouts in zip(tasks, sampled, strict=True):
        if task_rollouts.accumulators:
            columns = compute(distributed.all_reduce_accumulators(task_rollouts.accumulators))
            row |= task.columns(columns, several)
    return row


def count_tokens(
    tasks: Sequence[TaskState], batches: Sequence[ScoredBatch]
) -> tuple[float, dict[str, float]]:
    """Count what a step sampled and scored, over all processes.

    Scoring by a cache reads nothing, and so does a run without a teacher. Replayed responses were
    sampled in an earlier step. Probes, checks and measurements of a view are not counted.

    Args:
        tasks: Tasks of the step.
        batches: Their batches.

    Returns:
        Number of response tokens, and `cost/student_tokens` and `cost/teacher_sampled_tokens`, the
        tokens that each model sampled for the step, and `cost/teacher_tokens`, the tokens of
        prompts and responses that the teacher read to score them.
    """
    counts = torch.zeros(4, dtype=torch.float64, device=batches[0].scored.tokens.device)
    for task, batch in zip(tasks, batches, strict=True):
        scored, teacher = batch.scored, task.pair.teacher
        lengths = scored.lengths.double()
        is_new = torch.ones_like(scored.own_rows)
        if parse_prefixes(task.config.rollout.prefixes).replay_age:
            is_new = scored.age == 0
        is_teachers = (
            torch.zeros_like(is_new) if scored.origin is None else scored.origin == TEACHER
        )
        parts = [
            lengths.sum(),
            lengths[scored.own_rows & is_new].sum(),
            lengths[is_teachers].sum(),
            torch.zeros_like(lengths).sum(),
        ]
        if teacher.capabilities and not teacher.is_recorded:
            parts[3] = lengths.sum() + batch.prompts.teacher_prompts.mask.sum()
        counts += torch.stack(parts)
    totals = distributed.all_reduce_sum(counts).tolist()
    names = ("student_tokens", "teacher_sampled_tokens", "teacher_tokens")
    return totals[0], {f"cost/{name}": x for name, x in zip(names, totals[1:], strict=True)}


def roll_out_step(
    config: Config, tasks: Sequence[TaskState], engine: Engine, step: int
) -> list[TaskRollouts]:
    """Sample and grade this rank's responses for a step, with the engine's current weights.

    Args:
        config: Settings of the run.
        tasks: All tasks of the run.
        engine: Rollout engine.
        step: Step of the run.

    Returns:
        Graded rollouts of each task of the step.
    """
    return [
        roll_out(tasks[i], engine, step, task_step, config.rollout.top_p, ROLLOUT)
        for i, task_step in tasks_of_step(config, step)
    ]


def draw_problem_responses(
    task: TaskState, engine: Engine, step: int, task_step: int, top_p: float, purpose: int
) -> tuple[Prompts, Rollouts, list[Problem]]:
    """Draw this rank's responses to the problems of a step, before they are graded.

    Args:
        task: A task of problems.
        engine: Rollout engine.
        step: Step of the run.
        task_step: Number of the task's previous steps.
        top_p: Nucleus mass of the sampler.
        purpose: Seed stream.

    Returns:
        Prompts, with those of the teacher unless they depend on the responses; rollouts; and the
        problem of each row.
    """
    assert isinstance(task.problems, Task)
    config, tokenizer = task.config, task.pair.tokenizer
    prompt_indices, batch_slice = rows_of_rank(config)
    drawn = task.problems.train(task_step, config.data.prompts_per_step)
    prompts = encode_prompts(
        tokenizer,
        [drawn[i] for i in prompt_indices],
        config.data.group_size,
        config.data.max_prompt,
    )
    prompts = replace(prompts, index=torch.tensor(prompt_indices)[prompts.index])
    row_problems = [drawn[i] for i in prompts.index.tolist()]
    if task.view is not None and not task.view.reads_attempts:
        prompts = with_teacher_prompts(task.view, tokenizer, prompts, row_problems, None)
    prefixes = ON_POLICY if purpose != ROLLOUT else parse_prefixes(config.rollout.prefixes)
    rollouts = draw_responses(
        task.pair,
        engine,
        prompts,
        row_problems,
        writers(prefixes, config, step, task.index, batch_slice),
        prefixes,
        config=config,
        seed=seed_of_step(task, step, purpose),
        top_p=top_p,
        part=batch_slice,
    )
    return prompts, rollouts, row_problems


def rows_of_rank(config: Config) -> tuple[list[int], BatchSlice]:
    """Return this rank's prompts of a step, and its rows of the step's batch."""
    num_prompts, group_size = config.data.prompts_per_step, config.data.group_size
    prompt_indices = distributed.shard_prompts(num_prompts, config.optimizer.updates_per_batch)
    rows = [i * group_size + j for i in prompt_indices for j in range(group_size)]
    return prompt_indices, BatchSlice(rows, num_prompts * group_size)


def seed_of_step(task: TaskState, step: int, purpose: int) -> int:
    """Return the seed of a task's sampling noise in a step."""
    return derive_seed(task.config.seed, step, purpose, *([task.index] if task.index else []))


def roll_out(
    task: TaskState, engine: Engine, step: int, task_step: int, top_p: float, purpose: int
) -> TaskRollouts:
    """Sample and grade this rank's responses for one step of a task.

    Responses for training are written by whom the setting `prefixes` names; for any other purpose
    the student samples all of them.

    Args:
        task: The task.
        engine: Rollout engine.
        step: Step of the run; seeds the sampling noise.
        task_step: Number of the task's previous steps; selects the prompts.
        top_p: Nucleus mass of the sampler.
        purpose: Seed stream, such as `opd.runtime.seeds.ROLLOUT`, so that different uses have
            independent noise.

    Returns:
        Prompts, graded rollouts, and accumulators: episode metrics of games, or the share of
        responses to problems whose answer the grader could parse.
    """
    config, device, problems = task.config, task.pair.student.device, task.problems
    tokenizer, eos, accumulators = task.pair.tokenizer, task.pair.eos, dict[str, Accumulator]()
    if isinstance(problems, GameTask):
        prompt_indices, batch_slice = rows_of_rank(config)
        seeds = problems.train(task_step, config.data.prompts_per_step)
        games = [(i, seeds[i]) for i in prompt_indices]
        episodes = play_episodes(
            engine,
            tokenizer,
            eos,
            problems,
            games,
            config.data.group_size,
            max_prompt=config.data.max_prompt,
            max_response=config.rollout.max_response,
            temperature=config.rollout.temperature,
            top_p=top_p,
            generator=torch.Generator().manual_seed(seed_of_step(task, step, purpose)),
            batch_slice=batch_slice,
        )
        prompts, rollouts = pack_rows(
            episodes, problems.layout, temperature=config.rollout.temperature, top_p=top_p
        )
        if task.view is not None:
            prompts = with_game_views(task.view, tokenizer, eos, problems, episodes, prompts)
        rewards, accumulators = rollouts.reward, episode_accumulators(episodes)
    else:
        prompts, rollouts, row_problems = draw_problem_responses(
            task, engine, step, task_step, top_p, purpose
        )
        grades = grade_responses(
            tokenizer, rollouts.tokens, rollouts.mask, prompts.answers, problems.grade, eos
        )
        if task.view is not None and task.view.reads_attempts:
            attempts = graded_attempts(tokenizer, rollouts.tokens, rollouts.mask, grades, eos)
            prompts = with_teacher_prompts(task.view, tokenizer, prompts, row_problems, attempts)
        rewards = torch.tensor([grade.reward for grade in grades])
        readable = torch.tensor([grade.answer is not None for grade in grades])
        accumulators = {READABLE_SHARE: Mean.from_values(readable, ~rewards.isnan(), prompts.index)}
    if task.view is not None and task.view.template is not None:
        accumulators = {**accumulators, **copying_accumulators(prompts, rollouts)}
    rollouts = rollouts.to(device).with_fields(
        reward=rewards.to(device),
        task=torch.full((len(rewards),), task.index, device=device),
    )
    return TaskRollouts(prompts.to(device), rollouts, accumulators)


def copying_accumulators(prompts: Prompts, rollouts: Rollouts) -> dict[str, Accumulator]:
    """Compute what responses copy of the teacher's prompts (`view_copying`)."""
    teacher_prompts = prompts.teacher_prompts
    responses, student_ids, teacher_ids = (
        [tokens[mask].tolist() for tokens, mask in zip(rows.cpu(), masks.cpu(), strict=True)]
        for rows, masks in (
            (rollouts.tokens, rollouts.sampled),
            (prompts.tokens, prompts.mask),
            (teacher_prompts.tokens, teacher_prompts.mask),
        )
    )
    return view_copying(responses, student_ids, teacher_ids, prompts.index.cpu())


def with_view_effect(
    task: TaskState, sampled: TaskRollouts, batch: ScoredBatch, task_step: int
) -> TaskRollouts:
    """Add what the teacher's view changes to the metrics of a step, where that is due.

    Args:
        task: The task.
        sampled: Its rollouts.
        batch: Scored batch, with the loss mask.
        task_step: Number of the task's previous steps.

    Returns:
        The rollouts, with the accumulators of `opd.scoring.view_effect.measure_view`.
    """
    is_cached = isinstance(task.pair.teacher, CachedTeacher)  # its other prompts are not scored
    if is_cached or not is_due(task_step, task.config.view.view_metrics_every):
        return sampled
    effect = measure_view(task.pair.teacher, batch, task.request)
    return sampled._replace(accumulators={**sampled.accumulators, **effect})
