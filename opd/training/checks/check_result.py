"""The result of a check of models, settings or samples."""

from dataclasses import dataclass, field
from typing import Any, Literal

CheckStatus = Literal["ok", "warn", "fail"]


Numbers = dict[str, Any]


TEXTS = (
    "<think> Okay, let's see: 12 + 34 = 46.</think>",
    "The final answer is \\boxed{7}.\n\n    return x\t# 3.14\n",
    " naïve café, 漢字, 🙂",
)
"""Texts for checks of models and tokenizers: reasoning, a boxed answer, non-ASCII text."""


@dataclass(frozen=True)
class CheckResult:
    """Result of one check."""

    item: str
    """What was checked."""
    verdict: CheckStatus
    found: str
    """What the check found."""
    advice: str = ""
    """What to do about it."""
    numbers: Numbers = field(default_factory=dict)
    """Measured values, for `--json`."""
