"""Token ids of dumps that hold text, by the student's tokenizer."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from opd.data.chat_template import render_chat
from opd.tokens.token_bytes import token_bytes


class PairTokenizer:
    """Tokenizer of a model pair, as the conversion of dumps uses it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of a prompt: text as it is, messages by the chat template."""
        if not isinstance(prompt, str):
            chat = [(message["role"], message["content"]) for message in prompt]
            prompt = render_chat(self.tokenizer, chat)
        return self.response_ids(prompt)

    def response_ids(self, text: str) -> list[int]:
        """Return the ids of text, without adding special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token_id(self, token: bytes) -> int | None:
        """Return the lowest id that stands for these bytes, or None."""
        return self._ids_by_bytes.get(token)

    @cached_property
    def _ids_by_bytes(self) -> dict[bytes, int]:
        table = token_bytes(self.tokenizer)
        return {piece: i for i, piece in reversed([*enumerate(table)]) if piece}
