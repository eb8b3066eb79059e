"""Files of a monitor that was recorded before the renaming of row keys and types.

`older_monitor` holds four steps of a monitor with alarms (rows.jsonl, state.json), the batch that
they measured, as a batch file and as a token dump, and what the monitor of that version said of
four later steps, in which the teacher's log-probabilities are 4 nats lower.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diagnostics.alarms.alarms import Alarms, replay
from diagnostics.batch import ScoredRollouts
from diagnostics.catalogue import PANEL
from diagnostics.monitor import Monitor
from diagnostics.records.batch_files import load_batch
from diagnostics.records.renamed import present_row
from diagnostics.records.rows import read_rows
from diagnostics.records.sinks import to_file
from diagnostics.records.token_dumps import load_dump
from diagnostics.tensor_fields import flatten

FOLDER = Path(__file__).parent / "older_monitor"
METRICS = (
    "sampled_divergence",
    "exact_divergence",
    "length",
    "repetition",
    "support_consistency",
    "overlap",
)
NUMBERS = {"grad_norm": 0.0, "lr": 1e-3}


@pytest.fixture
def batch() -> ScoredRollouts:
    batch = load_batch(FOLDER / "batch.safetensors")
    assert isinstance(batch, ScoredRollouts)
    return batch


def make_monitor(rows: Path) -> Monitor:
    panel = {name: PANEL[name] for name in METRICS}
    return Monitor(panel, alarms=Alarms(), sinks=[to_file(rows)])


def test_batch_file_and_dump_give_the_numbers_of_the_rows(batch: ScoredRollouts) -> None:
    dump = load_dump(FOLDER / "dump.parquet")
    assert flatten(dump).keys() == flatten(batch).keys()
    for name, x in flatten(batch).items():
        assert torch.equal(x.nan_to_num(), flatten(dump)[name].nan_to_num()), name
    recorded = read_rows(FOLDER / "rows.jsonl")[0]
    for rollouts in (batch, dump):
        monitor = Monitor({name: PANEL[name] for name in METRICS})
        row = {"step": 1, **monitor(1, [rollouts], **NUMBERS)}
        assert row.keys() == recorded.keys()
        assert len(row) > 70
        for name, value in recorded.items():
            expected = math.nan if value is None else value
            assert row[name] == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), name


def test_a_resumed_monitor_raises_the_alarms_of_the_undisturbed_one(
    batch: ScoredRollouts, tmp_path: Path
) -> None:
    rows = shutil.copy(FOLDER / "rows.jsonl", tmp_path / "rows.jsonl")
    monitor = make_monitor(rows)
    monitor.load_state_dict(json.loads((FOLDER / "state.json").read_text()))
    monitor.rewind(4)
    assert list(monitor.missing) == ["overlap"]
    shifted = replace(batch, teacher_logp=(batch.teacher_logp - 4.0) * batch.sampled)
    for line in (FOLDER / "later_steps.jsonl").read_text().splitlines():
        expected = present_row(json.loads(line))
        raised, active = expected.pop("raised"), expected.pop("active")
        step = expected.pop("step")
        row = monitor(step, [shifted], **NUMBERS)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert [alarm.rule.name for alarm in monitor.raised] == raised
        assert sorted(monitor.alarms.active) == active
    assert "drift_k1" in active
    written = read_rows(rows)
    assert [row["step"] for row in written] == list(range(1, 9))
    assert len({frozenset(row) for row in written}) == 1, "one set of keys before and after"
    assert {alarm.rule.name for alarm in replay(written)} == set(active)


def test_without_its_state_the_rows_alone_give_the_same_alarms() -> None:
    state = json.loads((FOLDER / "state.json").read_text())
    alarms = Alarms()
    for row in read_rows(FOLDER / "rows.jsonl"):
        alarms.update(row)
    recomputed = json.loads(json.dumps(alarms.state_dict()))
    newer = recomputed["watches"].keys() - state["alarms"]["watches"].keys()
    assert newer == {"reward_falls"}
    for name in newer:
        del recomputed["watches"][name]
        assert recomputed["active"].pop(name, None) is None
    assert recomputed == state["alarms"]
