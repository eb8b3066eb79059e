"""Runs with a remote teacher: equal to a local one, server restarts, unsupported settings."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from opd.analysis.continuation import probe_continuation
from opd.analysis.own_prefix import probe_own_prefix
from opd.config.settings import Config, TaskSettings
from opd.models.loading import eos_ids, load_model
from opd.serving import json_endpoint
from opd.training.train import train
from tests.helpers.runs import rows, settings
from tests.helpers.servers.chosen_ids import GenerateTeacher
from tests.helpers.servers.teacher_server import FakeTeacher, drop_connection, serve

SHORT = {
    "steps": 3,
    "full_metrics_every": 2,
    "eval_every": 0,
    "save_every": 3,
    "save_batch_every": 1,
}


@pytest.fixture
def teacher(tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> FakeTeacher:
    monkeypatch.setattr(json_endpoint, "FIRST_RETRY_DELAY", 0.02)
    monkeypatch.setenv(json_endpoint.KEY_VARIABLE, "hush-hush")
    return FakeTeacher(tiny_pair[1])


def remote_config(pair: tuple[Path, Path], out: Path, url: str, **changes: object) -> Config:
    return replace(settings(pair, out, **changes), teacher=url)


def assert_close_rows(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Compare common metrics; rows with a remote teacher lack only unsupported metrics."""
    assert len(actual) == len(expected)
    for actual_row, expected_row in zip(actual, expected, strict=True):
        assert set(actual_row) <= set(expected_row)
        for name in ("loss", "grad_norm", "divergence/k1", "signal/negative_share"):
            assert name in actual_row
        common_values = {
            k: (actual_row[k], expected_row[k])
            for k in actual_row
            if isinstance(actual_row[k], float)
        }
        for name, (a, b) in common_values.items():
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
    tiny_pair: tuple[Path, Path], teacher: FakeTeacher, tmp_path: Path, changes: dict[str, object]
) -> None:
    local = train(settings(tiny_pair, tmp_path / "local", **(SHORT | changes))).folder
    with serve(teacher) as url:
        far = train(remote_config(tiny_pair, tmp_path / "far", url, **(SHORT | changes))).folder
    assert json.loads((far / "config.json").read_text())["teacher"] == url
    assert_close_rows(rows(far), rows(local))
    assert rows(local)[0]["divergence/reverse_kl"] > 0
    assert "divergence/reverse_kl" not in rows(far)[0]
    for path in far.rglob("*"):
        assert path.is_dir() or b"hush-hush" not in path.read_bytes()


@pytest.mark.parametrize("objective", ["student_topk", "union_topk_and_sampled"])
def test_a_run_on_the_students_ids_is_that_with_the_teacher_at_hand(
    tiny_pair: tuple[Path, Path], teacher: FakeTeacher, tmp_path: Path, objective: str
) -> None:
    changes = SHORT | {"objective": objective}
    local = train(settings(tiny_pair, tmp_path / "local", **changes)).folder
    with serve(GenerateTeacher(tiny_pair[1])) as url:
        far = train(remote_config(tiny_pair, tmp_path / "far", url, **changes)).folder
    assert_close_rows(rows(far), rows(local))
    with serve(teacher) as url, pytest.raises(ValueError, match="cannot score ids that"):
        train(remote_config(tiny_pair, tmp_path / "older", url, **changes))
    assert not (tmp_path / "older" / "rows.jsonl").exists()


def test_a_run_reads_the_teacher_at_the_eos_that_it_is_told(
    tiny_pair: tuple[Path, Path], teacher: FakeTeacher, tmp_path: Path
) -> None:
    fake, eos = GenerateTeacher(tiny_pair[1]), fake_eos(teacher)
    changes = SHORT | {"map_eos": True, "teacher_eos": (9,), "max_response": 40}
    with serve(fake) as url:
        train(remote_config(tiny_pair, tmp_path / "run", url, **changes))
        beyond = remote_config(
            tiny_pair, tmp_path / "beyond", url, **(changes | {"teacher_eos": (261,)})
        )
        with pytest.raises(ValueError, match="teacher_eos has the id 261"):
            train(beyond)
    asked = [x for x in fake.requests if "token_ids" in x and len(x["token_ids"]) != 32]
    last_rows = [x["sampling_params"]["prompt_logprob_token_ids"][-1] for x in asked]
    assert last_rows
    assert all(row == [9, x["token_ids"][-1]] for row, x in zip(last_rows, asked, strict=True))
    assert {x["token_ids"][-1] for x in asked} <= set(eos)


def fake_eos(teacher: FakeTeacher) -> list[int]:
    """Ids that end the student's responses, which has the teacher's tokenizer."""
    return [teacher.tokenizer.eos_token_id, *eos_ids(teacher.tokenizer, teacher.network)]


