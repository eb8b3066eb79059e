"""The result of one check of models, settings or samples."""

from dataclasses import dataclass, field
from typing import Any, Literal

CheckStatus = Literal["ok", "warn", "fail"]


Numbers = dict[str, Any]


TEXTS = (
    "<think> Okay, let's see: 12 + 34 = 46.</think>",
    "The final answer is \\boxed{7}.\n\n    return x\t# 3.14\n",
    " naïve café, 漢字, 🙂",
)


@dataclass(frozen=True)
class CheckResult:
    """One item's verdict; numbers are what `--json` adds."""

    item: str
    verdict: CheckStatus
    found: str
    advice: str = ""
    numbers: Numbers = field(default_factory=dict)
