"""Numbers as people write them, read exactly: decimals, powers of ten, fractions, simple Python.

Text is read by a small grammar and never run. What is a number has an exact fraction as its value,
so that no tolerance makes small numbers equal; an expression of a few functions, as numpy names
them, becomes LaTeX.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from diagnostics.errors import InvalidInput

LONGEST = 500
"""Most characters of an answer that are read."""
MOST_BITS = 8192
"""Most bits of a numerator or denominator; beyond, a number is compared as text."""

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,3}(?: \d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
SCIENTIFIC = rf"(?:{DIGITS})(?:[eE][+-]?\d+(?![\d.]))?"
TOKEN = re.compile(
    rf"\s*(?:(?P<number>{SCIENTIFIC})|(?P<fraction>\\frac)|(?P<power>\*\*|\^)"
    r"|(?P<name>(?:(?:np|numpy|math)\.)?[A-Za-z][A-Za-z0-9]*)|(?P<sign>[-+*/(){}]))",
    re.ASCII,
)
INNER_SCIENTIFIC = re.compile(
    r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,6})(?![\w.])", re.ASCII
)
PLAIN_NAME = re.compile(r"(?<![\\A-Za-z])(pi|ln|sin|cos|tan)(?![A-Za-z])")
ROOT = re.compile(r"√\s*(?:([0-9]+|[A-Za-z])|\(([^()]*)\)|\{([^{}]*)\})")
RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
VULGAR = re.compile("[¼-¾⅐-⅞]")
SYMBOLS = str.maketrans({"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "°": r"^\circ "})
MIXED = re.compile(r"(?<![\d.,/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.,/])", re.ASCII)
RECURRING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))", re.ASCII)
UNIT = re.compile(
    r"\s*\\(?:text|textrm|textbf|textit|mathrm|mbox|operatorname|rm)\s*\{([^{}]*)\}"
    r"(?:\s*\^\s*(?:\{-?\d\}|\d))?\s*$"
)
DEGREE = re.compile(r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°)\s*$")
WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathbf|mathrm|mbox)\s*\{([^{}]*)\}")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
SIGNS = str.maketrans(
    {"−": "-", "–": "-", "‐": "-", "‑": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/"}
    | {"⁄": "/", "∕": "/"}
)
FUNCTIONS = {
    "sqrt": r"\sqrt{{{}}}",
    "exp": r"e^{{{}}}",
    "ln": r"\ln\left({}\right)",
    "log10": r"\log_{{10}}\left({}\right)",
    "log2": r"\log_{{2}}\left({}\right)",
    **{name: rf"\{name}\left({{}}\right)" for name in ("sin", "cos", "tan", "arcsin", "arccos")},
    **{name: rf"\{name}\left({{}}\right)" for name in ("arctan", "sinh", "cosh", "tanh")},
    **{f"a{name}": rf"\arc{name}\left({{}}\right)" for name in ("sin", "cos", "tan")},
}
QUALIFIED = {"log": r"\ln\left({}\right)"}
"""Functions that mean this only behind np. or math.; a bare log may have the base 10."""
CONSTANTS = {"pi": r"\pi", "e": "e"}


class Term(NamedTuple):
    """value: exact, None where it is no fraction; latex: the same for a reader of LaTeX."""

    value: Fraction | None
    latex: str


class Number(NamedTuple):
    """A number that an answer states; a percentage states both 50 and 1/2."""

    value: Fraction
    percent: bool = False

    @property
    def key(self) -> str:
        """Equal for equal values."""
        return f"{self.value}%" if self.percent else str(self.value)

    def equals(self, other: "Number") -> bool:
        """Exactly; of one percentage either reading counts."""
        if self.percent == other.percent:
            return self.value == other.value
        part, plain = (self, other) if self.percent else (other, self)
        return plain.value in (part.value, part.value / 100)


class TooLarge(InvalidInput):
    """A number with more digits than can be compared exactly."""


def read_number(text: str) -> Number | None:
    """The number that all of a text states; None if it states none, or something else.

    Read are signs, thousands separators, decimals, 1.2e34, fractions, mixed numbers, products with
    powers of ten in LaTeX or plain text, percentages, simple Python (-1./3, 2**10); degree signs
    and units in \\text{...} are dropped.

    Raises:
      TooLarge: it is a number of more than MOST_BITS bits.
    """
    if len(text) > LONGEST:
        return None
    plain = normalised(text)
    percent = plain.endswith("%")
    term = parse(plain.removesuffix("%"))
    if term is None or term.value is None:
        return None
    return Number(term.value, percent)


def latex_of(text: str) -> str:
    """The text as a reader of LaTeX understands it: Python functions and plain names (pi, ln, sin)
    by their names there, Unicode's roots, powers, fractions and signs as LaTeX writes them, numbers
    such as 3e8 as powers of ten; unchanged where there is none of them."""
    term = None
    if re.search(r"\b(?:np|numpy|math)\.|\*\*|(?<![\\A-Za-z])[a-z]+[0-9]*\(", text):
        try:
            term = parse(normalised(text))
        except TooLarge:
            return text
    if term is not None:
        return term.latex
    text = PLAIN_NAME.sub(r"\\\1 ", ROOT.sub(root, text)).translate(SYMBOLS)
    text = VULGAR.sub(vulgar, RAISED.sub(exponent, text))
    return INNER_SCIENTIFIC.sub(r"\\left(\1 \\cdot 10^{\2}\\right)", text)


def normalised(text: str) -> str:
    """One spelling of signs, spaces, products and fractions, without dollars, units, degrees."""
    text = RAISED.sub(exponent, text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = re.sub(r"\\\$|\$|\\[()\[\]!]|\\(?:left|right|displaystyle)(?![a-zA-Z])|[€£]", "", text)
    text = re.sub(r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " ", text).replace("{,}", ",")
    text = re.sub(r"\\(?:times|cdot|ast)(?![a-zA-Z])", "*", text)
    text = re.sub(r"\\div(?![a-zA-Z])", "/", text).replace(r"\%", "%")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)(?=\s*[\d{])", r"\\frac{\1}", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}", text)
    if wrapped := WRAPPED.fullmatch(text.strip()):
        text = wrapped[1]
    text = DEGREE.sub("", UNIT.sub("", text.strip())).strip()
    text = MIXED.sub(sum_of_mixed, RECURRING.sub(fraction_of_recurring, text))
    return re.sub(r"(?<=[\d)}%])[.,]$", "", text).strip()


def exponent(match: re.Match[str]) -> str:
    """Superscripts as an exponent of LaTeX."""
    return f"^{{{match[0].translate(SUPERSCRIPTS)}}}"


def root(match: re.Match[str]) -> str:
    """√2, √(x + 1) as LaTeX."""
    return rf"\sqrt{{{match[1] or match[2] or match[3] or ''}}}"


def vulgar(match: re.Match[str]) -> str:
    """½ as LaTeX."""
    above, _, below = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{above}}}{{{below}}}"


def sum_of_mixed(match: re.Match[str]) -> str:
    """2 1/3 as a sum; an improper fraction behind a space is left as it stands."""
    whole, above, below = match.groups()
    proper = 0 < int(above) < int(below)
    return f"({whole}+{above}/{below})" if proper else match[0]


def fraction_of_recurring(match: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, start, period = match[1] or "0", match[2], match[3] or match[4]
    below = 10 ** len(start) * (10 ** len(period) - 1)
    return f"({int(whole + start + period) - int(whole + start)}/{below})"


def parse(text: str) -> Term | None:
    """The term that all of a text is; None if the grammar does not know it."""
    tokens: list[tuple[str, str]] = []
    place, text = 0, text.strip()
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None or match.lastgroup is None:
            return None
        tokens.append((match.lastgroup, match[match.lastgroup]))
        place = match.end()
    reader = Reader(tokens)
    try:
        term = reader.sum()
    except (Unknown, RecursionError, ZeroDivisionError):
        return None
    return term if reader.place == len(tokens) else None


class Unknown(Exception):
    """The grammar has no rule for this token."""


class Reader:
    """Recursive descent over (kind, text) of tokens: sums, products, powers, functions."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens, self.place = tokens, 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def accept(self, *texts: str) -> str:
        """The next token, if it is one of these; "" otherwise."""
        text = self.peek()[1]
        if text not in texts or not text:
            return ""
        self.place += 1
        return text

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise Unknown

    def sum(self) -> Term:
        negative = self.accept("+", "-") == "-"
        total = self.product()
        if negative:
            value = None if total.value is None else -total.value
            total = made(value, f"-{total.latex}")
        while sign := self.accept("+", "-"):
            term = self.product()
            value = None
            if total.value is not None and term.value is not None:
                value = total.value + (term.value if sign == "+" else -term.value)
            total = made(value, f"{total.latex} {sign} {term.latex}")
        return total

    def product(self) -> Term:
        total = self.power()
        while sign := self.accept("*", "/"):
            term = self.negated() if self.accept("-") else self.power()
            both = total.value is not None and term.value is not None
            if sign == "*":
                value = total.value * term.value if both else None  # type: ignore[operator]
                total = made(value, rf"{closed(total)} \cdot {closed(term)}")
            else:
                value = total.value / term.value if both else None  # type: ignore[operator]
                total = made(value, rf"\frac{{{total.latex}}}{{{term.latex}}}")
        return total

    def negated(self) -> Term:
        term = self.power()
        return made(None if term.value is None else -term.value, f"-{term.latex}")

    def power(self) -> Term:
        base = self.base()
        if not self.accept("^", "**"):
            return base
        exponent = self.negated() if self.accept("+", "-") == "-" else self.power()
        latex = f"{closed(base)}^{{{exponent.latex}}}"
        if base.value is None or exponent.value is None or exponent.value.denominator != 1:
            return made(None, latex)
        return made(raised(base.value, int(exponent.value)), latex)

    def base(self) -> Term:
        kind, text = self.peek()
        self.place += 1
        if kind == "number":
            number = decimal(text)
            if self.peek()[0] == "fraction" and text.isdigit():  # a mixed number
                part = self.base()
                if part.value is None or not 0 < part.value < 1:
                    raise Unknown
                return made(number + part.value, "")
            return made(number, "")
        if kind == "fraction":
            above, below = self.group(), self.group()
            both = above.value is not None and below.value is not None
            value = above.value / below.value if both else None  # type: ignore[operator]
            return made(value, rf"\frac{{{above.latex}}}{{{below.latex}}}")
        if text in ("(", "{"):
            inner = self.sum()
            self.expect({"(": ")", "{": "}"}[text])
            return Term(inner.value, rf"\left({inner.latex}\right)")
        if kind == "name":
            return self.named(text)
        raise Unknown

    def group(self) -> Term:
        self.expect("{")
        inner = self.sum()
        self.expect("}")
        return inner

    def named(self, text: str) -> Term:
        module, _, name = text.rpartition(".")
        shape = FUNCTIONS.get(name) or (QUALIFIED.get(name) if module else None)
        if shape is not None:
            self.expect("(")
            inner = self.sum()
            self.expect(")")
            return made(None, shape.format(inner.latex))
        if name not in CONSTANTS:
            raise Unknown
        return made(None, CONSTANTS[name])


