"""Where a response states its answer: in its last box, on its answer line, in its last number.

Every search is linear in the length of the text, which a student that loops makes long.
"""

import re

from opd.data.grading.exact_numbers import LONGEST, Number, TooLarge, read_number

BOX = re.compile(r"\\boxed\s*\{|[{}]")
ANSWER = re.compile(r"\banswer\s{0,3}[*_]{0,3}\s{0,3}[:：]", re.I)
EXPONENT = r"\s?(?:\^|\*\*)\s?(?:\{\s?[-+−]?[0-9]++\s?\}|[-+−]?[0-9]++)"
PART = r"(?:\{[-+−0-9., ]{1,60}\}|[0-9])"
FRACTION = rf"\\[dtc]?frac\s?{PART}\s?{PART}"
VULGAR = "[¼-¾⅐-⅞]"
GROUPED = r"[0-9]{1,3}(?:(?:\\,|\{,\}|[ \u00a0\u202f])[0-9]{3})++(?!,?[0-9])"
"""Thousands apart by a space or by LaTeX."""
MIXED = rf"[0-9]{{1,6}}+(?: ?(?P<part>{FRACTION}|{VULGAR})| (?P<ratio>[0-9]{{1,6}}+/[0-9]++))"
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)}\]])[-−])?"
    rf"(?:{FRACTION}|{VULGAR}|(?<![0-9.,/])(?:{MIXED})"
    rf"|(?:(?<![0-9.,]){GROUPED}|[0-9]++(?:,[0-9]++)*+|(?=\.[0-9]))(?:\.[0-9]++)?"
    r"(?:[eE][-+]?[0-9]++)?(?:/[0-9]++)?"
    rf"(?:{EXPONENT}|\s{{0,2}}(?:\\times|\\cdot|×|·|\*)\s{{0,2}}10{EXPONENT})?)"
    r"(?:\s?\\?%)?"
)


def behind_thoughts(text: str) -> str:
    """What follows the last closing think tag; all of a text without one."""
    return text.rsplit("</think>", 1)[-1]


def stated(text: str) -> str | None:
    """The content of the last box, else of the last answer line; None if there is neither."""
    boxed = last_box(text)
    return answer_line(text) if boxed is None else boxed


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...} whose braces close; None if there is none.

    Braces nest; an escaped one, as in \\{1, 2\\}, counts with its partner.
    """
    opened: list[tuple[int, bool]] = []
    start, content = -1, None
    for match in BOX.finditer(text):
        if match[0] != "}":
            opened.append((match.end(), match[0] != "{"))
        elif opened:
            begin, boxed = opened.pop()
            if boxed and begin > start:
                start, content = begin, text[begin : match.start()]
    return content


def answer_line(text: str) -> str | None:
    """What follows the last "Answer:" on its line, or on the next one that is not blank.

    Emphasis (**Answer: 34**) and a full stop at the end do not belong to the answer. None if there
    is no such line, or nothing behind it.
    """
    place = -1
    for match in ANSWER.finditer(text):
        place = match.end()
    if place < 0:
        return None
    for line in text[place : place + 4 * LONGEST].split("\n"):
        if answer := line.strip(" \t\r*_`").removesuffix("."):
            return answer
    return None


def last_number(text: str) -> Number | None:
    """The last number in a text; None if there is none, or it is too long to be compared."""
    last = None
    for match in NUMBER.finditer(text):
        last = match
    if last is None:
        return None
    try:
        number = read_number(without_list(last[0]))
        fraction = last["part"] or last["ratio"]
        if number is None and fraction:  # 12 7/3 is no mixed number
            number = read_number(fraction)
    except TooLarge:
        return None
    return number


def without_list(number: str) -> str:
    """The last of numbers between commas, where these do not part thousands."""
    digits = re.match(r"[-−]?([0-9]+(?:,[0-9]+)+)", number)
    if digits is None or re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", digits[1]):
        return number
    return number[digits.start(1) + digits[1].rindex(",") + 1 :]
