"""Exact parsing of written numbers: decimals, powers of ten, fractions, simple Python expressions.

Text is parsed by a small grammar and never executed. The value of a number is an exact fraction, so
that no tolerance makes small numbers equal. An expression with one of a few functions, as numpy
names them, is converted to LaTeX.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from diagnostics.errors import InvalidInput

MAX_LENGTH = 500
"""Largest number of characters of an answer that is parsed."""
MAX_BITS = 8192
"""Largest number of bits of a numerator or denominator; larger numbers are compared as text."""

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
"""Functions with this meaning only after np. or math.; a bare log may have base 10."""
CONSTANTS = {"pi": r"\pi", "e": "e"}


class Term(NamedTuple):
    """A parsed term."""

    value: Fraction | None
    """Exact value; None where it is not a fraction."""
    latex: str
    """The term in LaTeX."""


class Number(NamedTuple):
    """A number that an answer states; a percentage states both 50 and 1/2."""

    value: Fraction
    percent: bool = False

    @property
    def key(self) -> str:
        """Text that is equal for equal values."""
        return f"{self.value}%" if self.percent else str(self.value)

    def equals(self, number: "Number") -> bool:
        """Return whether two numbers are exactly equal; a percentage may be read either way."""
        if self.percent == number.percent:
            return self.value == number.value
        percentage, plain = (self, number) if self.percent else (number, self)
        return plain.value in (percentage.value, percentage.value / 100)


class TooLarge(InvalidInput):
    """A number with more digits than can be compared exactly."""


def read_number(text: str) -> Number | None:
    r"""Parse a text that is one number.

    Accepted are signs, thousands separators, decimals, 1.2e34, fractions, mixed numbers, products
    with powers of ten in LaTeX or plain text, percentages, and simple Python (-1./3, 2**10). Degree
    signs and units in \text{...} are dropped.

    Args:
        text: The text.

    Returns:
        The number; None if the text is not one number.

    Raises:
        TooLarge: The number has more than MAX_BITS bits.
    """
    if len(text) > MAX_LENGTH:
        return None
    normalised_text = normalise(text)
    percent = normalised_text.endswith("%")
    term = parse_term(normalised_text.removesuffix("%"))
    if term is None or term.value is None:
        return None
    return Number(term.value, percent)


def to_latex(text: str) -> str:
    """Convert a text to LaTeX that a LaTeX parser understands; other text is unchanged.

    Python functions and plain names (pi, ln, sin) become LaTeX commands; Unicode roots, powers,
    fractions and signs become LaTeX; numbers such as 3e8 become powers of ten.

    Args:
        text: The text.

    Returns:
        The text in LaTeX.
    """
    term = None
    if re.search(r"\b(?:np|numpy|math)\.|\*\*|(?<![\\A-Za-z])[a-z]+[0-9]*\(", text):
        try:
            term = parse_term(normalise(text))
        except TooLarge:
            return text
    if term is not None:
        return term.latex
    text = PLAIN_NAME.sub(r"\\\1 ", ROOT.sub(root_to_latex, text)).translate(SYMBOLS)
    text = VULGAR.sub(vulgar_fraction_to_latex, RAISED.sub(superscript_to_latex, text))
    return INNER_SCIENTIFIC.sub(r"\\left(\1 \\cdot 10^{\2}\\right)", text)


def normalise(text: str) -> str:
    """Unify signs, spaces, products and fractions; remove dollars, units and degrees."""
    text = RAISED.sub(superscript_to_latex, text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = re.sub(r"\\\$|\$|\\[()\[\]!]|\\(?:left|right|displaystyle)(?![a-zA-Z])|[€£]", "", text)
    text = re.sub(r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " ", text).replace("{,}", ",")
    text = re.sub(r"\\(?:times|cdot|ast)(?![a-zA-Z])", "*", text)
    text = re.sub(r"\\div(?![a-zA-Z])", "/", text).replace(r"\%", "%")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)(?=\s*[\d{])", r"\\frac{\1}", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}", text)
    if match := WRAPPED.fullmatch(text.strip()):
        text = match[1]
    text = DEGREE.sub("", UNIT.sub("", text.strip())).strip()
    text = MIXED.sub(mixed_number_to_sum, RECURRING.sub(recurring_to_fraction, text))
    return re.sub(r"(?<=[\d)}%])[.,]$", "", text).strip()


def superscript_to_latex(match: re.Match[str]) -> str:
    """Convert superscript digits to a LaTeX exponent."""
    return f"^{{{match[0].translate(SUPERSCRIPTS)}}}"


def root_to_latex(match: re.Match[str]) -> str:
    """Convert √2 or √(x + 1) to LaTeX."""
    return rf"\sqrt{{{match[1] or match[2] or match[3] or ''}}}"


def vulgar_fraction_to_latex(match: re.Match[str]) -> str:
    """Convert ½ to LaTeX."""
    numerator, _, denominator = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def mixed_number_to_sum(match: re.Match[str]) -> str:
    """Convert 2 1/3 to a sum; an improper fraction after a space is unchanged."""
    integer_part, numerator, denominator = match.groups()
    is_proper_fraction = 0 < int(numerator) < int(denominator)
    return f"({integer_part}+{numerator}/{denominator})" if is_proper_fraction else match[0]


def recurring_to_fraction(match: re.Match[str]) -> str:
    r"""Convert 0.1\overline{6} to a fraction."""
    integer_part, fixed_digits, period = match[1] or "0", match[2], match[3] or match[4]
    denominator = 10 ** len(fixed_digits) * (10 ** len(period) - 1)
    return (
        f"({int(integer_part + fixed_digits + period) - int(integer_part + fixed_digits)}"
        f"/{denominator})"
    )


def parse_term(text: str) -> Term | None:
    """Parse a text that is one term; None if the grammar does not accept all of it."""
    tokens: list[tuple[str, str]] = []
    position, text = 0, text.strip()
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            return None
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    parser = Parser(tokens)
    try:
        term = parser.sum()
    except (UnknownToken, RecursionError, ZeroDivisionError):
        return None
    return term if parser.place == len(tokens) else None


class UnknownToken(Exception):
    """The grammar has no rule for this token."""


class Parser:
    """Recursive descent over (kind, text) tokens: sums, products, powers, functions."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens, self.place = tokens, 0

    def peek(self) -> tuple[str, str]:
        """Return the next token without consuming it; ("end", "") after the last one."""
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def accept(self, *texts: str) -> str:
        """Consume and return the next token's text if it is one of `texts`; else return ""."""
        text = self.peek()[1]
        if text not in texts or not text:
            return ""
        self.place += 1
        return text

    def expect(self, text: str) -> None:
        """Consume the token `text`, or raise UnknownToken."""
        if not self.accept(text):
            raise UnknownToken

    def sum(self) -> Term:
        """Parse a sum of products with an optional sign."""
        negative = self.accept("+", "-") == "-"
        total = self.product()
        if negative:
            value = None if total.value is None else -total.value
            total = make_term(value, f"-{total.latex}")
        while sign := self.accept("+", "-"):
            term = self.product()
            value = None
            if total.value is not None and term.value is not None:
                value = total.value + (term.value if sign == "+" else -term.value)
            total = make_term(value, f"{total.latex} {sign} {term.latex}")
        return total

    def product(self) -> Term:
        """Parse a product or quotient of powers."""
        total = self.power()
        while sign := self.accept("*", "/"):
            term = self.negative_power() if self.accept("-") else self.power()
            is_exact = total.value is not None and term.value is not None
            if sign == "*":
                value = total.value * term.value if is_exact else None  # type: ignore[operator]
                total = make_term(value, rf"{add_brackets(total)} \cdot {add_brackets(term)}")
            else:
                value = total.value / term.value if is_exact else None  # type: ignore[operator]
                total = make_term(value, rf"\frac{{{total.latex}}}{{{term.latex}}}")
        return total

    def negative_power(self) -> Term:
        """Parse a power and negate it."""
        term = self.power()
        return make_term(None if term.value is None else -term.value, f"-{term.latex}")

    def power(self) -> Term:
        """Parse a base with an optional exponent."""
        base = self.base()
        if not self.accept("^", "**"):
            return base
        exponent = self.negative_power() if self.accept("+", "-") == "-" else self.power()
        latex = f"{add_brackets(base)}^{{{exponent.latex}}}"
        if base.value is None or exponent.value is None or exponent.value.denominator != 1:
            return make_term(None, latex)
        return make_term(exact_power(base.value, int(exponent.value)), latex)

    def base(self) -> Term:
        """Parse a number, a fraction, a group or a named function or constant."""
        kind, text = self.peek()
        self.place += 1
        if kind == "number":
            number = parse_decimal(text)
            if self.peek()[0] == "fraction" and text.isdigit():  # a mixed number
                fraction = self.base()
                if fraction.value is None or not 0 < fraction.value < 1:
                    raise UnknownToken
                return make_term(number + fraction.value, "")
            return make_term(number, "")
        if kind == "fraction":
            numerator, denominator = self.group(), self.group()
            is_exact = numerator.value is not None and denominator.value is not None
            value = numerator.value / denominator.value if is_exact else None  # type: ignore[operator]
            return make_term(value, rf"\frac{{{numerator.latex}}}{{{denominator.latex}}}")
        if text in ("(", "{"):
            inner = self.sum()
            self.expect({"(": ")", "{": "}"}[text])
            return Term(inner.value, rf"\left({inner.latex}\right)")
        if kind == "name":
            return self.function_or_constant(text)
        raise UnknownToken

    def group(self) -> Term:
        """Parse a sum in braces."""
        self.expect("{")
        inner = self.sum()
        self.expect("}")
        return inner

    def function_or_constant(self, text: str) -> Term:
        """Parse a function call or a constant."""
        module, _, name = text.rpartition(".")
        shape = FUNCTIONS.get(name) or (QUALIFIED.get(name) if module else None)
        if shape is not None:
            self.expect("(")
            inner = self.sum()
            self.expect(")")
            return make_term(None, shape.format(inner.latex))
        if name not in CONSTANTS:
            raise UnknownToken
        return make_term(None, CONSTANTS[name])


