"""The alarm rules of a run, which depend on who writes its responses."""

from collections.abc import Mapping
from typing import Any

from diagnostics.alarms.rules import RULES, AlarmRule
from diagnostics.errors import InvalidInput
from opd.config.prefixes import ON_POLICY, Prefixes, parse_prefixes


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


def rules_of(prefixes: Prefixes) -> list[AlarmRule]:
    """Return the alarm rules that mean something on the prefixes of a run.

    The sampled cost is a divergence on the student's own tokens only, and a column is no trend of
    the student while the share of its responses changes.

    Args:
        prefixes: Who writes the responses.

    Returns:
        The rules.
    """
    return [
        rule
        for rule in RULES
        if not (prefixes.partner and rule.metric == "divergence/k1")
        and not (prefixes.is_changing and rule.num_reference)
    ]
