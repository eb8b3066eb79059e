"""The tokenizer of a pair: every size loads from disk and encodes the tasks in the same way."""

from pathlib import Path

import pytest

from opd.data import sort_task
from opd.data.chain_task import Problem, all_prompts, solve
from opd.data.prompts import encode_prompt
from opd.lab.knobs import PairKnobs
from opd.lab.pair_models import new_model
from opd.lab.pair_tokenizer import TAG, make_pair_tokenizer, pair_ids


@pytest.mark.parametrize("vocabulary", [200, 262, 700])
def test_a_tokenizer_round_trips_from_disk(vocabulary: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_pair_tokenizer(vocabulary)
    tokenizer.save_pretrained(tmp_path)
    # the model in the same folder decides the class of the loaded tokenizer
    new_model("student", PairKnobs(size="tiny"), 0, tokenizer).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert len(loaded) == len(tokenizer) == vocabulary
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = pair_ids(loaded)
    assert ids == pair_ids(tokenizer)
    problems = [Problem(x, *solve(x)) for x in all_prompts(range(9, 11))[::97]]
    for problem in [*problems, *sort_task.problems("train", 5, 0)]:
        text = f"{problem.solution}<|im_end|>"
        assert tokenizer.encode(text) == loaded.encode(text) == [*ids.encode(text[:-10]), ids.end]
        assert loaded.decode(loaded.encode(text)) == text
        prompt_ids = encode_prompt(loaded, problem)
        assert prompt_ids == ids.encode_prompt(problem.prompt)
        assert loaded.decode(prompt_ids) == f"<|im_start|>{problem.prompt}<|im_end|><|im_start|>"


def test_the_two_forms_of_a_tag_are_the_same_text() -> None:
    tokenizer = make_pair_tokenizer(200)
    ids = pair_ids(tokenizer)
    assert tokenizer.decode([ids.tag]) == tokenizer.decode(list(ids.spelled)) == TAG
    assert tokenizer.encode(TAG) == [ids.tag]
    assert ids.tag_forms("student") == {"student": ids.spelled, "teacher": (ids.tag,)}
    assert ids.tag_forms("teacher") == {"student": (ids.tag,), "teacher": ids.spelled}


def test_tokens_beyond_the_bytes_are_never_written() -> None:
    tokenizer = make_pair_tokenizer(1000)
    text = "".join(map(chr, range(1, 0x300))) + "never-written-0 漢字"
    assert max(tokenizer.encode(text)) < 262
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens(262) == "never-written-0"
    small = make_pair_tokenizer(200)
    ids = small.encode("4:7*3+8 é!")
    assert len(ids) < len("4:7*3+8 é!".encode()), "bytes without a token are dropped"
    assert small.decode(ids).startswith("4:7*3+8 ")
