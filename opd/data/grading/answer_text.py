"""Extraction of the stated answer from a response: last box, answer line or last number.

Every search is linear in the length of the text: a student in a repetition loop writes long texts.
"""

import re

from opd.data.grading.exact_numbers import MAX_LENGTH, Number, TooLarge, read_number

BOX = re.compile(r"\\boxed\s*\{|[{}]")
ANSWER = re.compile(r"\banswer\s{0,3}[*_]{0,3}\s{0,3}[:：]", re.I)
EXPONENT = r"\s?(?:\^|\*\*)\s?(?:\{\s?[-+−]?[0-9]++\s?\}|[-+−]?[0-9]++)"
PART = r"(?:\{[-+−0-9., ]{1,60}\}|[0-9])"
FRACTION = rf"\\[dtc]?frac\s?{PART}\s?{PART}"
VULGAR = "[¼-¾⅐-⅞]"
GROUPED = r"[0-9]{1,3}(?:(?:\\,|\{,\}|[ \u00a0\u202f])[0-9]{3})++(?!,?[0-9])"
"""Thousands separated by a space or by LaTeX."""
MIXED = rf"[0-9]{{1,6}}+(?: ?(?P<part>{FRACTION}|{VULGAR})| (?P<ratio>[0-9]{{1,6}}+/[0-9]++))"
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)}\]])[-−])?"
    rf"(?:{FRACTION}|{VULGAR}|(?<![0-9.,/])(?:{MIXED})"
    rf"|(?:(?<![0-9.,]){GROUPED}|[0-9]++(?:,[0-9]++)*+|(?=\.[0-9]))(?:\.[0-9]++)?"
    r"(?:[eE][-+]?[0-9]++)?(?:/[0-9]++)?"
    rf"(?:{EXPONENT}|\s{{0,2}}(?:\\times|\\cdot|×|·|\*)\s{{0,2}}10{EXPONENT})?)"
    r"(?:\s?\\?%)?"
)


Span = tuple[int, int]
"""The first character of a part of a text, and the one after its last."""


def text_after_thinking(text: str) -> str:
    """Return what follows the last closing think tag; a text without one unchanged."""
    return text.rsplit("</think>", 1)[-1]


def select_span(text: str, span: Span | None) -> str | None:
    """Return a part of a text; None for None."""
    return None if span is None else text[span[0] : span[1]]


def strip_span(text: str, span: Span, characters: str | None = None) -> Span:
    """Narrow a part of a text as `str.strip` does; it may become empty."""
    start, end = span
    end = start + len(text[start:end].rstrip(characters))
    return end - len(text[start:end].lstrip(characters)), end


def stated_answer_span(text: str) -> Span | None:
    """Return where the last box's content is, else the last answer line's, else None."""
    box = last_box_span(text)
    return last_answer_line_span(text) if box is None else box


def extract_answer(text: str) -> str | None:
    """Return the content of the last box, else of the last answer line, else None."""
    return select_span(text, stated_answer_span(text))


def last_boxed_content(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} whose braces close; None if there is none."""
    return select_span(text, last_box_span(text))


def last_box_span(text: str) -> Span | None:
    r"""Return where the content of the last \boxed{...} whose braces close is.

    Nested braces are matched; an escaped brace, as in \{1, 2\}, is matched with its partner.

    Args:
        text: The text.

    Returns:
        Its first character and the one after its last, or None.
    """
    open_braces: list[tuple[int, bool]] = []
    last_start, span = -1, None
    for match in BOX.finditer(text):
        if match[0] != "}":
            open_braces.append((match.end(), match[0] != "{"))
        elif open_braces:
            content_start, is_box = open_braces.pop()
            if is_box and content_start > last_start:
                last_start, span = content_start, (content_start, match.start())
    return span


def last_answer_line(text: str) -> str | None:
    """Return what follows the last "Answer:" on its line, or on the next line that is not blank."""
    return select_span(text, last_answer_line_span(text))


def last_answer_line_span(text: str) -> Span | None:
    """Return where that which follows the last "Answer:" on its line, or on the next one, is.

    Emphasis (**Answer: 34**) and a full stop at the end are left out.

    Args:
        text: The text.

    Returns:
        Its first character and the one after its last; None if there is no such line, or nothing
        after it.
    """
    position = -1
    for match in ANSWER.finditer(text):
        position = match.end()
    if position < 0:
        return None
    for line in text[position : position + 4 * MAX_LENGTH].split("\n"):
        start, end = strip_span(line, (0, len(line)), " \t\r*_`")
        end -= line[start:end].endswith(".")
        if start < end:
            return position + start, position + end
        position += len(line) + 1
    return None


def last_number(text: str) -> Number | None:
    """Return the last number in a text; None if there is none or it is too large to compare."""
    number = last_number_with_span(text)
    return None if number is None else number[0]


def last_number_with_span(text: str) -> tuple[Number, Span] | None:
    """Return the last number in a text and where it is; None as for `last_number`."""
    last_match = None
    for match in NUMBER.finditer(text):
        last_match = match
    if last_match is None:
        return None
    end = last_match.end()
    try:
        word = last_of_list(last_match[0])
        number = read_number(word)
        fraction = last_match["part"] or last_match["ratio"]
        if number is None and fraction:  # 12 7/3 is not a mixed number
            group = "part" if last_match["part"] else "ratio"
            number, word, end = read_number(fraction), fraction, last_match.end(group)
    except TooLarge:
        return None
    return None if number is None else (number, (end - len(word), end))


def last_of_list(number: str) -> str:
    """Return the last of numbers separated by commas, unless the commas separate thousands."""
    digits = re.match(r"[-−]?([0-9]+(?:,[0-9]+)+)", number)
    if digits is None or re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", digits[1]):
        return number
    return number[digits.start(1) + digits[1].rindex(",") + 1 :]
