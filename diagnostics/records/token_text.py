"""What token ids spell: the bytes of a run's ids, from its tokenizer.json alone, and their text.

Free of torch and transformers. Shapes: none; ids are plain integers.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diagnostics.io.files import read_json
from diagnostics.records.vocabulary import byte_letters, entries


@dataclass(frozen=True)
class Spelling:
    """pieces: the bytes of every id that a tokenizer names; special: ids with that flag."""

    pieces: dict[int, bytes] = field(default_factory=dict)
    special: frozenset[int] = frozenset()

    def text(self, token: int) -> str:
        """An id by itself; bytes that are no text as \\xNN, an unknown id by its number."""
        return told([self.pieces[token]])[0] if token in self.pieces else f"#{token}"

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """Ids in their order; a character whose bytes several ids share stands at the first."""
        return told([self.pieces.get(token, f"#{token}".encode()) for token in tokens])


def read_run_spelling(places: Sequence[Path]) -> Spelling:
    """Of the first of these folders that holds a tokenizer; empty if none does."""
    return next((known for place in places if (known := read_spelling(place)).pieces), Spelling())


def read_spelling(folder: Path) -> Spelling:
    """Of a model's folder; empty where it holds no tokenizer.json."""
    path = folder / "tokenizer.json"
    return parse(read_json(path), str(path)) if path.exists() else Spelling()


def parse(tokenizer: Any, source: str = "tokenizer.json") -> Spelling:
    """Of the contents of a tokenizer.json: byte-level, SentencePiece-like or plain pieces."""
    known, added = entries(tokenizer, source)
    letters = byte_letters() if '"ByteLevel"' in json.dumps(tokenizer.get("decoder")) else {}
    pieces = {i: spelled(piece, letters) for piece, i in known.items()}
    pieces |= {token["id"]: encoded(token["content"]) for token in added}
    return Spelling(pieces, frozenset(token["id"] for token in added if token.get("special")))


def spelled(piece: str, letters: dict[str, int]) -> bytes:
    """The bytes of a piece; `letters` is the alphabet of bytes, empty if the pieces are text."""
    if letters:
        return b"".join(bytes([letters[c]]) if c in letters else encoded(c) for c in piece)
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(byte[1])
    return encoded(piece.replace("\u2581", " "))


def encoded(text: str) -> bytes:
    """UTF-8; a lone surrogate, which JSON can hold, as its three bytes, which are no text."""
    return text.encode("utf-8", "surrogatepass")


def told(pieces: Sequence[bytes]) -> list[str]:
    """Text of each of some consecutive pieces.

    A character goes to the piece with its first byte, so later ones may be empty; bytes that begin
    no character are shown as \\xNN where they are.
    """
    try:
        return [piece.decode() for piece in pieces]
    except UnicodeDecodeError:
        pass
    data = b"".join(pieces)
    owner = [k for k, piece in enumerate(pieces) for _ in piece]
    made, at = [""] * len(pieces), 0
    while at < len(data):
        text, size = first_character(data[at : at + 4])
        made[owner[at]] += text
        at += size
    return made


def first_character(data: bytes) -> tuple[str, int]:
    """The character that some bytes begin with and its size, or \\xNN of the first one."""
    for size in range(1, len(data) + 1):
        try:
            return data[:size].decode(), size
        except UnicodeDecodeError:
            continue
    return f"\\x{data[0]:02x}", 1
