"""The plan of a run as text and as JSON."""

import json
from collections.abc import Sequence
from typing import Any

from opd.analysis.plan.machines import GB
from opd.analysis.plan.plan import Plan
from opd.analysis.plan.remedies import Remedy


def format_plan(plan: Plan, remedies: Sequence[Remedy]) -> str:
    """Format a plan for a terminal.

    Args:
        plan: The plan.
        remedies: What to change where the run does not fit.

    Returns:
        The text.
    """
    workload, machine = plan.workload, plan.machine
    lines = [
        f"{describe_models(plan)} on {plan.gpus} x {machine.name}",
        f"each device: {workload.rows} responses a step, prompts of {workload.prompt} tokens, "
        f"responses of {workload.mean} and at most {workload.longest}; micro-batches of "
        f"{workload.update_rows} rows",
        "",
        "memory of each device, GB",
    ]
    for phase in plan.phases:
        mark = "  <- peak" if phase is plan.peak_phase else ""
        lines.append(f"  {phase.name:48} {phase.bytes / GB:9.3g}{mark}")
    lines += ["", f"at the peak ({plan.peak_phase.name}), GB"]
    lines += [f"  {term.name:48} {term.bytes / GB:9.3g}" for term in plan.peak_phase.terms]
    lines.append(f"  {reserve_name(plan):48} {plan.reserve / GB:9.3g}")
    lines.append(
        f"  {'sum':48} {plan.peak_bytes / GB:9.3g}  of {machine.memory / GB:.3g}: "
        f"{'fits' if plan.fits else 'does not fit'}"
    )
    if not plan.fits:
        lines += ["", *format_remedies(remedies)]
    lines += ["", "seconds of a step"]
    lines += [f"  {part.name:48} {part.seconds:9.3g}" for part in plan.activities]
    lines.append(f"  {'sum':48} {plan.step_seconds:9.3g}")
    hours = plan.step_seconds * plan.config.steps / 3600
    lines += ["", f"{plan.config.steps} steps: {hours:.3g} hours, without evaluations and records"]
    return "\n".join(lines)


def describe_models(plan: Plan) -> str:
    """Return the names and sizes of both models."""
    student = f"{plan.config.student} ({plan.student.num_weights / 1e9:.4g} B weights"
    if plan.student.num_trainable < plan.student.num_weights:
        student += f", {plan.student.num_trainable / 1e6:.3g} M trained"
    teacher = f"{plan.config.teacher}"
    if plan.teacher is not None:
        teacher += f" ({plan.teacher.num_weights / 1e9:.4g} B)"
    return f"{student}), teacher {teacher}"


def reserve_name(plan: Plan) -> str:
    """Return what the reserve is for."""
    share = f"{plan.machine.fragmentation:.0%} fragmentation"
    return f"{'CUDA context' if plan.machine.kind == 'cuda' else 'libraries'}, {share}"


def format_remedies(remedies: Sequence[Remedy]) -> list[str]:
    """Return lines with each change of settings and what is planned after it."""
    if not remedies:
        return ["no change of settings that was tried lowers the peak; use a smaller model"]
    lines = ["change, one after another:"]
    for remedy in remedies:
        flags = " ".join(option(name, value) for name, value in remedy.settings.items())
        plan = remedy.plan
        lines.append(
            f"  {flags:48} {plan.peak_bytes / GB:9.3g} GB ({plan.peak_phase.name}), "
            f"{plan.step_seconds:.3g} s a step"
        )
    if not remedies[-1].plan.fits:
        lines.append("  still too large: use a smaller student, or more GPUs with --sharding full")
    return lines


def option(name: str, value: Any) -> str:
    """Return a setting as an option of the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def plan_to_json(plan: Plan, remedies: Sequence[Remedy]) -> str:
    """Return a plan as a JSON object; memory in bytes, time in seconds."""
    return json.dumps(
        plan_values(plan)
        | {
            "remedies": [
                {"settings": remedy.settings, **plan_values(remedy.plan)} for remedy in remedies
            ]
        },
        indent=1,
    )


def plan_values(plan: Plan) -> dict[str, Any]:
    """Return the numbers of a plan as plain data."""
    return {
        "machine": plan.machine.name,
        "gpus": plan.gpus,
        "memory": plan.machine.memory,
        "peak": plan.peak_bytes,
        "peak_phase": plan.peak_phase.name,
        "reserve": plan.reserve,
        "fits": plan.fits,
        "student_weights": plan.student.num_weights,
        "trained_weights": plan.student.num_trainable,
        "teacher_weights": None if plan.teacher is None else plan.teacher.num_weights,
        "phases": {
            phase.name: {term.name: term.bytes for term in phase.terms} for phase in plan.phases
        },
        "seconds": {part.name: part.seconds for part in plan.activities},
        "flops": {part.name: part.flops for part in plan.activities},
        "step_seconds": plan.step_seconds,
        "steps": plan.config.steps,
    }


def format_line(plan: Plan) -> str:
    """Return the plan in one line, for the start of a run."""
    return (
        f"predicted peak: {plan.peak_bytes / GB:.3g} GB in {plan.peak_phase.name} "
        f"(opd plan says of what), {plan.step_seconds:.3g} s a step"
    )
