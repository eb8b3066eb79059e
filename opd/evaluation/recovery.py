"""Recovery: accuracy when a response is continued after an error, and without the error.

A place in the reasoning of each response is drawn, and the response is continued from there twice:
after its own token, and after a wrong token in its place. What the error costs is the difference of
the two accuracies; both continuations have the same length left and the same random numbers.

Shapes: M problems, S samples of each, B prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from diagnostics.errors import InvalidInput
from diagnostics.stats import Array
from opd.data.prompts import Prompts, decode_response, encode_prompts
from opd.data.tasks import Grader
from opd.evaluation.measures import BY_PROBLEM
from opd.evaluation.perturbation import (
    Perturbation,
    digit_alternatives,
    draw_perturbations,
    reasoning_places,
    runner_up_ids,
)
from opd.evaluation.responses import GREEDY, ROWS_AT_ONCE, GradedResponses
from opd.evaluation.statistics import mean_interval, ratio_values
from opd.models.model import CausalLM
from opd.rollouts.base import Engine
from opd.runtime.seeds import RECOVERY, derive_seed
from opd.tokens.masking import special_ids

Kind = Literal["digit", "runner_up"]


@dataclass(frozen=True)
class RecoveryRecord:
    """Both continuations of a response."""

    perturbation: Perturbation
    """Where and how the response was perturbed."""
    texts: tuple[str, str]
    """The response as continued without and with the error."""
    correct: tuple[bool, bool]
    """Whether each of them is correct."""


def measure_recovery(
    engine: Engine,
    model: CausalLM,
    tokenizer: Any,
    eos: list[int],
    graded: GradedResponses,
    grade: Grader,
    *,
    kind: Kind,
    source: Literal["response", "solution"],
    max_prompt: int,
    max_response: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> tuple[dict[str, Any], list[RecoveryRecord]]:
    """Perturb each response once at a random place, and continue it with and without the error.

    Args:
        engine: Generates the continuations.
        model: The model of the engine; chooses the tokens of `runner_up`.
        tokenizer: Its tokenizer.
        eos: Ids that end a response.
        graded: Its responses to M problems.
        grade: Grader of the task.
        kind: The error: a random digit in the place of a digit, or the most probable other token.
        source: What is continued: the responses, or the solutions of the problems.
        max_prompt: Maximum prompt tokens.
        max_response: Maximum response tokens, prefix included.
        temperature: Sampling temperature; 0 for greedy decoding.
        top_p: Nucleus of sampling.
        seed: Seed of places, digits and sampling.

    Returns:
        `recovery_metrics`, and the records; `prefixes` 0 and `left_out` 1 alone where no response
        has a token to perturb.

    Raises:
        InvalidInput: No solution has a token to perturb, or a problem has none.
    """
    if not graded.tokens:
        raise InvalidInput("recovery needs the tokens of responses, sampled in one process")
    prompts = encode_prompts(tokenizer, graded.problems, 1, max_prompt)
    alternatives = digit_alternatives(tokenizer, model.vocabulary) if kind == "digit" else None
    excluded = {*special_ids(tokenizer), *eos}
    token_rows: Sequence[Sequence[Sequence[int] | Array]] = graded.tokens
    if source == "solution":
        token_rows = solution_ids(tokenizer, graded)
    perturbations = draw_perturbations(
        [
            [reasoning_places(tokenizer, ids, eos, excluded, graded.grader) for ids in samples]
            for samples in token_rows
        ],
        token_rows,
        alternatives,
        max_response,
        np.random.default_rng(derive_seed(seed, 0, RECOVERY)),
    )
    if not perturbations and source == "solution":
        raise InvalidInput(
            f"no solution has a token before its answer that recovery {kind!r} can replace; use "
            "recovery_prefix response"
        )
    if not perturbations:  # a model that collapsed may have written nothing
        return {"prefixes": 0, "left_out": 1.0}, []
    if alternatives is None:
        replacements = runner_up_ids(model, prompts, perturbations, sorted(excluded))
        perturbations = [
            replace(place, replacement=token)
            for place, token in zip(perturbations, replacements, strict=True)
        ]
    texts = [
        continue_prefixes(
            engine,
            tokenizer,
            eos,
            prompts,
            perturbations,
            [[*place.prefix, token] for place, token in zip(perturbations, tokens, strict=True)],
            max_response=max_response,
            temperature=temperature,
            top_p=top_p,
            seed=derive_seed(seed, 1, RECOVERY),
        )
        for tokens in (
            [place.original for place in perturbations],
            [place.replacement for place in perturbations],
        )
    ]
    records = []
    for place, pair in zip(perturbations, zip(*texts, strict=True), strict=True):
        answer = graded.problems[place.problem].answer
        is_correct = [grade(text, answer).reward >= 1 for text in pair]
        records.append(RecoveryRecord(place, (pair[0], pair[1]), (is_correct[0], is_correct[1])))
    return recovery_metrics(records, *graded.reward.shape), records


def recovery_metrics(
    records: Sequence[RecoveryRecord], num_problems: int, num_samples: int
) -> dict[str, Any]:
    """Return both accuracies over the continued prefixes, and what the error costs.

    Args:
        records: The continuations.
        num_problems: M.
        num_samples: S.

    Returns:
        `unperturbed` and `perturbed`, accuracies with and without the error, and `loss`, their
        difference, each with a 95 % interval over problems; `prefixes`, their number; `left_out`,
        the share of responses without a place; `prefix_length`, mean tokens before the place; and
        `by_problem`, the sum of lost prefixes and the number of prefixes of each problem.
    """
    totals = np.zeros((3, num_problems))
    for record in records:
        totals[:, record.perturbation.problem] += (1, *record.correct)
    count, unperturbed, perturbed = totals
    metrics: dict[str, Any] = {}
    for name, sums, lowest in (
        ("unperturbed", unperturbed, 0.0),
        ("perturbed", perturbed, 0.0),
        ("loss", unperturbed - perturbed, -1.0),
    ):
        values = ratio_values(sums, count)
        low, high = mean_interval(values, lowest)
        metrics |= {name: float(values.mean()), f"{name}/low": low, f"{name}/high": high}
    lengths = [len(record.perturbation.prefix) for record in records]
    by_problem = np.stack([unperturbed - perturbed, count], 1).tolist()
    return metrics | {
        "prefixes": len(records),
        "left_out": (num_problems * num_samples - len(records)) / (num_problems * num_samples),
        "prefix_length": float(np.mean(lengths)),
        BY_PROBLEM: by_problem,
    }


def solution_ids(tokenizer: Any, graded: GradedResponses) -> list[list[list[int]]]:
    """Encode the solutions of the problems, each as often as there are samples.

    Args:
        tokenizer: A Hugging Face tokenizer.
        graded: The responses to M problems.

    Returns:
        (M, S) lists of ids.

    Raises:
        InvalidInput: A problem has no solution.
    """
    solutions = [problem.solution for problem in graded.problems]
    if not all(solutions):
        raise InvalidInput(
            f"{solutions.count('')} of {len(solutions)} problems have no solution to perturb; use "
            "recovery_prefix response"
        )
    num_samples = graded.reward.shape[1]
    return [
        [tokenizer.encode(solution, add_special_tokens=False)] * num_samples
        for solution in solutions
    ]


def continue_prefixes(
    engine: Engine,
    tokenizer: Any,
    eos: list[int],
    prompts: Prompts,
    places: Sequence[Perturbation],
    prefixes: Sequence[list[int]],
    *,
    max_response: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[str]:
    """Continue each prefix up to `max_response` tokens in all, and return the complete responses.

    Args:
        engine: Generates the continuations.
        tokenizer: A Hugging Face tokenizer.
        eos: Ids that end a response.
        prompts: The prompts of the problems.
        places: B places, which name the problem of each prefix.
        prefixes: B lists of ids, each shorter than `max_response`.
        max_response: Maximum response tokens, prefix included.
        temperature: Sampling temperature; 0 for greedy decoding.
        top_p: Nucleus of sampling.
        seed: Seed of the sampling; equal seeds give both continuations of a place equal noise.

    Returns:
        B texts, each with its prefix.
    """
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    sampling |= GREEDY if temperature == 0 else {}
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = [
        tokens[mask].tolist() for tokens, mask in zip(prompts.tokens, prompts.mask, strict=True)
    ]
    texts: list[str] = []
    for first in range(0, len(prefixes), ROWS_AT_ONCE):
        part = prefixes[first : first + ROWS_AT_ONCE]
        problems = [place.problem for place in places[first : first + ROWS_AT_ONCE]]
        inputs = Prompts.from_ids(
            [prompt_ids[i] + prefix for i, prefix in zip(problems, part, strict=True)],
            torch.arange(len(part)),
        )
        lengths = [max_response - len(prefix) for prefix in part]
        rollouts = engine.sample(
            inputs, eos, max_response=max(lengths), generator=generator, **sampling
        )
        for prefix, length, tokens, mask in zip(
            part, lengths, rollouts.tokens.cpu(), rollouts.mask.cpu(), strict=True
        ):
            continuation = tokens[mask].tolist()[:length]
            texts.append(decode_response(tokenizer, prefix + continuation, eos))
    return texts
