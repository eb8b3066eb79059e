"""Grammar of mask rules, which say which sampled tokens are not supervised. Does not import torch.

A rule is one line of text:

    id:151645          this id
    token:<|im_end|>   the id, or ids, whose bytes are exactly this text
    string:<think>     every token that overlaps this text, however it is split into ids
    role:eos           eos, bos, pad, special (any special token) or think (both think tags, as
                       strings)
    paper              what the published code masks: first `<`, first `think`, first `<|im_end|>`

A suffix `:first` restricts a rule to the first occurrence in a response; `:all` is the default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from diagnostics.errors import InvalidInput

Kind = Literal["id", "token", "string", "role"]
Occurrence = Literal["all", "first"]
ROLES = ("eos", "bos", "pad", "special", "think")
PRESETS = {"paper": ("token:<:first", "token:think:first", "token:<|im_end|>:first")}
FORMS = (
    "id:NUMBER, token:TEXT, string:TEXT, "
    + ", ".join(f"role:{role}" for role in ROLES)
    + f", each optionally followed by :first or :all, or {', '.join(PRESETS)}"
)


@dataclass(frozen=True)
class MaskRule:
    """One mask rule."""

    kind: Kind
    """What the rule matches."""
    value: str
    """Id, text or role."""
    occurrence: Occurrence = "all"
    """Which occurrences in a response are masked."""

    @property
    def name(self) -> str:
        """Text of the rule, without the default suffix."""
        return f"{self.kind}:{self.value}" + (":first" if self.occurrence == "first" else "")


def parse_rules(texts: Sequence[str]) -> tuple[MaskRule, ...]:
    """Parse mask rules in the order given, with presets expanded and duplicates removed.

    Args:
        texts: Rules or names of presets.

    Returns:
        The rules.

    Raises:
        InvalidInput: A text is not a rule; the message lists the valid forms.
    """
    rule_texts = [rule_text for text in texts for rule_text in PRESETS.get(text, (text,))]
    return tuple(dict.fromkeys(parse_rule(text) for text in rule_texts))


def parse_rule(text: str) -> MaskRule:
    """Parse one rule.

    Args:
        text: The rule, such as "role:eos:first".

    Returns:
        The rule.

    Raises:
        InvalidInput: The text is not a rule; the message lists the valid forms.
    """
    kind, _, value = text.partition(":")
    occurrence: Occurrence = "all"
    for suffix in get_args(Occurrence):
        if value.endswith(f":{suffix}"):
            value, occurrence = value.removesuffix(f":{suffix}"), suffix
            break
    if kind not in get_args(Kind) or not value:
        raise InvalidInput(f"unknown mask rule {text!r}; expected {FORMS}")
    if kind == "id" and not (value.isascii() and value.isdigit()):
        raise InvalidInput(f"mask rule {text!r} needs a number; write id:NUMBER, such as id:151645")
    if kind == "role" and value not in ROLES:
        raise InvalidInput(f"mask rule {text!r} has an unknown role; known: {', '.join(ROLES)}")
    return MaskRule(kind, value, occurrence)  # type: ignore[arg-type]
