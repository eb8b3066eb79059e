"""The demo at its smallest size: it resumes after a kill, and --full continues its runs."""

import os
import re
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from diagnostics.errors import OperationFailed
from diagnostics.records.rows import read_rows
from diagnostics.records.run_tables import accuracy_gains, training_table
from opd.cli import main as cli
from opd.experiments import demo
from opd.experiments.subcommand import run_opd
from tests.helpers.paths import ROOT
from tests.helpers.warm_process import run_process, start_process

IMPORTED_BY_COMMANDS = (
    "figures.__main__",
    "figures.runs.training",
    "figures.study.bias_variance",
    "matplotlib.backends.backend_pdf",
    "opd.cli.lab",
    "opd.cli.train",
    "pandas",
    "synthetic.experiments.bias_variance",
    "synthetic.runner.run",
)
"""What the commands of the demo import, once for all of its forks."""


def run_command(words: list[str]) -> None:
    """Run an `opd` command in this process, with its output on stderr."""
    os.dup2(2, 1)
    sys.argv = ["opd", *words]
    cli.main()


def fork_command(*words: object, threads: int | None = None) -> None:
    """Run an `opd` command in a child of this process, and so in its process group.

    With one job, its cells or models are computed in the child: workers would be interpreters.
    """
    if words[0] in ("study", "lab"):
        words += ("--jobs", "1")
    child = os.fork()  # in threads, in which `multiprocessing` would lose the status of a child
    if child == 0:
        exit_code = 1
        try:
            run_command([str(word) for word in words])
            exit_code = 0
        finally:
            os._exit(exit_code)
    _, status = os.waitpid(child, 0)
    assert status == 0


def run_demo_in_group(out: Path, *options: str) -> None:
    """Run the demo and its commands in a process group of their own.

    The commands are forks, which spares each the start of an interpreter and most imports;
    `test_a_command_is_a_process_of_its_own` is about the processes of the demo.
    """
    for name in IMPORTED_BY_COMMANDS:
        import_module(name)
    os.setsid()
    demo.run_opd = fork_command
    demo.main(["--smoke", "--out", str(out), *options])


def run_demo(folder: Path, *options: str) -> str:
    """Run the demo into a folder's folder "demo"; returns its standard output."""
    process = run_process(folder, run_demo_in_group, folder / "demo", *options)
    assert process.exit_code == 0, process.stderr
    assert re.search(r"\[4/4\] figures and report: \d+ s, \d+ s since the start", process.stderr)
    return process.stdout


def kill_while_training(folder: Path, out: Path) -> None:
    """Start the demo and kill all of its processes once a run of another seed has a row."""
    demo_process = start_process(folder, run_demo_in_group, out, "--full")
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


def test_the_demo_resumes_and_full_continues_it(tmp_path: Path) -> None:
    first_output = run_demo(tmp_path)
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

    full_output = run_demo(tmp_path, "--full")
    long_runs = sorted((tmp_path / "demo" / "runs").iterdir())
    assert [run.name for run in long_runs] == [
        f"{objective}-{seed}" for objective in ("sampled_token", "teacher_topk") for seed in (0, 1)
    ]
    assert all(len(rows_without_times(run)) == 4 for run in long_runs)
    for run, rows in zip(runs, short_rows, strict=True):
        assert rows_without_times(run)[:2] == rows

    stamps = {p: p.stat().st_mtime_ns for run in long_runs for p in run.glob("final/*")}
    second_output = run_demo(tmp_path, "--full")
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "finished runs are kept"
    tables = [re.sub(r"seconds .*", "", text) for text in (full_output, second_output)]
    assert tables[0] == tables[1]


def test_a_command_is_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has the threads that it is given, and writes to stderr; a failure names the command."""
    report = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.getpid(), file=sys.stderr)"
    (tmp_path / "sitecustomize.py").write_text(report)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    run_opd("--version", threads=3)
    out, err = capfd.readouterr()
    (threads, process), version = (line.split() for line in err.splitlines())
    assert (out, threads, version[0]) == ("", "3", "opdlab")
    assert int(process) != os.getpid()
    with pytest.raises(OperationFailed, match="`opd lab --no-option` exited with code 2"):
        run_opd("lab", "--no-option")
