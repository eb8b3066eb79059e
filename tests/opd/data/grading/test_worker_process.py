"""The grader worker: real time and memory limits, and users' functions."""

import json
import time
from pathlib import Path

import pytest

from opd.analysis.continuation import probe_continuation
from opd.analysis.own_prefix import probe_own_prefix
from opd.config.files import to_flat
from opd.config.settings import Config, with_settings
from opd.data.grading import graders
from opd.data.grading.graders import Grade, make_grader
from opd.data.grading.worker_process import GraderWorker
from opd.data.tasks import load_task

MODULE = """
import os, signal, time

print("loaded")

def contains(response, answer):
    print("graded", response)
    return answer in response

def partial(response, answer):
    return len(response) / 4

def explained(response, answer):
    return 0.5, "too small"

def missing(response, answer):
    return float("nan")

def broken(response, answer):
    return {}[answer]

def greedy(response, answer):
    return len(bytearray(int(response) << 20))

def slow(response, answer):
    signal.signal(signal.SIGALRM, signal.SIG_IGN) if "deaf" in response else None
    time.sleep(60) if "wait" in response else None
    os._exit(3) if "die" in response else None
    return 1
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own_grader_of_a_test.py"
    path.write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    graders.grader_worker.cache_clear()
    return path


def test_the_memory_limit_applies_to_the_worker_only(module: Path) -> None:
    worker = GraderWorker(seconds=20.0, kind=f"{module}:greedy", memory=256 << 20)
    start = time.perf_counter()
    assert worker("", "64") == {"score": float(64 << 20)}
    result = worker("", "512")
    assert result is not None
    assert "MemoryError" in result["error"]
    assert worker("", "64") == {"score": float(64 << 20)}
    assert time.perf_counter() - start < 20
    worker.end()


def test_expensive_algebra_ends_within_the_time_limit() -> None:
    worker = GraderWorker(seconds=1.0)
    for answer in ("2^{2^{33}}", "(x+y+z+w)^{4000}"):
        start = time.perf_counter()
        result = worker("5", answer)
        assert result is None or not result["equal"]
        assert time.perf_counter() - start < 8
    assert worker("1/2", "0.5") == {"gold": True, "key": "1/2", "equal": True}
    worker.end()


def test_users_functions_grade(module: Path) -> None:
    for name in (f"{module}:contains", f"{module.stem}:contains"):
        grade = make_grader(name)
        assert grade("<think>7</think>it is 42", "42") == Grade(1.0, "it is 42")
        assert grade(r"7, so \boxed{7}", "42") == Grade(0.0, "7")
        assert grade("", "42") == Grade(0.0, None)
    assert make_grader(f"{module}:partial")("abc", "") == Grade(0.75, "abc")
    explained = make_grader(f"{module}:explained")("41", "42")
    assert explained == Grade(0.5, "41", "too small")
    assert explained.feedback_text() == "too small"


def test_users_functions_that_fail_are_named(module: Path) -> None:
    for name, message in (
        ("missing", "it returned nan"),
        ("broken", "KeyError: '42'"),
        ("absent", "did not start: .* has no function 'absent'; it has .*contains"),
    ):
        with pytest.raises(RuntimeError, match=f"{module.stem}.py:{name} .*{message}"):
            make_grader(f"{module}:{name}")("7", "42")
    with pytest.raises(
        RuntimeError, match=r"no_such_module:grade did not start: .*ModuleNotFoundError"
    ):
        make_grader("no_such_module:grade")("7", "42")
    with pytest.raises(FileNotFoundError, match=r"no_such\.py"):
        make_grader("no_such.py:grade")
    with pytest.raises(ValueError, match="unknown grader ':grade'"):
        make_grader(":grade")


def test_user_functions_that_hang_or_die_give_reward_0(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graders, "USER_GRADER_TIMEOUT", 0.5)
    monkeypatch.setattr("opd.data.grading.worker_process.GRACE_SECONDS", 0.5)
    grade = make_grader(f"{module}:slow")
    for response in ("wait", "deaf, wait", "die"):
        start = time.perf_counter()
        with pytest.warns(UserWarning, match="took more than 0.5 s for a response"):
            assert grade(response, "42") == Grade(0.0, None)
        assert time.perf_counter() - start < 10
        assert grade("done", "42") == Grade(1.0, "done"), "a new process is started"


def test_gym_grades_within_its_time_limit() -> None:
    worker = GraderWorker(seconds=1.0, kind="gym")
    start = time.perf_counter()
    result = worker("countdown:3:0#0", "9**9**9**9")
    assert result in (None, {"score": 0.01}, {"score": 0.0}, {"score": 0.05})
    assert time.perf_counter() - start < 20
    worker.end()


def test_records_and_data_cannot_choose_what_code_runs(module: Path, tmp_path: Path) -> None:
    """A function named by a file from somebody else is neither loaded nor called."""
    marker = tmp_path / "ran"
    module.write_text(f"open({str(marker)!r}, 'w')\n{MODULE}")
    grader_name = f"{module}:contains"
    run = tmp_path / "run"
    run.mkdir()
    config = with_settings(Config(student="s", teacher="t", out=str(run)), grader=grader_name)
    (run / "config.json").write_text(json.dumps(to_flat(config)))
    for command in (lambda: probe_own_prefix(run), lambda: probe_continuation(run, [0], 1)):
        with pytest.raises(ValueError, match=r"config.json names the grader .*:contains"):
            command()
    rows = [{"prompt": f"{i}?", "answer": "1", "grader": grader_name} for i in range(9)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"p.jsonl names the function '.*:contains' as grader"):
        load_task(str(tmp_path / "p.jsonl"), 0)
    assert not marker.exists()
    load_task(str(tmp_path / "p.jsonl"), 0, grader=grader_name)
    assert marker.exists(), "the user's own choice is loaded when the data is read"
