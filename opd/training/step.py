"""A step of training: roll out, score with both models, update, observe; from top to bottom.

A step depends on (config, weights, optimizer, step) alone: prompts and random numbers are derived
from (seed, step). So a run that was killed goes on from its last checkpoint as if it never was. Nor
does it depend on the number of processes, up to rounding: each rolls out and scores its share of
the prompts; credit, selection and denominators are made of everybody's tokens, and sums of
gradients and of metrics are added.

Shapes: B responses of this process, T response positions.
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
from diagnostics.core.totals import Accumulator, Mean, read
from diagnostics.gradients.distributed import batches_of_ranks
from diagnostics.records.rows import Row
from opd.config.settings import Config
from opd.data.chain_task import Problem
from opd.data.grading.graders import verdicts
from opd.data.grading.unread_answers import READABLE
from opd.data.prompts import Prompts, encode
from opd.envs.packing import rows_of, totals
from opd.envs.rollout import play
from opd.envs.task import GameTask
from opd.models.contexts import awake
from opd.models.fsdp import whole
from opd.objectives.factory import Objective
from opd.rollouts.base import BatchSlice
from opd.runs.run_folder import write_text
from opd.runtime import distributed
from opd.runtime.seeds import PROBE, ROLLOUT, derive
from opd.scoring.score import score, score_support, score_told
from opd.teachers.remote_scores import asked
from opd.tokens.masking import audit, masked
from opd.training.checks.rescoring import is_due, rescored
from opd.training.checks.step import grader_numbers, prompt_numbers, sampler_numbers
from opd.training.checks.update import changed_share
from opd.training.gradient_probe import probe
from opd.training.prefetch import TaskRollouts
from opd.training.state import ScoredTaskBatch, TaskRun
from opd.training.update import probed_loss, update


def one_step(chosen: Sequence[tuple[TaskRun, int]], step: int) -> Row:
    """The step's rollouts and the optimizer steps on them; returns its row of numbers.

    chosen: the tasks that share the step, most often one, each with the number of its steps so far,
    which is what its prompts, probes and saved batches go by.
    """
    run, nth = chosen[0]
    clock = [time.perf_counter()]
    with whole(run.pair.student):
        drawn = run.ahead.take(step)
        run.ahead.begin(step)
        clock.append(time.perf_counter())
        parts, probed = scored_parts(chosen, drawn, step)
    clock.append(time.perf_counter())

    numbers = update(parts, step)
    run.ahead.settle()
    run.engine.sync(run.pair.student)
    clock.append(time.perf_counter())

    row = recorded(parts, step, numbers) | probed
    if due(nth, run.config.save_batch_every):
        save_batch(parts, run.folder / "batches" / f"step_{step:06d}.safetensors")
    clock.append(time.perf_counter())
    for name, a, b in zip(("rollout", "score", "update", "record"), clock, clock[1:], strict=False):
        row[f"seconds/{name}"] = b - a
    return row


def scored_parts(
    chosen: Sequence[tuple[TaskRun, int]], drawn: Sequence[TaskRollouts], step: int
) -> tuple[list[ScoredTaskBatch], Row]:
    """What was drawn for each task, scored; and what its gradient probe says where one is due."""
    parts: list[ScoredTaskBatch] = []
    probed: Row = {}
    for (one, nth), (prompts, rollouts, played) in zip(chosen, drawn, strict=True):
        with awake(one.pair.teacher, one.pair.student.device, one.config.offload_teacher):
            scored, hidden = scored_by_both(one, nth, prompts, rollouts)
            if any(other.pair.remote is not None for other, _ in chosen):
                scored = replace(scored, prefix=None)  # what one of a shared step cannot tell
            checks = checked(one, nth, prompts, scored)
            part = ScoredTaskBatch(
                run=one,
                prompts=prompts,
                scored=masked(scored, one.masks),
                teacher_hidden=hidden,
                played=played,
                checks=checks,
            )
            if due(nth, one.config.probe_every):
                one.ahead.settle()  # tokenizers serve one thread at a time
                found = probed_row(part, scored, step, nth)
                probed |= headed(one, found) if len(chosen) > 1 else found
        parts.append(part)
    return parts, probed


def checked(run: TaskRun, nth: int, prompts: Prompts, scored: ScoredRollouts) -> dict[str, Tensor]:
    """Numbers that say whether prompts, grader, sampler and scores are what they should be."""
    config, tokenizer = run.config, run.pair.tokenizer
    columns = prompt_numbers(config, prompts, tokenizer.bos_token_id)
    if student_measured(run, nth, scored):
        columns |= sampler_numbers(config, scored)
    if not isinstance(run.task, GameTask):
        columns |= grader_numbers(prompts.answers, scored.reward, partial(grade_texts, run))
    if is_due(nth, config.rescore_every):
        run.ahead.settle()  # a server of a teacher is asked by one thread at a time
        found = rescored(config, run.pair, prompts, scored)
        columns |= {name: scored.student_logp.new_tensor(x).double() for name, x in found.items()}
    if run.frozen is not None:
        columns["consistency/teacher_moved"] = changed_share(run.frozen).to(scored.tokens.device)
    return columns


def grade_texts(run: TaskRun, texts: list[str], answer: str) -> list[float]:
    """Rewards of texts as responses to one problem, graded in the way of a step's responses.

    Where a text holds an id that ends a response, nothing is cut from the texts.
    """
    assert not isinstance(run.task, GameTask)
    tokenizer = run.pair.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ends = run.pair.eos
    if any(set(text) & set(ends) for text in ids):
        ends = []
    ids = [text + ends[:1] for text in ids]
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, some in enumerate(ids):
        tokens[row, : len(some)] = torch.tensor(some)
        mask[row, : len(some)] = True
    problems = [Problem(prompt="", answer=answer)] * len(texts)
    graded = verdicts(tokenizer, tokens, mask, problems, run.task.grade, ends)
    return [verdict.reward for verdict in graded]


def largest(parts: Sequence[ScoredTaskBatch]) -> dict[str, Tensor]:
    """The checks of all tasks that share the step, of each the largest."""
    columns: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.checks.items():
            columns[name] = torch.maximum(columns[name], value) if name in columns else value
    return columns


def save_batch(parts: Sequence[ScoredTaskBatch], path: Path) -> None:
    """Write the rollouts of all tasks and processes, with the mask of the loss."""
    batches = [part.scored for part in parts]
    if distributed.size() > 1:
        batches = [other for batch in batches for other in batches_of_ranks(batch)]
    if distributed.rank() == 0:
        (batches[0] if len(batches) == 1 else concatenate(batches)).save(path)
    if distributed.size() == 1:  # one process has only its own prompts
        texts = [text for part in parts for text in asked_texts(part)]
        write_text(path.with_suffix(".prompts.json"), json.dumps(texts))


def asked_texts(part: ScoredTaskBatch) -> list[str]:
    """The prompt of each row of a part, as the student read it."""
    prompts, decode = part.prompts, part.run.pair.tokenizer.decode
    rows = zip(prompts.tokens.cpu(), prompts.mask.cpu().bool(), strict=True)
    return [decode(tokens[mask].tolist()) for tokens, mask in rows]


def recorded(parts: list[ScoredTaskBatch], step: int, numbers: dict[str, Tensor | float]) -> Row:
    """The step's row. Tasks that share a step are pooled in it; `Run.monitor` splits them too."""
    run, row = parts[0].run, Row(step=step)
    if len(parts) == 1 and run.name:
        row["task"] = run.name
    removed: Row = {}
    for part in parts:
        if part.run.masks:
            found = read(distributed.added(audit(part.scored, part.run.masks)))
            removed |= headed(part.run, found) if len(parts) > 1 else found
    known = {**numbers, **removed, **largest(parts)}
    row |= run.monitor(step, [part.scored for part in parts], **known)
    for part in parts:
        found = read(distributed.added(part.played)) if part.played else {}
        row |= headed(part.run, found) if len(parts) > 1 else found
    return row


