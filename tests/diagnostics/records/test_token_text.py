"""What ids spell, against the tokenizers that own them."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from diagnostics.records import token_text
from diagnostics.records.token_text import told
from opd.report.rollout_viewer import tokenizer_places
from opd.report.run_data import read_run

TEXT = "Grüße, 漢字 🙂🙂 a\n\tb"


@pytest.fixture
def bytewise(tmp_path: Path) -> tuple[Tokenizer, Path]:
    """A byte-level tokenizer that has hardly a merge, so that characters fall apart."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"Gr": 256}
    made = Tokenizer(models.BPE(vocabulary, [("G", "r")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|ende|>"])
    made.add_tokens(["漢字"])
    made.save(str(tmp_path / "tokenizer.json"))
    return made, tmp_path


def test_bytes_of_several_ids_are_one_character(bytewise: tuple[Tokenizer, Path]) -> None:
    tokenizer, folder = bytewise
    known = token_text.read_spelling(folder)
    ids = tokenizer.encode(TEXT + "<|ende|>").ids
    assert b"".join(known.pieces[i] for i in ids) == (TEXT + "<|ende|>").encode()
    texts = known.texts(ids)
    assert "".join(texts) == TEXT + "<|ende|>"
    at = texts.index("🙂")
    assert texts[at : at + 8] == ["🙂", "", "", "", "🙂", "", "", ""]
    assert known.special == {tokenizer.token_to_id("<|ende|>")}
    assert known.text(ids[at]) == "\\xf0"
    assert known.text(9999) == "#9999"
    assert known.texts([9999, ids[0]]) == ["#9999", "Gr"]


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([b"\xf0\x9f", b"\x99\x82!"], ["🙂", "!"]),  # a piece ends one character and has another
        ([b"a\xe6", b"\xbc", b"\xa2", b"b"], ["a漢", "", "", "b"]),
        ([b"\xf0\x9f", b"a"], ["\\xf0\\x9f", "a"]),  # a character that is never finished
        ([b"\x82", b"\xc3\xa9"], ["\\x82", "é"]),  # bytes that begin none
        ([b"\xe6\xbc"], ["\\xe6\\xbc"]),
        ([b"", b"x"], ["", "x"]),
        ([], []),
    ],
)
def test_broken_text_shows_its_bytes(pieces: list[bytes], texts: list[str]) -> None:
    assert told(pieces) == texts


def test_other_kinds_of_pieces() -> None:
    added = [{"id": 4, "content": "</s>", "special": True}, {"id": 5, "content": "<think>"}]
    known = token_text.parse(
        {
            "model": {"vocab": [["▁the", 0.0], ["<0xF0>", 0.0], ["a", 0.0], ["\ud800", 0.0]]},
            "decoder": None,
            "added_tokens": added,
        }
    )
    assert known.pieces == {
        0: b" the",
        1: b"\xf0",
        2: b"a",
        3: b"\xed\xa0\x80",
        4: b"</s>",
        5: b"<think>",
    }
    assert known.special == {4}
    assert known.text(3) == "\\xed\\xa0\\x80"


def test_a_run_finds_its_tokenizer(bytewise: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    _, folder = bytewise
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "rows.jsonl").touch()

    def found_by(run: Path) -> token_text.Spelling:
        return token_text.read_run_spelling(tokenizer_places(read_run(run, models=True)))

    assert found_by(run) == token_text.Spelling()
    (tmp_path / "pair").mkdir()
    (run / "config.json").write_text(json.dumps({"student": "pair", "teacher": "pair"}))
    assert found_by(run).pieces == {}
    (folder / "tokenizer.json").rename(tmp_path / "pair" / "tokenizer.json")
    found = found_by(run)
    assert found.pieces[256] == b"Gr"
    (run / "final").mkdir()
    other = {"model": {"vocab": {"x": 0}}}
    (run / "final" / "tokenizer.json").write_text(json.dumps(other))
    assert found_by(run).pieces == {0: b"x"}
