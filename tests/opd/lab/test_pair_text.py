"""Training text of a pair: rates of tags and ends, labels, targets, styles, errors and loops."""

import math
import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from opd.data.chain_task import all_prompts, grade, solve
from opd.lab.knobs import PairKnobs
from opd.lab.pair_lengths import (
    longest_response,
    shortest_response,
    step_range,
    tag_probabilities,
)
from opd.lab.pair_text import (
    READ_SHARE,
    TERSE_SHARE,
    TrainingToken,
    write_base,
    write_student,
    write_teacher,
)
from opd.lab.pair_tokenizer import PairIds, make_pair_tokenizer, pair_ids

NUM_RESPONSES = 1500
TOKENIZER = make_pair_tokenizer(262)
IDS = pair_ids(TOKENIZER)
Write = Callable[[str, random.Random, PairKnobs, PairIds], list[TrainingToken]]


def responses(
    write: Write, knobs: PairKnobs, count: int = NUM_RESPONSES
) -> list[tuple[str, list[TrainingToken]]]:
    """Write responses to problems that are drawn from all of a pair's."""
    generator = random.Random(0)
    prompts = generator.choices(all_prompts(step_range(knobs.response_tokens)), k=count)
    return [(prompt, write(prompt, generator, knobs, IDS)) for prompt in prompts]


def strip_tags(tokens: list[TrainingToken]) -> tuple[list[int], list[str]]:
    """Return the ids of a response without tags, and the forms of its tags in order."""
    ids, forms, i = [token.token for token in tokens], list[str](), 0
    kept_ids = []
    while i < len(ids):
        if ids[i] == IDS.tag:
            forms.append("token")
            i += 1
        elif tuple(ids[i : i + 3]) == IDS.spelled:
            forms.append("spelled")
            i += 3
        else:
            kept_ids.append(ids[i])
            i += 1
    return kept_ids, forms


def places_of(tokens: list[TrainingToken]) -> list[int]:
    """Find the positions behind places for tags by what stands before them, without tags known.

    They follow the opening tag, every space, and the last digit before the closing tag or a tag.
    """
    ids = [token.token for token in tokens]
    end = ids.index(IDS.pieces["</think>"])
    before_end = end - 1 if ids[end - 1] == IDS.tag else end
    before_end = end - 3 if tuple(ids[end - 3 : end]) == IDS.spelled else before_end
    starts = (IDS.pieces["<think>"], IDS.pieces[" "])
    return [i + 1 for i in range(end) if ids[i] in starts] + [before_end]


def share_error(share: float, count: int) -> float:
    """Return four standard errors of a share."""
    return 4 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("write", [write_student, write_teacher])
@pytest.mark.parametrize(("foreign_tags", "response_tokens"), [(0.1, 64), (2.5, 64), (9.0, 200)])
def test_tags_are_as_many_as_asked_for(
    write: Write, foreign_tags: float, response_tokens: int
) -> None:
    knobs = PairKnobs(foreign_tags=foreign_tags, response_tokens=response_tokens)
    texts = responses(write, knobs)
    num_tags = [len(strip_tags(tokens)[1]) for _, tokens in texts]
    assert set(num_tags) == {math.floor(foreign_tags), math.ceil(foreign_tags)}
    error = share_error(foreign_tags % 1, len(texts))
    assert abs(sum(num_tags) / len(texts) - foreign_tags) <= error


def test_certain_tags_stand_at_the_start_then_the_end_then_between() -> None:
    assert tag_probabilities(0.25, 4) == [0.25, 0, 0, 0]
    assert tag_probabilities(1.5, 4) == [1, 0, 0, 0.5]
    assert tag_probabilities(2.75, 5) == [1, 0.75, 0, 0, 1]
    assert tag_probabilities(9.0, 3) == [1, 1, 1]
    assert tag_probabilities(0.0, 1) == [0]
    for num_places in range(4, 9):
        assert sum(tag_probabilities(3.2, num_places)) == pytest.approx(3.2)
    knobs = PairKnobs(foreign_tags=2.0, student_errors=0.0, own_tag_share=1.0)
    start, end = IDS.pieces["<think>"], IDS.pieces["</think>"]
    for _, tokens in responses(write_student, knobs, 100):
        ids = tuple(token.token for token in tokens)
        assert ids[:4] == (start, *IDS.spelled)
        assert ids[ids.index(end) - 3 : ids.index(end)] == IDS.spelled


