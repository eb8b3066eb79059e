"""Bytes and text of token ids against the tokenizers that produced them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from diagnostics.errors import InvalidInput
from diagnostics.records.vocabulary import (
    Vocabulary,
    byte_alphabet,
    decode_pieces,
    load_first_vocabulary,
    load_vocabulary,
    tokenizer_vocabulary,
)
from opd.lab.build import make_tokenizer
from opd.report.rollout_viewer import tokenizer_folders
from opd.report.run_data import read_run

TEXT = "Grüße, 漢字 🙂🙂 a\n\tb"


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with hardly any merges, so that characters are split over ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"Gr": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("G", "r")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|ende|>"])
    tokenizer.add_tokens(["漢字"])
    return tokenizer


def sentence_piece_tokenizer() -> Tokenizer:
    """A unigram model with a space as U+2581 and lone bytes, as SentencePiece writes them."""
    bytes_of_all = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *bytes_of_all, *((x, -2.0) for x in "▁aGrüß,\n")]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁the", -1.0)], 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


TOKENIZERS: dict[str, Any] = {
    "byte level": byte_level_tokenizer,
    "sentence piece": sentence_piece_tokenizer,
    "lab": lambda: make_tokenizer().backend_tokenizer,
}


@pytest.fixture
def bytewise(tmp_path: Path) -> tuple[Tokenizer, Path]:
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tokenizer, tmp_path


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_mean_what_transformers_decodes(name: str, tmp_path: Path) -> None:
    """Alone and in sequence, as read from the folder that transformers saves."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[name]())
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = load_vocabulary(tmp_path)
    ids = sorted(tokenizer.get_vocab().values())
    assert sorted(vocabulary.token_bytes) == ids
    assert vocabulary.special == {i for i, x in tokenizer.added_tokens_decoder.items() if x.special}

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    for i in ids:
        assert vocabulary.token_bytes[i].decode("utf-8", "replace") == decode([i])
    for text in (TEXT, "the <think>a</s>", "ß漢the the", "\ufffd"):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        data = b"".join(vocabulary.token_bytes[i] for i in tokens)
        assert data.decode() == decode(tokens)
        assert "".join(vocabulary.texts(tokens)) == decode(tokens)


def test_bytes_of_several_ids_are_one_character(bytewise: tuple[Tokenizer, Path]) -> None:
    tokenizer, folder = bytewise
    vocabulary = load_vocabulary(folder)
    ids = tokenizer.encode(TEXT + "<|ende|>").ids
    assert b"".join(vocabulary.token_bytes[i] for i in ids) == (TEXT + "<|ende|>").encode()
    texts = vocabulary.texts(ids)
    assert "".join(texts) == TEXT + "<|ende|>"
    index = texts.index("🙂")
    assert texts[index : index + 8] == ["🙂", "", "", "", "🙂", "", "", ""]
    assert vocabulary.special == {tokenizer.token_to_id("<|ende|>")}
    assert vocabulary.text(ids[index]) == "\\xf0"
    assert vocabulary.text(9999) == vocabulary.name(9999) == "#9999"
    assert vocabulary.texts([9999, ids[0]]) == ["#9999", "Gr"]
    assert vocabulary.ids[b"Gr"] == 256


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
    vocabulary = tokenizer_vocabulary(sentence_piece_tokenizer())
    by_text = {text: vocabulary.ids[text] for text in (b" the", b"\xf0", b"a", b"</s>", b"<think>")}
    assert [vocabulary.text(i) for i in by_text.values()] == [
        *(" the", "\\xf0", "a", "</s>", "<think>")
    ]
    assert vocabulary.special == {by_text[b"</s>"]}


def test_of_equal_texts_the_special_token_is_found() -> None:
    vocabulary = Vocabulary({0: b"x", 1: b"a", 2: b"x", 3: b"x"}, frozenset({2}))
    assert vocabulary.ids == {b"x": 2, b"a": 1}


def test_the_alphabet_is_the_published_one() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model": {}}', '{"model": {"vocab": {"x": "y"}}}', '{"a": 1, "a": 2}']
)
def test_a_damaged_tokenizer_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"tokenizer\.json is not a tokenizer that tokenizers"):
        load_vocabulary(tmp_path)


def test_a_run_finds_its_tokenizer(bytewise: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    _, folder = bytewise
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "rows.jsonl").touch()

    def vocabulary_of(run: Path) -> Vocabulary:
        return load_first_vocabulary(tokenizer_folders(read_run(run, models=True)))

    assert vocabulary_of(run) == Vocabulary()
    (tmp_path / "pair").mkdir()
    (run / "config.json").write_text(json.dumps({"student": "pair", "teacher": "pair"}))
    assert vocabulary_of(run).token_bytes == {}
    (folder / "tokenizer.json").rename(tmp_path / "pair" / "tokenizer.json")
    assert vocabulary_of(run).token_bytes[256] == b"Gr"
    (run / "final").mkdir()
    Tokenizer(models.WordLevel({"x": 0}, "x")).save(str(run / "final" / "tokenizer.json"))
    assert vocabulary_of(run).token_bytes == {0: b"x"}
