"""The model card of a trained model, final/README.md: parents, data, settings and results."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diagnostics.records.run_folder import RunFolder
from diagnostics.terminal import escape_control_chars
from opd.config.settings import setting_fields
from opd.runs.result import run_verdict

DATA_SETTINGS = (
    *("prompt_column", "answer_column", "grader", "system", "chat_template", "template"),
    *("max_prompt", "max_response", "eval_task"),
    *("teacher_view", "teacher_system", "teacher_template", "teacher_thinking", "view_control"),
)
"""Settings that describe the data of a task."""
LISTED_ELSEWHERE = {"student", "teacher", "task", "tasks", "out", *DATA_SETTINGS}
"""Settings that the table of settings leaves out."""


def model_card(folder: Path, config: Mapping[str, Any]) -> str:
    """Format the model card of a run as Markdown with metadata.

    Args:
        folder: Run folder.
        config: Settings as plain data.

    Returns:
        The text. The metadata names those parents and data sets that are hub names; folders and
        files are named in the text only.
    """
    run = RunFolder(folder)
    result = run_verdict(run)
    sections = [
        metadata(config),
        f"# {text(folder.resolve().name)}: trained by on-policy distillation",
        parents(config),
        usage(config),
        "## Data",
        *(task_data(task, config) for task in tasks_of(config)),
        "## Settings",
        "Settings that are not at their defaults, and the most important others:",
        settings_table(config),
        "## Evaluation",
        evaluation_table(run.evaluations({})),
        "\n".join(f"- {text(change['sentence'])}" for change in result["changes"]),
        f"Summary: {text(result['text'])}.",
        "## Versions",
        versions(run),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def metadata(config: Mapping[str, Any]) -> str:
    """Format the YAML header, with the parents and data sets that are on the hub."""
    teachers = [task["teacher"] or config["teacher"] for task in tasks_of(config)]
    datasets = [str(task["task"] or config["task"]) for task in tasks_of(config)]
    datasets = [name.split(":")[1] for name in datasets if name.startswith("hf:")]
    lines = ["---"]
    if is_hub_name(str(config["student"])):
        lines.append(f"base_model: {text(config['student'])}")
        lines.append("base_model_relation: finetune")
    lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    tags = ["on-policy-distillation", "opdlab", *(["lora"] if config.get("lora_rank") else [])]
    lines.append(f"tags: [{', '.join(tags)}]")
    on_hub = [name for name in dict.fromkeys(datasets) if is_hub_name(name)]
    lines += [f"datasets: [{', '.join(map(text, on_hub))}]"] if on_hub else []
    on_hub = [str(name) for name in dict.fromkeys(teachers) if is_hub_name(str(name))]
    lines += [f"teachers: [{', '.join(map(text, on_hub))}]"] if on_hub else []
    return "\n".join([*lines, "---"])


def parents(config: Mapping[str, Any]) -> str:
    """Format the base model and the teachers."""
    lines = [f"- base model: {code(config['student'])}"]
    for task in tasks_of(config):
        name = f" of {code(task['name'])}" if task["name"] else ""
        lines.append(f"- teacher{name}: {code(task['teacher'] or config['teacher'])}")
    note = "The licenses of base model and teachers apply to this model; check them before use."
    return "\n".join([*lines, "", note])


def usage(config: Mapping[str, Any]) -> str:
    """Format what the folder holds and how to load it."""
    lines = [
        "The folder is a model of transformers with its tokenizer: "
        "`AutoModelForCausalLM.from_pretrained(...)`."
    ]
    if config.get("lora_rank"):
        lines.append(
            f"Adapters of rank {config['lora_rank']} are merged into it; `adapter/` holds them "
            "alone: `PeftModel.from_pretrained(base_model, '.../adapter')`."
        )
    return "\n".join(lines)


def task_data(task: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Format the source of a task's prompts, with the settings that say how they were read."""
    name = f" of {code(task['name'])}" if task["name"] else ""
    lines = [f"- prompts{name}: {code(task['task'] or config['task'])}"]
    for setting in DATA_SETTINGS:
        value = task.get(setting) if task.get(setting) is not None else config.get(setting)
        fields = setting_fields()
        always = setting.startswith("max_")
        if value is not None and (always or value != fields[setting].field.default):
            lines.append(f"- {setting}{name}: {code(value)}")
    return "\n".join(lines)


def settings_table(config: Mapping[str, Any]) -> str:
    """Format the settings that are not at their defaults, and the most important ones."""
    always = ("objective", "steps", "lr", "prompts_per_step", "group_size", "temperature", "seed")
    rows = []
    for name, setting in setting_fields().items():
        default = setting.field.default
        default = list(default) if isinstance(default, tuple) else default
        if name in config and name not in LISTED_ELSEWHERE:
            value = config[name]
            if name in always or value != default:
                rows.append([code(name), code(value)])
    return table(["setting", "value"], rows)


def evaluation_table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Format the first and the last evaluation of every task, with 95 % intervals."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in evaluations:
        by_task.setdefault(str(row.get("task", "")), []).append(row)
    rows = []
    for task, task_rows in by_task.items():
        for row in [*task_rows[:1], *task_rows[1:][-1:]]:
            interval = f"[{number(row.get('low'))}, {number(row.get('high'))}]"
            rows.append(
                [
                    text(task),
                    str(row.get("step", "")),
                    f"{number(row.get('accuracy'))} {interval}",
                    str(row.get("problems", "")),
                    number(row.get("length"), 1),
                    number(row.get("truncated")),
                ]
            )
    if not rows:
        return "Nothing was evaluated: the data have no answers."
    heads = ["step", "accuracy [95 %]", "problems", "tokens", "truncated share"]
    if list(by_task) == [""]:
        return table(heads, [row[1:] for row in rows])
    return table(["task", *heads], rows)


def versions(run: RunFolder) -> str:
    """Format what computed the run, from the last of its starts."""
    starts = run.starts()
    if not starts:
        return "Unknown: the run folder has no starts.jsonl."
    last = starts[-1]
    lines = [f"- opdlab {code(last.get('version'))}, commit {code(last.get('commit'))}"]
    lines.append(f"- Python {code(last.get('python'))}")
    libraries: Mapping[str, Any] = last.get("libraries") or {}
    lines += [f"- {text(name)} {code(version)}" for name, version in libraries.items()]
    processes = last.get("processes", 1)
    lines.append(f"- {text(processes)} process{'es' * (processes != 1)}, {len(starts)} start(s)")
    return "\n".join(lines)


def tasks_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the tasks of a run; one without a name for a run of a single task."""
    return config.get("tasks") or [{"name": "", "task": None, "teacher": None}]


def is_hub_name(name: str) -> bool:
    """Return whether a name can be that of a model or data set on the hub, and is no folder."""
    is_name = name.count("/") == 1 and name[:1] not in "./~" and ":" not in name
    return is_name and not Path(name).exists()


def number(value: Any, digits: int = 3) -> str:
    """Format a number, or a dash for what is missing."""
    is_number = isinstance(value, int | float) and value == value
    return f"{value:.{digits}f}" if is_number else "–"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text(value: Any) -> str:
    """Format a value on one line, without control characters and signs that end a table cell."""
    return escape_control_chars(str(value)).replace("\n", " ").replace("|", "\\|")


def code(value: Any) -> str:
    """Format a value as inline code on one line, safe for Markdown."""
    return f"`{text(value).replace('`', chr(39))}`"