def make_term(value: Fraction | None, latex: str) -> Term:
    """Build a term; the LaTeX of a number is its fraction."""
    if value is None:
        return Term(None, latex)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLarge(f"a number of more than {MAX_BITS} bits is compared as text")
    sign, numerator = "-" if value < 0 else "", abs(value.numerator)
    if value.denominator == 1:
        return Term(value, f"{sign}{numerator}")
    return Term(value, rf"{sign}\frac{{{numerator}}}{{{value.denominator}}}")


def add_brackets(term: Term) -> str:
    """Return the LaTeX of a factor, in brackets where they are needed."""
    needs_no_brackets = re.fullmatch(r"\d+|\\pi|e|\\left\(.*\\right\)|\\sqrt\{\d+\}", term.latex)
    return term.latex if needs_no_brackets else rf"\left({term.latex}\right)"


def parse_decimal(text: str) -> Fraction:
    """Return the exact value of a number token.

    Args:
        text: The token, such as "1,234.5e6".

    Returns:
        The value.

    Raises:
        TooLarge: The power of ten is too large.
    """
    digits, _, exponent = re.sub("[, ]", "", text).lower().partition("e")
    return Fraction(digits + "0" if digits.endswith(".") else digits) * exact_power(
        Fraction(10), int(exponent or 0)
    )


def exact_power(base: Fraction, exponent: int) -> Fraction:
    """Return base to an integer power.

    Args:
        base: The base.
        exponent: The exponent.

    Returns:
        The exact power.

    Raises:
        TooLarge: The result has more than MAX_BITS bits.
    """
    if base in (0, 1, -1) and exponent >= 0:
        return base ** (exponent % 2 + 2 * bool(exponent))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if (bits - 1) * abs(exponent) > MAX_BITS:
        raise TooLarge(f"a number of more than {MAX_BITS} bits is compared as text")
    return base**exponent
