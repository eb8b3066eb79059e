"""Evaluate a model: metrics of graded responses to held-out problems, with intervals."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from diagnostics.records.renamed import TASKS
from opd.data.chain_task import Problem
from opd.data.sources import DatasetProblem
from opd.data.tasks import Task
from opd.envs.task import GameTask
from opd.evaluation.calibration import over_confidence, vote_confidence
from opd.evaluation.recovery import RecoveryRecord
from opd.evaluation.responses import GradedResponses, respond
from opd.evaluation.statistics import encode_outcomes, summarize
from opd.models.model import CausalLM
from opd.rollouts.base import Engine
from opd.rollouts.hf_engine import HfEngine


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

    `accuracy`, `pass@k`, `gap@k` and `majority@S` have intervals over problems
    (opd.evaluation.statistics.summarize), and so has `vote/over_confidence`, the share of the other
    samples that state the answer of a sample, minus the accuracy, where problems have several
    samples with readable answers (opd.evaluation.calibration). `length` is a mean; `truncated` (no
    EOS) and `unparsed` (no readable answer) are shares of responses. If the problems have several
    task labels, `accuracy`, `low`, `high`, `unparsed` and `problems` of each are given as
    `task/LABEL/...` and their unweighted mean as `task_mean`. `outcomes` has one digit per sample
    and, with several samples, a space between problems; `problem_set` identifies the problems, so
    that opd.evaluation.statistics.compare can pair two evaluations. For games `accuracy` is the
    share of episodes won and `truncated` the share that was cut off; the metrics of
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
        "truncated": float((~graded.ended).mean()),
        "unparsed": sum(is_unparsed) / len(is_unparsed),
    }
    if correct.shape[1] > 1 and not graded.game_metrics:
        excess = over_confidence(vote_confidence(graded.answers), correct)
        metrics |= {f"vote/{name}": value for name, value in excess.items()}
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


def response_records(
    graded: GradedResponses, recovery: Sequence[RecoveryRecord] = ()
) -> list[dict[str, Any]]:
    """Return one row per problem: prompt, answer, task, and the text and grade of each sample.

    Args:
        graded: The responses.
        recovery: Their continuations after an error, which the rows hold as a list `recovery`.

    Returns:
        The rows.
    """
    rows: list[dict[str, Any]] = [
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
    for record in recovery:
        place = record.perturbation
        rows[place.problem].setdefault("recovery", []).append(
            {
                "sample": place.sample,
                "position": len(place.prefix),
                "ids": [place.original, place.replacement],
                "correct": list(record.correct),
                "responses": list(record.texts),
            }
        )
    return rows
