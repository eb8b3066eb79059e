"""Graders against tables of right, wrong and unreadable answers."""

import threading

import pytest

from opd.data.chain_task import problems
from opd.data.grading.answer_text import last_boxed_content
from opd.data.grading.graders import (
    Grade,
    GraderWorker,
    grade_exact,
    grade_lab,
    grade_math,
    grade_numeric,
    make_grader,
)
from opd.data.prompts import decode_response
from opd.lab.build import make_tokenizer

RIGHT = [
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac12}", "1/2"),
    (r"\boxed{0.50}", r"\frac{2}{4}"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    (r"\boxed{1,234}", "1234"),
    (r"\boxed{1\,234}", "1234"),
    (r"\boxed{1{,}234{,}567}", "1234567"),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}"),
    (r"\boxed{[0, 1)}", "[0,1)"),
    (r"\boxed{(-\infty, 2]}", r"(-\infty,2]"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{5 \mathrm{~cm}}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{\text{(B)}}", "B"),
    (r"\boxed{\text{Monday}}", "monday"),
    (r"\boxed{7}", r"\boxed{7}"),
    (r"\boxed{7}", "$7$"),
    (r"first \boxed{3}, no: \boxed{7}", "7"),
    (r"<think>\boxed{3}</think>so \boxed{7}", "7"),
    (r"\boxed{\frac{1}{\sqrt{2}}} and an open \boxed{", r"\frac{\sqrt{2}}{2}"),
]
WRONG = [
    (r"\boxed{8}", "7"),
    (r"\boxed{0.333}", r"\frac{1}{3}"),
    (r"\boxed{(0,1)}", "[0,1)"),
    (r"\boxed{(1,2)}", "(2,1)"),
    (r"\boxed{12,34}", "1234"),
    (r"\boxed{\text{evil}}", r"\text{live}"),
    (r"\boxed{evil}", "live"),
    (r"\boxed{x}", "y"),
    (r"first \boxed{7}, no: \boxed{3}", "7"),
]
UNREADABLE = [
    ("7", "7"),
    ("", "7"),
    (r"\boxed{}", "7"),
    (r"\boxed{7", "7"),
    (r"<think>\boxed{7}</think>7", "7"),
    (r"<think>a</think>7</think>\boxed{7}", "7"),
    (r"\boxed{\frac{1}{}}", "7"),
    (r"\boxed{" + "9" * 5000 + "}", "7"),
    ("\\boxed{\ud800\x00}", "7"),
]


def test_mathematical_answers_are_compared_as_mathematics() -> None:
    for response, answer in RIGHT:
        verdict = grade_math(response, answer)
        assert verdict.reward == 1, (response, answer)
        assert verdict.answer is not None
    for response, answer in WRONG:
        verdict = grade_math(response, answer)
        assert verdict.reward == 0, (response, answer)
        assert verdict.answer is not None, (response, answer)
    for response, answer in UNREADABLE:
        assert grade_math(response, answer) == Grade(0.0, None), (response, answer)


def test_equal_answers_vote_together() -> None:
    votes = {grade_math(rf"\boxed{{{x}}}", "3").answer for x in (r"\frac12", "0.5", "2/4", ".50")}
    assert len(votes) == 1
    assert grade_math(r"\boxed{0.6}", "3").answer not in votes
    # 50 % equals both 50 and 0.5: it votes for the reference answer if that is one of the two,
    # and for neither otherwise
    assert grade_math(r"\boxed{50\%}", "0.5").answer in votes
    assert grade_math(r"\boxed{50\%}", "50").answer == grade_math(r"\boxed{50}", "50").answer
    assert grade_math(r"\boxed{50\%}", "3").answer not in votes


def test_a_judge_that_hangs_or_dies_is_replaced_in_any_thread() -> None:
    judge = GraderWorker(seconds=0.5)
    grades: list = []

    def work() -> None:
        grades.append(judge("5", "9^{9^{9^{9}}}"))
        grades.append(judge("5", "5"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert grades == [None, {"gold": True, "key": "5", "equal": True}]
    assert judge.process is not None
    judge.process.kill()
    assert judge("5", "5") is None
    answer = judge("5", "6")
    assert answer is not None
    assert not answer["equal"]


def test_an_answer_that_is_no_mathematics_is_said_to_be() -> None:
    with pytest.warns(UserWarning, match=r"'\\\\frac\{' cannot be read as mathematics"):
        assert grade_math(r"\boxed{4}", r"\frac{").reward == 0


def test_a_missing_package_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'opdlab\[math\]'"):
        make_grader("math")


def test_boxes_nest_and_the_last_that_closes_counts() -> None:
    assert last_boxed_content(r"\boxed{a{b{c}}d} }") == "a{b{c}}d"
    assert last_boxed_content(r"\boxed {1}\boxed{2}\fbox{3}") == "2"
    assert last_boxed_content(r"\boxed{\boxed{5}}") == "5"
    assert last_boxed_content(r"\boxed{1} \boxed{2") == "1"
    assert last_boxed_content("{1}") is None


def test_the_other_graders() -> None:
    assert grade_exact("<think>8</think> 7\n", "7") == Grade(1.0, "7")
    assert grade_exact("<think>7</think>8", "7") == Grade(0.0, "8")
    assert grade_exact("<think>7</think> ", "7") == Grade(0.0, None)
    for text, answer, reward, vote in (
        ("It is 1,234.50.", "1234.5", 1.0, "2469/2"),
        ("3 + 4 = 7", "7", 1.0, "7"),
        ("7 = 3 + 4", "7", 0.0, "4"),
        ("-6/8", "-0.75", 1.0, "-3/4"),
        ("<think>7</think>none", "7", 0.0, None),
        ("1/0", "7", 0.0, None),
        (r"\boxed{7}, not 8", "7", 1.0, "7"),
        ("9" * 6000, "7", 0.0, None),
    ):
        assert grade_numeric(text, answer) == Grade(reward, vote), text
    with pytest.raises(ValueError, match="answer 'seven' is not a number; use the grader exact"):
        grade_numeric("7", "seven")
    for p in problems("test", 20, 0):
        assert grade_lab(p.solution, p.answer) == Grade(1.0, p.answer)
    assert grade_lab("7", "7") == Grade(0.0, None)
    with pytest.raises(
        ValueError, match="unknown grader 'maths'; known: exact, numeric, math, gym, lab"
    ):
        make_grader("maths")


def test_a_response_cut_behind_its_thoughts_has_not_answered() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(r"\boxed{5}</think>")
    assert decode_response(tokenizer, ids) == r"\boxed{5}</think>"
    assert decode_response(tokenizer, [*ids, tokenizer.eos_token_id]) == r"\boxed{5}</think>"
