"""The tokenizer of a pair of the family, with a vocabulary of any size from 200 to 32,000 tokens.

A token is a byte, a special token, or one that is never written: a vocabulary that is larger than
the bytes costs what a large head costs, but has no longer words. One that is smaller has the
printable ASCII characters first, in which the tasks are written; it drops other bytes of a text.
The chat template has no names of roles, since every token of a prompt costs time.
"""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.lab.knobs import NUM_BYTES, NUM_SPECIAL

TAG = "<s>"
"""The tag that the two models of a pair write in different tokens."""
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", TAG)
PIECE = re.compile(r"</?think>|.", re.DOTALL)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def make_pair_tokenizer(vocabulary: int) -> Any:
    """Build a tokenizer with one token per byte, special tokens, and tokens never written.

    A Qwen2Tokenizer, as `opd.lab.build.make_tokenizer`.

    Args:
        vocabulary: Number of tokens.

    Returns:
        The tokenizer.
    """
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert len(SPECIAL_TOKENS) == NUM_SPECIAL
    name_of_byte = bytes_to_unicode()
    printable = sorted(string.printable.encode())
    order = [*printable, *(i for i in range(NUM_BYTES) if i not in printable)]
    names = [*SPECIAL_TOKENS, *(name_of_byte[i] for i in order)][:vocabulary]
    names += [f"never-written-{i}" for i in range(vocabulary - len(names))]
    tokenizer = Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=[x for x in SPECIAL_TOKENS if x != "<|endoftext|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@dataclass(frozen=True)
class PairIds:
    """Ids of a pair's tokenizer, for training text."""

    start: int
    """The token before every message, <|im_start|>."""
    tag: int
    """The tag as one special token."""
    spelled: tuple[int, ...]
    """The tag in bytes."""
    end: int
    """The end token of both models, <|im_end|>."""
    second_end: int
    """The end token that only the student may use, <|endoftext|>."""
    pieces: Mapping[str, int]
    """Id of each printable character and think tag."""

    def tag_forms(self, spelled_by: str) -> dict[str, tuple[int, ...]]:
        """Return the form in which each model writes tags, by model."""
        if spelled_by == "teacher":
            return {"student": (self.tag,), "teacher": self.spelled}
        return {"student": self.spelled, "teacher": (self.tag,)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text of think tags and printable characters."""
        return [self.pieces[piece] for piece in PIECE.findall(text)]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a problem in the chat template, up to where the response begins."""
        return [self.start, *self.encode(text), self.end, self.start]


def pair_ids(tokenizer: Any) -> PairIds:
    """Return the ids of a pair's tokenizer."""
    names = ["<|im_start|>", TAG, "<|im_end|>", "<|endoftext|>"]
    start, tag, end, second_end = tokenizer.convert_tokens_to_ids(names)
    pieces = {x: tokenizer.encode(x)[0] for x in (*string.printable, "<think>", "</think>")}
    return PairIds(start, tag, tuple(pieces[x] for x in TAG), end, second_end, pieces)
