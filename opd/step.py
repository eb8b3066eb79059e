"""A step of training: roll out, score with both models, update, observe; from top to bottom.

A step depends on (config, weights, optimizer, step) alone: prompts and random numbers are derived
from (seed, step). So a run that was killed goes on from its last checkpoint as if it never was.

Shapes: B responses, T response positions.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts, Scored
from diagnostics.collapse import length, length_quantiles
from diagnostics.monitor import Monitor
from diagnostics.rows import Row
from diagnostics.totals import read
from opd.config import Config
from opd.data import Prompts, Task, encode
from opd.engines import Engine
from opd.evaluate import grade_responses
from opd.loss import loss_from_hidden
from opd.model import Pair, micro_batches, response_hidden
from opd.objectives import DENOMINATORS, Objective
from opd.optimizer import Optimizer, learning_rate
from opd.probing import probe
from opd.problems import Problem
from opd.roles import awake, follow, recomputing
from opd.scoring import score, score_support
from opd.selection import most_uncertain, narrowed
from opd.special import Mask, audit, masked

ROLLOUT, EVALUATION, PROBE = 0, 1, 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What the steps of a run share."""

    config: Config
    folder: Path
    pair: Pair
    task: Task
    engine: Engine
    objective: Objective
    masks: list[Mask]
    optimizer: Optimizer
    monitor: Monitor


def one_step(run: Run, step: int) -> Row:
    """Fresh rollouts and the optimizer steps on them; returns the step's row of numbers."""
    config, clock = run.config, [time.perf_counter()]
    prompts, rollouts = roll_out(run, step, config.top_p, ROLLOUT)
    clock.append(time.perf_counter())

    teacher, device = run.pair.teacher, run.pair.student.device
    with awake(teacher, device, config.offload_teacher):
        whole, teacher_hidden = scored_by_both(run, step, prompts, rollouts)
        probed = probed_row(run, step, prompts, whole) if due(step, config.probe_every) else {}
    clock.append(time.perf_counter())

    scored = masked(whole, run.masks)
    with awake(teacher, device, config.offload_teacher and run.objective.support == "full"):
        numbers = update(run, step, prompts, scored, teacher_hidden, slots(whole.mask))
    run.engine.sync(run.pair.student)
    clock.append(time.perf_counter())

    row: Row = {"step": step}
    removed = read(audit(whole, run.masks)) if run.masks else {}
    row |= run.monitor(step, [scored], **numbers, **removed) | probed
    if run.masks:  # a response is as long as it was sampled, whatever is supervised of it
        row |= read(length(whole) | length_quantiles(whole))
    if due(step, config.batch_every):
        scored.save(run.folder / "batches" / f"step_{step:06d}.safetensors")
    clock.append(time.perf_counter())
    for name, a, b in zip(("rollout", "score", "update", "record"), clock, clock[1:], strict=False):
        row[f"seconds/{name}"] = b - a
    return row


def roll_out(run: Run, step: int, top_p: float, purpose: int) -> tuple[Prompts, Rollouts]:
    """The step's prompts and graded responses to them, with the noise of that purpose."""
    config = run.config
    generator = torch.Generator().manual_seed(derive(config.seed, step, purpose))
    problems = run.task.train(step, config.prompts_per_step)
    prompts = encode(run.pair.tokenizer, problems, config.group_size, config.max_prompt)
    rollouts = run.engine.sample(
        prompts,
        run.pair.eos,
        max_response=config.max_response,
        temperature=config.temperature,
        top_p=top_p,
        generator=generator,
    )
    answers = [Problem(prompt="", answer=answer) for answer in prompts.answers]
    verdicts = grade_responses(
        run.pair.tokenizer, rollouts.tokens, rollouts.mask, answers, run.task.grade
    )
    device = run.pair.student.device
    rollouts = replace(rollouts.to(device), reward=torch.tensor(verdicts, device=device))
    return prompts.to(device), rollouts


def scored_by_both(
    run: Run, step: int, prompts: Prompts, rollouts: Rollouts
) -> tuple[Scored, Tensor | None]:
    """The scored batch, and the teacher's states (N, D') for objectives on the whole vocabulary.

    Between the steps that measure whole distributions, an objective that does not need the
    student's is spared them.
    """
    config = run.config
    measured = due(step, config.exact_every) or due(step, config.probe_every)
    if not measured and spared(run, rollouts):
        return score_support(run.pair, prompts, rollouts, **scoring(config)), None
    return exact(run, prompts, rollouts)


def exact(run: Run, prompts: Prompts, rollouts: Rollouts) -> tuple[Scored, Tensor | None]:
    """The same with whole distributions measured."""
    return score(
        run.pair,
        prompts,
        rollouts,
        source=source_of(run.objective),
        keep_teacher=run.objective.support == "full",
        endings=run.pair.endings if run.config.own_end else None,
        **scoring(run.config),
    )


