"""Evaluate a model: metrics of graded responses to held-out problems, with intervals."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from diagnostics.errors import InvalidInput
from diagnostics.records.renamed import TASKS
from opd.config.groups import EvalConfig, GamesConfig
from opd.data.chain_task import Problem
from opd.data.chat_template import set_chat_template
from opd.data.sources import DEFAULT_COLUMNS, Columns, DatasetProblem
from opd.data.tasks import Task, load_task, reject_long_prompts, skip_long_prompts
from opd.envs.task import GameTask, is_games, load_games
from opd.evaluation.responses import GradedResponses, respond
from opd.evaluation.statistics import encode_outcomes, summarize
from opd.models.loading import eos_ids, load_model, num_head_rows
from opd.models.model import CausalLM, split_head
from opd.rollouts.base import Engine
from opd.rollouts.hf_engine import HfEngine

DEFAULT_GAMES = GamesConfig()


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