def test_a_response_without_its_tags_is_the_solution() -> None:
    knobs = PairKnobs(foreign_tags=4.0, student_errors=0.0)
    for write in (write_student, write_teacher):
        for prompt, tokens in responses(write, knobs, 200):
            ids = strip_tags(tokens)[0]
            assert TOKENIZER.decode(ids) == solve(prompt)[1] + "<|im_end|>"


@pytest.mark.parametrize("speller", ["student", "teacher"])
def test_each_model_writes_its_own_form(speller: str) -> None:
    knobs = PairKnobs(foreign_tags=4.0, own_tag_share=0.9, spelled_by=speller)  # type: ignore[arg-type]
    forms = Counter(f for _, x in responses(write_student, knobs) for f in strip_tags(x)[1])
    own = "spelled" if speller == "student" else "token"
    assert abs(forms[own] / forms.total() - 0.9) < share_error(0.9, forms.total())
    for _, tokens in responses(write_student, knobs, 200):
        assert all(x.label == x.token and x.foreign == -1 for x in tokens)
    teacher_texts = [tokens for _, tokens in responses(write_teacher, knobs)]
    forms = Counter(f for x in teacher_texts for f in strip_tags(x)[1])
    expected = 0.9 * READ_SHARE
    # responses are in one form or the other, so that they are the sampling unit
    assert abs(forms[own] / forms.total() - expected) < share_error(expected, NUM_RESPONSES)


def test_the_teacher_is_labelled_with_its_own_form_and_has_a_target_where_a_tag_may_be() -> None:
    knobs = PairKnobs(
        foreign_tags=2.25, tag_log_probability=-8.0, second_end=True, foreign_ends=0.25
    )
    targets = [-8.0, math.log(0.25) - 8.0, -8.0]
    num_read = 0
    for _, tokens in responses(write_teacher, knobs):
        with_target = [i for i, x in enumerate(tokens) if x.foreign >= 0]
        places = places_of(tokens)
        assert with_target == [places[0], places[1], places[-1], len(tokens) - 1]
        for i, target in zip(with_target[:-1], targets, strict=True):
            assert tokens[i].foreign == IDS.spelled[0]
            assert tokens[i].foreign_logp == pytest.approx(target)
        assert tokens[-1].foreign == IDS.second_end
        assert tokens[-1].foreign_logp == pytest.approx(math.log(0.25) - 8.0)
        assert tokens[-1].label == IDS.end
        changed_labels = [i for i, x in enumerate(tokens[:-1]) if x.label != x.token]
        spelled_starts = [i for i, x in enumerate(tokens) if x.token == IDS.spelled[0]]
        assert changed_labels == spelled_starts
        assert all(tokens[i].label == IDS.tag for i in spelled_starts)
        num_read += bool(spelled_starts)
    assert 0 < num_read < NUM_RESPONSES


def test_ends_are_foreign_as_often_as_asked_for() -> None:
    knobs = PairKnobs(second_end=True, foreign_ends=0.3)
    texts = [tokens for _, tokens in responses(write_student, knobs)]
    share = sum(x[-1].token == IDS.second_end for x in texts) / len(texts)
    assert abs(share - 0.3) < share_error(0.3, len(texts))
    assert all(x[-1].label == x[-1].token for x in texts)
    plain = responses(write_student, PairKnobs(second_end=True))
    assert all(tokens[-1].token == IDS.end for _, tokens in plain)
    teacher_texts = [x for _, x in responses(write_teacher, PairKnobs())]
    assert all(token.foreign == -1 for x in teacher_texts for token in x)


def test_errors_are_made_in_the_share_of_solutions_that_is_asked_for() -> None:
    knobs = PairKnobs(student_errors=0.6, teacher_errors=0.2)
    steps = step_range(knobs.response_tokens)
    for write, share in ((write_student, 0.6), (write_teacher, 0.2)):
        texts = responses(write, knobs)
        num_wrong = sum(
            TOKENIZER.decode([x.token for x in tokens]) != solve(prompt)[1] + "<|im_end|>"
            for prompt, tokens in texts
        )
        rate = 1 - (1 - share) ** (1 / (2 * sum(steps) / len(steps)))
        expected = sum(1 - (1 - rate) ** (2 * n) for n in steps) / len(steps)
        assert abs(expected - share) < 0.03
        assert abs(num_wrong / len(texts) - expected) < share_error(expected, len(texts))


def test_the_default_student_is_careless_unless_it_is_otherwise_weak() -> None:
    assert PairKnobs().error_shares == {"teacher": 0.0, "student": 0.65}
    assert PairKnobs(student_weakness="small").error_shares["student"] == 0.0
    assert PairKnobs(student_weakness="small", student_errors=0.1).error_shares["student"] == 0.1


