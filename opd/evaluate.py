"""Evaluation: accuracy on held-out verifiable problems, with an interval over problems."""

import math
from typing import Any

import torch

from opd.data import Grader, Task, encode, load_task
from opd.model import Model, end_ids, head_rows, load, split
from opd.problems import Problem
from opd.rollout import sample

ROWS_AT_ONCE = 256


def evaluate(
    model: Model,
    tokenizer: Any,
    eos: list[int],
    task: Task,
    *,
    problems: int,
    max_prompt: int,
    max_response: int,
    temperature: float,
    generator: torch.Generator,
) -> dict[str, Any]:
    """One sampled response to each held-out problem.

    Returns accuracy with its 95 % Wilson interval over problems, the mean length, the truncated
    share, and `outcomes`, one digit a problem, so that two runs can be compared pair by pair.
    """
    chosen = task.test(problems)
    outcomes, lengths, ended = [], 0, 0
    for first in range(0, len(chosen), ROWS_AT_ONCE):
        some = chosen[first : first + ROWS_AT_ONCE]
        prompts = encode(tokenizer, some, 1, max_prompt)
        rollouts = sample(
            model,
            prompts,
            eos,
            max_response=max_response,
            temperature=temperature,
            top_p=1.0,
            generator=generator,
        )
        outcomes += grade_responses(tokenizer, rollouts.tokens, rollouts.mask, some, task.grade)
        lengths += int(rollouts.mask.sum())
        ended += int(rollouts.ended.sum())
    right, n = sum(x >= 1 for x in outcomes), len(outcomes)
    low, high = wilson(right, n)
    return {
        "accuracy": right / n,
        "low": low,
        "high": high,
        "problems": n,
        "length": lengths / n,
        "truncated": 1 - ended / n,
        "outcomes": "".join("1" if x >= 1 else "0" for x in outcomes),
    }


def grade_responses(
    tokenizer: Any,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    problems: list[Problem],
    grade: Grader,
) -> list[float]:
    """The grader's verdict on each response; it sees special tokens, but not the last EOS."""
    verdicts = []
    for row, real, problem in zip(tokens.tolist(), mask.tolist(), problems, strict=True):
        ids = [token for token, keep in zip(row, real, strict=True) if keep]
        verdicts.append(grade(response_text(tokenizer, ids), problem.answer))
    return verdicts


def response_text(tokenizer: Any, ids: list[int]) -> str:
    """Decoded response without its final end token; every other special token stays visible."""
    if ids and ids[-1] in tokenizer.all_special_ids:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False)


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a share of `right` in `n` independent problems."""
    p = right / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - half) / scale, (centre + half) / scale


def evaluate_folder(
    name: str,
    task: str,
    *,
    device: str,
    problems: int,
    max_prompt: int,
    max_response: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """`evaluate` for a saved model and a named task."""
    tokenizer, network = load(name, device, "float32")
    return evaluate(
        split(network, head_rows(network)),
        tokenizer,
        end_ids(tokenizer, network),
        load_task(task, 0),
        problems=problems,
        max_prompt=max_prompt,
        max_response=max_response,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )
