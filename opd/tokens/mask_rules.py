r"""The grammar of mask rules: which sampled tokens are not supervised. Free of torch.

A rule is one line of text:

    id:151645          this id
    token:<|im_end|>   the id, or ids, whose bytes are exactly this text
    string:<think>     every token that overlaps this text, however it is split into ids
    role:eos           eos, bos, pad, special (any special token) or think (both think tags, as
                       strings)
    paper              what the published code masks: first `<`, first `think`, first `<|im_end|>`

with `:first` behind it for the first occurrence in a response only, or `:all` (the default).
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
    + f", each with :first or :all behind it, or {', '.join(PRESETS)}"
)


@dataclass(frozen=True)
class MaskRule:
    """One rule: what it looks for, and which occurrences in a response it takes."""

    kind: Kind
    value: str
    occurrence: Occurrence = "all"

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.value}" + (":first" if self.occurrence == "first" else "")


def parse(texts: Sequence[str]) -> tuple[MaskRule, ...]:
    """Rules in the order given, presets spelled out, each once.

    Raises:
      ValueError: a text is no rule; it is named, and the known forms are listed.
    """
    spelled = [one for text in texts for one in PRESETS.get(text, (text,))]
    return tuple(dict.fromkeys(parse_one(text) for text in spelled))


def parse_one(text: str) -> MaskRule:
    kind, _, value = text.partition(":")
    occurrence: Occurrence = "all"
    for known in get_args(Occurrence):
        if value.endswith(f":{known}"):
            value, occurrence = value.removesuffix(f":{known}"), known
            break
    if kind not in get_args(Kind) or not value:
        raise InvalidInput(f"mask rule {text!r} is not known; write {FORMS}")
    if kind == "id" and not (value.isascii() and value.isdigit()):
        raise InvalidInput(f"mask rule {text!r} names no token id; write id:NUMBER, as id:151645")
    if kind == "role" and value not in ROLES:
        raise InvalidInput(f"mask rule {text!r} names no role; known: {', '.join(ROLES)}")
    return MaskRule(kind, value, occurrence)  # type: ignore[arg-type]