def made(value: Fraction | None, latex: str) -> Term:
    """A term; of a number the LaTeX is its fraction."""
    if value is None:
        return Term(None, latex)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise TooLarge(f"a number of more than {MOST_BITS} bits is compared as text")
    sign, above = "-" if value < 0 else "", abs(value.numerator)
    if value.denominator == 1:
        return Term(value, f"{sign}{above}")
    return Term(value, rf"{sign}\frac{{{above}}}{{{value.denominator}}}")


def closed(term: Term) -> str:
    """The LaTeX of a factor, in brackets where it needs them."""
    simple = re.fullmatch(r"\d+|\\pi|e|\\left\(.*\\right\)|\\sqrt\{\d+\}", term.latex)
    return term.latex if simple else rf"\left({term.latex}\right)"


def decimal(text: str) -> Fraction:
    """The exact value of a number token.

    Raises:
      TooLarge: its power of ten is.
    """
    digits, _, exponent = re.sub("[, ]", "", text).lower().partition("e")
    return Fraction(digits + "0" if digits.endswith(".") else digits) * raised(
        Fraction(10), int(exponent or 0)
    )


def raised(base: Fraction, exponent: int) -> Fraction:
    """base to a whole power.

    Raises:
      TooLarge: the result has more than MOST_BITS bits.
    """
    if base in (0, 1, -1) and exponent >= 0:
        return base ** (exponent % 2 + 2 * bool(exponent))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if (bits - 1) * abs(exponent) > MOST_BITS:
        raise TooLarge(f"a number of more than {MOST_BITS} bits is compared as text")
    return base**exponent
