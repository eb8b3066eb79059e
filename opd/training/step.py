"""One training step: roll out, score with both models, update, and compute metrics.

A step depends on (config, weights, optimizer, step) alone: prompts and random numbers are derived
from (seed, step), so a killed run resumes from its last checkpoint as if it had not been
interrupted. Up to rounding, a step does not depend on the number of ranks either: each rank rolls
out and scores its shard of the prompts, while credit, token selection and denominators use the
tokens of all ranks, and gradients and metrics are summed over ranks.

Shapes: B responses of this rank, T response positions.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts, ScoredRollouts, concatenate
from diagnostics.core.totals import Accumulator, Mean, compute
from diagnostics.gradients.distributed import all_gather_batches
from diagnostics.records.rows import Row
from opd.config.settings import Config
from opd.data.grading.graders import grade_responses
from opd.data.grading.unread_answers import READABLE_SHARE
from opd.data.prompts import Prompts, encode_prompts
from opd.envs.packing import episode_accumulators, pack_rows
from opd.envs.rollout import play_episodes
from opd.envs.task import GameTask
from opd.models.contexts import on_device
from opd.models.fsdp import unsharded
from opd.objectives.factory import Objective
from opd.rollouts.base import BatchSlice
from opd.runs.run_folder import write_text
from opd.runtime import distributed
from opd.runtime.seeds import PROBE, ROLLOUT, derive_seed
from opd.scoring.score import score, score_support, score_with_remote_teacher
from opd.teachers.remote_scores import score_remote
from opd.tokens.masking import apply_mask_rules, mask_rule_metrics
from opd.training.checks.rescoring import is_rescoring_due, rescoring_columns
from opd.training.checks.step import (
    grader_check_columns,
    prompt_check_columns,
    sampler_check_columns,
)
from opd.training.checks.update import changed_weight_share
from opd.training.gradient_probe import probe_gradients
from opd.training.prefetch import TaskRollouts
from opd.training.state import ScoredTaskBatch, TaskRun
from opd.training.update import make_trained_loss, run_updates


def run_step(task_runs: Sequence[tuple[TaskRun, int]], step: int) -> Row:
    """Roll out, score, update, and return the step's row.

    Args:
        task_runs: Tasks of the step (usually one), each with the number of steps it had before,
            which determines its prompts, probes and saved batches.
        step: Step of the run.

    Returns:
        The row of metrics.
    """
    run, task_step = task_runs[0]
    timestamps = [time.perf_counter()]
    with unsharded(run.pair.student):
        task_rollouts = run.prefetcher.get(step)
        run.prefetcher.launch(step)
        timestamps.append(time.perf_counter())
        task_batches, probe_row = score_task_batches(task_runs, task_rollouts, step)
    timestamps.append(time.perf_counter())

    numbers = run_updates(task_batches, step)
    run.prefetcher.wait()
    run.engine.sync(run.pair.student)
    timestamps.append(time.perf_counter())

    row = make_row(task_batches, step, numbers) | probe_row
    if is_due(task_step, run.config.save_batch_every):
        save_batch(task_batches, run.folder / "batches" / f"step_{step:06d}.safetensors")
    timestamps.append(time.perf_counter())
    for name, start, end in zip(
        ("rollout", "score", "update", "record"), timestamps, timestamps[1:], strict=False
    ):
        row[f"seconds/{name}"] = end - start
    return row


def score_task_batches(
    task_runs: Sequence[tuple[TaskRun, int]], task_rollouts: Sequence[TaskRollouts], step: int
) -> tuple[list[ScoredTaskBatch], Row]:
    """Score the rollouts of each task, and run the gradient probe where it is due.

    Args:
        task_runs: Tasks of the step, each with the number of its previous steps.
        task_rollouts: Rollouts of each task.
        step: Step of the run.

    Returns:
        The scored batches, and the columns of the gradient probe.
    """
    task_batches: list[ScoredTaskBatch] = []
    probe_rows: Row = {}
    for (run, task_step), (prompts, rollouts, accumulators) in zip(
        task_runs, task_rollouts, strict=True
    ):
        with on_device(run.pair.teacher, run.pair.student.device, run.config.offload_teacher):
            scored, teacher_hidden = score_with_both_models(run, task_step, prompts, rollouts)
            # A remote teacher has no full distributions: drop them for all tasks of a mixed step.
            if any(other_run.pair.remote_teacher is not None for other_run, _ in task_runs):
                scored = replace(scored, prefix=None)
            checks = check_batch(run, task_step, prompts, scored)
            task_batch = ScoredTaskBatch(
                run=run,
                prompts=prompts,
                scored=apply_mask_rules(scored, run.masks),
                teacher_hidden=teacher_hidden,
                accumulators=accumulators,
                checks=checks,
            )
            if is_due(task_step, run.config.probe_every):
                run.prefetcher.wait()  # tokenizers are not thread-safe
                row = gradient_probe_row(task_batch, scored, step, task_step)
                probe_rows |= with_task_prefix(run, row) if len(task_runs) > 1 else row
        task_batches.append(task_batch)
    return task_batches, probe_rows


def check_batch(
    run: TaskRun, task_step: int, prompts: Prompts, scored: ScoredRollouts
) -> dict[str, Tensor]:
    """Compute health checks of prompts, grader, sampler and scores.

    Args:
        run: The task.
        task_step: Number of the task's previous steps.
        prompts: Prompts of the batch.
        scored: Scored rollouts, before any mask.

    Returns:
        Columns of the row, as scalars.
    """
    config, tokenizer = run.config, run.pair.tokenizer
    columns = prompt_check_columns(config, prompts, tokenizer.bos_token_id)
    if needs_student_pass(run, task_step, scored):
        columns |= sampler_check_columns(config, scored)
    if not isinstance(run.task, GameTask):
        columns |= grader_check_columns(prompts.answers, scored.reward, partial(grade_texts, run))
    if is_rescoring_due(task_step, config.rescore_every):
        run.prefetcher.wait()  # the client of a remote teacher is not thread-safe
        differences = rescoring_columns(config, run.pair, prompts, scored)
        columns |= {
            name: scored.student_logp.new_tensor(value).double()
            for name, value in differences.items()
        }
    if run.teacher_sample is not None:
        columns["consistency/teacher_moved"] = changed_weight_share(run.teacher_sample).to(
            scored.tokens.device
        )
    return columns


def grade_texts(run: TaskRun, texts: list[str], answer: str) -> list[float]:
    """Grade texts as responses to one problem, as the step's responses are graded.

    Responses end at an EOS id. If a text itself holds such an id, no text is truncated.

    Args:
        run: The task.
        texts: Texts of the responses.
        answer: Reference answer of the problem.

    Returns:
        One reward per text.
    """
    assert not isinstance(run.task, GameTask)
    tokenizer = run.pair.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    eos_ids = run.pair.eos
    if any(set(text) & set(eos_ids) for text in ids):
        eos_ids = []
    ids = [text + eos_ids[:1] for text in ids]
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, token_ids in enumerate(ids):
        tokens[row, : len(token_ids)] = torch.tensor(token_ids)
        mask[row, : len(token_ids)] = True
    answers = [answer] * len(texts)
    grades = grade_responses(tokenizer, tokens, mask, answers, run.task.grade, eos_ids)
    return [grade.reward for grade in grades]


def largest_checks(task_batches: Sequence[ScoredTaskBatch]) -> dict[str, Tensor]:
    """Combine the checks of all tasks of the step by their maximum."""
    columns: dict[str, Tensor] = {}
    for task_batch in task_batches:
        for name, value in task_batch.checks.items():
            columns[name] = torch.maximum(columns[name], value) if name in columns else value
    return columns


def save_batch(task_batches: Sequence[ScoredTaskBatch], path: Path) -> None:
    """Write the rollouts of all tasks and ranks, with the loss mask, and their prompts as text.

    Args:
        task_batches: Scored batches of the step.
        path: File of the batch. The prompts are written beside it, if there is a single rank: a
            rank has only its own prompts.
    """
    scored_batches = [task_batch.scored for task_batch in task_batches]
    if distributed.world_size() > 1:
        scored_batches = [
            rank_batch for batch in scored_batches for rank_batch in all_gather_batches(batch)
        ]
    if distributed.rank() == 0:
        (scored_batches[0] if len(scored_batches) == 1 else concatenate(scored_batches)).save(path)
    if distributed.world_size() == 1:  # a rank has only its own prompts
        texts = [text for task_batch in task_batches for text in decode_prompts(task_batch)]
        write_text(path.with_suffix(".prompts.json"), json.dumps(texts))


def decode_prompts(task_batch: ScoredTaskBatch) -> list[str]:
    """Decode the prompt of each row, as the student read it."""
    prompts, decode = task_batch.prompts, task_batch.run.pair.tokenizer.decode
    rows = zip(prompts.tokens.cpu(), prompts.mask.cpu().bool(), strict=True)
    return [decode(tokens[mask].tolist()) for tokens, mask in rows]


def make_row(
    task_batches: list[ScoredTaskBatch], step: int, numbers: dict[str, Tensor | float]
) -> Row:
    """Build the step's row.

    Metrics pool the tasks of a mixed step; `TaskRun.monitor` reports some of them per task as well.

    Args:
        task_batches: Scored batches of the step.
        step: Step of the run.
        numbers: Numbers of the update, by column.

    Returns:
        The row.
    """
    run, row = task_batches[0].run, Row(step=step)
    if len(task_batches) == 1 and run.name:
        row["task"] = run.name
    mask_columns: Row = {}
    for task_batch in task_batches:
        if task_batch.run.masks:
            columns = compute(
                distributed.all_reduce_accumulators(
                    mask_rule_metrics(task_batch.scored, task_batch.run.masks)
                )
            )
            mask_columns |= (
                with_task_prefix(task_batch.run, columns) if len(task_batches) > 1 else columns
            )
    values = {**numbers, **mask_columns, **largest_checks(task_batches)}
    row |= run.monitor(step, [task_batch.scored for task_batch in task_batches], **values)
    for task_batch in task_batches:
        columns = (
            compute(distributed.all_reduce_accumulators(task_batch.accumulators))
            if task_batch.accumulators
            else {}
        )
        row |= with_task_prefix(task_batch.run, columns) if len(task_batches) > 1 else columns
    return row


def with_task_prefix(run: TaskRun, row: Row) -> Row:
    """Prefix column names with the task, as `diagnostics.metrics.groupby.by` does."""
    return {f"task={run.name}/{name}": value for name, value in row.items()}


def roll_out_tasks(task_runs: Sequence[tuple[TaskRun, int]], step: int) -> list[TaskRollouts]:
    """Roll out every task of a step."""
    return [
        roll_out(run, step, task_step, run.config.top_p, ROLLOUT) for run, task_step in task_runs
    ]


def roll_out(run: TaskRun, step: int, task_step: int, top_p: float, purpose: int) -> TaskRollouts:
    """Sample and grade this rank's responses for one step of a task.

    Args:
        run: The task.
        step: Step of the run; seeds the sampling noise.
        task_step: Number of the task's previous steps; selects the prompts.
        top_p: Nucleus mass of the sampler.
        purpose: Seed stream, such as `opd.runtime.seeds.ROLLOUT`, so that different uses have
            independent noise.

    Returns:
        Prompts, graded rollouts, and accumulators: episode metrics of games, or the share of
        responses to problems whose answer the grader could parse.
    """
    config, device, task = run.config, run.pair.student.device, run.task
    num_prompts, group_size = config.prompts_per_step, config.group_size
    prompt_indices = distributed.shard_prompts(num_prompts, config.updates_per_batch)
    seed_parts = (config.seed, step, purpose, *([run.task_index] if run.task_index else []))
    sampling_options: dict[str, Any] = {
        "max_response": config.max_response,
        "temperature": config.temperature,
        "top_p": top_p,
        "generator": torch.Generator().manual_seed(derive_seed(*seed_parts)),
        "batch_slice": BatchSlice(
            [i * group_size + j for i in prompt_indices for j in range(group_size)],
            num_prompts * group_size,
        ),
    }
    tokenizer, eos, accumulators = run.pair.tokenizer, run.pair.eos, dict[str, Accumulator]()
    if isinstance(task, GameTask):
        seeds = task.train(task_step, num_prompts)
        games = [(i, seeds[i]) for i in prompt_indices]
        sampling_options |= {"max_prompt": config.max_prompt}
        episodes = play_episodes(
            run.engine, tokenizer, eos, task, games, group_size, **sampling_options
        )
        prompts, rollouts = pack_rows(
            episodes, task.layout, temperature=config.temperature, top_p=top_p
        )
        rewards, accumulators = rollouts.reward, episode_accumulators(episodes)
    else:
        problems = task.train(task_step, num_prompts)
        prompts = encode_prompts(
            tokenizer, [problems[i] for i in prompt_indices], group_size, config.max_prompt
        )
        prompts = replace(prompts, index=torch.tensor(prompt_indices)[prompts.index])
        rollouts = run.engine.sample(prompts, eos, **sampling_options)
        grades = grade_responses(
            tokenizer, rollouts.tokens, rollouts.mask, prompts.answers, task.grade, eos
        )
        rewards = torch.tensor([grade.reward for grade in grades])
        readable = torch.tensor([grade.answer is not None for grade in grades])
        accumulators = {READABLE_SHARE: Mean.from_values(readable, ~rewards.isnan(), prompts.index)}
    rollouts = replace(
        rollouts.to(device),
        reward=rewards.to(device),
        task=torch.full((len(rewards),), run.task_index, device=device),
    )
    return prompts.to(device), rollouts, accumulators


def score_with_both_models(
    run: TaskRun, task_step: int, prompts: Prompts, rollouts: Rollouts
) -> tuple[ScoredRollouts, Tensor | None]:
    """Score rollouts with student and teacher.

    On steps without full-vocabulary metrics, the student's full softmax is skipped if the objective
    does not need it.

    Args:
        run: The task.
        task_step: Number of the task's previous steps.
        prompts: Prompts of the rollouts.
        rollouts: Rollouts to score.

    Returns:
        Scored rollouts, and the (N, D') teacher hidden states for full-vocabulary objectives.
    """
    config, remote = run.config, run.pair.remote_teacher
    teacher_scores = (
        None if remote is None else score_remote(remote, prompts, rollouts, config.support_k)
    )
    if not needs_student_pass(run, task_step, rollouts):
        return score_support(
            run.pair, prompts, rollouts, teacher_scores=teacher_scores, **scoring_options(config)
        ), None
    if teacher_scores is None:
        return score_full_vocabulary(run, prompts, rollouts)
    memory_limits = {
        "max_tokens_per_microbatch": config.max_tokens_per_microbatch,
        "max_logits_per_chunk": config.max_logits_per_chunk,
    }
    source = support_source(run.objective)
    return score_with_remote_teacher(
        run.pair, prompts, rollouts, teacher_scores, source=source, **memory_limits
    ), None


def needs_student_pass(run: TaskRun, task_step: int, rollouts: Rollouts) -> bool:
    """Return whether the student scores the step, instead of reusing its sampler's softmax."""
    config = run.config
    measures_full_vocabulary = is_due(task_step, config.full_metrics_every) or is_due(
        task_step, config.probe_every
    )
    return measures_full_vocabulary or not can_skip_student_pass(run, rollouts)


def score_full_vocabulary(
    run: TaskRun, prompts: Prompts, rollouts: Rollouts
) -> tuple[ScoredRollouts, Tensor | None]:
    """Score rollouts with full-vocabulary metrics; returns as `score_with_both_models`."""
    return score(
        run.pair,
        prompts,
        rollouts,
        source=support_source(run.objective),
        keep_teacher=run.objective.support == "full",
        eos_map=run.pair.eos_map if run.config.map_eos else None,
        **scoring_options(run.config),
    )


def scoring_options(config: Config) -> dict[str, Any]:
    """Return the settings that all scoring functions take."""
    return {
        "k": config.support_k,
        "temperature": config.temperature,
        "max_tokens_per_microbatch": config.max_tokens_per_microbatch,
        "max_logits_per_chunk": config.max_logits_per_chunk,
    }


def can_skip_student_pass(run: TaskRun, rollouts: Rollouts) -> bool:
    """Return whether the step can do without the student's full softmax (see `score_support`)."""
    needs_teacher_topk_only = run.objective.support == "teacher" and not run.objective.normalised
    uses_default_options = run.config.entropy_top_fraction == 1 and not run.config.map_eos
    if bool((rollouts.age > 0).any()):
        return False  # the sampler's softmax is that of earlier weights
    return needs_teacher_topk_only and uses_default_options and rollouts.softmax_logp is not None


def gradient_probe_row(
    task_batch: ScoredTaskBatch, scored: ScoredRollouts, step: int, task_step: int
) -> Row:
    """Run the gradient probe at the weights before the update.

    The training loss is measured on the step's own rollouts. The gamma family needs tokens sampled
    from the student itself: it uses the rollouts before any mask, or fresh rollouts with top_p = 1
    if they are off-policy or sampled with a nucleus.

    Args:
        task_batch: Scored batch with the loss mask.
        scored: The same rollouts before any mask.
        step: Step of the run.
        task_step: Number of the task's previous steps.

    Returns:
        Columns of the row.
    """
    run, config, prompts = task_batch.run, task_batch.run.config, task_batch.prompts
    trained_loss = make_trained_loss(task_batch)
    if config.top_p < 1 or bool((scored.age > 0).any()):
        prompts, rollouts, _ = roll_out(run, step, task_step, top_p=1.0, purpose=PROBE)
        scored, _ = score_full_vocabulary(run, prompts, rollouts)
    return probe_gradients(
        run.pair,
        prompts,
        scored,
        trained_loss,
        gamma=config.gamma,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        max_logits_per_chunk=config.max_logits_per_chunk,
        blocks=config.probe_blocks,
    )


def support_source(objective: Objective) -> str:
    """Return whose top-K is the support; the teacher's if the objective needs none."""
    return "teacher" if objective.support in ("none", "full") else objective.support


def is_due(step: int, interval: int) -> bool:
    """Return whether a periodic action is due at a step; an interval of 0 means never."""
    return interval > 0 and step % interval == 0
