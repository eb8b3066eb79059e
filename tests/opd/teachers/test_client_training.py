"""Runs with a teacher on a server: the same as at hand, through restarts, and refused in time."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from opd.analysis.continuation import continuation
from opd.analysis.own_prefix import control
from opd.config.settings import Config, TaskSettings
from opd.models.loading import load
from opd.serving import json_endpoint
from opd.training.train import train
from tests.helpers.fake_teacher_server import Teacher, dropped, serving
from tests.opd.training.test_train import rows, settings

SHORT = {
    "steps": 4,
    "full_metrics_every": 2,
    "eval_every": 0,
    "save_every": 1,
    "save_batch_every": 1,
}


@pytest.fixture
def teacher(tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Teacher:
    monkeypatch.setattr(json_endpoint, "FIRST_WAIT", 0.02)
    monkeypatch.setenv(json_endpoint.KEY, "hush-hush")
    return Teacher(tiny_pair[1])


def served(pair: tuple[Path, Path], out: Path, url: str, **changes: object) -> Config:
    return replace(settings(pair, out, **changes), teacher=url)


def close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """What both rows have agrees; the server's rows lack only what it cannot tell."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert set(mine) <= set(theirs)
        for name in ("loss", "grad_norm", "divergence/k1", "signal/negative_share"):
            assert name in mine
        shared = {k: (mine[k], theirs[k]) for k in mine if isinstance(mine[k], float)}
        for name, (a, b) in shared.items():
            assert a == pytest.approx(b, rel=2e-3, abs=2e-4, nan_ok=True), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "sampled_token", "gamma": 0.5, "mask": ("role:eos",)},
        {"objective": "intersection_topk", "support_k": 16},
    ],
    ids=["teacher_topk", "sampled_token", "intersection"],
)
def test_a_run_is_that_with_the_teacher_at_hand(
    tiny_pair: tuple[Path, Path], teacher: Teacher, tmp_path: Path, changes: dict[str, object]
) -> None:
    local = train(settings(tiny_pair, tmp_path / "local", **(SHORT | changes)))
    with serving(teacher) as url:
        far = train(served(tiny_pair, tmp_path / "far", url, **(SHORT | changes)))
    assert json.loads((far / "config.json").read_text())["teacher"] == url
    close(rows(far), rows(local))
    assert "divergence/reverse_kl" in rows(local)[0]
    assert "divergence/reverse_kl" not in rows(far)[0]
    for path in far.rglob("*"):
        assert path.is_dir() or b"hush-hush" not in path.read_bytes()


def test_a_restart_in_the_middle_changes_nothing(
    tiny_pair: tuple[Path, Path], teacher: Teacher, tmp_path: Path
) -> None:
    began, port = len(teacher.asked), 0

    def restarted() -> None:
        with serving(teacher, port):
            while len(teacher.asked) < began + 5:
                time.sleep(0.005)
        time.sleep(0.5)
        with serving(teacher, port):
            done.wait(60)

    with serving(teacher) as url:
        whole = train(served(tiny_pair, tmp_path / "whole", url, **SHORT))
    began, port = len(teacher.asked), int(url.split(":")[2].removesuffix("/v1"))
    done = threading.Event()
    thread = threading.Thread(target=restarted)
    thread.start()
    try:
        again = train(served(tiny_pair, tmp_path / "again", url, **SHORT))
    finally:
        done.set()
        thread.join()
    assert rows(again) == rows(whole)


def test_a_run_whose_server_stays_away_stops_whole_and_resumes(
    tiny_pair: tuple[Path, Path], teacher: Teacher, tmp_path: Path
) -> None:
    how = SHORT | {"rescore_every": 0}  # every step asks as often as the others
    with serving(teacher) as url:
        whole = train(served(tiny_pair, tmp_path / "whole", url, **how))
        each = (len(teacher.asked) - 3) // 4
        # two steps and a part of the third
        teacher.faults = [lambda body: (200, {}, body)] * (3 + 2 * each + 1) + [dropped] * 1000
        cut = served(tiny_pair, tmp_path / "cut", url, teacher_timeout=5.0, **how)
        with pytest.raises(RuntimeError, match="goes on from the last checkpoint"):
            train(cut)
        assert [row["step"] for row in rows(tmp_path / "cut")] == [0, 1]
        last = max((tmp_path / "cut" / "checkpoints").iterdir())
        assert last.name == "step_000002"
        (shard,) = (last / "optimizer").iterdir()
        kept = load_file(shard)
        assert {float(x) for name, x in kept.items() if name.endswith("step")} == {2.0}
        teacher.faults = []
        honest, teacher.network = teacher.network, Teacher(tiny_pair[0]).network
        with pytest.raises(RuntimeError, match="another model than at the start"):
            train(cut)
        teacher.network = honest
        train(cut)
    assert rows(tmp_path / "cut") == rows(whole)


def test_a_mixed_step_of_both_kinds_of_teacher(
    tiny_pair: tuple[Path, Path], teacher: Teacher, tmp_path: Path
) -> None:
    how = SHORT | {"task_order": "mixed", "prompts_per_step": 4}

    def run(name: str, second: str) -> Path:
        tasks = (
            TaskSettings(name="near", task="lab", teacher=str(tiny_pair[0])),
            TaskSettings(name="far", task="lab", teacher=second, max_response=9),
        )
        return train(settings(tiny_pair, tmp_path / name, tasks=tasks, **how))

    local = run("local", str(tiny_pair[1]))
    with serving(teacher) as url:
        close(rows(run("both", url)), rows(local))


REFUSED = {
    "student_topk": ({"objective": "student_topk"}, "the student's ids"),
    "union_topk": ({"objective": "union_topk"}, "the student's ids"),
    "full": ({"objective": "full_reverse_kl"}, "its whole distribution"),
    "mean_future": ({"objective": "mean_future", "gamma": 0.5}, "its whole distribution"),
    "local_kl": ({"objective": "sampled_token", "baseline": "local_kl"}, "its whole distribution"),
    "temperature": ({"temperature": 0.7}, "servers tell that of 1"),
    "map_eos": ({"map_eos": True}, "map_eos off"),
    "entropy_top_fraction": ({"entropy_top_fraction": 0.5}, "entropy_top_fraction 1"),
    "probe": ({"probe_every": 2}, "hidden states"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_server_cannot_tell_is_refused_before_anything(
    tiny_pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    nowhere = "http://127.0.0.1:9/v1"
    with pytest.raises(ValueError, match=message) as caught:
        train(served(tiny_pair, tmp_path / "run", nowhere, teacher_timeout=1.0, **changes))
    assert nowhere in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_commands_that_need_weights_say_so(
    tiny_pair: tuple[Path, Path], teacher: Teacher, tmp_path: Path
) -> None:
    with serving(teacher) as url:
        run = train(served(tiny_pair, tmp_path / "run", url, **(SHORT | {"steps": 1})))
        with pytest.raises(ValueError, match="writes none here"):
            control(run)
        with pytest.raises(ValueError, match="one on a server"):
            continuation(run, [0], 2)
        with pytest.raises(ValueError, match="is a server, which shows no weights"):
            load(url, "cpu", "float32")
        long = served(tiny_pair, tmp_path / "long", url, max_response=200)
        with pytest.raises(ValueError, match="--max-model-len 265"):
            train(long)