def headed(run: TaskRun, row: Row) -> Row:
    """The columns under the task's name, as `diagnostics.metrics.groupby.by` heads them."""
    return {f"task={run.name}/{name}": x for name, x in row.items()}


def draw(chosen: Sequence[tuple[TaskRun, int]], step: int) -> list[TaskRollouts]:
    """The rollouts of every task that shares the step."""
    return [roll_out(one, step, nth, one.config.top_p, ROLLOUT) for one, nth in chosen]


def roll_out(run: TaskRun, step: int, nth: int, top_p: float, purpose: int) -> TaskRollouts:
    """This process's prompts of the task's nth step and graded responses to them.

    The noise is for that purpose. Of games the rows of episodes, and what became of these; of
    problems the share of graded responses whose answer the grader could read.
    """
    config, device, task = run.config, run.pair.student.device, run.task
    count, group = config.prompts_per_step, config.group_size
    mine = distributed.own(count, config.updates_per_batch)
    words = (config.seed, step, purpose, *([run.place] if run.place else []))
    how: dict[str, Any] = {
        "max_response": config.max_response,
        "temperature": config.temperature,
        "top_p": top_p,
        "generator": torch.Generator().manual_seed(derive(*words)),
        "share": BatchSlice([i * group + j for i in mine for j in range(group)], count * group),
    }
    tokenizer, eos, played = run.pair.tokenizer, run.pair.eos, dict[str, Accumulator]()
    if isinstance(task, GameTask):
        seeds = task.train(nth, count)
        games = [(i, seeds[i]) for i in mine]
        how |= {"max_prompt": config.max_prompt}
        episodes = play(run.engine, tokenizer, eos, task, games, group, **how)
        prompts, rollouts = rows_of(
            episodes, task.layout, temperature=config.temperature, top_p=top_p
        )
        rewards, played = rollouts.reward, totals(episodes)
    else:
        problems = task.train(nth, count)
        prompts = encode(tokenizer, [problems[i] for i in mine], group, config.max_prompt)
        prompts = replace(prompts, index=torch.tensor(mine)[prompts.index])
        rollouts = run.engine.sample(prompts, eos, **how)
        answers = [Problem(prompt="", answer=answer) for answer in prompts.answers]
        graded = verdicts(tokenizer, rollouts.tokens, rollouts.mask, answers, task.grade, eos)
        rewards = torch.tensor([verdict.reward for verdict in graded])
        readable = torch.tensor([verdict.answer is not None for verdict in graded])
        played = {READABLE: Mean.of(readable, ~rewards.isnan(), prompts.index)}
    rollouts = replace(
        rollouts.to(device),
        reward=rewards.to(device),
        task=torch.full((len(rewards),), run.place, device=device),
    )
    return prompts.to(device), rollouts, played


