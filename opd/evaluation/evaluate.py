"""Evaluate a model: sampled or greedy responses to held-out problems, graded, with intervals.

Shapes: M problems, S samples of each, B responses, T response positions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from diagnostics.batch import Rollouts
from diagnostics.core.totals import compute
from diagnostics.errors import InvalidInput
from diagnostics.records.renamed import TASKS
from opd.config.groups import EvalConfig, GamesConfig
from opd.data.chain_task import Problem
from opd.data.chat_template import set_chat_template
from opd.data.prompts import decode_response, decode_responses, encode_prompts
from opd.data.sources import DEFAULT_COLUMNS, Columns, DatasetProblem
from opd.data.tasks import Grader, Task, load_task, reject_long_prompts, skip_long_prompts
from opd.envs.packing import episode_accumulators
from opd.envs.rollout import Episode, play_episodes
from opd.envs.task import GameTask, is_games, load_games
from opd.evaluation.statistics import Array, encode_outcomes, summarize
from opd.models.loading import eos_ids, load_model, num_head_rows
from opd.models.model import CausalLM, split_head
from opd.rollouts.base import BatchSlice, Engine
from opd.rollouts.hf_engine import HfEngine
from opd.runtime import distributed

ROWS_AT_ONCE = 1024
DEFAULT_GAMES = GamesConfig()
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
    game_metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the episodes; empty for problems that are not games."""

    @property
    def correct(self) -> Array:
        """(M, S) bool, whether the reward is at least 1."""
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
    """Return the metrics of a model on a task's held-out problems.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        eos: Ids that end a response.
        task: Task or game.
        problems: Number of held-out problems.
        max_prompt: Maximum prompt tokens.
        max_response: Maximum response tokens.
        temperature: Sampling temperature; 0 for greedy decoding.
        generator: Random generator.
        samples: Responses per problem.
        top_p: Nucleus of sampling.
        engine: Generates the responses; the model itself if None.

    Returns:
        `evaluation_result` of `respond`.
    """
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
    return evaluation_result(graded)


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
        columns += gather_in_order(graded_responses, samples)
    return build_table(test_problems, samples, columns)


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
    **game_metrics: Mapping[str, float],
) -> GradedResponses:
    """Arrange responses as a table with one row per problem.

    Args:
        problems: The M problems.
        samples: S, responses per problem.
        columns: M x S responses, problem by problem.
        **game_metrics: Metrics of games, as the keyword argument `game_metrics`.

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
        **game_metrics,
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
    return build_table(
        problems, samples, gather_in_order(columns, samples), game_metrics=game_metrics
    )


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


def evaluation_result(graded: GradedResponses) -> dict[str, Any]:
    """Return the metrics of an evaluation and its outcomes, a flat row of evals.jsonl.

    `accuracy`, `pass@k` and `majority@S` have intervals over problems
    (opd.evaluation.statistics.summarize). `length` is a mean; `truncated` (no EOS) and `unparsed`
    (no readable answer) are shares of responses. If the problems have several task labels,
    `accuracy`, `low`, `high`, `unparsed` and `problems` of each are given as `task/LABEL/...` and
    their unweighted mean as `task_mean`. `outcomes` has one digit per sample and, with several
    samples, a space between problems; `problem_set` identifies the problems, so that
    opd.evaluation.statistics.compare can pair two evaluations. For games `accuracy` is the share of
    episodes won and `truncated` the share that was cut off; the metrics of
    `opd.envs.packing.episode_accumulators` are added.

    Args:
        graded: The graded responses.

    Returns:
        Metrics by name.
    """
    correct, labels = graded.correct, [task_label(problem) for problem in graded.problems]
    is_unparsed = [answer is None for row in graded.answers for answer in row]
    metrics: dict[str, Any] = summarize(correct, graded.answers)
    metrics |= {
        "problems": correct.shape[0],
        "samples": correct.shape[1],
        "length": float(graded.length.mean()),
        "truncated": 1 - float(graded.ended.mean()),
        "unparsed": sum(is_unparsed) / len(is_unparsed),
    }
    names = sorted(set(labels))
    for name in names if len(names) > 1 else []:
        rows = [i for i, label in enumerate(labels) if label == name]
        task_summary = summarize(correct[rows], [graded.answers[i] for i in rows])
        task_metrics = {k: task_summary[k] for k in ("accuracy", "low", "high")} | {
            "problems": len(rows)
        }
        task_is_unparsed = [answer is None for i in rows for answer in graded.answers[i]]
        task_metrics["unparsed"] = sum(task_is_unparsed) / len(task_is_unparsed)
        metrics |= {f"task/{name}/{k}": v for k, v in task_metrics.items()}
    if len(names) > 1:
        metrics["task_mean"] = float(np.mean([metrics[f"task/{name}/accuracy"] for name in names]))
    metrics |= graded.game_metrics
    return metrics | {
        "outcomes": encode_outcomes(correct),
        "problem_set": problem_fingerprint(graded.problems),
    }


def task_label(problem: Problem) -> str:
    """Return the task that a problem belongs to, or "unlabelled"."""
    return (problem.task if isinstance(problem, DatasetProblem) else "") or "unlabelled"


def problem_fingerprint(problems: list[Problem]) -> str:
    """Return 12 hexadecimal digits that identify a sequence of prompts and answers.

    Games are hashed under their former source names, so that records of before a renaming compare.

    Args:
        problems: The problems, in order.

    Returns:
        The fingerprint.
    """
    former_names = {present: former for former, present in TASKS.items()}
    pairs = []
    for problem in problems:
        source, space, text = problem.prompt.partition(" ")
        pairs.append((former_names.get(source, source) + space + text, problem.answer))
    digest = hashlib.sha256(json.dumps(pairs).encode())
    return digest.hexdigest()[:12]


def response_records(graded: GradedResponses) -> list[dict[str, Any]]:
    """Return one row per problem: prompt, answer, task, and the text and grade of each sample."""
    return [
        {
            "prompt": problem.prompt,
            "answer": problem.answer,
            "task": task_label(problem),
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
    evaluation: EvalConfig,
    games: GamesConfig = DEFAULT_GAMES,
    max_prompt: int,
    max_response: int,
    seed: int,
    device: str,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    skip_long: bool = False,
    columns: Columns = DEFAULT_COLUMNS,
    grader: str = "",
    system: str = "",
    template: Mapping[str, Any] | None = None,
    chat_template: str = "",
) -> GradedResponses:
    """Run `respond` for a saved model and a task by name.

    Args:
        name: Folder or hub name of the model.
        task: Name of the task, of whose problems a tenth is held out.
        evaluation: Number of problems, sampling, and another task, all of whose problems are used.
        games: Layout and length of games; ignored for problems without turns.
        max_prompt: Maximum prompt tokens.
        max_response: Maximum response tokens.
        seed: Seed of the sampling.
        device: Device.
        dtype: Name of a torch dtype.
        trust_remote_code: Run Python code that comes with the model.
        skip_long: Skip prompts that are too long instead of refusing them.
        columns: Columns of `task`.
        grader: Grader, see `opd.data.tasks.load_task`.
        system: System message of every prompt.
        template: Settings of the chat template.
        chat_template: Jinja file of a chat template in the place of the model's own; "" for that.

    Returns:
        The graded responses.

    Raises:
        InvalidInput: Both tasks are given, or the models or problems cannot be used.
    """
    if evaluation.eval_task and task != "lab":
        raise InvalidInput(
            f"eval_task is {evaluation.eval_task!r}, of which all problems are used, and task is "
            f"{task!r}; leave one of them out"
        )
    tokenizer, network = load_model(name, device, dtype, trust_remote_code)
    set_chat_template(tokenizer, chat_template)
    source, columns_of_source = task, columns
    if evaluation.eval_task:
        source = evaluation.eval_task
        columns_of_source = replace(
            columns, prompt=evaluation.eval_prompt_column, answer=evaluation.eval_answer_column
        )
    if is_games(source):
        loaded_task: Task | GameTask = load_games(
            source,
            0,
            system=system,
            layout=games.layout,
            max_turns=games.max_turns,
            history=games.history_turns,
            template=tuple((template or {}).items()),
        )
    else:
        loaded_task = load_task(
            source,
            0,
            test=evaluation.eval_task if source != "lab" else "",
            grader=grader,
            system=system,
            template=template,
            columns=columns_of_source,
            handle_long_prompts=partial(
                skip_long_prompts if skip_long else reject_long_prompts, tokenizer, max_prompt
            ),
        )
    return respond(
        HfEngine(split_head(network, num_head_rows(network))),
        tokenizer,
        eos_ids(tokenizer, network),
        loaded_task,
        problems=evaluation.eval_problems,
        max_prompt=max_prompt,
        max_response=max_response,
        temperature=evaluation.eval_temperature,
        generator=torch.Generator().manual_seed(seed),
        samples=evaluation.eval_samples,
        top_p=evaluation.eval_top_p,
    )


def evaluate_folder(name: str, task: str, **settings: Any) -> dict[str, Any]:
    """Return `evaluation_result` of `respond_folder`."""
    return evaluation_result(respond_folder(name, task, **settings))
