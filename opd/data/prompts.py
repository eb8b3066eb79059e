"""Encoding of prompts as token ids, and decoding of responses."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from diagnostics.ragged import left_pad
from opd.data.chain_task import Problem
from opd.data.chat_template import ChatFormat, render_chat
from opd.data.sources import (
    DatasetProblem,
    row_number,
)
from opd.data.sources import read_problems as read_problems
from opd.tokens.masking import special_ids

CLOSING_TAG = re.compile(r"</\w{2,}>")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """Encoded prompts, padded on the left; shapes: B rows, P positions."""

    tokens: Tensor
    """(B, P) long."""
    mask: Tensor
    """(B, P) bool, True where a token is real."""
    index: Tensor
    """(B,) long, equal for rows of the same prompt."""
    answers: list[str]
    """Reference answer of each row, for the grader."""
    view: "Prompts | None" = None
    """What the teacher reads in the place of each row (`opd.data.teacher_view`); None: the same."""

    @property
    def teacher_prompts(self) -> "Prompts":
        """The prompts that the teacher reads, B rows; these ones without a view of its own."""
        return self if self.view is None else self.view

    @classmethod
    def from_ids(
        cls, ids: Sequence[Sequence[int]], index: Tensor, answers: list[str] | None = None
    ) -> "Prompts":
        """Pad prompts on the left.

        Args:
            ids: Token ids of each of the B prompts.
            index: (B,) long, equal for rows of the same prompt.
            answers: Reference answers; empty texts if None.

        Returns:
            The prompts.
        """
        return cls(
            tokens=left_pad(ids, torch.long),
            mask=left_pad([[True] * len(row) for row in ids], torch.bool),
            index=index,
            answers=[""] * len(ids) if answers is None else answers,
        )

    def __len__(self) -> int:
        return len(self.answers)

    def to(self, device: torch.device) -> "Prompts":
        """Return the prompts on a device."""
        return Prompts(
            tokens=self.tokens.to(device),
            mask=self.mask.to(device),
            index=self.index.to(device),
            answers=self.answers,
            view=None if self.view is None else self.view.to(device),
        )

    def rows(self, index: list[int]) -> "Prompts":
        """Return the selected rows, without columns that are padding in all of them."""
        answers = [self.answers[i] for i in index]
        mask = self.mask[index]
        first = int(mask.any(0).nonzero()[0])
        return Prompts(
            tokens=self.tokens[index, first:],
            mask=mask[:, first:],
            index=self.index[index],
            answers=answers,
            view=None if self.view is None else self.view.rows(index),
        )


def filter_by_length(
    tokenizer: Any, max_prompt: int, candidates: list[Problem]
) -> tuple[list[Problem], int]:
    """Keep the problems whose prompt is short enough.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_prompt: Largest allowed number of prompt tokens.
        candidates: The problems to filter.

    Returns:
        The problems whose prompt has at most `max_prompt` tokens, and the length of the longest
        prompt of all.
    """
    lengths = [
        len(encode_numbered_prompt(tokenizer, problem, position))
        for position, problem in enumerate(candidates)
    ]
    short_enough = [
        row for row, length in zip(candidates, lengths, strict=True) if length <= max_prompt
    ]
    return short_enough, max(lengths, default=0)


def encode_prompts(
    tokenizer: Any, problems: list[Problem], group_size: int, max_prompt: int
) -> Prompts:
    """Encode prompts, through the chat template where the tokenizer has one.

    Args:
        tokenizer: A Hugging Face tokenizer.
        problems: One problem per prompt.
        group_size: Number of consecutive rows per prompt.
        max_prompt: Largest allowed number of prompt tokens.

    Returns:
        len(problems) * group_size rows, padded on the left.

    Raises:
        InvalidInput: A prompt is longer than `max_prompt` tokens.
    """
    encoded = [encode_prompt(tokenizer, problem) for problem in problems]
    width = max(len(ids) for ids in encoded)
    if width > max_prompt:
        raise InvalidInput(
            f"a prompt has {width} tokens, but max_prompt is {max_prompt}; raise max_prompt, or "
            "shorten the prompt"
        )
    index = torch.arange(len(encoded)).repeat_interleave(group_size)
    answers = [problem.answer for problem in problems for _ in range(group_size)]
    return Prompts.from_ids([encoded[i] for i in index.tolist()], index, answers)


def encode_numbered_prompt(tokenizer: Any, problem: Problem, position: int) -> list[int]:
    """Encode a prompt as `encode_prompt` does; an error names the row number."""
    try:
        return encode_prompt(tokenizer, problem)
    except InvalidInput as error:
        raise InvalidInput(f"row {row_number(problem, position)}: {error}") from error


def encode_prompt(
    tokenizer: Any, problem: Problem, chat_format: ChatFormat | None = None
) -> list[int]:
    """Encode a prompt up to where the response begins, with at most one BOS.

    The chat template writes its own special tokens. Without a template, the text is encoded with
    the special tokens that the tokenizer adds.

    Args:
        tokenizer: A Hugging Face tokenizer.
        problem: The problem whose prompt is encoded.
        chat_format: Chat template in the place of the tokenizer's own.

    Returns:
        The token ids of the prompt.

    Raises:
        InvalidInput: The prompt needs a chat template (several messages or template settings) that
            the tokenizer does not have, the template rejects the messages, or the prompt encodes to
            no token.
    """
    settings: dict[str, Any] = {}
    chat: tuple[tuple[str, str], ...] = (("user", problem.prompt),)
    if isinstance(problem, DatasetProblem):
        chat, settings = problem.chat or chat, dict(problem.template)
    if chat_format is not None:
        settings |= chat_format.arguments()
    if tokenizer.chat_template is None and chat_format is None:
        if len(chat) > 1 or settings:
            raise InvalidInput(
                "the tokenizer has no chat template for a system message, several messages or "
                "template settings; use plain text prompts, or set tokenizer.chat_template"
            )
        ids = tokenizer.encode(problem.prompt)
        if ids[:2] == [tokenizer.bos_token_id] * 2:  # the text itself begins with BOS
            ids = ids[1:]
    else:
        text = render_chat(tokenizer, chat, **settings)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise InvalidInput(f"the prompt {problem.prompt!r} encodes to no token; remove it")
    return ids


def decode_responses(
    tokenizer: Any, tokens: Tensor, mask: Tensor, eos_ids: Sequence[int] = ()
) -> list[str]:
    """Decode the real tokens of each response.

    Args:
        tokenizer: A Hugging Face tokenizer.
        tokens: (B, T) token ids.
        mask: (B, T), True where a token is real.
        eos_ids: See `decode_response`.

    Returns:
        The text of each of the B responses.
    """
    responses = [row[is_token].tolist() for row, is_token in zip(tokens, mask, strict=True)]
    return [decode_response(tokenizer, ids, eos_ids) for ids in responses]


def decode_response(tokenizer: Any, ids: Sequence[int], eos_ids: Sequence[int] = ()) -> str:
    """Decode a response up to its end; special tokens inside it stay visible.

    The end is the first id that ends a response, by the generation config or as the tokenizer's own
    EOS token, whether or not it is flagged as special. Special tokens that remain at the end
    (padding, an end token that is not configured) are dropped too. A closing tag such as </think>
    is content, even where it is flagged as special or ends a response: a response that was
    truncated right after it contains reasoning but no answer.

    Args:
        tokenizer: A Hugging Face tokenizer.
        ids: The token ids of the response.
        eos_ids: Ids that end a response (`opd.models.loading.eos_ids`); the tokenizer's EOS id is
            always one.

    Returns:
        The text of the response.
    """
    stop_ids = {*eos_ids, tokenizer.eos_token_id}
    length = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
    if length < len(ids) and is_closing_tag(tokenizer, ids[length]):
        length += 1
    special = special_ids(tokenizer)
    while length and ids[length - 1] in special and not is_closing_tag(tokenizer, ids[length - 1]):
        length -= 1
    return tokenizer.decode(list(ids[:length]), skip_special_tokens=False)


def is_closing_tag(tokenizer: Any, token: int) -> bool:
    """Return whether an id is a closing tag such as </think>; </s> is an end token."""
    return CLOSING_TAG.fullmatch(tokenizer.decode([token]).strip()) is not None
