"""Control experiments of a view: another problem's values, empty ones, or shuffled words."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.tasks import prompt_hash
from opd.data.teacher_view.values import problem_values

STATEMENT_NAMES = frozenset(("prompt", "messages", "goal", "observation"))
"""Names of what the student reads too, which no control changes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewControl:
    """How what is shown to the teacher differs from what belongs to the problem."""

    kind: str = "none"
    """"none", "other_problem", "empty" or "shuffled"."""
    seed: int = 0
    """Seed of the random orders."""
    statement: frozenset[str] = STATEMENT_NAMES
    """Names that no control changes, with the columns that the student's prompt is made of."""
    successors: Mapping[bytes, Problem] = field(default_factory=dict)
    """For "other_problem": the problem that is shown for each prompt, by its hash."""


def pair_problems(problems: Sequence[Problem], seed: int) -> dict[bytes, Problem]:
    """Assign to each prompt another problem: the next one in a random cyclic order.

    No prompt is assigned itself, and every problem is assigned once, whatever the order of the
    rows.

    Args:
        problems: The training problems; of several with the same prompt the first one counts.
        seed: Seed of the order.

    Returns:
        Hash of a prompt to the problem that is shown for it.

    Raises:
        InvalidInput: There are fewer than two different prompts.
    """
    first_by_key: dict[bytes, Problem] = {}
    for problem in problems:
        first_by_key.setdefault(prompt_hash(problem), problem)
    if len(first_by_key) < 2:
        raise InvalidInput(
            f"view_control is other_problem, but the data have {len(first_by_key)} different "
            "prompts; use at least 2, or another control"
        )
    keys = sorted(first_by_key)
    random.Random(f"{seed}-other-problem").shuffle(keys)
    return {key: first_by_key[keys[(i + 1) % len(keys)]] for i, key in enumerate(keys)}


def other_problem(control: ViewControl, problem: Problem) -> Problem:
    """Return the problem that is shown for a problem; also for one that is not trained on."""
    key = prompt_hash(problem)
    if key in control.successors:
        return control.successors[key]
    keys = sorted(control.successors)
    return control.successors[keys[int.from_bytes(key[:8], "big") % len(keys)]]


def control_values(
    control: ViewControl, values: Mapping[str, Any], problem: Problem
) -> dict[str, Any]:
    """Change what is shown to the teacher, as the control says.

    Args:
        control: The control.
        values: Values of a view, by name.
        problem: The problem that they belong to.

    Returns:
        The values to show; those in `ViewControl.statement` are unchanged.
    """
    if control.kind == "none":
        return dict(values)
    unchanged = {name: value for name, value in values.items() if name in control.statement}
    changed = {name: value for name, value in values.items() if name not in control.statement}
    if control.kind == "other_problem":
        replacement = problem_values(other_problem(control, problem))
        # also what this problem lacks, so that as many rows show a value as without the control
        changed = {x: value for x, value in replacement.items() if x not in control.statement}
    elif control.kind == "empty":
        changed = {name: empty_value(value) for name, value in changed.items()}
    else:
        generator = random.Random(f"{control.seed}-{prompt_hash(problem).hex()}")
        changed = {name: shuffle_words(changed[name], generator) for name in sorted(changed)}
    return unchanged | changed


def empty_value(value: Any) -> Any:
    """Return the value of the same kind that shows nothing."""
    if isinstance(value, list | tuple):
        return []
    return {} if isinstance(value, dict) else ""


def shuffle_words(value: Any, generator: random.Random) -> Any:
    """Return a value with the words of its texts in random order; lists are shuffled within."""
    if isinstance(value, str):
        words = value.split()
        generator.shuffle(words)
        return " ".join(words)
    if isinstance(value, list | tuple):
        return [shuffle_words(item, generator) for item in value]
    if isinstance(value, dict):
        return {name: shuffle_words(item, generator) for name, item in value.items()}
    return value
