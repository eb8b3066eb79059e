"""Text of token ids against the tokenizers that produced them."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from diagnostics.records import token_text
from diagnostics.records.token_text import decode_pieces
from opd.report.rollout_viewer import tokenizer_folders
from opd.report.run_data import read_run

TEXT = "Grüße, 漢字 🙂🙂 a\n\tb"


@pytest.fixture
def bytewise(tmp_path: Path) -> tuple[Tokenizer, Path]:
    """A byte-level tokenizer with hardly any merges, so that characters are split over ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"Gr": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("G", "r")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|ende|>"])
    tokenizer.add_tokens(["漢字"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tokenizer, tmp_path


def test_bytes_of_several_ids_are_one_character(bytewise: tuple[Tokenizer, Path]) -> None:
    tokenizer, folder = bytewise
    decoder = token_text.load_token_decoder(folder)
    ids = tokenizer.encode(TEXT + "<|ende|>").ids
    assert b"".join(decoder.token_bytes[i] for i in ids) == (TEXT + "<|ende|>").encode()
    texts = decoder.texts(ids)
    assert "".join(texts) == TEXT + "<|ende|>"
    index = texts.index("🙂")
    assert texts[index : index + 8] == ["🙂", "", "", "", "🙂", "", "", ""]
    assert decoder.special == {tokenizer.token_to_id("<|ende|>")}
    assert decoder.text(ids[index]) == "\\xf0"
    assert decoder.text(9999) == "#9999"
    assert decoder.texts([9999, ids[0]]) == ["#9999", "Gr"]


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([b"\xf0\x9f", b"\x99\x82!"], ["🙂", "!"]),  # a token ends one character and holds another
        ([b"a\xe6", b"\xbc", b"\xa2", b"b"], ["a漢", "", "", "b"]),
        ([b"\xf0\x9f", b"a"], ["\\xf0\\x9f", "a"]),  # an incomplete character
        ([b"\x82", b"\xc3\xa9"], ["\\x82", "é"]),  # a byte that begins no character
        ([b"\xe6\xbc"], ["\\xe6\\xbc"]),
        ([b"", b"x"], ["", "x"]),
        ([], []),
    ],
)
def test_broken_text_shows_its_bytes(pieces: list[bytes], texts: list[str]) -> None:
    assert decode_pieces(pieces) == texts


def test_other_kinds_of_pieces() -> None:
    added_tokens = [{"id": 4, "content": "</s>", "special": True}, {"id": 5, "content": "<think>"}]
    decoder = token_text.parse_tokenizer(
        {
            "model": {"vocab": [["▁the", 0.0], ["<0xF0>", 0.0], ["a", 0.0], ["\ud800", 0.0]]},
            "decoder": None,
            "added_tokens": added_tokens,
        }
    )
    assert decoder.token_bytes == {
        0: b" the",
        1: b"\xf0",
        2: b"a",
        3: b"\xed\xa0\x80",
        4: b"</s>",
        5: b"<think>",
    }
    assert decoder.special == {4}
    assert decoder.text(3) == "\\xed\\xa0\\x80"


def test_a_run_finds_its_tokenizer(bytewise: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    _, folder = bytewise
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "rows.jsonl").touch()

    def decoder_of(run: Path) -> token_text.TokenDecoder:
        return token_text.load_first_token_decoder(tokenizer_folders(read_run(run, models=True)))

    assert decoder_of(run) == token_text.TokenDecoder()
    (tmp_path / "pair").mkdir()
    (run / "config.json").write_text(json.dumps({"student": "pair", "teacher": "pair"}))
    assert decoder_of(run).token_bytes == {}
    (folder / "tokenizer.json").rename(tmp_path / "pair" / "tokenizer.json")
    decoder = decoder_of(run)
    assert decoder.token_bytes[256] == b"Gr"
    (run / "final").mkdir()
    other_tokenizer = {"model": {"vocab": {"x": 0}}}
    (run / "final" / "tokenizer.json").write_text(json.dumps(other_tokenizer))
    assert decoder_of(run).token_bytes == {0: b"x"}
