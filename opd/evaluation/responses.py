"""Sample responses to held-out problems, or episodes of held-out games, and grade them.

Shapes: M problems, S samples of each, B responses, T response positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from diagnostics.batch import Rollouts
from diagnostics.core.totals import compute
from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.prompts import decode_response, decode_responses, encode_prompts
from opd.data.sources import DatasetProblem
from opd.data.tasks import Grader, Task
from opd.envs.packing import episode_accumulators
from opd.envs.rollout import Episode, play_episodes
from opd.envs.task import GameTask
from opd.evaluation.statistics import Array
from opd.rollouts.base import BatchSlice, Engine
from opd.runtime import distributed

ROWS_AT_ONCE = 1024
GREEDY = {"temperature": 1.0, "top_p": 1e-9}  # the nucleus contains only the likeliest token


GradedResponse = tuple[float, int, bool, str | None, str]
"""Reward, number of tokens, whether it ended, its majority-vote key, and the text of a response."""


@dataclass(frozen=True, eq=False)
class GradedResponses:
    """Graded responses to M problems, S of each.

    For games a response is an episode: the reward is 1 if it was won, the length counts all its
    tokens, and the texts contain all its turns.
    """

    problems: list[Problem]
    """The M problems."""
    reward: Array
    """(M, S) rewards."""
    length: Array
    """(M, S) numbers of tokens."""
    ended: Array
    """(M, S) bool, whether a response has an EOS, or an episode was played to its end."""
    answers: list[list[str | None]]
    """(M, S) majority-vote keys; None if unreadable."""
    texts: list[list[str]]
    """(M, S) texts."""
    tokens: Sequence[Sequence[Array]] = ()
    """(M, S) arrays of the ids of each response; empty for games, and where several processes
    sampled."""
    grader: str = ""
    """Name of the grader; empty for games."""
    game_metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the episodes; empty for problems that are not games."""

    @property
    def correct(self) -> Array:
        """(M, S) bool, whether the reward is at least 1."""
        return self.reward >= 1


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
    """Sample and grade `samples` responses to each of the first `problems` held-out problems.

    Args:
        engine: Generates the responses.
        tokenizer: The model's tokenizer.
        eos: Ids that end a response.
        task: Task or game.
        problems: Number of held-out problems.
        max_prompt: Maximum prompt tokens.
        max_response: Maximum response tokens.
        temperature: Sampling temperature; 0 for greedy decoding, which ignores top_p.
        generator: Random generator.
        samples: Responses per problem; 1 with greedy decoding.
        top_p: Nucleus of sampling.

    Returns:
        The graded responses of all processes.

    Raises:
        InvalidInput: samples is below 1 or several greedy samples are requested, or the problems
            have no answers.
    """
    if samples < 1:
        raise InvalidInput(f"samples is {samples}; it must be at least 1")
    if temperature == 0 and samples > 1:
        raise InvalidInput(f"{samples} greedy samples would all be equal; set temperature above 0")
    sampling: dict[str, Any] = GREEDY if temperature == 0 else {}
    sampling = {"temperature": temperature, "top_p": top_p, "generator": generator, **sampling}
    if isinstance(task, GameTask):
        sampling |= {"max_prompt": max_prompt, "max_response": max_response}
        return respond_to_games(engine, tokenizer, eos, task, problems, samples, **sampling)
    test_problems = task.test(problems)
    if not all(problem.answer for problem in test_problems):
        raise InvalidInput(
            "the held-out problems have no answers, so they cannot be graded; set the column that "
            "holds the answers, or use another task"
        )
    columns: list[GradedResponse] = []
    tokens: list[Array] = []
    step = max(1, ROWS_AT_ONCE // samples)
    for first in range(0, len(test_problems), step):
        problem_batch = test_problems[first : first + step]
        local_indices = distributed.shard_indices(len(problem_batch))
        local_problems = [problem_batch[i] for i in local_indices]
        graded_responses: list[GradedResponse] = []
        if local_indices:
            prompts = encode_prompts(tokenizer, local_problems, samples, max_prompt)
            rows = BatchSlice(
                [i * samples + j for i in local_indices for j in range(samples)],
                len(problem_batch) * samples,
            )
            rollouts = engine.sample(
                prompts, eos, max_response=max_response, batch_slice=rows, **sampling
            )
            graded_responses = grade_rollouts(
                tokenizer, eos, rollouts, repeat_each(local_problems, samples), task.grade
            )
            tokens += response_ids(rollouts)
        columns += gather_in_order(graded_responses, samples)
    table = build_table(test_problems, samples, columns)
    if distributed.world_size() > 1:
        return replace(table, grader=task.name)
    token_rows = [tokens[i : i + samples] for i in range(0, len(tokens), samples)]
    return replace(table, grader=task.name, tokens=token_rows)


def response_ids(rollouts: Rollouts) -> list[Array]:
    """Return the ids of each response, with its EOS."""
    tokens, masks = rollouts.tokens.cpu().numpy(), rollouts.mask.cpu().numpy()
    return [row[mask].astype(np.int32) for row, mask in zip(tokens, masks, strict=True)]


def gather_in_order(local_responses: list[GradedResponse], samples: int) -> list[GradedResponse]:
    """Gather the responses of all processes, `samples` per problem, in order of the problems."""
    rows_by_rank = distributed.all_gather_object(local_responses)
    parts = [[rows[i : i + samples] for i in range(0, len(rows), samples)] for rows in rows_by_rank]
    interleaved = [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]
    return [(row[0], row[1], row[2], row[3], row[4]) for rows in interleaved for row in rows]


def build_table(
    problems: list[Problem],
    samples: int,
    columns: list[GradedResponse],
) -> GradedResponses:
    """Arrange responses as a table with one row per problem.

    Args:
        problems: The M problems.
        samples: S, responses per problem.
        columns: M x S responses, problem by problem.

    Returns:
        The table.
    """
    reward, length, ended, answers, texts = map(list, zip(*columns, strict=True))
    shape = len(problems), samples
    return GradedResponses(
        problems=problems,
        reward=np.array(reward).reshape(shape),
        length=np.array(length).reshape(shape),
        ended=np.array(ended).reshape(shape),
        answers=[answers[i : i + samples] for i in range(0, len(answers), samples)],
        texts=[texts[i : i + samples] for i in range(0, len(texts), samples)],
    )


def respond_to_games(
    engine: Engine,
    tokenizer: Any,
    eos: list[int],
    games: GameTask,
    count: int,
    samples: int,
    **sampling: Any,
) -> GradedResponses:
    """Play `samples` episodes of each of `count` held-out games; a failed episode is not won.

    Args:
        engine: Generates the responses.
        tokenizer: The model's tokenizer.
        eos: Ids that end a response.
        games: The games.
        count: Number of held-out games.
        samples: Episodes per game.
        **sampling: Sampling options of `opd.envs.rollout.play_episodes`.

    Returns:
        The graded episodes of all processes.
    """
    seeds = games.test(count)
    local_indices = distributed.shard_indices(len(seeds))
    episodes, columns = [], []
    if local_indices:
        rows = BatchSlice(
            [i * samples + j for i in local_indices for j in range(samples)], count * samples
        )
        local_games = [(i, seeds[i]) for i in local_indices]
        episodes = play_episodes(
            engine, tokenizer, eos, games, local_games, samples, batch_slice=rows, **sampling
        )
        columns = [grade_episode(tokenizer, eos, episode) for episode in episodes]
    goals = distributed.all_gather_object([episode.goal for episode in episodes[::samples]])
    problems: list[Problem] = [
        DatasetProblem(
            prompt=f"{games.source} {seed}", answer=goals[i % len(goals)][i // len(goals)]
        )
        for i, seed in enumerate(seeds)
    ]
    game_metrics = compute(distributed.all_reduce_accumulators(episode_accumulators(episodes)))
    table = build_table(problems, samples, gather_in_order(columns, samples))
    return replace(table, game_metrics=game_metrics)


def grade_episode(tokenizer: Any, eos: Sequence[int], episode: Episode) -> GradedResponse:
    """Return won, number of tokens, played to the end, vote key and transcript of an episode."""
    texts = [decode_response(tokenizer, turn.response, eos) for turn in episode.turns]
    length = sum(len(turn.response) for turn in episode.turns)
    vote = "won" if episode.won else "lost"
    return float(episode.won), length, episode.outcome in ("won", "lost"), vote, "\n".join(texts)


def repeat_each(problems: Sequence[Problem], samples: int) -> list[Problem]:
    """Repeat each problem `samples` times."""
    return [problem for problem in problems for _ in range(samples)]


def grade_rollouts(
    tokenizer: Any,
    eos: Sequence[int],
    rollouts: Rollouts,
    problems: list[Problem],
    grade: Grader,
) -> list[GradedResponse]:
    """Grade a batch of responses.

    Args:
        tokenizer: The model's tokenizer.
        eos: Ids that end a response.
        rollouts: The responses.
        problems: The problem of each response.
        grade: Grader of the task.

    Returns:
        One tuple per response.
    """
    texts = decode_responses(tokenizer, rollouts.tokens, rollouts.mask, eos)
    grades = [grade(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
    lengths, ended = rollouts.mask.sum(1).tolist(), rollouts.ended.tolist()
    return [
        (grade_result.reward, length, end, grade_result.answer, text)
        for grade_result, length, end, text in zip(grades, lengths, ended, texts, strict=True)
    ]
