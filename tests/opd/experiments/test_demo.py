"""The demo at its smallest size; a second call keeps finished runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from diagnostics.records.run_tables import accuracy_gains, training_table
from opd.cli import main as cli
from opd.experiments import demo
from tests.helpers.warm_process import start_process


def run_demo(out: Path) -> str:
    command_line = [sys.executable, "-m", "opd.cli.main", "demo", "--smoke", "--out", str(out)]
    result = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_command(words: list[str]) -> None:
    """Run an `opd` command in this process, as the interpreter does that is started for it."""
    sys.argv = ["opd", *words]
    cli.main()


def test_the_demo_runs_and_keeps_finished_runs(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first_output = run_demo(tmp_path)
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) >= 4
    for row in accuracy_gains(training_table(runs)).to_dict("records"):
        line = next(x for x in first_output.splitlines() if x.startswith(row["objective"]))
        assert f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" in line
    for name in ("figures/training.png", "figures/bias_variance.pdf", "report.html"):
        assert (tmp_path / name).stat().st_size > 10_000
    stamps = {p: p.stat().st_mtime_ns for run in runs for p in run.glob("final/*")}

    def run_opd(*words: object, threads: int | None = None) -> None:
        folder = tmp_path_factory.mktemp("output")
        process = start_process(folder, run_command, [str(word) for word in words])
        assert process.wait(300) == 0, process.stderr

    # the commands of the second call are forked, which spares ten starts of an interpreter
    monkeypatch.setattr(demo, "run_opd", run_opd)
    demo.main(["--smoke", "--out", str(tmp_path)])
    second_output = capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    table = [re.sub(r"seconds .*", "", text) for text in (first_output, second_output)]
    assert table[0] == table[1]
