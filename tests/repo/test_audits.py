"""The record behind docs/audits.md: complete, of the installed versions, and repeatable."""

import json
import re
from importlib.metadata import version
from typing import Any

import pytest

from docs.generate.audit_notes import EXAMPLES, NOTES
from docs.generate.audit_targets import TARGETS
from docs.generate.audits import RECORD, audit_row, row_cells

STORED = json.loads(RECORD.read_text())
ROWS: dict[str, dict[str, Any]] = {
    f"{library}:{row['loss']}": row for library, part in STORED.items() for row in part["rows"]
}
"""TARGET of `opd audit` -> row of the record."""


@pytest.mark.parametrize("library", [x for x in TARGETS if TARGETS[x]])
def test_every_listed_loss_is_recorded(library: str) -> None:
    assert [row["loss"] for row in STORED[library]["rows"]] == TARGETS[library]
    assert not any("error" in row for row in STORED[library]["rows"])


def test_the_record_is_of_the_installed_trl() -> None:
    assert STORED["trl"]["version"] == version("trl"), "python -m docs.generate.audits --record trl"


def test_notes_are_of_recorded_losses() -> None:
    assert {*NOTES} <= {*ROWS}
    for target, note in NOTES.items():
        headings = EXAMPLES.get(target.partition(":")[0], {})
        for number in re.findall(r"\(\d\)", note):
            assert any(x.startswith(number) for x in headings), f"{target}: {note}"


def test_no_row_breaks_the_table() -> None:
    for target, row in ROWS.items():
        cells = row_cells(row, target.partition(":")[0])
        assert len(cells) == 7
        assert not any("\n" in cell for cell in cells)


@pytest.mark.parametrize(
    "target",
    ["ours:k1", "ours:teacher_topk_bucket", "trl:GKD,beta=1", "trl:RLOO,beta=0"],
)
def test_an_audit_repeats_the_record(target: str) -> None:
    found, recorded = audit_row(target), ROWS[target]
    for key in ("verdict", "faults", "warnings", "caveats"):
        assert found[key] == recorded[key]
    for key in ("name", "nearest", "weighting"):
        assert found["target"][key] == recorded["target"][key]
    numbers = [
        (found["noise_ratio"], recorded["noise_ratio"]),
        *((found["target"][x], recorded["target"][x]) for x in ("cosine", "scale")),
    ]
    for now, before in numbers:
        assert now == (None if before is None else pytest.approx(before, rel=0.02))
