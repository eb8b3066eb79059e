"""Display text and special tokens of a run's vocabulary, from its tokenizer.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import check_fields, has_type, read_json, read_object, short_repr


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of a run as figures show it."""

    special: frozenset[int]
    """Ids of added tokens with the special flag."""
    names: dict[int, str]
    """Display text of every id."""

    def name(self, token: int) -> str:
        """Return the display text of an id, or its number if unknown."""
        return self.names.get(token, f"#{token}")


def load_vocabulary(run: Path) -> Vocabulary:
    """Load the vocabulary of a run: of the trained model, or of the initial student.

    Args:
        run: The run folder.

    Returns:
        The vocabulary.

    Raises:
        MissingFile: Neither folder has a tokenizer.json.
    """
    folders = [run / "final", model_folder(run, "student")]
    for folder in folders:
        if (folder / "tokenizer.json").exists():
            return parse_vocabulary(
                read_json(folder / "tokenizer.json"), str(folder / "tokenizer.json")
            )
    raise MissingFile(
        f"no tokenizer.json in {folders[0]} or {folders[1]}: finish the run, or restore the "
        "student at the path in its config.json"
    )


def model_folder(run: Path, role: str) -> Path:
    """Return the folder of the run's student or teacher; see `resolve_folder`."""
    return resolve_folder(run, read_object(run / "config.json", {role: str})[role])


def resolve_folder(run: Path, name: str) -> Path:
    """Find a folder named in a run's config.json; a relative one also from the run's parents."""
    candidates = [parent / name for parent in run.resolve().parents if (parent / name).is_dir()]
    return Path(name) if Path(name).is_dir() or not candidates else candidates[0]


def eos_id(folder: Path, vocabulary: Vocabulary) -> int:
    """Return the id of the EOS token of a model's tokenizer.

    Args:
        folder: The model folder.
        vocabulary: The run's vocabulary.

    Returns:
        The id.

    Raises:
        MissingFile: The folder names no EOS token.
        InvalidInput: The vocabulary does not have it.
    """
    settings = folder / "tokenizer_config.json"
    token = read_object(settings).get("eos_token") if settings.exists() else None
    if token is None:
        raise MissingFile(f"no eos_token in {settings}, which the figure needs")
    text = token.get("content") if isinstance(token, dict) else token
    ids = [i for i, name in vocabulary.names.items() if name == text]
    if not ids:
        raise InvalidInput(f"the eos_token {text!r} of {folder} is not in the run's vocabulary")
    return ids[0]


def parse_vocabulary(tokenizer: Any, source: str = "tokenizer.json") -> Vocabulary:
    """Parse the content of a tokenizer.json; byte-level entries become text, invalid bytes hex."""
    pieces, added_tokens = tokenizer_entries(tokenizer, source)
    byte_by_letter = byte_alphabet()
    names = {i: display_text(piece, byte_by_letter) for piece, i in pieces.items()}
    names |= {token["id"]: token["content"] for token in added_tokens}
    return Vocabulary(frozenset(t["id"] for t in added_tokens if t.get("special")), names)


def tokenizer_entries(tokenizer: Any, source: str) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return the vocabulary entries of a tokenizer's model by id, and its added tokens.

    Args:
        tokenizer: Content of a tokenizer.json.
        source: File name for messages.

    Returns:
        Text to id, and the added tokens.

    Raises:
        InvalidInput: Not the content of a tokenizer.json; names `source`, the field and the value.
    """
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise InvalidInput(f"{source}: {short_repr(tokenizer)} has no object 'model'")
    pieces, added_tokens = tokenizer["model"].get("vocab"), tokenizer.get("added_tokens") or []
    if isinstance(pieces, list):  # a unigram model: [piece, score] by id
        for i, pair in enumerate(pieces):
            if not isinstance(pair, list) or not pair or not isinstance(pair[0], str):
                raise InvalidInput(
                    f"{source}, model.vocab[{i}]: {short_repr(pair)}, not [text, score]"
                )
        pieces = {pair[0]: i for i, pair in enumerate(pieces)}
    if not isinstance(pieces, dict):
        raise InvalidInput(f"{source}, model.vocab: {short_repr(pieces)} is not an object of ids")
    for piece, i in pieces.items():
        if not has_type(i, int):
            raise InvalidInput(
                f"{source}, model.vocab: {short_repr(piece)} has the id {short_repr(i)}"
            )
    if not isinstance(added_tokens, list):
        raise InvalidInput(f"{source}, added_tokens: {short_repr(added_tokens)} is not a list")
    for i, token in enumerate(added_tokens):
        if not isinstance(token, dict):
            raise InvalidInput(f"{source}, added_tokens[{i}]: {short_repr(token)} is not an object")
        check_fields(token, {"id": int, "content": str}, f"{source}, added_tokens[{i}]")
    return pieces, added_tokens


def byte_alphabet() -> dict[str, int]:
    """Return the byte for each letter of byte-level entries (GPT-2).

    Printable bytes are themselves; the others, in order, are the code points from 256 on.

    Returns:
        Letter to byte.
    """
    printable_bytes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other_bytes = [b for b in range(256) if b not in printable_bytes]
    return {chr(b): b for b in printable_bytes} | {
        chr(256 + i): b for i, b in enumerate(other_bytes)
    }


def display_text(piece: str, byte_by_letter: dict[str, int]) -> str:
    r"""Return an entry as text with visible spaces and line ends; invalid UTF-8 bytes as \xNN."""
    if all(letter in byte_by_letter for letter in piece):
        data = bytes(byte_by_letter[letter] for letter in piece)
        piece = data.decode("utf-8", errors="backslashreplace")
    return piece.replace("▁", "␣").replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
