"""Run folders that are written row by row, with numbers that a test can add up."""

import json
from pathlib import Path

from diagnostics.records import rows


def write_run(
    folder: Path,
    outcomes: dict[int, str],
    *,
    seed: int,
    seconds: float,
    truncated_from: int = 99,
    student: str = "",
) -> Path:
    """Write a run whose steps take `seconds` and have ten tokens more than the previous one."""
    folder.mkdir(parents=True)
    student = student or f"student-{seed}"
    settings = {"seed": seed, "student": student, "objective": folder.name[:-2]}
    (folder / "config.json").write_text(json.dumps(settings))
    for step in range(max(outcomes)):
        tokens = 100 + 10 * step
        parts = {"rollout": seconds / 2, "score": seconds / 4, "update": seconds / 4, "record": 1.0}
        row = {f"seconds/{name}": value for name, value in parts.items()}
        row["machine/tokens_per_second"] = tokens / (seconds + 1.0)
        row["response/truncated_share"] = float(step >= truncated_from)
        rows.append_row(folder / "rows.jsonl", {"step": step, **row})
    for step, text in outcomes.items():
        share = text.count("1") / len(text)
        row = {"step": step, "accuracy": share, "outcomes": text, "problem_set": "p"}
        rows.append_row(folder / "evals.jsonl", row)
    return folder
