"""The bytes of every token id, to compare text however it is split into ids.

Shapes: V ids that a tokenizer knows, Q bytes.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    Byte-level vocabularies write a byte as a printable character. SentencePiece vocabularies write
    a space as U+2581 and a lone byte as <0xNN>. Added tokens are their own text in both.

    Args:
        tokenizer: Hugging Face tokenizer.

    Returns:
        One byte string per id.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values()) + 1)
    decode_token = byte_level if has_byte_level(tokenizer) else sentence_piece
    for token, index in vocabulary.items():
        table[index] = decode_token(token)
    for index, added_token in tokenizer.added_tokens_decoder.items():
        table[index] = added_token.content.encode()
    return table


def has_byte_level(tokenizer: Any) -> bool:
    """Return whether tokens are written in the printable alphabet of byte-level vocabularies."""
    if not tokenizer.is_fast:
        return False
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    return '"ByteLevel"' in json.dumps(decoder)


def byte_level(token: str) -> bytes:
    """Return the bytes of a byte-level token; other characters stand for themselves."""
    return b"".join(
        bytes([ALPHABET[character]]) if character in ALPHABET else character.encode()
        for character in token
    )


def sentence_piece(token: str) -> bytes:
    """Return the bytes of a SentencePiece token."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(byte[1])
    return token.replace("\u2581", " ").encode()


def byte_alphabet() -> dict[str, int]:
    """Return the printable character of each byte: itself if printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + position): byte for position, byte in enumerate(unprintable)}
    return {chr(byte): byte for byte in printable} | shifted


ALPHABET = byte_alphabet()


def format_token(piece: bytes) -> str:
    """Format a token's bytes for a reader: quoted, and escaped where they are not valid text."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)[1:]
