"""The bytes of every token id, to compare text however it is split into ids.

Shapes: V ids that a tokenizer knows, Q bytes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.records.vocabulary import make_vocabulary, tokenizer_vocabulary


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of all ids, concatenated, on one device.

    Id v owns data[start[v] : start[v] + length[v]]. The last row is empty: it stands for any id
    beyond V.
    """

    data: Tensor
    """(Q,) uint8."""
    start: Tensor
    """(V + 1,) long."""
    length: Tensor
    """(V + 1,) long."""

    def to(self, device: torch.device) -> "TokenBytes":
        """Return a copy on the device."""
        return TokenBytes(self.data.to(device), self.start.to(device), self.length.to(device))


def pack_token_bytes(table: list[bytes]) -> TokenBytes:
    """Convert the table of `token_bytes` to tensors."""
    length = torch.tensor([*map(len, table), 0])
    data = torch.tensor(list(b"".join(table)), dtype=torch.uint8)
    return TokenBytes(data, length.cumsum(0) - length, length)


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes that each id stands for, by id; empty for unused ids.

    Args:
        tokenizer: Hugging Face tokenizer.

    Returns:
        One byte string per id.
    """
    if tokenizer.is_fast:
        vocabulary = tokenizer_vocabulary(tokenizer.backend_tokenizer)
    else:
        pieces, added_tokens = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        vocabulary = make_vocabulary(pieces, added_tokens, byte_level=False)
    table = [b""] * (max(vocabulary.token_bytes) + 1)
    for token, data in vocabulary.token_bytes.items():
        table[token] = data
    return table


def format_token(piece: bytes) -> str:
    """Format a token's bytes for a reader: quoted, and escaped where they are not valid text."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)[1:]