def scored_by_both(
    run: TaskRun, nth: int, prompts: Prompts, rollouts: Rollouts
) -> tuple[ScoredRollouts, Tensor | None]:
    """The scored batch, and the teacher's states (N, D') for objectives on the whole vocabulary.

    Between the steps that measure whole distributions, an objective that does not need the
    student's is spared them.
    """
    config, remote = run.config, run.pair.remote
    told = None if remote is None else asked(remote, prompts, rollouts, config.support_k)
    if not student_measured(run, nth, rollouts):
        return score_support(run.pair, prompts, rollouts, told=told, **scoring(config)), None
    if told is None:
        return exact(run, prompts, rollouts)
    sizes = {
        "max_tokens_per_microbatch": config.max_tokens_per_microbatch,
        "max_logits_per_chunk": config.max_logits_per_chunk,
    }
    source = source_of(run.objective)
    return score_told(run.pair, prompts, rollouts, told, source=source, **sizes), None


def student_measured(run: TaskRun, nth: int, rollouts: Rollouts) -> bool:
    """Whether the student scores the step itself, and is not taken from its sampler."""
    config = run.config
    due_now = due(nth, config.full_metrics_every) or due(nth, config.probe_every)
    return due_now or not spared(run, rollouts)


def exact(
    run: TaskRun, prompts: Prompts, rollouts: Rollouts
) -> tuple[ScoredRollouts, Tensor | None]:
    """The same with whole distributions measured."""
    return score(
        run.pair,
        prompts,
        rollouts,
        source=source_of(run.objective),
        keep_teacher=run.objective.support == "full",
        endings=run.pair.endings if run.config.map_eos else None,
        **scoring(run.config),
    )


def scoring(config: Config) -> dict[str, Any]:
    """Settings that every way of scoring has."""
    return {
        "k": config.support_k,
        "temperature": config.temperature,
        "max_tokens_per_microbatch": config.max_tokens_per_microbatch,
        "max_logits_per_chunk": config.max_logits_per_chunk,
    }


def spared(run: TaskRun, rollouts: Rollouts) -> bool:
    """Whether the step can do without the student's whole distributions: see `score_support`."""
    plain = run.objective.support == "teacher" and not run.objective.normalised
    rest = run.config.entropy_top_fraction == 1 and not run.config.map_eos
    if bool((rollouts.age > 0).any()):
        return False  # the sampler's softmax is that of older weights
    return plain and rest and rollouts.softmax_logp is not None


def probed_row(part: ScoredTaskBatch, scored: ScoredRollouts, step: int, nth: int) -> Row:
    """The gradient probe at the weights before the update.

    The loss that trains is measured on the step's own rollouts. The family, which asks for tokens
    of the student itself, is measured on them as they were scored, before any mask, or on rollouts
    of the probe's own where they are stale or of a nucleus.
    """
    run, config, prompts = part.run, part.run.config, part.prompts
    trained = probed_loss(part)
    if config.top_p < 1 or bool((scored.age > 0).any()):
        prompts, rollouts, _ = roll_out(run, step, nth, top_p=1.0, purpose=PROBE)
        scored, _ = exact(run, prompts, rollouts)
    return probe(
        run.pair,
        prompts,
        scored,
        trained,
        gamma=config.gamma,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        max_logits_per_chunk=config.max_logits_per_chunk,
        blocks=config.probe_blocks,
    )


def source_of(objective: Objective) -> str:
    """Whose top-K the support is; the teacher's, for the diagnostics, where none is needed."""
    return "teacher" if objective.support in ("none", "full") else objective.support


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
