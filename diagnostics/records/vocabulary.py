"""What the ids of a run mean, read from its tokenizer.json: text, and which are special."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import check_fields, has_type, read_json, read_object, short


@dataclass(frozen=True)
class Vocabulary:
    """special: ids of added tokens with that flag; names: text of every id as shown in a figure."""

    special: frozenset[int]
    names: dict[int, str]

    def name(self, token: int) -> str:
        return self.names.get(token, f"#{token}")


def read(run: Path) -> Vocabulary:
    """The vocabulary of a run: of the model it trained, or of the student it began with.

    Raises:
      FileNotFoundError: neither folder has a tokenizer.json.
    """
    places = [run / "final", model(run, "student")]
    for place in places:
        if (place / "tokenizer.json").exists():
            return parse(read_json(place / "tokenizer.json"), str(place / "tokenizer.json"))
    raise MissingFile(
        f"no tokenizer.json in {places[0]} or {places[1]}: finish the run, or put the student "
        "where its config.json says"
    )


def model(run: Path, role: str) -> Path:
    """The folder of the run's student or teacher; see `located`."""
    return located(run, read_object(run / "config.json", {role: str})[role])


def located(run: Path, name: str) -> Path:
    """A folder that a run's config.json names; a relative one also from the run's parents."""
    found = [up / name for up in run.resolve().parents if (up / name).is_dir()]
    return Path(name) if Path(name).is_dir() or not found else found[0]


def end(folder: Path, vocabulary: Vocabulary) -> int:
    """The id by which a model ends in its own way: its tokenizer's end token.

    Raises:
      FileNotFoundError: the folder names none. ValueError: the vocabulary does not have it.
    """
    settings = folder / "tokenizer_config.json"
    token = read_object(settings).get("eos_token") if settings.exists() else None
    if token is None:
        raise MissingFile(f"no eos_token in {settings}, and without it no ends to show")
    text = token.get("content") if isinstance(token, dict) else token
    ids = [i for i, name in vocabulary.names.items() if name == text]
    if not ids:
        raise InvalidInput(f"{folder} ends with {text!r}, which the run's vocabulary does not have")
    return ids[0]


def parse(tokenizer: Any, source: str = "tokenizer.json") -> Vocabulary:
    """Of the contents of a tokenizer.json; byte-level pieces become text, odd bytes stay hex."""
    pieces, added = entries(tokenizer, source)
    letters = byte_letters()
    names = {i: shown(piece, letters) for piece, i in pieces.items()}
    names |= {token["id"]: token["content"] for token in added}
    return Vocabulary(frozenset(t["id"] for t in added if t.get("special")), names)


def entries(tokenizer: Any, source: str) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The pieces of a tokenizer's model by their ids, and the tokens added to them.

    Raises:
      InvalidInput: not the contents of a tokenizer.json; names `source`, the field and the value.
    """
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise InvalidInput(f"{source}: {short(tokenizer)} has no object 'model' of a tokenizer")
    pieces, added = tokenizer["model"].get("vocab"), tokenizer.get("added_tokens") or []
    if isinstance(pieces, list):  # a unigram model: [piece, score] by id
        for i, pair in enumerate(pieces):
            if not isinstance(pair, list) or not pair or not isinstance(pair[0], str):
                raise InvalidInput(f"{source}, model.vocab[{i}]: {short(pair)}, not [text, score]")
        pieces = {pair[0]: i for i, pair in enumerate(pieces)}
    if not isinstance(pieces, dict):
        raise InvalidInput(f"{source}, model.vocab: {short(pieces)} holds no pieces by their ids")
    for piece, i in pieces.items():
        if not has_type(i, int):
            raise InvalidInput(f"{source}, model.vocab: {short(piece)} has the id {short(i)}")
    if not isinstance(added, list):
        raise InvalidInput(f"{source}, added_tokens: {short(added)} is not a list")
    for i, token in enumerate(added):
        if not isinstance(token, dict):
            raise InvalidInput(f"{source}, added_tokens[{i}]: {short(token)} is not an object")
        check_fields(token, {"id": int, "content": str}, f"{source}, added_tokens[{i}]")
    return pieces, added


def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level pieces (of GPT-2) to that byte.

    Printable bytes stand for themselves; the others, in order, are the code points from 256 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def shown(piece: str, letters: dict[str, int]) -> str:
    """A piece as text, with visible spaces and line ends; bytes that are no text as \\xNN."""
    if all(letter in letters for letter in piece):
        data = bytes(letters[letter] for letter in piece)
        piece = data.decode("utf-8", errors="backslashreplace")
    return piece.replace("▁", "␣").replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
