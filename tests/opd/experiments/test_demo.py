"""The demo at its smallest size: it resumes after a kill, and --full continues its runs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diagnostics.records.rows import read_rows
from diagnostics.records.run_tables import accuracy_gains, training_table
from opd.cli import main as cli
from opd.experiments import demo
from tests.helpers.warm_process import start_process


def demo_command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "opd.cli.main", "demo", "--smoke", "--out", str(out), *options]


def run_demo(out: Path, *options: str) -> str:
    line = demo_command(out, *options)
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"\[4/4\] figures and report: \d+ s, \d+ s since the start", result.stderr)
    return result.stdout


def run_command(words: list[str]) -> None:
    """Run an `opd` command in this process, as the interpreter does that is started for it."""
    sys.argv = ["opd", *words]
    cli.main()


def fork_command(*words: object, threads: int | None = None) -> None:
    """Run an `opd` command in a child of this process, and so of its process group."""
    child = os.fork()
    if child == 0:
        exit_code = 1
        try:
            run_command([str(word) for word in words])
            exit_code = 0
        finally:
            os._exit(exit_code)
    _, status = os.waitpid(child, 0)
    assert status == 0


def run_full_demo_in_group(out: Path) -> None:
    """Run the demo and its commands in a process group of their own."""
    os.setsid()
    demo.run_opd = fork_command
    demo.main(["--smoke", "--full", "--out", str(out)])


def kill_while_training(folder: Path, out: Path) -> None:
    """Start the demo and kill all of its processes once a run of another seed has a row."""
    demo_process = start_process(folder, run_full_demo_in_group, out)
    deadline = time.monotonic() + 300
    while not any((out / "runs").glob("*-1/rows.jsonl")):
        assert demo_process.exit_code is None, demo_process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert demo_process.process.pid is not None
    os.killpg(demo_process.process.pid, signal.SIGKILL)
    assert demo_process.wait() == -signal.SIGKILL


def rows_without_times(run: Path) -> list[dict[str, float]]:
    rows = read_rows(run / "rows.jsonl")
    timings = ("seconds/", "machine/")
    return [{k: v for k, v in row.items() if not k.startswith(timings)} for row in rows]


def test_the_demo_resumes_and_full_continues_it(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first_output = run_demo(tmp_path / "demo")
    runs = sorted((tmp_path / "demo" / "runs").iterdir())
    assert [run.name for run in runs] == ["sampled_token-0", "teacher_topk-0"]
    for row in accuracy_gains(training_table(runs)).to_dict("records"):
        line = next(x for x in first_output.splitlines() if x.startswith(row["objective"]))
        assert f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" in line
    for name in ("figures/training.png", "figures/bias_variance.pdf", "report.html"):
        assert (tmp_path / "demo" / name).stat().st_size > 10_000
    short_rows = [rows_without_times(run) for run in runs]
    assert [len(rows) for rows in short_rows] == [2, 2]

    kill_while_training(tmp_path, tmp_path / "demo")

    def run_opd(*words: object, threads: int | None = None) -> None:
        folder = tmp_path_factory.mktemp("output")
        process = start_process(folder, run_command, [str(word) for word in words])
        assert process.wait(300) == 0, process.stderr

    # from here on commands are forked, which spares the start of an interpreter each
    monkeypatch.setattr(demo, "run_opd", run_opd)
    words = ["--smoke", "--full", "--out", str(tmp_path / "demo")]
    demo.main(words)
    full_output = capsys.readouterr().out
    long_runs = sorted((tmp_path / "demo" / "runs").iterdir())
    assert [run.name for run in long_runs] == [
        f"{objective}-{seed}" for objective in ("sampled_token", "teacher_topk") for seed in (0, 1)
    ]
    assert all(len(rows_without_times(run)) == 4 for run in long_runs)
    for run, rows in zip(runs, short_rows, strict=True):
        assert rows_without_times(run)[:2] == rows

    stamps = {p: p.stat().st_mtime_ns for run in long_runs for p in run.glob("final/*")}
    demo.main(words)
    second_output = capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "finished runs are kept"
    tables = [re.sub(r"seconds .*", "", text) for text in (full_output, second_output)]
    assert tables[0] == tables[1]
