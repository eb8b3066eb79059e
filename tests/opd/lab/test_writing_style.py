"""Writing styles of the toy models: spelled tags, foreign end tokens, unlabelled tags and loops."""

import random
from dataclasses import replace

import pytest

from opd.data.sort_task import corrupted_solution, problems
from opd.lab.build import make_tokenizer, make_training_batch, new_model
from opd.lab.configs import ToyModelConfig, mismatched_config
from opd.lab.writing_style import (
    MAX_REPEATS,
    UNLABELLED,
    WritingStyle,
    encode_solution,
    repeat_steps,
)

SOLUTION = "<think>7 27 279</think>279"


@pytest.mark.parametrize("tag", ["token", "spelled"])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_both_spellings_decode_to_one_text(tag: str, end: str) -> None:
    tokenizer = make_tokenizer()
    habit = WritingStyle(tag=tag, end=end)  # type: ignore[arg-type]
    ids, labels = encode_solution(tokenizer, SOLUTION, habit, random.Random(0))
    assert tokenizer.decode(ids) == SOLUTION + end
    assert labels == ids
    special = {tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>")}
    assert special.isdisjoint(ids) == (tag == "spelled")


def test_unlabelled_tags_exclude_their_first_byte_and_keep_the_end() -> None:
    tokenizer = make_tokenizer("<|endoftext|>")
    habit = WritingStyle(end="<|endoftext|>", read=1.0)
    ids, labels = encode_solution(tokenizer, SOLUTION, habit, random.Random(0))
    assert tokenizer.decode(ids) == SOLUTION + "<|endoftext|>"
    unlabelled = [i for i, label in enumerate(labels) if label == UNLABELLED]
    assert [tokenizer.decode([ids[i]]) for i in unlabelled] == ["<", "<"]
    assert tokenizer.decode(ids[unlabelled[0] : unlabelled[0] + 7]) == "<think>"
    assert tokenizer.decode(ids[unlabelled[1] : unlabelled[1] + 8]) == "</think>"
    assert [i for i, (x, y) in enumerate(zip(ids, labels, strict=True)) if x != y] == unlabelled


def test_foreign_responses_have_the_opposite_style_at_their_share() -> None:
    tokenizer, generator = make_tokenizer(), random.Random(0)
    habit, ends = WritingStyle(tag="spelled", foreign=0.25), []
    for _ in range(2000):
        ids, labels = encode_solution(tokenizer, SOLUTION, habit, generator)
        foreign = ids[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
        assert foreign == (tokenizer.convert_tokens_to_ids("<think>") in ids)
        assert labels == ids
        ends.append(foreign)
    assert abs(sum(ends) / 2000 - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_loops_repeat_steps_and_nothing_else() -> None:
    generator, num_repeated, num_repeated_twice = random.Random(0), 0, 0
    for _ in range(3000):
        text = repeat_steps(SOLUTION, 0.1, generator)
        assert text.startswith("<think>")
        assert text.endswith("</think>279")
        steps = text.removeprefix("<think>").removesuffix("</think>279").split(" ")
        assert list(dict.fromkeys(steps)) == ["7", "27", "279"]
        for step in ("7", "27", "279"):
            repeats = steps.count(step) - 1
            assert repeats <= MAX_REPEATS
            num_repeated, num_repeated_twice = (
                num_repeated + (repeats > 0),
                num_repeated_twice + (repeats > 1),
            )
    assert abs(num_repeated / 9000 - 0.1) < 4 * (0.09 / 9000) ** 0.5
    assert abs(num_repeated_twice / num_repeated - 0.9) < 4 * (0.09 / num_repeated) ** 0.5


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


def test_corrupted_sorting_has_its_error_rate() -> None:
    generator, num_placed, num_wrong = random.Random(0), 0, 0
    for problem in problems("train", 400, 0):
        solution = corrupted_solution(problem.prompt, 0.3, generator)
        entries = solution.removeprefix("<think>").split("</think>")[0].split(" ")
        for prefix_before, prefix_after, digit in zip(
            ["", *entries], entries, problem.prompt.removeprefix("sort "), strict=False
        ):
            assert sorted(prefix_after) == sorted(prefix_before + digit)
            if prefix_before == "".join(
                sorted(prefix_before)
            ):  # an error is visible only after a correct prefix
                num_placed, num_wrong = (
                    num_placed + 1,
                    num_wrong + (prefix_after != "".join(sorted(prefix_after))),
                )
    assert 0.08 < num_wrong / num_placed < 0.3  # a random position may be correct


def test_mismatched_models_have_both_end_tokens_and_mix_tasks() -> None:
    recipes = mismatched_config().models
    tokenizer = make_tokenizer(recipes["teacher"].habit.end)
    network = new_model(recipes["teacher"], 0, tokenizer)
    ends = ["<|endoftext|>", "<|im_end|>"]
    assert network.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(ends)
    student = replace(recipes["student"], batch=8)
    ids, labels = make_training_batch(make_tokenizer(), student, seed=3)
    texts = [tokenizer.decode(row) for row in ids]
    assert sum("user\nsort " in text for text in texts) == 4
    assert all((row[label != UNLABELLED] == label[label != UNLABELLED]).all()
               for row, label in zip(ids, labels, strict=True))  # fmt: skip
    plain = new_model(
        ToyModelConfig(layers=1, width=32, steps=1, batch=1, lr=1), 0, make_tokenizer()
    )
    assert plain.generation_config.eos_token_id == make_tokenizer().eos_token_id
