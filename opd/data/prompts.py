"""Encoded prompts, and the text of responses."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.chat_template import render_chat
from opd.data.sources import (
    Question,
    row_of,
)
from opd.data.sources import read_problems as read_problems
from opd.tokens.masking import special_ids

CLOSING_TAG = re.compile(r"</\w{2,}>")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """Encoded prompts, padded on the left.

    tokens (B, P) long; mask (B, P) bool; index (B,) long, equal for rows of one prompt; answers:
    what the grader compares with.
    """

    tokens: Tensor
    mask: Tensor
    index: Tensor
    answers: list[str]

    def __len__(self) -> int:
        return len(self.answers)

    def to(self, device: torch.device) -> "Prompts":
        moved = (self.tokens.to(device), self.mask.to(device), self.index.to(device))
        return Prompts(tokens=moved[0], mask=moved[1], index=moved[2], answers=self.answers)

    def rows(self, index: list[int]) -> "Prompts":
        answers = [self.answers[i] for i in index]
        cut = Prompts(
            tokens=self.tokens[index],
            mask=self.mask[index],
            index=self.index[index],
            answers=answers,
        )
        first = int(cut.mask.any(0).nonzero()[0])
        return Prompts(
            tokens=cut.tokens[:, first:], mask=cut.mask[:, first:], index=cut.index, answers=answers
        )


def fits(tokenizer: Any, max_prompt: int, rows: list[Problem]) -> tuple[list[Problem], int]:
    """(the rows whose prompt has at most `max_prompt` tokens, the longest length of all)."""
    lengths = [len(encode_row(tokenizer, problem, place)) for place, problem in enumerate(rows)]
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= max_prompt]
    return kept, max(lengths, default=0)


def encode(tokenizer: Any, chosen: list[Problem], repeats: int, max_prompt: int) -> Prompts:
    """Chat-templated (where the tokenizer has a template) prompts, each `repeats` times.

    Raises:
      ValueError: a prompt is longer than `max_prompt` tokens.
    """
    encoded = [encode_one(tokenizer, problem) for problem in chosen]
    width = max(len(ids) for ids in encoded)
    if width > max_prompt:
        raise InvalidInput(f"a prompt has {width} tokens, max_prompt is {max_prompt}")
    tokens = torch.zeros(len(encoded), width, dtype=torch.long)
    mask = torch.zeros(len(encoded), width, dtype=torch.bool)
    for i, ids in enumerate(encoded):
        tokens[i, width - len(ids) :] = torch.tensor(ids)
        mask[i, width - len(ids) :] = True
    index = torch.arange(len(encoded)).repeat_interleave(repeats)
    answers = [problem.answer for problem in chosen for _ in range(repeats)]
    return Prompts(tokens=tokens[index], mask=mask[index], index=index, answers=answers)


def encode_row(tokenizer: Any, problem: Problem, place: int) -> list[int]:
    """`encode_one`; an error names the row."""
    try:
        return encode_one(tokenizer, problem)
    except InvalidInput as error:
        raise InvalidInput(f"row {row_of(problem, place)}: {error}") from error


def encode_one(tokenizer: Any, problem: Problem) -> list[int]:
    """Ids of a prompt up to where the response begins, with at most one BOS.

    Through the chat template, which writes its own special tokens; without one, the text with the
    special tokens that the tokenizer adds.

    Raises:
      ValueError: several messages or settings for a template that the tokenizer lacks, messages
        that its template refuses, or no token.
    """
    settings: dict[str, Any] = {}
    chat: tuple[tuple[str, str], ...] = (("user", problem.prompt),)
    if isinstance(problem, Question):
        chat, settings = problem.chat or chat, dict(problem.template)
    if tokenizer.chat_template is None:
        if len(chat) > 1 or settings:
            raise InvalidInput(
                "the tokenizer has no chat template for a system message, several messages or "
                "template settings; give plain prompts, or set tokenizer.chat_template"
            )
        ids = tokenizer.encode(problem.prompt)
        if ids[:2] == [tokenizer.bos_token_id] * 2:  # the text began with one
            ids = ids[1:]
    else:
        text = render_chat(tokenizer, chat, **settings)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise InvalidInput(f"the prompt {problem.prompt!r} encodes to no token")
    return ids


def response_texts(
    tokenizer: Any, tokens: Tensor, mask: Tensor, ends: Sequence[int] = ()
) -> list[str]:
    """(B, T) ids and mask -> the text of each response; `ends` as in `response_text`."""
    sampled = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
    return [response_text(tokenizer, ids, ends) for ids in sampled]


def response_text(tokenizer: Any, ids: Sequence[int], ends: Sequence[int] = ()) -> str:
    """Decode a response up to its end; special tokens inside it stay visible.

    The end is the first id that ends a response, by the generation config or as the tokenizer's
    own end token, whether or not it is flagged as special. Special tokens that are left at the end
    (padding, an end token that nobody named) are dropped too. A closing tag such as </think> is
    content, even where it is flagged as special or ends a response: a response that was cut behind
    it has thought, and has not answered.

    Args:
      ends: ids that end a response (`opd.models.model.end_ids`); the tokenizer's own is always one.
    """
    stops = {*ends, tokenizer.eos_token_id}
    length = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    if length < len(ids) and closes_tag(tokenizer, ids[length]):
        length += 1
    special = special_ids(tokenizer)
    while length and ids[length - 1] in special and not closes_tag(tokenizer, ids[length - 1]):
        length -= 1
    return tokenizer.decode(list(ids[:length]), skip_special_tokens=False)


def closes_tag(tokenizer: Any, token: int) -> bool:
    """Whether an id is a closing tag, such as </think>; </s> is an end token."""
    return CLOSING_TAG.fullmatch(tokenizer.decode([token]).strip()) is not None
