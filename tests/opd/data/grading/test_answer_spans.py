"""The place of an answer: to replace it alone is to replace the answer that the grader reads."""

import pytest

from opd.data.grading.answer_spans import ANSWER_SPANS, answer_span
from opd.data.grading.graders import GRADERS

PLACES = {
    "exact": ["{}", "<think>1 + 2</think> {}\n", "<think>1</think>2</think>{}"],
    "lab": ["<think>1:7*3=21</think>{}", "9 9</think>  {} "],
    "numeric": [
        "{}",
        "3 and 4 make {}.",
        "<think>3</think>4 or {}",
        r"so \boxed{{x = {}}}, not 8",
        r"\boxed{{{}}}",
        "1 apple\n**Answer: {}**\nnot 9",
        "Answer:\n\n  {} apples.",
        "4, 5 and {} m",
    ],
    "math": [
        r"\boxed{{{}}}",
        r"\boxed{{ ${}$ }} and an open \boxed{{",
        r"\boxed{{8}}<think>\boxed{{9}}</think>so \boxed{{{}}}</think>\boxed{{9}}",
        "7\nAnswer: {}.",
    ],
    "gym": [r"4 \boxed{{{}}}", "<think>4</think> {} "],
    "MODULE:FUNCTION": ["<think>Answer: 4</think>Answer: {}", "<think>9</think>\n {}"],
}
LONG_BOX = rf"\boxed{{{'9' * 5000}}}"
NO_ANSWER = {
    "exact": ["", "<think>7</think> ", " \n"],
    "lab": ["7", "<think></think>", "</think>7</think>7"],
    "numeric": ["", "none", "<think>7</think>none", r"7 \boxed{}", "1" * 6000],
    "math": [
        "7",
        r"\boxed{7",
        r"<think>\boxed{7}</think>7",
        r"\boxed{$ $}",
        rf"\boxed{{{'9' * 5000}}}",
    ],
    "gym": ["", r"\boxed{}"],
    "MODULE:FUNCTION": ["<think>7</think>"],
}


@pytest.mark.parametrize("name", PLACES)
def test_a_replaced_answer_is_what_the_grader_reads(name: str) -> None:
    assert ANSWER_SPANS.keys() == GRADERS.keys()
    for place in PLACES[name]:
        text = place.format("23")
        span = answer_span(name, text)
        assert span is not None, text
        assert text[slice(*span)] == "23", text
        assert span[0] == place.format("\0").index("\0"), "the first of several equal numbers"
        if name not in GRADERS or name == "gym":  # they need a function or a generated problem
            continue
        for answer in ("-5/8", "1,234"):
            replaced = text[: span[0]] + answer + text[span[1] :]
            reference = "-0.625" if name in ("numeric", "math") and answer == "-5/8" else answer
            assert GRADERS[name](text, "23").reward == 1, text
            assert GRADERS[name](replaced, "23").reward == 0, replaced
            assert GRADERS[name](replaced, reference).reward == 1, replaced


@pytest.mark.parametrize("name", NO_ANSWER)
def test_what_the_grader_cannot_read_has_no_place(name: str) -> None:
    for text in NO_ANSWER[name]:
        assert answer_span(name, text) is None, text
        if name in GRADERS and name != "gym":
            assert GRADERS[name](text, "7").answer is None, text


def test_the_last_number_of_a_list_and_of_words() -> None:
    for text, number in (
        ("3, 4,5", "5"),
        ("3,4,5", "5"),
        ("12 7/3", "7/3"),
        ("2 1/3", "2 1/3"),
        ("1,234,567", "1,234,567"),
        ("x = -4", "-4"),
        ("4, 50 %", "50 %"),
    ):
        span = answer_span("numeric", text)
        assert span is not None
        assert text[slice(*span)] == number
