"""Places of a response where an error is put, and the wrong token there.

Shapes: M problems, S samples of each, B places.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diagnostics.stats import Array
from opd.data.grading.answer_spans import answer_span
from opd.data.prompts import Prompts, decode_response
from opd.evaluation.answer_confidence import MAX_TOKENS_PER_MICROBATCH, answer_tokens, mask_ranges
from opd.models.contexts import evaluation_mode
from opd.models.forward import micro_batches, response_hidden_states
from opd.models.model import CausalLM

DIGITS = re.compile(r"([Ġ▁ ]?)([0-9]+)")
"""A token of digits, as vocabularies write it: perhaps with a space before them."""


@dataclass(frozen=True)
class Perturbation:
    """A place of a response, and the wrong token there."""

    problem: int
    """Index of the problem."""
    sample: int
    """Index of the response among those to the problem."""
    prefix: tuple[int, ...]
    """Ids of the response before the place."""
    original: int
    """Id of the response at the place."""
    replacement: int
    """Id in its place."""


def reasoning_places(
    tokenizer: Any,
    ids: Sequence[int] | Array,
    eos: Sequence[int],
    excluded: set[int],
    grader: str,
) -> list[int]:
    """Return the positions of a response before its answer, without special tokens.

    An error in the answer itself cannot be recovered from. A response without an answer, such as
    one that was cut, counts up to its end.

    Args:
        tokenizer: A Hugging Face tokenizer.
        ids: Ids of the response.
        eos: Ids that end a response.
        excluded: Special ids and those that end a response.
        grader: Name of the grader that reads the answer.

    Returns:
        Positions, rising.
    """
    text = decode_response(tokenizer, [int(x) for x in ids], eos)
    span = answer_span(grader, text)
    answer = None if span is None else answer_tokens(tokenizer, ids, text, span)
    # a text without a closing think tag may be all answer
    end = len(ids) if answer is None or answer[0] == 0 else answer[0]
    return [t for t in range(end) if int(ids[t]) not in excluded]


def digit_alternatives(tokenizer: Any, vocabulary: int) -> dict[int, list[int]]:
    """Return the other tokens with as many digits for every token that consists of digits.

    Args:
        tokenizer: A Hugging Face tokenizer.
        vocabulary: Number of ids of the model.

    Returns:
        Id to ids, where there are any.
    """
    ids_by_form: dict[tuple[str, int], list[int]] = {}
    for token, i in tokenizer.get_vocab().items():
        match = DIGITS.fullmatch(token)
        if match is not None and i < vocabulary:
            ids_by_form.setdefault((match[1], len(match[2])), []).append(i)
    return {
        i: sorted(alternative for alternative in ids if alternative != i)
        for ids in ids_by_form.values()
        for i in ids
        if len(ids) > 1
    }


def draw_perturbations(
    places: Sequence[Sequence[list[int]]],
    token_rows: Sequence[Sequence[Sequence[int] | Array]],
    alternatives: Mapping[int, list[int]] | None,
    max_response: int,
    generator: np.random.Generator,
) -> list[Perturbation]:
    """Draw one place of each response uniformly, and a replacement from its alternatives.

    Args:
        places: (M, S) positions of each response that may be drawn.
        token_rows: (M, S) ids of each response.
        alternatives: Id to its replacements, which are equally likely; other ids are not drawn.
            None: any id may be drawn, and -1 stands for its replacement.
        max_response: Maximum response tokens, of which one must be left after the place.
        generator: Random generator.

    Returns:
        One perturbation of each response that has a place.
    """
    perturbations = []
    for i, rows in enumerate(places):
        for j, positions in enumerate(rows):
            ids = [int(x) for x in token_rows[i][j]]
            candidates = [
                t
                for t in positions
                if t + 1 < max_response and (alternatives is None or ids[t] in alternatives)
            ]
            if not candidates:
                continue
            t = candidates[int(generator.integers(len(candidates)))]
            replacement = -1
            if alternatives is not None:
                choices = alternatives[ids[t]]
                replacement = choices[int(generator.integers(len(choices)))]
            perturbations.append(Perturbation(i, j, tuple(ids[:t]), ids[t], replacement))
    return perturbations


@torch.no_grad()
def runner_up_ids(
    model: CausalLM, prompts: Prompts, places: Sequence[Perturbation], excluded: Sequence[int]
) -> list[int]:
    """Return the most probable token at each place but the response's own and special ones.

    Args:
        model: The model.
        prompts: The prompts of the problems.
        places: B places.
        excluded: Ids that are no error but an end.

    Returns:
        B ids.
    """
    # the place is the last position of its row, where the state that predicts it is read
    rows = [[*place.prefix, place.original] for place in places]
    ranges = [(len(ids) - 1, len(ids)) for ids in rows]
    row_prompts = prompts.rows([place.problem for place in places])
    batch = mask_ranges(row_prompts, rows, ranges, model.vocabulary).to(model.device)
    row_prompts = row_prompts.to(model.device)
    replacements = [0] * len(places)
    with evaluation_mode(model.network):
        for rows_of_batch in micro_batches(row_prompts, batch, MAX_TOKENS_PER_MICROBATCH):
            part = batch.rows(rows_of_batch).trim()
            states = response_hidden_states(model, row_prompts.rows(rows_of_batch), part)
            logits = model.head.logits(states)
            logits[:, [i for i in excluded if i < model.vocabulary]] = -torch.inf
            logits.scatter_(1, part.tokens[part.mask][:, None], -torch.inf)
            for row, token in zip(rows_of_batch, logits.argmax(1).tolist(), strict=True):
                replacements[row] = token
    return replacements
