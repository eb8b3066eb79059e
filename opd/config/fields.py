"""Declaration of a setting: its default, its range, and where it may differ or change."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RULES = "rules"
"""Key of the `SettingRules` in the metadata of a field."""


@dataclass(frozen=True, kw_only=True)
class SettingRules:
    """What is known about a setting besides its type and default."""

    within: str | tuple[str, ...] = ""
    """Range, a key of `opd.config.field_checks.RANGE_CHECKS`; of a tuple the range of all its
    numbers, or one for each. Empty: any value of the type."""
    resumable: bool = False
    """Whether it may change when a run is resumed, because no computed value depends on it."""
    per_task: bool = False
    """Whether a task may have its own value (`opd.config.settings.TaskSettings`)."""
    address: str = ""
    """Role of the servers whose addresses it may hold: "teacher", "rollout", or "" for neither."""


def rules(
    *,
    within: str | tuple[str, ...] = "",
    resumable: bool = False,
    per_task: bool = False,
    address: str = "",
) -> Mapping[str, Any]:
    """Return the metadata of a field with the given `SettingRules`."""
    setting_rules = SettingRules(
        within=within, resumable=resumable, per_task=per_task, address=address
    )
    return {RULES: setting_rules}


def setting(
    default: Any,
    *,
    within: str | tuple[str, ...] = "",
    resumable: bool = False,
    per_task: bool = False,
    address: str = "",
) -> Any:
    """Declare a setting with a default and the given `SettingRules`, as a dataclass field."""
    metadata = rules(within=within, resumable=resumable, per_task=per_task, address=address)
    return dataclasses.field(default=default, metadata=metadata)


def rules_of(field: "dataclasses.Field[Any]") -> SettingRules:
    """Return the rules of a field; those of a field without rules restrict nothing."""
    return field.metadata.get(RULES, SettingRules())
