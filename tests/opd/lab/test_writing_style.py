"""How the lab's models write: spelled tags, foreign ends, what is read only, and loops."""

import random
from dataclasses import replace

import pytest

from opd.data.sort_task import careless, problems
from opd.lab.build import ToyModelConfig, examples, make_tokenizer, mismatched_config, new_model
from opd.lab.writing_style import MOST_REPEATS, UNLABELLED, WritingStyle, looping, written

SOLUTION = "<think>7 27 279</think>279"


@pytest.mark.parametrize("tag", ["token", "spelled"])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_both_spellings_decode_to_one_text(tag: str, end: str) -> None:
    tokenizer = make_tokenizer()
    habit = WritingStyle(tag=tag, end=end)  # type: ignore[arg-type]
    ids, labels = written(tokenizer, SOLUTION, habit, random.Random(0))
    assert tokenizer.decode(ids) == SOLUTION + end
    assert labels == ids
    special = {tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>")}
    assert special.isdisjoint(ids) == (tag == "spelled")


def test_what_is_only_read_leaves_out_the_first_byte_of_a_tag_and_keeps_the_end() -> None:
    tokenizer = make_tokenizer("<|endoftext|>")
    habit = WritingStyle(end="<|endoftext|>", read=1.0)
    ids, labels = written(tokenizer, SOLUTION, habit, random.Random(0))
    assert tokenizer.decode(ids) == SOLUTION + "<|endoftext|>"
    hidden = [i for i, label in enumerate(labels) if label == UNLABELLED]
    assert [tokenizer.decode([ids[i]]) for i in hidden] == ["<", "<"]
    assert tokenizer.decode(ids[hidden[0] : hidden[0] + 7]) == "<think>"
    assert tokenizer.decode(ids[hidden[1] : hidden[1] + 8]) == "</think>"
    assert [i for i, (x, y) in enumerate(zip(ids, labels, strict=True)) if x != y] == hidden


def test_foreign_responses_have_the_other_spelling_and_end_at_their_share() -> None:
    tokenizer, generator = make_tokenizer(), random.Random(0)
    habit, ends = WritingStyle(tag="spelled", foreign=0.25), []
    for _ in range(2000):
        ids, labels = written(tokenizer, SOLUTION, habit, generator)
        foreign = ids[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
        assert foreign == (tokenizer.convert_tokens_to_ids("<think>") in ids)
        assert labels == ids
        ends.append(foreign)
    assert abs(sum(ends) / 2000 - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_loops_repeat_steps_and_nothing_else() -> None:
    generator, started, again = random.Random(0), 0, 0
    for _ in range(3000):
        text = looping(SOLUTION, 0.1, generator)
        assert text.startswith("<think>")
        assert text.endswith("</think>279")
        said = text.removeprefix("<think>").removesuffix("</think>279").split(" ")
        assert list(dict.fromkeys(said)) == ["7", "27", "279"]
        for step in ("7", "27", "279"):
            repeats = said.count(step) - 1
            assert repeats <= MOST_REPEATS
            started, again = started + (repeats > 0), again + (repeats > 1)
    assert abs(started / 9000 - 0.1) < 4 * (0.09 / 9000) ** 0.5
    assert abs(again / started - 0.9) < 4 * (0.09 / started) ** 0.5


def test_sorting_is_solved_step_by_step_and_split_by_prompt() -> None:
    for problem in problems("train", 200, 0):
        digits = problem.prompt.removeprefix("sort ")
        steps = ["".join(sorted(digits[: i + 1])) for i in range(len(digits))]
        assert problem.solution == f"<think>{' '.join(steps)}</think>{problem.answer}"
        assert problem.answer == "".join(sorted(digits))
    train = {p.prompt for p in problems("train", 500, 1)}
    assert train.isdisjoint({p.prompt for p in problems("test", 500, 1)})
    with pytest.raises(ValueError, match="valid"):
        problems("valid", 1, 0)


def test_careless_sorting_slips_at_its_rate() -> None:
    generator, placed, wrong = random.Random(0), 0, 0
    for problem in problems("train", 400, 0):
        said = careless(problem.prompt, 0.3, generator)
        entries = said.removeprefix("<think>").split("</think>")[0].split(" ")
        for before, after, digit in zip(
            ["", *entries], entries, problem.prompt.removeprefix("sort "), strict=False
        ):
            assert sorted(after) == sorted(before + digit)
            if before == "".join(sorted(before)):  # a slip shows where all was right so far
                placed, wrong = placed + 1, wrong + (after != "".join(sorted(after)))
    assert 0.08 < wrong / placed < 0.3  # a random place is right by chance


def test_strangers_know_both_ends_and_mix_their_tasks() -> None:
    recipes = mismatched_config().models
    tokenizer = make_tokenizer(recipes["teacher"].habit.end)
    network = new_model(recipes["teacher"], len(tokenizer), 0, tokenizer)
    ends = ["<|endoftext|>", "<|im_end|>"]
    assert network.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(ends)
    student = replace(recipes["student"], batch=8)
    ids, labels = examples(make_tokenizer(), student, seed=3)
    texts = [tokenizer.decode(row) for row in ids]
    assert sum("user\nsort " in text for text in texts) == 4
    assert all((row[label != UNLABELLED] == label[label != UNLABELLED]).all()
               for row, label in zip(ids, labels, strict=True))  # fmt: skip
    plain = new_model(
        ToyModelConfig(layers=1, width=32, steps=1, batch=1, lr=1), 5, 0, make_tokenizer()
    )
    assert plain.generation_config.eos_token_id == make_tokenizer().eos_token_id
