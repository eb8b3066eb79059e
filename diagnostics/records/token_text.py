"""Text of token ids, from a run's tokenizer.json alone.

Needs neither torch nor transformers. Ids are plain integers.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diagnostics.io.files import read_json
from diagnostics.records.vocabulary import byte_alphabet, tokenizer_entries


@dataclass(frozen=True)
class TokenDecoder:
    """Bytes of the ids of a tokenizer, decoded to text."""

    token_bytes: dict[int, bytes] = field(default_factory=dict)
    """Bytes of every id of the tokenizer."""
    special: frozenset[int] = frozenset()
    """Ids of special tokens."""

    def text(self, token: int) -> str:
        r"""Return the text of one id; invalid UTF-8 bytes as \xNN, an unknown id by its number."""
        return (
            decode_pieces([self.token_bytes[token]])[0]
            if token in self.token_bytes
            else f"#{token}"
        )

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each id; a character split over several ids is at the first."""
        return decode_pieces(
            [self.token_bytes.get(token, f"#{token}".encode()) for token in tokens]
        )


def load_first_token_decoder(folders: Sequence[Path]) -> TokenDecoder:
    """Load the tokenizer of the first folder that has one; empty if none does."""
    return next(
        (decoder for folder in folders if (decoder := load_token_decoder(folder)).token_bytes),
        TokenDecoder(),
    )


def load_token_decoder(folder: Path) -> TokenDecoder:
    """Load the tokenizer of a model folder; empty if it has no tokenizer.json."""
    path = folder / "tokenizer.json"
    return parse_tokenizer(read_json(path), str(path)) if path.exists() else TokenDecoder()


def parse_tokenizer(tokenizer: Any, source: str = "tokenizer.json") -> TokenDecoder:
    """Parse the content of a tokenizer.json with byte-level, SentencePiece or plain entries."""
    piece_ids, added_tokens = tokenizer_entries(tokenizer, source)
    byte_by_letter = (
        byte_alphabet() if '"ByteLevel"' in json.dumps(tokenizer.get("decoder")) else {}
    )
    pieces = {i: piece_bytes(piece, byte_by_letter) for piece, i in piece_ids.items()}
    pieces |= {token["id"]: encode_text(token["content"]) for token in added_tokens}
    return TokenDecoder(
        pieces, frozenset(token["id"] for token in added_tokens if token.get("special"))
    )


def piece_bytes(piece: str, byte_by_letter: dict[str, int]) -> bytes:
    """Return the bytes of a vocabulary entry.

    Args:
        piece: Text of the entry.
        byte_by_letter: Byte alphabet; empty if entries are plain text.

    Returns:
        Its bytes.
    """
    if byte_by_letter:
        return b"".join(
            bytes([byte_by_letter[c]]) if c in byte_by_letter else encode_text(c) for c in piece
        )
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(byte[1])
    return encode_text(piece.replace("\u2581", " "))


def encode_text(text: str) -> bytes:
    """Encode to UTF-8; a lone surrogate, which JSON can hold, becomes three invalid bytes."""
    return text.encode("utf-8", "surrogatepass")


def decode_pieces(pieces: Sequence[bytes]) -> list[str]:
    r"""Decode consecutive token bytes to one text each.

    A character belongs to the token with its first byte, so later ones may be empty; bytes that
    begin no character are shown as \xNN in place.

    Args:
        pieces: Bytes of consecutive tokens.

    Returns:
        The text of each.
    """
    try:
        return [piece.decode() for piece in pieces]
    except UnicodeDecodeError:
        pass
    data = b"".join(pieces)
    piece_index = [k for k, piece in enumerate(pieces) for _ in piece]
    texts, offset = [""] * len(pieces), 0
    while offset < len(data):
        text, size = first_character(data[offset : offset + 4])
        texts[piece_index[offset]] += text
        offset += size
    return texts


def first_character(data: bytes) -> tuple[str, int]:
    r"""Return the first character of some bytes and its size, or \xNN of the first byte and 1."""
    for size in range(1, len(data) + 1):
        try:
            return data[:size].decode(), size
        except UnicodeDecodeError:
            continue
    return f"\\x{data[0]:02x}", 1
