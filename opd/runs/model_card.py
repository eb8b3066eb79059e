"""The model card of a trained model, final/README.md: inputs, settings and result of the run."""

from pathlib import Path
from typing import Any

from diagnostics.records.run_folder import RunFolder
from diagnostics.terminal import escape_control_chars
from opd.runs.result import run_verdict


def model_card(folder: Path, config: dict[str, Any]) -> str:
    """Format the model card of a run as Markdown with metadata.

    Args:
        folder: Run folder.
        config: Settings as plain data. `base_model` is set in the metadata if the student is a hub
            name; a local folder is named in the text only.

    Returns:
        The text.
    """
    result = run_verdict(RunFolder(folder))
    student = str(config["student"])
    is_hub_name = (
        not Path(student).exists() and student.count("/") == 1 and student[:1] not in "./~"
    )
    tasks = config.get("tasks") or [{"name": "", "task": None, "teacher": None}]
    lines = ["---", *([f"base_model: {escape_control_chars(student)}"] if is_hub_name else [])]
    lines += ["library_name: transformers", "tags: [on-policy-distillation, opdlab]", "---", ""]
    lines += ["# A model trained by on-policy distillation", "", f"- base model: {code(student)}"]
    for task in tasks:
        name = f" of {code(task['name'])}" if task["name"] else ""
        lines.append(f"- teacher{name}: {code(task['teacher'] or config['teacher'])}")
        lines.append(f"- task{name}: {code(task['task'] or config['task'])}")
    names = ("objective", "steps", "lr", "prompts_per_step", "group_size", "seed")
    lines += [f"- {name}: {code(config[name])}" for name in names if name in config]
    lines += ["", "Results of the run:", ""]
    lines += [f"- {escape_control_chars(change['sentence'])}" for change in result["changes"]]
    lines += ["", f"Summary: {escape_control_chars(result['text'])}.", ""]
    return "\n".join(lines)


def code(value: Any) -> str:
    """Format a value as inline code on one line, safe for Markdown."""
    return f"`{escape_control_chars(str(value)).replace('`', chr(39)).replace(chr(10), ' ')}`"