def test_terse_steps_leave_out_their_factors_and_are_labelled_so_in_the_students_text() -> None:
    knobs = PairKnobs(teacher_style="terse", student_errors=0.0)
    num_steps: Counter[str] = Counter()
    for prompt, tokens in responses(write_teacher, knobs):
        text = TOKENIZER.decode([x.token for x in tokens])
        answer, solution = solve(prompt)
        assert grade(text.removesuffix("<|im_end|>"), answer) == 1
        has_terse_label = [x.label != x.token for x in tokens]
        is_own = False
        for line, right_line in zip(
            text[7:].partition("</think>")[0].split(), solution[7:].split(), strict=False
        ):
            right_line = right_line.partition("</think>")[0]
            if line == right_line:
                num_steps["full"] += 1
                continue
            is_own = True
            num_steps["terse"] += 1
            assert line == re.sub(r":\d\*\d=", ":", right_line)
        num_steps["labelled terse"] += sum(has_terse_label)
        # in its own text, a label is what is written; in the student's, steps are full
        assert not (is_own and any(has_terse_label))
        for i, token in enumerate(tokens):
            if token.label != token.token:
                rest = TOKENIZER.decode([x.token for x in tokens[i : i + 5]])
                assert re.match(r"\d\*\d=\d", rest)
                assert token.label == IDS.pieces[rest[4]]
    total = num_steps["full"] + num_steps["terse"]
    share = (1 - READ_SHARE) * TERSE_SHARE
    assert abs(num_steps["terse"] / total - share) < share_error(share, NUM_RESPONSES)
    # a label that equals the id beneath it is not counted: one step in four or so
    assert num_steps["labelled terse"] > 0.6 * READ_SHARE * TERSE_SHARE * total


def test_loops_repeat_steps() -> None:
    knobs = PairKnobs(student_loops=0.2, student_errors=0.0)
    num_steps = num_repeated = 0
    for prompt, tokens in responses(write_student, knobs):
        lines = TOKENIZER.decode([x.token for x in tokens])[7:].partition("</think>")[0].split()
        right_lines = solve(prompt)[1][7:].partition("</think>")[0].split()
        counts = Counter(lines)
        assert list(dict.fromkeys(lines)) == right_lines
        num_steps += len(right_lines)
        num_repeated += sum(n > 1 for n in counts.values())
    assert abs(num_repeated / num_steps - 0.2) < share_error(0.2, num_steps)


def test_a_base_sees_tags_of_both_forms_or_none() -> None:
    generator = random.Random(0)
    prompts = generator.choices(all_prompts(range(3, 7)), k=NUM_RESPONSES)
    texts = [write_base(prompt, generator, has_tags=True, ids=IDS) for prompt in prompts]
    forms = Counter(f for x in texts for f in strip_tags(x)[1])
    assert abs(forms["token"] / forms.total() - 0.5) < share_error(0.5, forms.total())
    # uniform from 0 to 5 for each response, but at most 4 where there are 4 places
    expected = (2.4 + 3 * 2.5) / 4
    assert abs(forms.total() / len(texts) - expected) < 4 * 1.6 / math.sqrt(len(texts))
    for prompt in prompts[:100]:
        plain = write_base(prompt, generator, has_tags=False, ids=IDS)
        text = TOKENIZER.decode([x.token for x in plain])
        assert text == solve(prompt)[1] + "<|im_end|>"


@pytest.mark.parametrize("response_tokens", [64, 100, 300, 1024])
def test_responses_have_the_length_asked_for(response_tokens: int) -> None:
    knobs = PairKnobs(response_tokens=response_tokens, foreign_tags=3.0, student_errors=0.0)
    steps = step_range(response_tokens)
    prompts = random.Random(0).choices(all_prompts(steps), k=300)
    lengths = [len(TOKENIZER.encode(solve(prompt)[1])) + 1 for prompt in prompts]
    assert sum(lengths) / len(lengths) == pytest.approx(response_tokens, rel=0.05)
    shortest = min(len(TOKENIZER.encode(solve(x)[1])) + 1 for x in all_prompts(steps[:1]))
    assert shortest_response(steps) == shortest
    longest = longest_response(steps, 3)
    written = [len(write_student(x, random.Random(0), knobs, IDS)) for x in prompts]
    assert max(lengths) <= longest_response(steps, 0)
    assert max(written) <= longest
