"""Exit of commands: one line for user errors, a traceback for bugs, no output for a closed pipe."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from diagnostics.errors import BrokenPackage, InvalidInput, MissingFile, MissingPackage
from diagnostics.io import files
from diagnostics.io.command import EXIT_CLOSED_PIPE, EXIT_INTERRUPTED, run_command
from diagnostics.io.packages import load_package
from diagnostics.records.rows import read_rows
from tests.helpers.paths import ROOT
from tests.helpers.warm_process import run_module, run_process


def raised_by_command(error: BaseException) -> BaseException:
    def command() -> None:
        raise error

    with pytest.raises(BaseException) as raised:  # noqa: PT011
        run_command("opd x", command)
    return raised.value


def test_errors_for_the_user_are_one_line_and_ours_keep_their_traceback() -> None:
    for error in (InvalidInput("a is 1"), MissingFile("b"), PermissionError(13, "denied", "c")):
        exit_error = raised_by_command(error)
        assert isinstance(exit_error, SystemExit)
        assert exit_error.__cause__ is error
        assert str(exit_error.code).startswith("opd x: ")
        assert "\n" not in str(exit_error.code)
    assert str(raised_by_command(IsADirectoryError(21, "Is a directory", "out")).code) == (  # type: ignore[attr-defined]
        "opd x: out: Is a directory; give a file, not a folder"
    )
    program_errors = [
        ValueError("a"),
        KeyError("b"),
        RuntimeError("c"),
        OSError("d"),
        TypeError("e"),
    ]
    for error in [
        *program_errors,
        FileNotFoundError(2, "no such file", "own/data"),
        PermissionError(13, "x"),
    ]:
        assert raised_by_command(error) is error
    assert raised_by_command(KeyboardInterrupt()).code == EXIT_INTERRUPTED  # type: ignore[attr-defined]
    assert raised_by_command(SystemExit(3)).code == 3  # type: ignore[attr-defined]


def test_a_reader_that_stops_reading_is_no_error() -> None:
    """Like `opd --help | head -0`: the pipe is closed before anything is written."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run(
        [sys.executable, "-m", "opd.cli.main", "--help"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    os.close(write_end)
    assert process.stderr == b""
    assert process.returncode == EXIT_CLOSED_PIPE


WRITING = (
    ("opd.cli.main", "train", "smoke", "--show"),
    ("opd.cli.main", "study", "list"),
    ("synthetic.runner.run", "list"),
)
"""Commands with output."""
FAILING = {
    ("figures", "pie"): "opd figures: unknown figure 'pie'; known: ",
    ("synthetic.runner.run", "run", "magic"): "opd study: unknown experiment 'magic'; known: ",
    ("opd.cli.main", "figures", "pie"): "opd figures: unknown figure 'pie'; known: ",
    ("opd.cli.main", "diagnose", "none.jsonl"): "opd diagnose: none.jsonl ",
    ("opd.cli.main", "eval", "m", "--against", "none"): "opd eval: none does not exist",
    ("opd.cli.main", "eval", "m", "--template", "{"): "--template is not JSON",
    ("opd.cli.main", "report", "none"): "opd report: none is not a run folder",
}
"""Commands with a mistake, and the message."""


@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_no_command_minds_a_closed_pipe(tmp_path: Path, words: tuple[str, ...]) -> None:
    process = run_process(tmp_path, partial(run_module, words, closed_pipe=True))
    assert process.stderr == ""
    assert process.exit_code == EXIT_CLOSED_PIPE


@pytest.mark.parametrize("words", FAILING, ids=" ".join)
def test_every_entry_point_answers_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    process = run_process(tmp_path, run_module, words)
    assert process.exit_code != 0
    assert "Traceback" not in process.stderr
    assert FAILING[words] in process.stderr.strip().splitlines()[-1]


def test_a_package_that_is_missing_and_one_that_is_broken_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = {
        "one_broken": "raise ImportError('libfoo.so.3: cannot open')",
        "one_alone": "import a_dependency_of_it",
        "one_wrong": "1 / 0",
    }
    for name, text in broken.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "one_whole.py").write_text("value = 3")
    with pytest.raises(
        MissingPackage, match=r"a list needs one_none: pip install 'opdlab\[few\]', or wait"
    ):
        load_package("one_none.part", "a list", "few", alternative="wait")
    causes = (
        "libfoo.so.3: cannot open",
        "No module named 'a_dependency_of_it'",
        "division by zero",
    )
    for name, cause in zip(broken, causes, strict=True):
        with pytest.raises(BrokenPackage, match=f"{name}, which is installed .*{cause}") as raised:
            load_package(name, "a list", "few")
        assert raised.value.__cause__ is not None
    assert load_package("one_whole", "a list", "few").value == 3


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_logger_says_why_it_cannot_be_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd.training.trackers import open_trackers

    (tmp_path / f"{name}.py").write_text("raise ImportError('built for another numpy')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [m for m in sys.modules if m.split(".")[0] == name or "utils.tensorboard" in m]:
        monkeypatch.delitem(sys.modules, module)
    with (
        pytest.raises(BrokenPackage, match=f"the logger {name} .*built for another numpy"),
        open_trackers((name,), tmp_path, {}),
    ):
        pass
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(MissingPackage, match=rf"needs {name}: pip install 'opdlab\[{name}\]'"),
        open_trackers((name,), tmp_path, {}),
    ):
        pass


def test_rows_are_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert read_rows(str(path), {"step": int}) == read_rows(path) == [{"step": 0}, {"step": 1}]
    for line, pattern in (
        ("[1]", r"line 1 is not a JSON object: \[1\]"),
        ('{"a": 1}', "line 1: the field 'step' .an integer. is missing"),
        ('{"step": "0"}', "line 1, field step: '0' is not an integer"),
        ('{"step": true}', "line 1, field step: True is not an integer"),
        ('{"step": 0, "step": 1}', "line 1 has the duplicate field 'step'"),
        ("[" * 100_000, "line 1 is nested too deeply"),
        ("step: 0", "line 1 is not JSON"),
        ("\xff", "line 1 is not UTF-8: .* byte 0xff"),
    ):
        path.write_bytes(f'{line}\n{{"step": 2}}\n'.encode("latin-1"))
        with pytest.raises(InvalidInput, match=f"rows.jsonl.*{pattern}") as raised:
            read_rows(path, {"step": int})
        assert len(str(raised.value)) < 400
    assert read_rows(tmp_path / "none.jsonl") == []


def test_the_text_of_a_large_value_is_not_made() -> None:
    assert len(files.short_repr(["x" * 10**6] * 10**5)) <= files.MAX_VALUE_LENGTH
    assert files.short_repr([1, "a", None]) == "[1, 'a', None]"
