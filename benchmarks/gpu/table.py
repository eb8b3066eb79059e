"""results.json and results.md."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.result import Check, Measurement, Omission, Outcome, Row

HEAD = "| what | result | extra memory | ratio | |\n|---|---|---|---|---|"


def write_results(
    folder: Path,
    machine: dict[str, str],
    missing: dict[str, str],
    outcomes: Sequence[Outcome],
) -> None:
    """Write both files, each complete at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine,
        "missing": missing,
        "parts": [outcome.as_dict() for outcome in outcomes],
    }
    texts = {
        "results.json": json.dumps(content, indent=1),
        "results.md": markdown(machine, missing, outcomes),
    }
    for name, text in texts.items():
        part_path = folder / f"{name}.part"
        part_path.write_text(text, "utf-8")
        part_path.replace(folder / name)


def markdown(machine: dict[str, str], missing: dict[str, str], outcomes: Sequence[Outcome]) -> str:
    """Return the report."""
    lines = ["# Proofs and measurements", ""]
    lines += [f"- {name}: {fact}" for name, fact in machine.items()]
    lines += [f"- without {name}: {cost}" for name, cost in missing.items()]
    lines += ["", "| part | kind | status | s | |", "|---|---|---|---|---|"]
    lines += [
        f"| {o.name} | {o.kind} | {o.status} | {o.seconds:.1f} | {cell(o.reason)} |"
        for o in outcomes
    ]
    for outcome in outcomes:
        if outcome.rows:
            lines += ["", f"## {outcome.name}", "", HEAD, *map(table_row, outcome.rows)]
        if outcome.traceback:
            lines += ["", "```", outcome.traceback.strip(), "```"]
    return "\n".join(lines) + "\n"


def table_row(row: Row) -> str:
    """Return a line of the table of a part."""
    if isinstance(row, Omission):
        return f"| {row.subject} | not run | | | {cell(row.reason)} |"
    if isinstance(row, Check):
        verdict = "right" if row.passed else "**WRONG**"
        return (
            f"| {row.subject} | {verdict}: {row.deviation:.2g} (limit {row.limit:g}) | | | "
            f"{cell(row.note)} |"
        )
    assert isinstance(row, Measurement)
    memory = "" if row.mebibytes is None else f"{row.mebibytes:,.0f} MiB"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x {row.reference}"
    return (
        f"| {row.subject} | {row.value:,.4g} {row.unit} | {memory} | {ratio} | {cell(row.note)} |"
    )


def cell(text: str) -> str:
    """Return a text that stays in its cell."""
    return text.replace("|", "/").replace("\n", " ")
