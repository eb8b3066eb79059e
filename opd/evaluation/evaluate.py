"""Evaluation: sampled or greedy responses to held-out problems, graded, with intervals.

Shapes: M problems, S samples of each, B responses, T response positions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from diagnostics.batch import Rollouts
from diagnostics.core.totals import read
from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.prompts import encode, response_text, response_texts
from opd.data.sources import Question
from opd.data.tasks import Grader, Task, load_task, refuse_long, skip_long_prompts
from opd.envs.packing import totals
from opd.envs.rollout import Episode, play
from opd.envs.task import GameTask, is_games, load_games
from opd.evaluation.statistics import Array, summary, written
from opd.models.loading import end_ids, head_rows, load
from opd.models.model import CausalLM, split
from opd.rollouts.base import BatchSlice, Engine
from opd.rollouts.hf_engine import HfEngine
from opd.runtime import distributed

ROWS_AT_ONCE = 1024
GREEDY = {"temperature": 1.0, "top_p": 1e-9}  # the likeliest token is its whole nucleus


Column = tuple[float, int, bool, str | None, str]
"""Of a response: reward, tokens, whether it ended, what it votes for, its text."""


@dataclass(frozen=True, eq=False)
class GradedResponses:
    """Responses to M problems, S of each, as graded.

    reward, length (M, S) numbers; ended (M, S) bool, with an end token; answers (M, S), what each
    votes for, None if unreadable; texts (M, S). Of games: won, tokens of an episode, whether it was
    played to its end, and all that was said; numbers: what else became of the episodes.
    """

    problems: list[Problem]
    reward: Array
    length: Array
    ended: Array
    answers: list[list[str | None]]
    texts: list[list[str]]
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def right(self) -> Array:
        """(M, S) bool."""
        return self.reward >= 1


def evaluate(
    model: CausalLM,
    tokenizer: Any,
    eos: list[int],
    task: Task | GameTask,
    *,
    problems: int,
    max_prompt: int,
    max_response: int,
    temperature: float,
    generator: torch.Generator,
    samples: int = 1,
    top_p: float = 1.0,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Accuracy of a model on a task's held-out problems: `result` of `respond`."""
    graded = respond(
        engine or HfEngine(model),
        tokenizer,
        eos,
        task,
        problems=problems,
        max_prompt=max_prompt,
        max_response=max_response,
        temperature=temperature,
        generator=generator,
        samples=samples,
        top_p=top_p,
    )
    return result(graded)