@pytest.mark.parametrize("objective", ["teacher_topk", "union_topk"])
def test_a_restart_in_the_middle_changes_nothing(
    tiny_pair: tuple[Path, Path], teacher: FakeTeacher, tmp_path: Path, objective: str
) -> None:
    options = SHORT | {"objective": objective}
    if objective == "union_topk":
        teacher = GenerateTeacher(tiny_pair[1])
    num_requests, port = len(teacher.requests), 0

    def serve_with_restart() -> None:
        with serve(teacher, port):
            while len(teacher.requests) < num_requests + 5:
                time.sleep(0.005)
        time.sleep(0.2)
        with serve(teacher, port):
            finished.wait(60)

    with serve(teacher) as url:
        reference_folder = train(
            remote_config(tiny_pair, tmp_path / "whole", url, **options)
        ).folder
    num_requests, port = len(teacher.requests), int(url.split(":")[2].removesuffix("/v1"))
    finished = threading.Event()
    thread = threading.Thread(target=serve_with_restart)
    thread.start()
    try:
        restarted_folder = train(
            remote_config(tiny_pair, tmp_path / "again", url, **options)
        ).folder
    finally:
        finished.set()
        thread.join()
    assert rows(restarted_folder) == rows(reference_folder)


def test_a_run_whose_server_stays_away_stops_whole_and_resumes(
    tiny_pair: tuple[Path, Path], teacher: FakeTeacher, tmp_path: Path
) -> None:
    # with rescore_every 0 every step sends the same number of requests
    options = SHORT | {"steps": 4, "save_every": 1, "rescore_every": 0}
    with serve(teacher) as url:
        reference_folder = train(
            remote_config(tiny_pair, tmp_path / "whole", url, **options)
        ).folder
        requests_per_step = (len(teacher.requests) - 3) // 4
        # fail in the third step
        teacher.faults = [lambda body: (200, {}, body)] * (3 + 2 * requests_per_step + 1) + [
            drop_connection
        ] * 1000
        config = remote_config(tiny_pair, tmp_path / "cut", url, teacher_timeout=2.0, **options)
        with pytest.raises(RuntimeError, match="resume from the last checkpoint"):
            train(config)
        assert [row["step"] for row in rows(tmp_path / "cut")] == [0, 1]
        last = max((tmp_path / "cut" / "checkpoints").iterdir())
        assert last.name == "step_000002"
        (shard,) = (last / "optimizer").iterdir()
        optimizer_state = load_file(shard)
        assert {float(x) for name, x in optimizer_state.items() if name.endswith("step")} == {2.0}
        teacher.faults = []
        network, teacher.network = teacher.network, FakeTeacher(tiny_pair[0]).network
        with pytest.raises(RuntimeError, match="not the same model as at the start"):
            train(config)
        teacher.network = network
        train(config)
    assert rows(tmp_path / "cut") == rows(reference_folder)


def test_a_mixed_step_of_both_kinds_of_teacher(
    tiny_pair: tuple[Path, Path], teacher: FakeTeacher, tmp_path: Path
) -> None:
    options = SHORT | {"task_order": "mixed", "prompts_per_step": 4}

    def run(name: str, second_teacher: str) -> Path:
        tasks = (
            TaskSettings(name="near", task="lab", teacher=str(tiny_pair[0])),
            TaskSettings(name="far", task="lab", teacher=second_teacher, max_response=9),
        )
        return train(settings(tiny_pair, tmp_path / name, tasks=tasks, **options)).folder

    local = run("local", str(tiny_pair[1]))
    with serve(teacher) as url:
        assert_close_rows(rows(run("both", url)), rows(local))


UNSUPPORTED_SETTINGS = {
    "full": ({"objective": "full_reverse_kl"}, "its full distribution"),
    "mean_future": ({"objective": "mean_future", "gamma": 0.5}, "its full distribution"),
    "local_kl": ({"objective": "sampled_token", "baseline": "local_kl"}, "its full distribution"),
    "temperature": ({"temperature": 0.7}, "servers return log-probabilities at 1"),
    "map_eos": ({"map_eos": True}, "set teacher_eos to them"),
    "entropy_top_fraction": ({"entropy_top_fraction": 0.5}, "entropy_top_fraction 1"),
    "probe": ({"probe_every": 2}, "hidden states"),
}


@pytest.mark.parametrize(
    ("changes", "message"), UNSUPPORTED_SETTINGS.values(), ids=UNSUPPORTED_SETTINGS
)
def test_what_a_server_cannot_tell_is_refused_before_anything(
    tiny_pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    nowhere = "http://127.0.0.1:9/v1"
    with pytest.raises(ValueError, match=message) as caught:
        train(remote_config(tiny_pair, tmp_path / "run", nowhere, teacher_timeout=1.0, **changes))
    assert nowhere in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_commands_that_need_weights_say_so(
    tiny_pair: tuple[Path, Path], teacher: FakeTeacher, tmp_path: Path
) -> None:
    with serve(teacher) as url:
        run = train(
            remote_config(tiny_pair, tmp_path / "run", url, **(SHORT | {"steps": 1}))
        ).folder
        with pytest.raises(ValueError, match="weights of its own in this process"):
            probe_own_prefix(run)
        with pytest.raises(ValueError, match="weights of its own in this process"):
            probe_continuation(run, [0], 2)
        with pytest.raises(ValueError, match="is a server, which provides neither weights"):
            load_model(url, "cpu", "float32")
        long = remote_config(tiny_pair, tmp_path / "long", url, max_response=200)
        with pytest.raises(ValueError, match="--max-model-len 265"):
            train(long)
