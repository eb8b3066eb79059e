"""The model card of a trained model, final/README.md: from what, how, and what was shown."""

from pathlib import Path
from typing import Any

from diagnostics.records import rows
from diagnostics.terminal import visible
from opd.runs.result import verdict


def model_card(folder: Path, config: dict[str, Any]) -> str:
    """Markdown with the metadata of a model card, of a run folder and its settings as plain data.

    `base_model` is in the metadata where it is a hub's name; a folder is named in the text alone.
    """
    judged = verdict(rows.read(folder / "rows.jsonl"), rows.read(folder / "evals.jsonl"))
    student = str(config["student"])
    hub = not Path(student).exists() and student.count("/") == 1 and student[:1] not in "./~"
    tasks = config.get("tasks") or [{"name": "", "task": None, "teacher": None}]
    lines = ["---", *([f"base_model: {visible(student)}"] if hub else [])]
    lines += ["library_name: transformers", "tags: [on-policy-distillation, opdlab]", "---", ""]
    lines += ["# A model trained by on-policy distillation", "", f"- base model: {code(student)}"]
    for task in tasks:
        name = f" of {code(task['name'])}" if task["name"] else ""
        lines.append(f"- teacher{name}: {code(task['teacher'] or config['teacher'])}")
        lines.append(f"- task{name}: {code(task['task'] or config['task'])}")
    names = ("objective", "steps", "lr", "prompts_per_step", "group_size", "seed")
    lines += [f"- {name}: {code(config[name])}" for name in names if name in config]
    lines += ["", "What the run has shown:", ""]
    lines += [f"- {visible(change['sentence'])}" for change in judged["changes"]]
    lines += ["", f"In short: {visible(judged['text'])}.", ""]
    return "\n".join(lines)


def code(value: Any) -> str:
    """A value on one line, as code that no mark of Markdown can leave."""
    return f"`{visible(str(value)).replace('`', chr(39)).replace(chr(10), ' ')}`"