def respond(
    engine: Engine,
    tokenizer: Any,
    eos: list[int],
    task: Task | GameTask,
    *,
    problems: int,
    max_prompt: int,
    max_response: int,
    temperature: float,
    generator: torch.Generator,
    samples: int = 1,
    top_p: float = 1.0,
) -> GradedResponses:
    """`samples` graded responses to each of the first `problems` held-out problems.

    temperature: 0 is greedy decoding, which draws one sample whatever top_p is.

    Raises:
      ValueError: no sample, or several greedy ones.
    """
    if samples < 1:
        raise InvalidInput(f"samples is {samples}; it must be at least 1")
    if temperature == 0 and samples > 1:
        raise InvalidInput(f"{samples} greedy samples are all equal; set temperature above 0")
    how: dict[str, Any] = GREEDY if temperature == 0 else {}
    how = {"temperature": temperature, "top_p": top_p, "generator": generator, **how}
    if isinstance(task, GameTask):
        how |= {"max_prompt": max_prompt, "max_response": max_response}
        return won(engine, tokenizer, eos, task, problems, samples, **how)
    chosen = task.test(problems)
    if not all(problem.answer for problem in chosen):
        raise InvalidInput("the held-out problems have no answers, so there is nothing to evaluate")
    columns: list[Column] = []
    step = max(1, ROWS_AT_ONCE // samples)
    for first in range(0, len(chosen), step):
        some = chosen[first : first + step]
        mine = distributed.strided(len(some))
        asked = [some[i] for i in mine]
        found: list[Column] = []
        if mine:
            prompts = encode(tokenizer, asked, samples, max_prompt)
            rows = BatchSlice(
                [i * samples + j for i in mine for j in range(samples)], len(some) * samples
            )
            rollouts = engine.sample(prompts, eos, max_response=max_response, share=rows, **how)
            found = graded_rows(tokenizer, eos, rollouts, repeated(asked, samples), task.grade)
        columns += in_order(found, samples)
    return tabulated(chosen, samples, columns)


def in_order(found: list[Column], samples: int) -> list[Column]:
    """The columns of all processes' problems, `samples` of each, in the order of the problems."""
    told = distributed.told(found)
    parts = [[rows[i : i + samples] for i in range(0, len(rows), samples)] for rows in told]
    mixed = [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]
    return [(row[0], row[1], row[2], row[3], row[4]) for rows in mixed for row in rows]


def tabulated(
    problems: list[Problem], samples: int, columns: list[Column], **numbers: Mapping[str, float]
) -> GradedResponses:
    """The columns of all responses as a table, a row a problem."""
    reward, length, ended, answers, texts = map(list, zip(*columns, strict=True))
    shape = len(problems), samples
    return GradedResponses(
        problems=problems,
        reward=np.array(reward).reshape(shape),
        length=np.array(length).reshape(shape),
        ended=np.array(ended).reshape(shape),
        answers=[answers[i : i + samples] for i in range(0, len(answers), samples)],
        texts=[texts[i : i + samples] for i in range(0, len(texts), samples)],
        **numbers,
    )


def won(
    engine: Engine,
    tokenizer: Any,
    eos: list[int],
    games: GameTask,
    count: int,
    samples: int,
    **how: Any,
) -> GradedResponses:
    """`samples` episodes of each of `count` held-out games; one that failed is not won."""
    seeds = games.test(count)
    mine = distributed.strided(len(seeds))
    played, columns = [], []
    if mine:
        rows = BatchSlice([i * samples + j for i in mine for j in range(samples)], count * samples)
        chosen = [(i, seeds[i]) for i in mine]
        played = play(engine, tokenizer, eos, games, chosen, samples, share=rows, **how)
        columns = [seen(tokenizer, eos, episode) for episode in played]
    goals = distributed.told([episode.goal for episode in played[::samples]])
    problems: list[Problem] = [
        Question(prompt=f"{games.source} {seed}", answer=goals[i % len(goals)][i // len(goals)])
        for i, seed in enumerate(seeds)
    ]
    numbers = read(distributed.added(totals(played)))
    return tabulated(problems, samples, in_order(columns, samples), numbers=numbers)


def seen(tokenizer: Any, eos: Sequence[int], episode: Episode) -> Column:
    """(won, tokens, played to its end, how it votes, all that was said) of an episode."""
    said = [response_text(tokenizer, turn.response, eos) for turn in episode.turns]
    length = sum(len(turn.response) for turn in episode.turns)
    vote = "won" if episode.won else "lost"
    return float(episode.won), length, episode.outcome in ("won", "lost"), vote, "\n".join(said)


def repeated(problems: Sequence[Problem], samples: int) -> list[Problem]:
    return [problem for problem in problems for _ in range(samples)]


def graded_rows(
    tokenizer: Any,
    eos: Sequence[int],
    rollouts: Rollouts,
    problems: list[Problem],
    grade: Grader,
) -> list[Column]:
    texts = response_texts(tokenizer, rollouts.tokens, rollouts.mask, eos)
    found = [grade(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
    lengths, ended = rollouts.mask.sum(1).tolist(), rollouts.ended.tolist()
    return [
        (verdict.reward, length, end, verdict.answer, text)
        for verdict, length, end, text in zip(found, lengths, ended, texts, strict=True)
    ]


def result(graded: GradedResponses) -> dict[str, Any]:
    """The numbers of an evaluation, flat, and its outcomes; what evals.jsonl holds.

    `accuracy`, `pass@k`, `majority@S` with intervals over problems (opd.evaluation.statistics.summary); mean
    `length`; shares `truncated` (no end token) and `unparsed` (no readable answer) of responses;
    where the problems carry several task labels, `accuracy`, `low`, `high`, `unparsed` and
    `problems` of each as `task/LABEL/...` and their plain mean as `task_mean`. `outcomes` has a
    digit a sample, and with several samples a space between problems; `problem_set` identifies the
    problems, so that opd.evaluation.statistics.compare can pair two evaluations. Of games `accuracy` is the
    share won, `truncated`
    that of episodes which were cut; `opd.envs.rollout.totals` are there too.
    """
    right, labels = graded.right, [label(problem) for problem in graded.problems]
    silent = [answer is None for row in graded.answers for answer in row]
    found: dict[str, Any] = summary(right, graded.answers)
    found |= {
        "problems": right.shape[0],
        "samples": right.shape[1],
        "length": float(graded.length.mean()),
        "truncated": 1 - float(graded.ended.mean()),
        "unparsed": sum(silent) / len(silent),
    }
    names = sorted(set(labels))
    for name in names if len(names) > 1 else []:
        rows = [i for i, other in enumerate(labels) if other == name]
        part = summary(right[rows], [graded.answers[i] for i in rows])
        chosen = {k: part[k] for k in ("accuracy", "low", "high")} | {"problems": len(rows)}
        unread = [answer is None for i in rows for answer in graded.answers[i]]
        chosen["unparsed"] = sum(unread) / len(unread)
        found |= {f"task/{name}/{k}": v for k, v in chosen.items()}
    if len(names) > 1:
        found["task_mean"] = float(np.mean([found[f"task/{name}/accuracy"] for name in names]))
    found |= graded.numbers
    return found | {"outcomes": written(right), "problem_set": fingerprint(graded.problems)}


def label(problem: Problem) -> str:
    """The task that a problem belongs to; "unlabelled" if it does not say."""
    return (problem.task if isinstance(problem, Question) else "") or "unlabelled"


def fingerprint(problems: list[Problem]) -> str:
    """12 hexadecimal digits that tell sequences of prompts and answers apart."""
    pairs = json.dumps([(problem.prompt, problem.answer) for problem in problems])
    return hashlib.sha256(pairs.encode()).hexdigest()[:12]


def records(graded: GradedResponses) -> list[dict[str, Any]]:
    """One row a problem: prompt, answer, task, and of each sample what it said and how it went."""
    return [
        {
            "prompt": problem.prompt,
            "answer": problem.answer,
            "task": label(problem),
            "rewards": graded.reward[i].tolist(),
            "answers": graded.answers[i],
            "lengths": graded.length[i].tolist(),
            "truncated": (~graded.ended[i]).tolist(),
            "responses": graded.texts[i],
        }
        for i, problem in enumerate(graded.problems)
    ]


def respond_folder(
    name: str,
    task: str,
    *,
    device: str,
    problems: int,
    max_prompt: int,
    max_response: int,
    temperature: float,
    seed: int,
    samples: int = 1,
    top_p: float = 1.0,
    dtype: str = "float32",
    whole: bool = False,
    drop: bool = False,
    layout: str = "turns",
    max_turns: int = 30,
    history: int = 2,
    trust_remote_code: bool = False,
    **settings: Any,
) -> GradedResponses:
    """`respond` for a saved model and a task by name.

    Args:
      whole: all problems of a file, not only those that training on it would hold out.
      drop: leave out prompts that are too long, instead of refusing them.
      layout, max_turns, history: of games (opd.envs.task); problems without turns have no use for them.
      settings: of `opd.data.tasks.load_task`: grader, system, template, columns.
    """
    tokenizer, network = load(name, device, dtype, trust_remote_code)
    fit = partial(skip_long_prompts if drop else refuse_long, tokenizer, max_prompt)
    test = task if whole and task != "lab" else ""
    told = {"layout": layout, "max_turns": max_turns, "history": history}
    return respond(
        HfEngine(split(network, head_rows(network))),
        tokenizer,
        end_ids(tokenizer, network),
        load_games(task, 0, system=settings.get("system", ""), **told)
        if is_games(task)
        else load_task(task, 0, test=test, fit=fit, **settings),
        problems=problems,
        max_prompt=max_prompt,
        max_response=max_response,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        samples=samples,
        top_p=top_p,
    )


def evaluate_folder(name: str, task: str, **settings: Any) -> dict[str, Any]:
    """`result` of `respond_folder`."""
    return result(respond_folder(name, task, **settings))
