"""Metric logs of other trainers: the rules that apply to them raise what was put into them."""

import json
import math
from pathlib import Path

import pytest

from diagnostics.errors import InvalidInput
from diagnostics.records.metric_logs import is_metric_log, read_metric_log

TRAINER_STATE = Path(__file__).parents[1] / "formats" / "examples" / "trainer_state.json"
SERIES = {
    # transformers' trackers put "train/" before each name
    "train/loss": [2.0, 1.5, float("nan"), 1.0],
    "train/grad_norm": [1.0, 0.0, 0.0, 0.0],
    "train/learning_rate": [1e-3, 1e-3, 1e-3, 1e-3],
    "train/completions/clipped_ratio": [0.1, 0.2, 0.3, 0.4],
    "train/divergence/k1": [0.5, 0.4, 0.3, 0.2],
}
OURS = ("loss", "grad_norm", "lr", "response/truncated_share", "divergence/k1")


def rows_of_series() -> list[dict]:
    return [
        {"train/global_step": 10 * i} | {name: x[i] for name, x in SERIES.items()} for i in range(4)
    ]


def write_log(folder: Path, kind: str) -> Path:
    """Write the series as another tool would."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tb")) as writer:
            for name, values in SERIES.items():
                for i, value in enumerate(values):
                    writer.add_scalar(name, value, 10 * i)
        return folder / "tb"
    if kind == "csv":
        # a chart of several metrics: the run's name before each, and minima and maxima beside them
        names = [f"first run - {name}{end}" for name in SERIES for end in ("", "__MIN", "__MAX")]
        lines = [",".join(["train/global_step", *names])]
        for i in range(4):
            cells = [f"{x[i]}" for x in SERIES.values() for _ in range(3)]
            lines.append(",".join([f"{10 * i}", *("" if c == "nan" else c for c in cells)]))
        (folder / "chart.csv").write_text("\n".join(lines) + "\n")
        return folder / "chart.csv"
    rows = [
        {k: "NaN" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        | {"_step": i, "_timestamp": 1.7e9 + i}
        for i, row in enumerate(rows_of_series())
    ]
    if kind == "jsonl":
        (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "history.jsonl"
    (folder / "history.json").write_text(json.dumps(rows))
    return folder / "history.json"


@pytest.mark.parametrize("kind", ["tensorboard", "csv", "jsonl", "json"])
def test_a_log_is_rows_with_our_names(kind: str, tmp_path: Path) -> None:
    path = write_log(tmp_path, kind)
    assert is_metric_log(path)
    rows = read_metric_log(path)
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    for name, values in zip(OURS, SERIES.values(), strict=True):
        for row, value in zip(rows, values, strict=True):
            if kind == "csv" and math.isnan(value):
                assert name not in row
            else:
                assert row[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name


def test_the_state_of_a_trl_run_has_its_numbers() -> None:
    history = json.loads(TRAINER_STATE.read_text())["log_history"]
    assert is_metric_log(TRAINER_STATE)
    rows = read_metric_log(TRAINER_STATE)
    assert [row["step"] for row in rows] == [1, 2]
    for row, entry in zip(rows, history[:2], strict=True):
        assert row["response/truncated_share"] == entry["completions/clipped_ratio"]
        assert row["response/length"] == entry["completions/mean_length"]
        assert row["lr"] == entry["learning_rate"]
        assert row["grad_norm"] == entry["grad_norm"]
        assert row["response/reward"] == entry["reward"]
        assert row["entropy"] == entry["entropy"]


def test_what_is_no_log_or_has_no_steps_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"loss": 1.0, "grad_norm": 2.0}\n')
    assert is_metric_log(path)
    with pytest.raises(
        InvalidInput, match=r"no column of steps \(step, .*\) among loss, grad_norm"
    ):
        read_metric_log(path)
    path.with_suffix(".csv").write_text("loss,grad_norm\n1,2\n")
    with pytest.raises(InvalidInput, match="no column of steps"):
        read_metric_log(path.with_suffix(".csv"))
    path.write_text('{"step": 1.5, "loss": 1.0}\n')
    with pytest.raises(InvalidInput, match=r"the step 1\.5 is not an integer"):
        read_metric_log(path)
    path.with_suffix(".json").write_text('{"log_history": 3}')
    with pytest.raises(InvalidInput, match="log_history 3 is not a list"):
        read_metric_log(path.with_suffix(".json"))
    path.with_suffix(".json").write_text('{"log_history": []}')
    with pytest.raises(InvalidInput, match="holds no rows"):
        read_metric_log(path.with_suffix(".json"))
    for row in ({"tokens": [1], "step": 1}, {"step": 1, "prompt": "a", "completion": "b"}, [3]):
        path.write_text(json.dumps(row) + "\n")
        assert not is_metric_log(path)
    assert not is_metric_log(tmp_path)
    assert not is_metric_log(tmp_path / "missing.jsonl")
