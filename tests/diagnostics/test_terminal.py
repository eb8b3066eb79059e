"""Control characters in names, records, templates and errors are escaped for the terminal."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from diagnostics import errors
from diagnostics.records import sinks
from diagnostics.terminal import escape_control_chars, protect_terminal
from opd.cli import main

CLEAR = "\x1b[2J\x1b[31mALL OK"
HIDDEN = ("\x1b", "\x9b", "\x07", "\x08", "\r", "\x7f", "\u202e", "\u2066", "\u200b", "\ufeff")


def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[io.StringIO, io.StringIO]:
    """Return stdout and stderr as a command has them, on top of plain buffers."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    protect_terminal()
    return out, err


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Run a command in this process; return its final message as Python prints it."""
    monkeypatch.setattr(sys, "argv", ["opd", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    return "" if exit_info.value.code is None else str(exit_info.value.code)


def test_each_hidden_character_is_spelled_out() -> None:
    for character in HIDDEN:
        assert escape_control_chars(f"a{character}b") == f"a\\u{ord(character):04x}b"
    assert escape_control_chars("\ud800\U000e0001") == "\\ud800\\U000e0001"
    assert escape_control_chars("é漢 a\n\tb") == "é漢 a\n\tb"


def test_both_streams_of_a_command_write_visible_text(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = streams(monkeypatch)
    print("name", CLEAR, "one\rtwo", sep="  ")
    sys.stdout.writelines([CLEAR, "\n"])
    tqdm.write(CLEAR, file=sys.stderr)
    assert out.getvalue().count("\\u001b[2J") == 2
    assert "one\\u000dtwo" in out.getvalue()
    assert err.getvalue().count("\\u001b[2J") == 1
    assert "\x1b" not in out.getvalue() + err.getvalue()
    protect_terminal()  # a second call does not escape twice
    print("\x1b")
    assert out.getvalue().endswith("\\u001b\n")


def test_progress_bars_still_move_and_their_names_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = streams(monkeypatch)
    with tqdm(total=2, desc=CLEAR, file=sys.stderr, mininterval=0) as bar:
        bar.update(1)
    assert err.getvalue().startswith("\r\\u001b[2J\\u001b[31mALL OK:   0%")
    assert "\x1b" not in err.getvalue()
    sys.stderr.write("\x1b[A\x1b[A")
    assert err.getvalue().endswith("\x1b[A\x1b[A")


def test_a_terminal_for_bars_is_none_for_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setattr(sys, "stderr", Screen())
    protect_terminal()
    assert (sys.stdout.isatty(), sys.stderr.isatty()) == (False, True)


def test_a_message_for_the_user_is_visible_without_a_command() -> None:
    """A script that catches the error prints the same text as a command."""
    for kind in (
        errors.InvalidInput,
        errors.OperationFailed,
        errors.MissingFile,
        errors.MissingPackage,
    ):
        assert str(kind(f"{CLEAR} is not known")) == "\\u001b[2J\\u001b[31mALL OK is not known"


def test_a_console_sink_shows_the_names_of_columns(capsys: pytest.CaptureFixture[str]) -> None:
    sinks.to_console([CLEAR])(3, {CLEAR: 1.5})
    assert capsys.readouterr().out == "step 3  \\u001b[2J\\u001b[31mALL OK 1.5\n"


def test_names_from_anywhere_are_spelled_out_by_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / f"run{CLEAR}"
    folder.mkdir()
    record = {"tokens": [1, 2], "student_logp": [-1.0, -1.0], "teacher_logp": [-1.0, -1.0]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(record | {CLEAR: 1}) + "\n") * 2)
    tasks = tmp_path / "tasks.toml"
    tasks.write_text('[[tasks]]\nname = "a\\u001b[2J"\n')
    messages = [
        run(monkeypatch, "report", folder),
        run(monkeypatch, "diagnose", tmp_path / f"{CLEAR}.jsonl"),
        run(monkeypatch, "eval", tmp_path / f"model{CLEAR}", "--out", tmp_path / "x.json"),
        run(monkeypatch, "figures", CLEAR),
        run(monkeypatch, "figures", "loop", "--table", tmp_path / CLEAR),
        run(monkeypatch, "report", folder, f"--{CLEAR}"),
        run(monkeypatch, "train", "smoke", "--tasks", tasks),
        run(monkeypatch, "train", "smoke", f"--{CLEAR}", "3"),
        run(monkeypatch, CLEAR),
        run(monkeypatch, "train", CLEAR),
    ]
    monkeypatch.setattr(sys, "argv", ["opd", "diagnose", str(rows)])
    main.main()
    printed = capsys.readouterr()
    all_output = "".join((*messages, printed.out, printed.err))
    assert "\x1b" not in all_output
    assert all_output.count("\\u001b[2J") + all_output.count("\\x1b[2J") >= len(messages)


def test_warnings_and_the_tracebacks_of_other_exceptions_are_visible() -> None:
    """A traceback is printed after the command has ended."""
    code = (
        "import sys, types, warnings, opd.cli.main as cli\n"
        f"def fail(argv): warnings.warn({CLEAR!r}); raise RuntimeError({CLEAR!r})\n"
        "cli.COMMANDS['fail'] = ('failing', '')\n"
        "sys.modules['failing'] = types.SimpleNamespace(main=fail)\n"
        "sys.argv = ['opd', 'fail']; cli.main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert "RuntimeError: \\u001b[2J" in process.stderr
    assert "UserWarning: \\u001b[2J" in process.stderr
    assert "\x1b" not in process.stderr


def test_no_text_is_lost_or_changed_that_is_safe() -> None:
    text = "held-out accuracy 0.25 [0.10, 0.49] ± é漢\n"
    assert escape_control_chars(text) == text
    assert escape_control_chars("") == ""
