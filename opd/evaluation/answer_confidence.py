"""The model's probability of the answers that its responses state, given what precedes them.

Shapes: M problems, S samples of each, B responses.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.stats import Array
from opd.data.grading.answer_spans import answer_span
from opd.data.grading.answer_text import Span
from opd.data.prompts import Prompts, encode_prompts
from opd.evaluation.responses import GradedResponses
from opd.models.contexts import evaluation_mode
from opd.models.forward import log_probabilities, micro_batches, response_hidden_states
from opd.models.lm_head import chunk_slices
from opd.models.model import CausalLM
from opd.rollouts.given import given_rollouts

MAX_TOKENS_PER_MICROBATCH = 1 << 14
MAX_LOGITS_PER_CHUNK = 1 << 24
LONGEST_CHARACTER = 4
"""Most tokens that together are one character, each a byte of it."""


def answer_confidence(
    model: CausalLM, tokenizer: Any, graded: GradedResponses, max_prompt: int
) -> Array:
    """Return the model's probability of the answer in each response, given all that precedes it.

    The product of the probabilities of the tokens of the answer (`answer_tokens`), at temperature 1
    and over the whole vocabulary, however the response was sampled. What follows the answer does
    not count, so a number of several tokens shares the probability of its first ones with the
    longer numbers that begin with them.

    Args:
        model: The model that sampled the responses.
        tokenizer: Its tokenizer.
        graded: The responses to M problems, with their tokens.
        max_prompt: Maximum prompt tokens.

    Returns:
        (M, S) probabilities; NaN where the grader reads no answer.

    Raises:
        InvalidInput: The responses are episodes of games, or several processes sampled them.
    """
    if not graded.tokens:
        raise InvalidInput(
            "calibration needs the tokens of responses to problems; episodes of games have no "
            "answer, and several processes keep no tokens: evaluate problems in one process"
        )
    prompts = encode_prompts(tokenizer, graded.problems, 1, max_prompt)
    confidence = np.full(graded.reward.shape, np.nan)
    problem_rows, responses, ranges, places = [], [], [], []
    for i, (answers, texts, tokens) in enumerate(
        zip(graded.answers, graded.texts, graded.tokens, strict=True)
    ):
        for j, (answer, text, ids) in enumerate(zip(answers, texts, tokens, strict=True)):
            span = None if answer is None else answer_span(graded.grader, text)
            token_range = None if span is None else answer_tokens(tokenizer, ids, text, span)
            if token_range is not None:
                places.append((i, j))
                problem_rows.append(i)
                responses.append(ids[: token_range[1]].tolist())
                ranges.append(token_range)
    if places:
        logp = range_logp(model, prompts.rows(problem_rows), responses, ranges)
        confidence[tuple(np.array(places).T)] = np.exp(logp)
    return confidence


def answer_tokens(
    tokenizer: Any, ids: Sequence[int] | Array, text: str, span: Span
) -> tuple[int, int] | None:
    """Return which tokens of a response hold any character of a part of its text.

    Found by decoding prefixes of the sampled ids, which need not be those that the tokenizer would
    encode the text to.

    Args:
        tokenizer: A Hugging Face tokenizer.
        ids: Ids of the response.
        text: The response (`opd.data.prompts.decode_response`).
        span: First character and the one after the last.

    Returns:
        Position of the first token and the one after the last; None if the prefixes do not decode
        to the beginnings of the text.
    """
    start, end = span

    def prefix_text(count: int) -> str:
        return str(tokenizer.decode([int(x) for x in ids[:count]], skip_special_tokens=False))

    def prefix_length(count: int) -> int:
        return len(prefix_text(count))

    counts = range(len(ids) + 1)
    first = bisect_right(counts, start, key=prefix_length) - 1
    last = bisect_left(counts, end, key=prefix_length)
    for count in range(last, min(last + LONGEST_CHARACTER, len(ids) + 1)):
        if prefix_text(count)[start:end] == text[start:end]:
            return (first, count) if first >= 0 else None
    return None


def mask_ranges(
    prompts: Prompts,
    responses: Sequence[list[int]],
    ranges: Sequence[tuple[int, int]],
    vocabulary: int,
) -> Rollouts:
    """Return responses as rollouts whose mask holds a range of tokens of each.

    Args:
        prompts: B prompts.
        responses: B lists of ids.
        ranges: B pairs: position of the first token, and the one after the last.
        vocabulary: Number of ids of the model.

    Returns:
        B rollouts.
    """
    batch = given_rollouts(
        prompts,
        responses,
        vocabulary=vocabulary,
        max_response=max(map(len, responses)),
        temperature=1.0,
    )
    positions = torch.arange(batch.tokens.shape[1])
    starts, ends = torch.tensor(ranges).T[:, :, None]
    in_range = (starts <= positions) & (positions < ends)
    return batch.with_fields(mask=in_range, sampled_mask=batch.mask)


@torch.no_grad()
def range_logp(
    model: CausalLM,
    prompts: Prompts,
    responses: Sequence[list[int]],
    ranges: Sequence[tuple[int, int]],
) -> Array:
    """Return the log-probability of a range of tokens of each response, given all before it.

    Args:
        model: The model.
        prompts: B prompts.
        responses: B lists of ids, each up to the end of its range at least.
        ranges: B pairs: position of the first token, and the one after the last.

    Returns:
        (B,) sums of log-probabilities at temperature 1, float64.
    """
    batch = mask_ranges(prompts, responses, ranges, model.vocabulary).to(model.device)
    prompts, sums = prompts.to(model.device), np.zeros(len(responses))
    with evaluation_mode(model.network):
        for rows in micro_batches(prompts, batch, MAX_TOKENS_PER_MICROBATCH):
            part = batch.rows(rows).trim()
            states = response_hidden_states(model, prompts.rows(rows), part)
            ids = part.tokens[part.mask]
            chunks = [
                log_probabilities(model, states[c], 1.0).gather(-1, ids[c][:, None])[:, 0]
                for c in chunk_slices(len(ids), model.vocabulary, MAX_LOGITS_PER_CHUNK)
            ]
            row_of_token = np.repeat(rows, part.mask.sum(1).cpu())
            np.add.at(sums, row_of_token, torch.cat(chunks).double().cpu().numpy())
    return sums