def scoring(config: Config) -> dict[str, Any]:
    """Settings that every way of scoring has."""
    return {
        "k": config.support_k,
        "temperature": config.temperature,
        "micro_tokens": config.micro_tokens,
        "chunk_elements": config.chunk_elements,
    }


def spared(run: Run, rollouts: Rollouts) -> bool:
    """Whether the step can do without the student's whole distributions: see `score_support`."""
    plain = run.objective.support == "teacher" and not run.objective.normalised
    rest = run.config.keep_uncertain == 1 and not run.config.own_end
    return plain and rest and rollouts.softmax_logp is not None


def probed_row(run: Run, step: int, prompts: Prompts, whole: Scored) -> Row:
    """The gradient probe at the weights before the update, on these rollouts or its own."""
    config = run.config
    if config.top_p < 1:
        prompts, rollouts = roll_out(run, step, top_p=1.0, purpose=PROBE)
        whole, _ = exact(run, prompts, rollouts)
    return probe(
        run.pair,
        prompts,
        whole,
        gamma=config.gamma,
        micro_tokens=config.micro_tokens,
        chunk_elements=config.chunk_elements,
    )


def source_of(objective: Objective) -> str:
    """Whose top-K the support is; the teacher's, for the diagnostics, where none is needed."""
    return "teacher" if objective.support in ("none", "full") else objective.support


def update(
    run: Run,
    step: int,
    prompts: Prompts,
    scored: Scored,
    teacher_hidden: Tensor | None,
    slot: Tensor,
) -> dict[str, Tensor | float]:
    """`updates` optimizer steps, each on its share of the prompts; returns numbers for the row.

    teacher_hidden (N, D'): of all sampled tokens, masked ones too; slot (B, T): their rows in it.

    Credit, ratio and selection are made once, on all rollouts; a denominator counts the tokens of
    its own optimizer step. loss and grad_norm are means over the updates; skipped counts those
    whose gradient was not finite.
    """
    config, optimizer = run.config, run.optimizer
    credit, ratio = run.objective.credit(scored), run.objective.ratio(scored)
    kept = scored
    if config.keep_uncertain < 1:
        kept = narrowed(scored, most_uncertain(scored, config.keep_uncertain))
    rate = learning_rate(config.lr, step, config.steps, config.warmup, config.schedule)
    losses, norms, skipped = [], [], 0
    for rows in shares(prompts, config.updates):
        optimizer.zero_grad()
        mine, theirs = prompts.rows(rows), kept.rows(rows)
        weight = ratio[rows] / DENOMINATORS[config.denominator](theirs)[:, None]
        loss = torch.zeros((), device=scored.tokens.device)
        for some in micro_batches(mine, theirs, config.micro_tokens):
            part = theirs.rows(some).trimmed()
            width = part.mask.shape[1]
            where = slot[rows][some][:, :width][part.mask]
            with recomputing(run.pair.student.network, config.checkpointing):
                partial = loss_from_hidden(
                    run.pair,
                    run.objective,
                    response_hidden(run.pair.student, mine.rows(some), part),
                    None if teacher_hidden is None else teacher_hidden[where],
                    part,
                    credit[rows][some][:, :width],
                    weight[some][:, :width][part.mask],
                    chunk_elements=config.chunk_elements,
                )
                partial.backward()
            loss = loss + partial.detach()
        norm, taken = optimizer.step(rate, config.clip)
        if taken and config.teacher == "ema":
            follow(run.pair.teacher, run.pair.student, config.ema_decay)
        losses.append(loss)
        norms.append(norm)
        skipped += not taken
    means = {"loss": torch.stack(losses).mean(), "grad_norm": torch.stack(norms).mean()}
    return {**means, "lr": rate, "skipped": float(skipped)}


def shares(prompts: Prompts, updates: int) -> list[list[int]]:
    """Rows of each update: equally many prompts, in order, all rollouts of a prompt together."""
    index = prompts.index.tolist()
    order = list(dict.fromkeys(index))
    size = len(order) // updates
    place = {prompt: i // size for i, prompt in enumerate(order)}
    return [[r for r, p in enumerate(index) if place[p] == u] for u in range(updates)]


def slots(mask: Tensor) -> Tensor:
    """(B, T) row of each supervised token in the flat order."""
    return (mask.flatten().cumsum(0) - 1).reshape(mask.shape)


def derive(*words: int) -> int:
    """A 62-bit seed from integers, different for every tuple (splitmix64 rounds)."""
    state = 0
    for word in words:
        state = (state ^ word) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 2


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
