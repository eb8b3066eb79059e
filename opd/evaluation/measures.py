"""What an evaluation measures beside accuracy; imported by the command line, so without torch."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What to measure beside accuracy (docs/evaluation.md)."""

    calibration: bool = False
    """over-confidence, Brier score and calibration error of the probability of each answer and,
    with several samples, of the vote; costs one pass over the responses"""
    recovery: Literal["none", "digit", "runner_up"] = "none"
    """continue each response from a random place with and without an error there: a digit replaced
    by a random one, or a token by the most probable other one"""
    recovery_prefix: Literal["response", "solution"] = "response"
    """what is continued: the model's own responses, or the solutions that the problems have"""
    other_task: str = ""
    """a second source that was not trained; accuracy on the first --eval-problems of all its
    problems, and with --against the change of it"""
    other_prompt_column: str = "prompt"
    """column of --other-task with the prompt"""
    other_answer_column: str = "answer"
    """column of --other-task with the reference answer"""
    other_grader: str = ""
    """grader of --other-task; empty: the one that its rows name, or exact"""
    teacher: str = ""
    """folder or hub name of a teacher: its accuracy on the same problems and, with --against, the
    share of the teacher's lead over that model that is closed"""

    @property
    def need_responses(self) -> bool:
        """Whether something is measured on responses with an answer, which games do not have."""
        return self.calibration or self.recovery != "none"


NO_MEASURES = Measures()
BY_PROBLEM = "by_problem"
"""End of the names of results with one entry per problem, for paired comparisons."""
UNNAMED_INTERVALS = ("accuracy", "gain", "change")
"""Ends of the names of results whose interval is `low` to `high` beside them."""


def is_long(name: str) -> bool:
    """Return whether a result holds one entry per problem or bin and is written, not printed."""
    return name.rpartition("/")[2] in ("outcomes", "bins", BY_PROBLEM)


def without_long_results(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the results that are one number or text."""
    return {name: value for name, value in metrics.items() if not is_long(name)}


def format_table(metrics: dict[str, Any]) -> str:
    """Format the numbers of an evaluation for reading: one a line, with its interval.

    Args:
        metrics: Results by name.

    Returns:
        Lines of name, value and [low, high] where there is an interval; results that are text
        follow their name.
    """
    numbers = without_long_results(metrics)
    lines = []
    for name, value in numbers.items():
        parent, _, last_part = name.rpartition("/")
        if last_part in ("low", "high") or isinstance(value, (dict, list)):
            continue
        if isinstance(value, str):
            lines.append((name, value))
            continue
        stem = parent if last_part in UNNAMED_INTERVALS else name
        ends = [numbers.get(f"{stem}/{end}".removeprefix("/")) for end in ("low", "high")]
        interval = "" if None in ends else f"  [{ends[0]:.3f}, {ends[1]:.3f}]"
        is_count = float(value).is_integer() and abs(value) > 1
        lines.append((name, (f"{value:.0f}" if is_count else f"{value:.3f}") + interval))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
