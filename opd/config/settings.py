"""The settings of a training run: frozen dataclasses in groups.

Does not import torch, so that the command line starts quickly. The attribute docstrings are the
help of the command line. Values are checked by `opd.config.problems.setting_problems`, not when a
configuration is built, so that all problems can be reported at once.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

from diagnostics.errors import InvalidInput
from diagnostics.io.files import parse_json
from opd.config.fields import SettingRules, rules, rules_of, setting
from opd.config.groups import (
    DataConfig,
    EvalConfig,
    GamesConfig,
    HardwareConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RecordConfig,
    RemoteTeacherConfig,
    RolloutConfig,
    RolloutServersConfig,
    ViewConfig,
)

TRUST_HELP = "run Python code that comes with a model; review it first"
"""Help of the option --trust-remote-code."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Settings of one of several tasks; None means the run's setting of the same name."""

    name: str
    """Label of the task in rows and evaluations."""
    task: str
    """Source of its problems; see `DataConfig.task`."""
    weight: float = setting(1.0, within="positive")
    """Weight of the task in `DataConfig.task_order` "weighted" and "mixed"."""
    teacher: str | None = None
    teacher_eos: tuple[int, ...] | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    response_column: str | None = None
    grader: str | None = None
    system: str | None = None
    template: str | None = None
    max_prompt: int | None = None
    max_response: int | None = None
    mask: tuple[str, ...] | None = None
    teacher_view: str | None = None
    teacher_system: str | None = None
    teacher_template: str | None = None
    teacher_thinking: Literal["same", "on", "off"] | None = None
    view_control: Literal["none", "other_problem", "empty", "shuffled"] | None = None
    max_teacher_prompt: int | None = None
    layout: Literal["turns", "trajectory"] | None = None
    max_turns: int | None = None
    history_turns: int | None = None
    eval_task: str | None = None
    eval_prompt_column: str | None = None
    eval_answer_column: str | None = None
    eval_problems: int | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of `opd train`; a recipe is a function that returns one."""

    student: str
    """Causal LM to train: a folder or a Hugging Face hub name."""
    teacher: str = dataclasses.field(metadata=rules(per_task=True, address="teacher"))
    """Frozen causal LM with the same vocabulary: a folder or a hub name; "base": the student
    without its LoRA adapters; "ema": an exponential moving average of the student; the address of a
    vLLM or SGLang server, http://HOST:PORT/v1 (opd.teachers.client); cache:FOLDER, scores on disk
    (docs/prefixes.md); or "none", for an objective without a teacher."""
    out: str = dataclasses.field(metadata=rules(resumable=True))
    """Run folder. An unfinished run in it is resumed."""
    seed: int = setting(0, within="not negative")
    """Random seed."""
    steps: int = setting(100, within="not negative", resumable=True)
    """Number of training steps, each on new rollouts."""
    data: DataConfig = dataclasses.field(default=DataConfig())
    rollout: RolloutConfig = dataclasses.field(default=RolloutConfig())
    objective: ObjectiveConfig = dataclasses.field(default=ObjectiveConfig())
    optimizer: OptimizerConfig = dataclasses.field(default=OptimizerConfig())
    evaluation: EvalConfig = dataclasses.field(default=EvalConfig())
    record: RecordConfig = dataclasses.field(default=RecordConfig())
    hardware: HardwareConfig = dataclasses.field(default=HardwareConfig())
    view: ViewConfig = dataclasses.field(default=ViewConfig())
    remote_teacher: RemoteTeacherConfig = dataclasses.field(default=RemoteTeacherConfig())
    rollout_servers: RolloutServersConfig = dataclasses.field(default=RolloutServersConfig())
    games: GamesConfig = dataclasses.field(default=GamesConfig())
    tasks: tuple[TaskSettings, ...] = ()
    """Several tasks, each with its own teacher; on the command line a file, --tasks FILE.toml
    (opd.training.multitask). `task` and `teacher` are the defaults of tasks that set none."""


@dataclass(frozen=True)
class SettingField:
    """A setting of `Config`: where it is, and what its field says."""

    group: str
    """Field of `Config` that holds the setting; empty for a field of `Config` itself."""
    owner: type
    """Dataclass that declares the setting."""
    field: "dataclasses.Field[Any]"
    """The field."""

    @property
    def rules(self) -> SettingRules:
        """Range, and where the setting may differ or change."""
        return rules_of(self.field)

    @property
    def path(self) -> str:
        """The key in files: GROUP.NAME, or NAME."""
        return f"{self.group}.{self.field.name}" if self.group else self.field.name


GROUPS: dict[str, type] = {
    field.name: type(field.default)
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(field.default)
}
"""Name of a group of settings to its dataclass."""


@cache
def setting_fields() -> Mapping[str, SettingField]:
    """Return every setting by name, over all groups, in the order of the help."""
    top_level = [
        SettingField("", Config, field)
        for field in dataclasses.fields(Config)
        if field.name not in GROUPS
    ]
    grouped = [
        SettingField(group, owner, field)
        for group, owner in GROUPS.items()
        for field in dataclasses.fields(owner)
    ]
    return {setting.field.name: setting for setting in [*top_level, *grouped]}


def setting_values(config: Config) -> dict[str, Any]:
    """Return the value of every setting by name."""
    values = {}
    for name, setting_field in setting_fields().items():
        holder = getattr(config, setting_field.group) if setting_field.group else config
        values[name] = getattr(holder, name)
    return values


def with_settings(config: Config, **changes: Any) -> Config:
    """Replace settings by name, over all groups.

    Args:
        config: The configuration.
        **changes: Name of a setting, without its group, to its value; values are not checked.

    Returns:
        The changed configuration.

    Raises:
        InvalidInput: There is no such setting.
    """
    changes_by_group: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in setting_fields():
            raise InvalidInput(f"there is no setting {name!r}{closest_setting(name)}")
        changes_by_group.setdefault(setting_fields()[name].group, {})[name] = value
    top_level = changes_by_group.pop("", {})
    groups = {
        group: dataclasses.replace(getattr(config, group), **values)
        for group, values in changes_by_group.items()
    }
    return dataclasses.replace(config, **top_level, **groups)


def parse_template(text: str, name: str = "template") -> dict[str, Any]:
    """Parse the arguments of a chat template.

    Args:
        text: The setting, a JSON object.
        name: Name of the setting, for messages.

    Returns:
        The arguments.

    Raises:
        InvalidInput: The text is not JSON, or no object.
    """
    values = parse_json(text, name)
    if not isinstance(values, dict):
        raise InvalidInput(
            f'{name} is {text!r}; it must be a JSON object, such as {{"enable_thinking": false}}'
        )
    return values


def closest_setting(name: str) -> str:
    """Return the end of a message about an unknown setting: the closest known one, or ""."""
    matches = get_close_matches(name, setting_fields(), n=1)
    return f"; the closest is {setting_fields()[matches[0]].path}" if matches else ""
