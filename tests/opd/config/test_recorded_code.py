"""A record, which may be a stranger's, chooses no code that runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from diagnostics.errors import InvalidInput
from opd.analysis.probed_run import read_probed_config
from opd.cli.doctor import DoctorOptions, run_checks
from opd.cli.train import parse_arguments
from opd.config.files import to_flat, to_toml
from opd.config.settings import Config, TaskSettings, with_settings

FUNCTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "FILE:f"}, "objective"),
    "second metric": ({"metrics": ("FILE:f", "FILE:g")}, "metrics"),
    "grader": ({"grader": "FILE:f"}, "grader"),
    "games": ({"task": "env:FILE:f"}, "task"),
    "grader of a task": (
        {"tasks": (TaskSettings(name="a", task="lab", grader="FILE:f"),)},
        "grader",
    ),
    "second task's games": (
        {
            "tasks": (
                TaskSettings(name="a", task="lab"),
                TaskSettings(name="b", task="env:FILE:f"),
            )
        },
        "task",
    ),
}
"""Settings that name a function, and the setting that messages name."""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A module that leaves a mark when it is imported."""
    path = tmp_path / "code_of_a_stranger.py"
    mark = tmp_path / "ran"
    path.write_text(f"open({str(mark)!r}, 'w')\ndef f(*values):\n    return None\n")
    return path


def write_record(folder: Path, code: Path, changes: dict[str, Any]) -> tuple[Path, Config]:
    """Write config.json of a run that needs no model, with FILE in `changes` as `code`."""
    config = with_settings(Config(student="absent", teacher="absent", out="run"), **changes)
    text = json.dumps(to_flat(config)).replace("FILE", str(code))
    (folder / "config.json").write_text(text)
    return folder / "config.json", config


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_of_a_record_needs_the_users_word(case: str, code: Path, tmp_path: Path) -> None:
    changes, setting = FUNCTIONS[case]
    path, _ = write_record(tmp_path, code, changes)
    words = rf"config.json names the {setting} .*{code.name}:f, a function whose code would run"
    with pytest.raises(InvalidInput, match=words):
        parse_arguments(["--config", str(path), "--lr", "1e-4"])
    with pytest.raises(InvalidInput, match=words):
        run_checks(DoctorOptions(config=path))
    assert not (tmp_path / "ran").exists()
    options = parse_arguments(["--config", str(path), "--trust-remote-code"])
    assert options.settings.hardware.trust_remote_code


def test_a_function_that_the_user_replaces_is_not_the_records(code: Path, tmp_path: Path) -> None:
    path, _ = write_record(tmp_path, code, {"grader": "FILE:f", "objective": "FILE:f"})
    replaced = ["--grader", "exact", "--objective=sampled_token"]
    settings = parse_arguments(["--config", str(path), *replaced]).settings
    assert (settings.data.grader, settings.objective.objective) == ("exact", "sampled_token")
    with pytest.raises(InvalidInput, match="names the objective"):
        parse_arguments(["--config", str(path), *replaced[:2]])
    path, _ = write_record(tmp_path, code, FUNCTIONS["second task's games"][0])
    (tmp_path / "tasks.toml").write_text('[[tasks]]\nname = "own"\ntask = "lab"\n')
    options = parse_arguments(["--config", str(path), "--tasks", str(tmp_path / "tasks.toml")])
    assert [task.name for task in options.settings.tasks] == ["own"]


def test_a_permission_in_a_record_counts_for_nothing(code: Path, tmp_path: Path) -> None:
    path, config = write_record(tmp_path, code, {"trust_remote_code": True, "metrics": ("FILE:f",)})
    with pytest.raises(InvalidInput, match="names the metrics"):
        parse_arguments(["--config", str(path)])
    arguments = ["--config", str(path), "--metrics"]
    assert not parse_arguments(arguments).settings.hardware.trust_remote_code
    assert not read_probed_config(tmp_path, False).hardware.trust_remote_code
    # a file of settings that is no record is the user's own
    own = tmp_path / "own.toml"
    own.write_text(to_toml(with_settings(config, metrics=(f"{code}:f",))))
    settings = parse_arguments(["--config", str(own)]).settings
    assert settings.hardware.trust_remote_code
    assert settings.record.metrics == (f"{code}:f",)
    assert not (tmp_path / "ran").exists()


def test_names_that_are_no_functions_are_read(code: Path, tmp_path: Path) -> None:
    changes = {
        "task": "hf:owner/data:train",
        "eval_task": "gsm8k:x.jsonl",
        "teacher": "http://h:1/v1",
    }
    path, _ = write_record(tmp_path, code, changes)
    assert parse_arguments(["--config", str(path)]).settings.data.task == changes["task"]
