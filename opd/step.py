"""A step of training: roll out, score with both models, update, observe; from top to bottom.

A step depends on (config, weights, optimizer, step) alone: prompts and random numbers are derived
from (seed, step). So a run that was killed goes on from its last checkpoint as if it never was. Nor
does it depend on the number of processes, up to rounding: each rolls out and scores its share of
the prompts; credit, selection and denominators are made of everybody's tokens, and sums of
gradients and of metrics are added.

Shapes: B responses of this process, T response positions.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts, Scored, concatenate
from diagnostics.collapse import length, length_quantiles
from diagnostics.monitor import Monitor
from diagnostics.ranks import among, batches_of_ranks
from diagnostics.rows import Row
from diagnostics.totals import Total, merge, read
from opd import processes
from opd.ahead import Ahead, Drawn
from opd.config import Config
from opd.data import Prompts, Task, encode
from opd.engines import Engine
from opd.episodes import play, rows_of, totals
from opd.evaluate import grade_responses
from opd.games import Games
from opd.loss import loss_from_hidden
from opd.model import Pair, micro_batches, response_hidden
from opd.objectives import DENOMINATORS, Objective
from opd.optimizer import Optimizer, learning_rate
from opd.probing import probe
from opd.problems import Problem
from opd.roles import awake, follow, recomputing
from opd.rollout import Share
from opd.scoring import score, score_support, score_told
from opd.seeds import PROBE, ROLLOUT, derive
from opd.selection import most_uncertain, narrowed
from opd.sharding import whole
from opd.special import Mask, audit, masked
from opd.told import asked


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What the steps of a run share; of a run of several tasks, what the steps of one task share.

    The tasks of a run have one student, optimizer, engine and what it samples ahead between them.
    name, place, weight: of the task among several; its loss counts by weight where they share a
    step.
    """

    config: Config
    folder: Path
    pair: Pair
    task: Task | Games
    engine: Engine
    ahead: Ahead
    objective: Objective
    masks: list[Mask]
    optimizer: Optimizer
    monitor: Monitor
    name: str = ""
    place: int = 0
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One task's rollouts of a step, scored.

    whole: every sampled token; scored: the supervised ones; teacher_hidden (N, D'): the teacher's
    states at the tokens of `whole`, for objectives on the whole vocabulary; played: what became of
    episodes, nothing where prompts are answered once.
    """

    run: Run
    prompts: Prompts
    whole: Scored
    scored: Scored
    teacher_hidden: Tensor | None
    played: Mapping[str, Total]


def one_step(chosen: Sequence[tuple[Run, int]], step: int) -> Row:
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
    if due(nth, run.config.batch_every):
        save_batch(parts, run.folder / "batches" / f"step_{step:06d}.safetensors")
    clock.append(time.perf_counter())
    for name, a, b in zip(("rollout", "score", "update", "record"), clock, clock[1:], strict=False):
        row[f"seconds/{name}"] = b - a
    return row


def scored_parts(
    chosen: Sequence[tuple[Run, int]], drawn: Sequence[Drawn], step: int
) -> tuple[list[Part], Row]:
    """What was drawn for each task, scored; and what its gradient probe says where one is due."""
    parts: list[Part] = []
    probed: Row = {}
    for (one, nth), (prompts, rollouts, played) in zip(chosen, drawn, strict=True):
        with awake(one.pair.teacher, one.pair.student.device, one.config.offload_teacher):
            scored, hidden = scored_by_both(one, nth, prompts, rollouts)
            if any(other.pair.remote is not None for other, _ in chosen):
                scored = replace(scored, prefix=None)  # what one of a shared step cannot tell
            if due(nth, one.config.probe_every):
                one.ahead.settle()  # tokenizers serve one thread at a time
                found = probed_row(one, step, nth, prompts, scored)
                probed |= headed(one, found) if len(chosen) > 1 else found
        parts.append(
            Part(
                run=one,
                prompts=prompts,
                whole=scored,
                scored=masked(scored, one.masks),
                teacher_hidden=hidden,
                played=played,
            )
        )
    return parts, probed


def save_batch(parts: Sequence[Part], path: Path) -> None:
    """Write the supervised tokens of all tasks and processes."""
    batches = [part.scored for part in parts]
    if processes.size() > 1:
        batches = [other for batch in batches for other in batches_of_ranks(batch)]
    if processes.rank() == 0:
        (batches[0] if len(batches) == 1 else concatenate(batches)).save(path)


def recorded(parts: list[Part], step: int, numbers: dict[str, Tensor | float]) -> Row:
    """The step's row. Tasks that share a step are pooled in it; `Run.monitor` splits them too."""
    run, row = parts[0].run, Row(step=step)
    if len(parts) == 1 and run.name:
        row["task"] = run.name
    removed: Row = {}
    for part in parts:
        if part.run.masks:
            found = read(processes.added(audit(part.whole, part.run.masks)))
            removed |= headed(part.run, found) if len(parts) > 1 else found
    row |= run.monitor(step, [part.scored for part in parts], **numbers, **removed)
    if removed:  # a response is as long as it was sampled, whatever is supervised of it
        lengths = (length(part.whole) | length_quantiles(part.whole) for part in parts)
        row |= read(processes.added(reduce(merge, lengths)))
    for part in parts:
        found = read(processes.added(part.played)) if part.played else {}
        row |= headed(part.run, found) if len(parts) > 1 else found
    return row


def headed(run: Run, row: Row) -> Row:
    """The columns under the task's name, as `diagnostics.groups.by` heads them."""
    return {f"task={run.name}/{name}": x for name, x in row.items()}


def draw(chosen: Sequence[tuple[Run, int]], step: int) -> list[Drawn]:
    """The rollouts of every task that shares the step."""
    return [roll_out(one, step, nth, one.config.top_p, ROLLOUT) for one, nth in chosen]


def roll_out(run: Run, step: int, nth: int, top_p: float, purpose: int) -> Drawn:
    """This process's prompts of the task's nth step and graded responses to them.

    The noise is for that purpose. Of games the rows of episodes, and what became of these.
    """
    config, device, task = run.config, run.pair.student.device, run.task
    count, group = config.prompts_per_step, config.group_size
    mine = processes.own(count, config.updates)
    words = (config.seed, step, purpose, *([run.place] if run.place else []))
    how: dict[str, Any] = {
        "max_response": config.max_response,
        "temperature": config.temperature,
        "top_p": top_p,
        "generator": torch.Generator().manual_seed(derive(*words)),
        "share": Share([i * group + j for i in mine for j in range(group)], count * group),
    }
    tokenizer, eos, played = run.pair.tokenizer, run.pair.eos, dict[str, Total]()
    if isinstance(task, Games):
        seeds = task.train(nth, count)
        games = [(i, seeds[i]) for i in mine]
        how |= {"max_prompt": config.max_prompt}
        episodes = play(run.engine, tokenizer, eos, task, games, group, **how)
        prompts, rollouts = rows_of(
            episodes, task.layout, temperature=config.temperature, top_p=top_p
        )
        verdicts, played = rollouts.reward, totals(episodes)
    else:
        problems = task.train(nth, count)
        prompts = encode(tokenizer, [problems[i] for i in mine], group, config.max_prompt)
        prompts = replace(prompts, index=torch.tensor(mine)[prompts.index])
        rollouts = run.engine.sample(prompts, eos, **how)
        answers = [Problem(prompt="", answer=answer) for answer in prompts.answers]
        verdicts = torch.tensor(
            grade_responses(tokenizer, rollouts.tokens, rollouts.mask, answers, task.grade)
        )
    rollouts = replace(
        rollouts.to(device),
        reward=verdicts.to(device),
        task=torch.full((len(verdicts),), run.place, device=device),
    )
    return prompts.to(device), rollouts, played


def scored_by_both(
    run: Run, nth: int, prompts: Prompts, rollouts: Rollouts
) -> tuple[Scored, Tensor | None]:
    """The scored batch, and the teacher's states (N, D') for objectives on the whole vocabulary.

    Between the steps that measure whole distributions, an objective that does not need the
    student's is spared them.
    """
    config, remote = run.config, run.pair.remote
    told = None if remote is None else asked(remote, prompts, rollouts, config.support_k)
    measured = due(nth, config.exact_every) or due(nth, config.probe_every)
    if not measured and spared(run, rollouts):
        return score_support(run.pair, prompts, rollouts, told=told, **scoring(config)), None
    if told is None:
        return exact(run, prompts, rollouts)
    sizes = {"micro_tokens": config.micro_tokens, "chunk_elements": config.chunk_elements}
    source = source_of(run.objective)
    return score_told(run.pair, prompts, rollouts, told, source=source, **sizes), None


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
    if bool((rollouts.age > 0).any()):
        return False  # the sampler's softmax is that of older weights
    return plain and rest and rollouts.softmax_logp is not None


def probed_row(run: Run, step: int, nth: int, prompts: Prompts, scored: Scored) -> Row:
    """The gradient probe at the weights before the update, on these rollouts or its own."""
    config = run.config
    if config.top_p < 1 or bool((scored.age > 0).any()):
        prompts, rollouts, _ = roll_out(run, step, nth, top_p=1.0, purpose=PROBE)
        scored, _ = exact(run, prompts, rollouts)
    return probe(
        run.pair,
        prompts,
        scored,
        gamma=config.gamma,
        micro_tokens=config.micro_tokens,
        chunk_elements=config.chunk_elements,
        blocks=config.probe_blocks,
    )


def source_of(objective: Objective) -> str:
    """Whose top-K the support is; the teacher's, for the diagnostics, where none is needed."""
    return "teacher" if objective.support in ("none", "full") else objective.support


def update(parts: Sequence[Part], step: int) -> dict[str, Tensor | float]:
    """`updates` optimizer steps, each on its share of every part; returns numbers for the row.

    The loss is the mean of the parts' losses by weight, each over its own denominator, which counts
    the tokens of its own optimizer step. Credit, ratio and selection are made once, on all
    rollouts. loss and grad_norm are means over the updates; skipped counts those whose gradient was
    not finite.
    """
    run = parts[0].run
    config, optimizer = run.config, run.optimizer
    rate = learning_rate(config.lr, step, config.steps, config.warmup, config.schedule)
    weights = [part.run.weight / sum(part.run.weight for part in parts) for part in parts]
    ready = [shared_out(part) for part in parts]
    losses, norms, skipped = [], [], 0
    for u in range(config.updates):
        optimizer.zero_grad()
        loss = torch.zeros((), device=run.pair.student.device)
        for part, weight, work in zip(parts, weights, ready, strict=True):
            loss = loss + backward(part, work[u], weight)
        optimizer.gather()
        norm, taken = optimizer.step(rate, config.clip)
        if taken and config.teacher == "ema":
            with whole(run.pair.student):
                follow(run.pair.teacher, run.pair.student, config.ema_decay)
        losses.append(processes.summed(loss))
        norms.append(norm)
        skipped += not taken
    means = {"loss": torch.stack(losses).mean(), "grad_norm": torch.stack(norms).mean()}
    return {**means, "lr": rate, "skipped": float(skipped)}


@dataclass(frozen=True, eq=False)
class Work:
    """What an update does with a part: rows, and for all rows of the part what the loss needs.

    kept: the tokens that the loss is taken over; credit, weight (B, T): of every token, the weight
    being ratio over denominator, which is right on `rows` alone.
    """

    rows: list[int]
    kept: Scored
    credit: Tensor
    weight: Tensor


def shared_out(part: Part) -> list[Work]:
    """The work of each update, from what all processes' tokens say of credit and denominators."""
    config, objective = part.run.config, part.run.objective
    alone = processes.size() == 1
    batch, mine = (part.scored, slice(None)) if alone else among(part.scored)
    here = (mine, slice(part.scored.mask.shape[1]))
    credit, ratio = objective.credit(batch)[here], objective.ratio(batch)[here]
    kept = part.scored
    if config.keep_uncertain < 1:
        chosen = most_uncertain(batch, config.keep_uncertain)
        kept, batch = narrowed(kept, chosen[here]), narrowed(batch, chosen)
    counted = replace(batch, support=None, prefix=None)
    found, place = [], torch.arange(len(batch))[mine].tolist()
    for rows in shares(batch.prompt.tolist(), config.updates):
        below = batch.student_logp.new_ones(len(batch))
        below[rows] = DENOMINATORS[config.denominator](counted.rows(rows))
        chosen_rows = set(rows)
        own = [i for i, row in enumerate(place) if row in chosen_rows]
        found.append(Work(own, kept, credit, ratio / below[mine, None]))
    return found


def backward(part: Part, work: Work, share: float) -> Tensor:
    """Add the gradient of `share` times the loss of these rows; returns that loss, detached."""
    run, config, slot = part.run, part.run.config, slots(part.whole.mask)
    loss = torch.zeros((), device=part.whole.tokens.device)
    asleep = config.offload_teacher and run.objective.support == "full"
    with awake(run.pair.teacher, run.pair.student.device, asleep):
        for some, counts in in_step(run, part.prompts, work):
            batch = work.kept.rows(some).trimmed()
            width = batch.mask.shape[1]
            hidden = part.teacher_hidden
            if hidden is not None:
                hidden = hidden[slot[some][:, :width][batch.mask]]
            with recomputing(run.pair.student.network, config.checkpointing):
                partial = loss_from_hidden(
                    run.pair,
                    run.objective,
                    response_hidden(run.pair.student, part.prompts.rows(some), batch),
                    hidden,
                    batch,
                    work.credit[some][:, :width],
                    share * counts * work.weight[some][:, :width][batch.mask],
                    chunk_elements=config.chunk_elements,
                )
                partial.backward()
            loss = loss + partial.detach()
    return loss


def in_step(run: Run, prompts: Prompts, work: Work) -> list[tuple[list[int], float]]:
    """Micro-batches of rows, and whether they count.

    Processes that share the weights go through them together, so that all have equally many; one
    that has fewer goes through its smallest again, for nothing.
    """
    groups = micro_batches(
        prompts.rows(work.rows), work.kept.rows(work.rows), run.config.micro_tokens
    )
    found = [([work.rows[i] for i in group], 1.0) for group in groups]
    if run.config.sharding == "none":
        return found
    lengths = work.kept.lengths.tolist()
    idle = [min(range(len(lengths)), key=lengths.__getitem__)]
    missing = processes.largest(len(found)) - len(found)
    return found + [(idle, 0.0)] * missing


def shares(prompt: list[int], updates: int) -> list[list[int]]:
    """Rows of each update: equally many prompts, by their numbers, all rollouts of one together.

    Nearly equally many where games failed.

    Raises:
      ValueError: fewer prompts than updates.
    """
    order = sorted(set(prompt))
    if len(order) < updates:
        raise ValueError(f"{len(order)} games were played, too few for {updates} updates")
    place = {number: i * updates // len(order) for i, number in enumerate(order)}
    return [[r for r, number in enumerate(prompt) if place[number] == u] for u in range(updates)]


def slots(mask: Tensor) -> Tensor:
    """(B, T) row of each supervised token in the flat order."""
    return (mask.flatten().cumsum(0) - 1).reshape(mask.shape)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
