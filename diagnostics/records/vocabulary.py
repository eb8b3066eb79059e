r"""Ids of a tokenizer: their bytes, text and special tokens. Needs neither torch nor transformers.

Read from tokenizer.json by the library `tokenizers`. Ids are plain integers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import read_text
from diagnostics.io.packages import load_package
from diagnostics.records.run_folder import RunFolder

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
"""Spaces and line ends as figures show them."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer."""

    token_bytes: dict[int, bytes] = field(default_factory=dict)
    """Bytes of every id."""
    special: frozenset[int] = frozenset()
    """Ids of added tokens with the special flag."""

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """Id of each byte string; of several, a special token's, then the smallest."""
        order = sorted(self.token_bytes, key=lambda i: (i in self.special, -i))
        return {self.token_bytes[i]: i for i in order}

    def text(self, token: int) -> str:
        r"""Return the text of one id; invalid UTF-8 bytes as \xNN, an unknown id by its number."""
        if token not in self.token_bytes:
            return f"#{token}"
        return decode_pieces([self.token_bytes[token]])[0]

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each id; a character split over several ids is at the first."""
        return decode_pieces(
            [self.token_bytes.get(token, f"#{token}".encode()) for token in tokens]
        )

    def name(self, token: int) -> str:
        """Return the text of one id with visible spaces and line ends."""
        return self.text(token).translate(VISIBLE)


def load_vocabulary(folder: Path) -> Vocabulary:
    """Load the vocabulary of a model folder; empty if it has no tokenizer.json.

    Args:
        folder: The folder.

    Returns:
        The vocabulary.

    Raises:
        InvalidInput: The file is not a tokenizer; names the file and the reason.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return Vocabulary()
    tokenizers = load_package("tokenizers", "reading tokenizer.json", "train")
    text = read_text(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain exceptions
        raise InvalidInput(
            f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} can read ({error})"
            "; copy it again"
        ) from error
    return tokenizer_vocabulary(tokenizer)


def load_first_vocabulary(folders: Sequence[Path]) -> Vocabulary:
    """Load the vocabulary of the first folder that has one; empty if none does."""
    vocabularies = map(load_vocabulary, folders)
    return next((x for x in vocabularies if x.token_bytes), Vocabulary())


def load_run_vocabulary(run: Path) -> Vocabulary:
    """Load the vocabulary of a run: of the trained model, or of the initial student.

    Args:
        run: The run folder.

    Returns:
        The vocabulary.

    Raises:
        MissingFile: Neither folder has a tokenizer.json.
    """
    folders = [run / "final", RunFolder(run).model_folder("student")]
    vocabulary = load_first_vocabulary(folders)
    if not vocabulary.token_bytes:
        raise MissingFile(
            f"no tokenizer.json in {folders[0]} or {folders[1]}: finish the run, or restore the "
            "student at the path in its config.json"
        )
    return vocabulary


def tokenizer_vocabulary(tokenizer: "Tokenizer") -> Vocabulary:
    """Return the vocabulary of a loaded tokenizer of the library `tokenizers`."""
    decoder = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
    pieces = tokenizer.get_vocab(with_added_tokens=False)
    return make_vocabulary(pieces, tokenizer.get_added_tokens_decoder(), b'"ByteLevel"' in decoder)


def make_vocabulary(
    pieces: Mapping[str, int], added_tokens: "Mapping[int, AddedToken]", byte_level: bool
) -> Vocabulary:
    """Return the vocabulary of a tokenizer's model and its added tokens.

    Byte-level models write a byte as a printable character. SentencePiece models write a space as
    U+2581 and a lone byte as <0xNN>. Added tokens are their own text in both.

    Args:
        pieces: Ids of the model's entries.
        added_tokens: Added tokens by id.
        byte_level: Whether the model is byte-level.

    Returns:
        The vocabulary.
    """
    piece_bytes = byte_level_bytes if byte_level else sentence_piece_bytes
    token_bytes = {i: piece_bytes(piece) for piece, i in pieces.items()}
    token_bytes |= {i: token.content.encode() for i, token in added_tokens.items()}
    return Vocabulary(token_bytes, frozenset(i for i, x in added_tokens.items() if x.special))


def byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a byte-level entry; other characters stand for themselves."""
    return b"".join(
        bytes([ALPHABET[character]]) if character in ALPHABET else character.encode()
        for character in piece
    )


def sentence_piece_bytes(piece: str) -> bytes:
    """Return the bytes of a SentencePiece entry."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(byte[1])
    return piece.replace("\u2581", " ").encode()


def byte_alphabet() -> dict[str, int]:
    """Return the byte of each printable character of byte-level entries (GPT-2).

    Printable bytes are themselves; the others, in order, are the code points from 256 on.

    Returns:
        Character to byte.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + position): byte for position, byte in enumerate(unprintable)}
    return {chr(byte): byte for byte in printable} | shifted


ALPHABET = byte_alphabet()


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
