"""The bytes of every token id, so that text can be compared however it is split into ids.

Shapes: V ids that a tokenizer names, Q bytes.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of all ids, laid end to end, on one device.

    data (Q,) uint8; start (V + 1,) long and length (V + 1,) long, where id v owns
    data[start[v] : start[v] + length[v]]. The last row is empty: it stands for any id beyond V.
    """

    data: Tensor
    start: Tensor
    length: Tensor

    def to(self, device: torch.device) -> "TokenBytes":
        return TokenBytes(self.data.to(device), self.start.to(device), self.length.to(device))


def pieces(table: list[bytes]) -> TokenBytes:
    """The table of `token_bytes` as tensors."""
    length = torch.tensor([*map(len, table), 0])
    data = torch.tensor(list(b"".join(table)), dtype=torch.uint8)
    return TokenBytes(data, length.cumsum(0) - length, length)


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each id stands for, by id; empty for ids that no token has.

    Byte-level vocabularies spell a byte by a printable character, SentencePiece ones a space by
    U+2581 and a lone byte by <0xNN>; added tokens are their own text in both.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values()) + 1)
    spelled = byte_level if has_byte_level(tokenizer) else sentence_piece
    for token, index in vocabulary.items():
        table[index] = spelled(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        table[index] = added.content.encode()
    return table


def has_byte_level(tokenizer: Any) -> bool:
    """Whether tokens are spelled in the printable alphabet of byte-level vocabularies."""
    if not tokenizer.is_fast:
        return False
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    return '"ByteLevel"' in json.dumps(decoder)


def byte_level(token: str) -> bytes:
    """Bytes of a token in the printable alphabet; any other character stands for itself."""
    return b"".join(
        bytes([ALPHABET[character]]) if character in ALPHABET else character.encode()
        for character in token
    )


def sentence_piece(token: str) -> bytes:
    """Bytes of a SentencePiece token."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(byte[1])
    return token.replace("\u2581", " ").encode()


def alphabet() -> dict[str, int]:
    """Printable character of each byte: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    shifted = {chr(256 + place): byte for place, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in seen} | shifted


ALPHABET = alphabet()


def shown(piece: bytes) -> str:
    """A token's bytes as a reader wants them: quoted, and escaped where they are no text."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)[1:]
