"""The alarm rules of a run, which depend on who writes its responses and on its objective."""

from collections.abc import Mapping
from typing import Any

from diagnostics.alarms.rules import RULES, AlarmRule
from diagnostics.errors import InvalidInput
from opd.config.prefixes import ON_POLICY, Prefixes, parse_prefixes

TEACHER_FREE = ("negative_log_likelihood", "reward_only")
"""Objectives without a teacher, which minimise no divergence from one that is given anyway."""
DIVERGENCES = ("divergence/reverse_kl", "divergence/k1")
"""Columns that an objective with a teacher is expected to decrease."""


def recorded_prefixes(settings: Mapping[str, Any]) -> Prefixes:
    """Return who wrote the responses of a recorded run.

    Args:
        settings: Its settings, by name; those of another trainer or of an older run have none.

    Returns:
        The setting; the student's own responses where it is absent or of an unknown form.
    """
    try:
        return parse_prefixes(str(settings.get("prefixes", "student")))
    except InvalidInput:  # written by another version
        return ON_POLICY


def rules_of(prefixes: Prefixes, objective: str = "") -> list[AlarmRule]:
    """Return the alarm rules that mean something in a run.

    The sampled cost is a divergence on the student's own tokens only, a column is no trend of the
    student while the share of its responses changes, and without a teacher in the objective no
    divergence has to decrease.

    Args:
        prefixes: Who writes the responses.
        objective: Name of the objective; "" if it is not known.

    Returns:
        The rules.
    """
    return [
        rule
        for rule in RULES
        if not (prefixes.partner and rule.metric == "divergence/k1")
        and not (prefixes.is_changing and rule.num_reference)
        and not (objective in TEACHER_FREE and rule.num_reference and rule.metric in DIVERGENCES)
    ]
