"""The page of audits: what our losses, and those of public libraries, estimate.

Audits take minutes and need the library, so the page is rendered from a record, docs/audits.json.
`python -m docs.generate.audits --record LIBRARY [TARGET ...]` updates the rows of a library, or
only those of some targets.
"""

import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diagnostics.errors import UserError
from diagnostics.io.atomic import write_text
from docs.generate.attributes import table
from docs.generate.audit_notes import EXAMPLES, INTRODUCTIONS, NOTES
from docs.generate.audit_targets import TARGETS

RECORD = Path(__file__).resolve().parents[1] / "audits.json"
PACKAGES = {"trl": "trl", "verl": "verl"}
"""Prefix -> package whose version is recorded."""

REST = ("mean_at_teacher", "student_mass", "teacher_mass", "log_mass_ratio", "largest_kl")
"""Fields of the place of rest that are recorded."""

HEADER = """# What losses estimate

*Generated from `docs/audits.json` by `python -m docs.generate`; `python -m docs.generate.audits
--record LIBRARY` repeats the audits.*

Each row is one `opd audit`: the loss's mean gradient over everything that a student can sample in
small worlds, compared with the exact gradients of known targets. Repeat a row with

    opd audit trl:GKD,beta=1
    opd audit ours:full_reverse_kl,gamma=1 --json

- **Target**: whose gradient the mean is, up to a positive factor; "none, near X" where it is
  nobody's, with the cosine and the relative bias.
- **Weighting**: what the loss divides by, and the factor that is left.
- **Noise**: variance over that of our least noisy estimator of the same target, at the same batch;
  "-" where there is none.
- **Found**: codes of the faults, warnings (*w*) and caveats (*c*). `biased` says that the mean is
  no positive multiple of a target: not that it is useless. The section below a table says why.
- A loss is called as its trainer calls it: a teacher computed without gradient has none, whatever
  the loss would do with one.
"""


def audit_row(target: str) -> dict[str, Any]:
    """Audit a loss.

    Args:
        target: TARGET of `opd audit`.

    Returns:
        The row of the record.
    """
    from opd.objectives.audit.audit import audit
    from opd.objectives.audit.named import load_loss

    name = target.partition(":")[2]
    try:
        card = audit(load_loss(target))
    except UserError as error:
        return {"loss": name, "error": str(error)}
    found = card.to_dict()
    noise, rest = found["noise"] or {}, found["rest"]
    return {
        "loss": name,
        "verdict": card.verdict,
        "target": {key: _rounded(value) for key, value in found["target"].items()},
        "noise_ratio": _rounded(noise.get("ratio_to_best")),
        "rest": None if rest is None else {key: _rounded(rest[key]) for key in REST},
        "faults": card.faults,
        "warnings": card.warnings,
        "caveats": card.caveats,
        "evidence": card.evidence,
    }


def _rounded(value: Any) -> Any:
    """Return a number with three digits, so that rounding of another machine does not show."""
    if not isinstance(value, float):
        return value
    return 0.0 if abs(value) < 1e-4 else float(f"{value:.3g}")


def record(library: str, targets: list[str]) -> None:
    """Audit losses of a library and write each row when it is known.

    Args:
        library: Key of TARGETS.
        targets: Some of its targets; all if empty. Rows of others that are recorded stay.
    """
    for name in targets or TARGETS[library]:
        row = audit_row(f"{library}:{name}")
        print(name, row.get("verdict", "error"), flush=True)
        stored = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        rows = {x["loss"]: x for x in stored.get(library, {"rows": []})["rows"]} | {name: row}
        stored[library] = {
            "version": version(PACKAGES[library]) if library in PACKAGES else None,
            "rows": [rows[x] for x in TARGETS[library] if x in rows],
        }
        ordered = {key: stored[key] for key in TARGETS if key in stored}
        write_text(RECORD, json.dumps(ordered, indent=1) + "\n")


def row_cells(row: dict[str, Any], library: str) -> tuple[str, ...]:
    """Return the cells of a row.

    Args:
        row: Row of the record.
        library: Its library.

    Returns:
        Loss, settings, target, weighting, noise, what was found, note.
    """
    loss, _, settings = row["loss"].partition(",")
    note = NOTES.get(f"{library}:{row['loss']}", "")
    start = (f"`{loss}`", settings.replace(",", ", ") and f"`{settings.replace(',', ', ')}`")
    if "error" in row:
        return (*start, "not judged", "", "-", "", row["error"])
    target = row["target"]
    name = f"`{target['name']}`"
    if target["name"] == "none" and target["nearest"] is not None:
        name = f"none, near `{target['nearest']}` (cosine {target['cosine']:.3f}"
        name += f", bias {target['relative_bias']:.2g})"
    weighting = target["weighting"]
    if target["scale"] is not None and abs(target["scale"] - 1) > 1e-3:
        weighting += f", times {target['scale']:.3g}"
    noise = "-" if row["noise_ratio"] is None else f"{row['noise_ratio']:.3g}"
    found = [
        *(f"`{code}`" for code in row["faults"]),
        *(f"`{code}` *w*" for code in row["warnings"]),
        *(f"`{code}` *c*" for code in row["caveats"]),
    ]
    return (*start, name, weighting, noise, ", ".join(found), note)


def page() -> str:
    """Return the page in Markdown."""
    stored = json.loads(RECORD.read_text())
    lines = [HEADER]
    for library, part in stored.items():
        title, text = INTRODUCTIONS[library]
        lines += [f"## {title}{'' if part['version'] is None else ' ' + part['version']}", ""]
        lines += [text, ""]
        columns = ("loss", "settings", "target", "weighting", "noise", "found", "note")
        rows = [row_cells(row, library) for row in part["rows"]]
        lines += [*table(columns, rows), ""]
        for heading, example in EXAMPLES.get(library, {}).items():
            lines += [f"### {heading}", "", example.strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str]) -> None:
    """Update the record: `--record LIBRARY [TARGET ...]`.

    Args:
        argv: Command-line arguments.

    Raises:
        SystemExit: The arguments are others.
    """
    if len(argv) < 2 or argv[0] != "--record" or argv[1] not in TARGETS:
        raise SystemExit(
            f"usage: python -m docs.generate.audits --record {'|'.join(TARGETS)} [TARGET ...]"
        )
    warnings.filterwarnings("ignore")
    record(argv[1], argv[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
