"""Where a response states the answer that a grader reads, as positions in its text."""

from collections.abc import Callable, Mapping

from opd.data.grading.answer_text import (
    Span,
    last_box_span,
    last_number_with_span,
    stated_answer_span,
    strip_span,
)
from opd.data.grading.exact_numbers import MAX_LENGTH
from opd.data.grading.graders import parse_number

END_OF_THINKING = "</think>"


def answer_span(grader: str, text: str) -> Span | None:
    """Return where a response states its answer.

    A replacement of this part of the text alone replaces the answer that the grader reads. Graders
    of the user are taken to read what their responses vote for (`grade_with_user_function`).

    Args:
        grader: Name of the grader (`opd.data.tasks.Task.name`).
        text: The response.

    Returns:
        First character and the one after the last; None if the grader reads no answer.
    """
    span = ANSWER_SPANS.get(grader, stated_or_all_span)(text)
    return None if span is None or span[0] == span[1] else span


def lab_span(text: str) -> Span | None:
    """Return what follows the only closing think tag; None if there is not exactly one."""
    return span_after_thinking(text) if text.count(END_OF_THINKING) == 1 else None


def span_after_thinking(text: str) -> Span:
    """Return what follows the last closing think tag, or all of a text without one, stripped."""
    tag = text.rfind(END_OF_THINKING)
    start = 0 if tag < 0 else tag + len(END_OF_THINKING)
    return strip_span(text, (start, len(text)))


def numeric_span(text: str) -> Span | None:
    """Return the number that `grade_numeric` reads."""
    offset, _ = span_after_thinking(text)
    answer_text = text[offset:]
    stated = stated_answer_span(answer_text)
    if stated is not None:
        start, end = strip_span(answer_text, stated)
        if parse_number(answer_text[start:end]) is not None:
            return offset + start, offset + end
        offset, answer_text = offset + start, answer_text[start:end]
    number = last_number_with_span(answer_text)
    return None if number is None else shift_span(number[1], offset)


def math_span(text: str) -> Span | None:
    """Return the answer that `grade_math` reads, without dollars around it."""
    start, end = 0, len(text)
    if END_OF_THINKING in text:
        start = text.index(END_OF_THINKING) + len(END_OF_THINKING)
        second = text.find(END_OF_THINKING, start)
        end = len(text) if second < 0 else second
    stated = stated_answer_span(text[start:end])
    if stated is None or stated[1] - stated[0] > MAX_LENGTH:
        return None
    span = strip_span(text, shift_span(stated, start))
    return strip_span(text, strip_span(text, span, "$"))


def boxed_or_all_span(text: str) -> Span | None:
    """Return the last box after the last closing think tag, or all that follows the tag."""
    return span_of_part(text, last_box_span)


def stated_or_all_span(text: str) -> Span | None:
    """Return the last box or answer line after the last closing think tag, or all that follows."""
    return span_of_part(text, stated_answer_span)


def span_of_part(text: str, find: Callable[[str], Span | None]) -> Span:
    """Return a part of what follows the last closing think tag; all of that where none is there."""
    after_thinking = span_after_thinking(text)
    part = find(text[after_thinking[0] : after_thinking[1]])
    if part is None:
        return after_thinking
    return strip_span(text, shift_span(part, after_thinking[0]))


def shift_span(span: Span, offset: int) -> Span:
    """Return the span in a text that has `offset` more characters before it."""
    return span[0] + offset, span[1] + offset


ANSWER_SPANS: Mapping[str, Callable[[str], Span | None]] = {
    "exact": span_after_thinking,
    "numeric": numeric_span,
    "math": math_span,
    "gym": boxed_or_all_span,
    "lab": lab_span,
}
"""Name of a grader to the part of a response that it reads; of others `stated_or_all_span`."""
