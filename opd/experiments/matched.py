"""Cells of `opd paper` on the models of `opd lab --view`: what the teacher reads, and controls.

The group "views" has four teachers: a frozen copy of the student, a moving average of it, the
student itself, and the stronger model from which the students were made. Each reads the solution of
the problem, that of another problem, or none. The group "controls" has the comparisons that a paper
on distillation is asked for, all with the same teacher, which reads what the student reads: other
sources of responses, another loss, or no teacher. The seed is that of the student, of prompts and
of sampling.
"""

from pathlib import Path
from typing import Any

from opd.lab.configs import view_student

TEACHERS = {
    "frozen": ("--teacher", "{student}"),
    "moving": ("--teacher", "ema", "--ema-decay", "0.9"),
    "live": ("--teacher", "ema", "--ema-decay", "0"),
    "strong": ("--teacher", "{teacher}"),
}
"""Teacher of the group "views" to its settings."""
VIEWS = {"solution": "none", "another": "other_problem", "empty": "empty"}
"""What a teacher is shown to the control that shows it."""
VIEW_METHODS: dict[str, tuple[str, ...]] = {
    f"{teacher}_{view}": (
        *settings,
        *("--teacher-view", "{lab}/view.jinja", "--view-control", control),
    )
    for teacher, settings in TEACHERS.items()
    for view, control in VIEWS.items()
}

GIVEN = ("--prefixes", "dataset", "--prompts-per-step", "32", "--group-size", "1")
TEACHER = ("--teacher", "{teacher}")
NO_TEACHER = ("--teacher", "none")
CONTROL_METHODS: dict[str, tuple[str, ...]] = {
    "sft": (*GIVEN, *NO_TEACHER, "--objective", "negative_log_likelihood", "--steps", "120"),
    "offline_kl": (*GIVEN, *TEACHER, "--objective", "full_forward_kl", "--steps", "60"),
    "mixed": ("--prefixes", "mixed:0.5", *TEACHER, "--objective", "full_jsd", "--beta", "0.5"),
    "reward_only": (*NO_TEACHER, "--objective", "reward_only", "--reward-weight", "1"),
    "on_policy_sampled": (*TEACHER, "--objective", "sampled_token"),
    "on_policy_topk": (*TEACHER, "--objective", "teacher_topk"),
}
"""Control to its settings. Steps that generate nothing take less time, so they are more."""
MATCHED_METHODS = {"views": VIEW_METHODS, "controls": CONTROL_METHODS}
"""Group to its methods."""

SHARED_SETTINGS = (
    *("pair", "--student", "{student}", "--task", "{lab}/train.jsonl"),
    *("--eval-task", "{lab}/test.jsonl", "--eval-problems", "200"),
    *("--max-prompt", "64", "--max-response", "48", "--support-k", "8"),
    *("--betas", "0.9", "0.95", "--save-batch-every", "0", "--save-every", "0"),
)
GROUP_SETTINGS = {
    "views": (
        *("--objective", "full_reverse_kl", "--prompts-per-step", "48", "--group-size", "1"),
        *("--updates-per-batch", "2", "--lr", "1e-3", "--steps", "40", "--eval-every", "10"),
    ),
    "controls": (
        *("--prompts-per-step", "16", "--group-size", "2"),
        *("--lr", "2e-4", "--steps", "30", "--eval-every", "5"),
    ),
}
"""Group to the settings that its methods share; all its methods have as many responses a step."""


def matched_arguments(group: str, seed: int, method: str, root: Path, lab: Path) -> list[Any]:
    """Return the arguments of `opd train` for a cell.

    Args:
        group: Group of MATCHED_METHODS.
        seed: Seed, which also selects the student.
        method: Method of the group.
        root: Folder of the run folders.
        lab: Folder of the models of `opd lab --view`.

    Returns:
        The arguments.
    """
    folders = {"student": lab / view_student(seed), "teacher": lab / "teacher", "lab": lab}
    words = (*SHARED_SETTINGS, *GROUP_SETTINGS[group], *MATCHED_METHODS[group][method])
    settings = [word.format(**folders) for word in words]
    return [*settings, "--seed", seed, "--out", root / group / f"{method}-{seed}"]
