"""A restarted run loses nothing of its record; damage, gaps and changes are reported."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diagnostics.errors import InvalidInput
from diagnostics.records import rows as records
from opd.config.files import read_config
from opd.config.settings import Config
from opd.models.loading import load_model
from opd.report.run_data import read_run
from opd.runs import restart
from opd.runtime.manifest import find_damage, write_manifest
from opd.training.train import train
from tests.helpers.runs import rows, settings
from tests.helpers.warm_process import run_process


@pytest.fixture(scope="module")
def four(tiny_pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with checkpoints at 2 and 4; read-only."""
    return train(settings(tiny_pair, tmp_path_factory.mktemp("four") / "run")).folder


@pytest.fixture(scope="module")
def six(tiny_pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with six steps; read-only."""
    return train(settings(tiny_pair, tmp_path_factory.mktemp("six") / "run", steps=6)).folder


@pytest.fixture
def run(four: Path, tmp_path: Path) -> Path:
    """A copy of the run of four steps."""
    return shutil.copytree(four, tmp_path / "run")


def resume(tiny_pair, run: Path, start_over: bool = False, **changes: object) -> Path:
    return train(settings(tiny_pair, run, **({"steps": 6} | changes)), start_over).folder


def assert_same_run(run: Path, reference: Path) -> None:
    assert rows(run) == rows(reference)
    assert records.read_rows(run / "evals.jsonl") == records.read_rows(reference / "evals.jsonl")
    names = [sorted(path.name for path in (x / "batches").iterdir()) for x in (run, reference)]
    assert names[0] == names[1]
    final = [(x / "final" / "model.safetensors").read_bytes() for x in (run, reference)]
    assert final[0] == final[1]


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder except its lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_last_two_checkpoints_are_kept_and_list_their_files(six: Path) -> None:
    saved_checkpoints = sorted((six / "checkpoints").iterdir())
    assert [path.name for path in saved_checkpoints] == ["step_000004", "step_000006"]
    for path in saved_checkpoints:
        manifest = json.loads((path / "files.json").read_text())
        assert set(manifest) == set(content(path)) - {"files.json"}
        assert "state.json" in manifest
        assert any(name.startswith("optimizer/") for name in manifest)
        assert find_damage(path) == ""


# --- a record without its checkpoints -----------------------------------------------------------


@pytest.mark.parametrize("loss", ["deleted", "moved", "rows too", "settings changed"])
def test_a_record_without_checkpoints_is_refused_and_stays(
    tiny_pair, run: Path, tmp_path: Path, loss: str
) -> None:
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    if loss == "deleted":
        shutil.rmtree(tmp_path / "elsewhere")
    if loss == "rows too":
        (run / "rows.jsonl").unlink()
        (run / "evals.jsonl").unlink()
    content_before = content(run)
    changes = {"save_every": 100} if loss == "settings changed" else {}
    with pytest.raises(InvalidInput, match=r"no checkpoint to resume from.*--anew"):
        resume(tiny_pair, run, **changes)
    assert content(run) == content_before
    if loss == "moved":
        (tmp_path / "elsewhere").rename(run / "checkpoints")
        assert [row["step"] for row in rows(resume(tiny_pair, run))] == list(range(6))


def test_a_finished_run_without_checkpoints_has_nothing_to_do(
    tiny_pair, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    content_before = content(run)
    resume(tiny_pair, run, steps=4)
    assert content(run) == content_before
    assert f"{run} is already finished (4 steps)" in capfd.readouterr().err


def test_a_run_that_took_more_steps_keeps_their_number(tiny_pair, run: Path) -> None:
    """As where `opd demo` continues the longer runs of an older one."""
    rows_before = rows(run)
    resume(tiny_pair, run, steps=2)
    assert rows(run) == rows_before
    assert read_config(run / "config.json").steps == len(rows_before) == 4


def test_anew_moves_the_record_aside(tiny_pair, run: Path, six: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    content_before = content(run)
    resume(tiny_pair, run, start_over=True)
    assert content(run / "earlier" / "001") == content_before
    assert_same_run(run, six)
    resume(tiny_pair, run, start_over=True, lr=0.5, steps=1)  # other settings as well
    assert content(run / "earlier" / "001") == content_before
    assert len(rows(run / "earlier" / "002")) == 6


def test_without_rows_a_folder_with_checkpoints_keeps_its_settings(tiny_pair, run: Path) -> None:
    (run / "rows.jsonl").unlink()
    (run / "evals.jsonl").unlink()
    with pytest.raises(InvalidInput, match=r"other settings \(lr: 0\.001 -> 0\.01\).*--anew"):
        resume(tiny_pair, run, lr=0.01)


def test_a_folder_of_another_program_is_left_as_it_is(tiny_pair, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pair[0], model)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"student": "s", "tea')
    for folder in (model, broken):
        before = content(folder)
        for start_over in (False, True):
            config = settings(tiny_pair, folder, steps=1)
            with pytest.raises(InvalidInput, match=r"config.json is not that of a run.*--out"):
                train(config, start_over)
            assert content(folder) == before


def test_an_out_that_cannot_be_a_folder_is_named(tiny_pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, obstacle in (("file", "file"), ("file/run", "file"), ("link", "link")):
        words = rf"out is '.*{name}', but .*{obstacle}.* is no folder; choose another --out"
        with pytest.raises(InvalidInput, match=words):
            train(settings(tiny_pair, tmp_path / name, steps=1))
    assert (tmp_path / "file").read_text() == "x"


# --- rows, evaluations and batches beyond or before the checkpoint ------------------------------


def test_what_comes_after_the_checkpoint_is_computed_again_and_kept(
    tiny_pair, run: Path, six: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints" / "step_000004")
    content_before = content(run)
    resume(tiny_pair, run)
    assert_same_run(run, six)
    dropped = run / "dropped" / "before_start_002"
    lines = content_before["rows.jsonl"].decode().splitlines()
    assert (dropped / "rows.jsonl").read_text().splitlines() == lines[2:]
    assert [row["step"] for row in records.read_rows(dropped / "evals.jsonl")] == [4]
    name = "batches/step_000002.safetensors"
    assert (dropped / name).read_bytes() == content_before[name]
    assert f"2 rows from step 2 on will be recomputed; the old ones are in {dropped}" in (
        capfd.readouterr().err
    )


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    tiny_pair, run: Path, six: Path
) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "final")
    lines = (run / "rows.jsonl").read_text().splitlines(keepends=True)
    (run / "rows.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    resume(tiny_pair, run)
    assert_same_run(run, six)
    dropped = run / "dropped" / "before_start_002"
    assert (dropped / "rows.jsonl").read_text() == "".join(lines[:2])


@pytest.mark.parametrize(
    ("kept_steps", "steps", "message"),
    [
        ([0, 1], [[2, 3]], "lacks the rows of steps 2 to 3"),
        ([], [[0, 3]], "lacks the rows of steps 0 to 3"),
        ([0, 2], [[1, 1], [3, 3]], "lacks the rows of steps 1, 3"),
    ],
)
def test_a_gap_in_the_record_is_said_and_recorded(
    tiny_pair, run: Path, kept_steps, steps, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "rows.jsonl").read_text().splitlines(keepends=True)
    (run / "rows.jsonl").write_text("".join(lines[i] for i in kept_steps))
    (run / "evals.jsonl").write_text("")
    resume(tiny_pair, run)
    error = capfd.readouterr().err
    assert f"{run / 'rows.jsonl'} {message}" in error
    assert f"{run / 'evals.jsonl'} lacks 3 evaluations" in error
    assert records.read_rows(run / "starts.jsonl")[-1]["missing"] == {
        "steps": steps,
        "evaluations": 3,
    }
    assert [row["step"] for row in rows(run)] == [*kept_steps, 4, 5]
    text = message.removeprefix("lacks the rows of ").rstrip(",")
    assert f"restarted at step 4: the record lacks the rows of {text}; " in read_run(run).code


def test_a_row_that_is_damaged_is_named(tiny_pair, run: Path) -> None:
    good = (run / "rows.jsonl").read_bytes()
    for bad, message in (
        (good + b"\xff\xfe", r"rows\.jsonl line 5 is not UTF-8"),
        (b"[1]\n" + good, r"rows\.jsonl line 1 is not a JSON object"),
        (b"{}\n" + good, r"rows\.jsonl line 1 has no integer step"),
        (b"nonsense\n" + good, r"rows\.jsonl line 1 is not JSON"),
    ):
        (run / "rows.jsonl").write_bytes(bad)
        with pytest.raises(InvalidInput, match=message):
            resume(tiny_pair, run)
        assert (run / "rows.jsonl").read_bytes() == bad


# --- damaged files -------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "one bit": flip,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage_kind", DAMAGE)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.json", "tokenizer.json", "optimizer/*", "files.json"]
)
def test_every_damaged_file_of_a_checkpoint_is_named(
    four: Path, tmp_path: Path, name, damage_kind
) -> None:
    checkpoint = shutil.copytree(four / "checkpoints" / "step_000004", tmp_path / "step_000004")
    (path,) = checkpoint.glob(name)
    DAMAGE[damage_kind](path)
    problem = find_damage(checkpoint)
    if name == "files.json" and damage_kind == "gone":  # as of a version that wrote no list
        assert problem == ""
    elif name == "files.json" and damage_kind == "one bit":
        assert str(checkpoint) in problem
    else:
        assert str(path) in problem


def test_an_older_checkpoint_is_used_if_the_last_is_damaged(
    tiny_pair, run: Path, six: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "step_000004" / "model.safetensors"
    truncate(path)
    damaged = path.read_bytes()
    resume(tiny_pair, run)
    assert_same_run(run, six)
    error = capfd.readouterr().err
    assert f"{path.parent} is damaged ({path} has {len(damaged)} bytes instead of" in error
    assert f"the run resumes from {run / 'checkpoints' / 'step_000002'}" in error
    aside = run / "dropped" / "before_start_002" / "checkpoints" / "step_000004"
    assert (aside / "model.safetensors").read_bytes() == damaged
    assert str(path.parent) in records.read_rows(run / "starts.jsonl")[-1]["damaged"]


def test_without_a_whole_checkpoint_nothing_is_touched(tiny_pair, run: Path) -> None:
    for step in (2, 4):
        truncate(run / "checkpoints" / f"step_{step:06d}" / "state.json")
    content_before = content(run)
    with pytest.raises(InvalidInput, match=r"step_000004/state\.json has .* no intact checkpoint"):
        resume(tiny_pair, run)
    assert content(run) == content_before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_damaged_model_is_refused_by_its_file(tiny_pair, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_pair[1], tmp_path / "teacher")
    for damaged in (truncate, DAMAGE["empty"]):
        damaged(folder / name)
        with pytest.raises(InvalidInput, match=rf"{folder / name} .*download the model .* again"):
            train(settings((tiny_pair[0], folder), tmp_path / "run"))
        assert not (tmp_path / "run" / "rows.jsonl").exists()


def test_a_part_of_the_weights_that_is_missing_is_named(tiny_pair, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny_pair[1], tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    load_model(str(folder), "cpu", "float32")
    missing_file = sorted(folder.glob("model-*.safetensors"))[1]
    missing_file.unlink()
    with pytest.raises(InvalidInput, match=f"{missing_file}, which .* lists, is missing"):
        load_model(str(folder), "cpu", "float32")


def test_a_manifest_lists_folders_in_folders(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"123456789")
    write_manifest(tmp_path)
    # the check value of CRC-32 that its specification gives for these nine digits
    assert json.loads((tmp_path / "files.json").read_text()) == {
        "a/b/c": {"bytes": 9, "crc32": 0xCBF43926}
    }


# --- which code, and kills -----------------------------------------------------------------------


def test_starts_record_code_and_versions_and_say_what_changed(
    tiny_pair, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (first,) = records.read_rows(run / "starts.jsonl")
    state = restart.loaded_code()
    assert (first["step"], first["source"]) == (0, state.source)
    assert first["commit"] == state.commit
    assert {"torch", "transformers"} <= first["libraries"].keys()
    resume(tiny_pair, run, steps=5)
    error = capfd.readouterr().err
    assert f"{run} resumes at step 4\n" in error
    assert "instead of" not in error
    changed_state = replace(state, source="0123456789abcdef", diff="+x = 1\n")
    original = restart.package_version
    monkeypatch.setattr(restart, "loaded_code", lambda: changed_state)
    monkeypatch.setattr(
        restart, "package_version", lambda name: "9.9" if name == "torch" else original(name)
    )
    resume(tiny_pair, run)
    error = capfd.readouterr().err
    code = f"the source code's hash is 0123456789abcdef instead of {state.source}"
    assert f"from step 5 on, {code}" in error
    assert f"from step 5 on, torch is 9.9 instead of {original('torch')}" in error
    assert [row["step"] for row in records.read_rows(run / "starts.jsonl")] == [0, 4, 5]
    assert (run / "code_003.txt").read_text().endswith("source 0123456789abcdef\n+x = 1\n")
    assert not (run / "code_002.txt").exists()


NAME_CHANGES = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")
"""The system's calls before which a run is killed."""


def train_and_kill(config: Config, num_calls: int) -> None:
    """Train; SIGKILL before call number `num_calls`, from 0, of those that change names."""
    calls_left = [num_calls]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **options: Any) -> Any:
            calls_left[0] -= 1
            if calls_left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*words, **options)

        return call

    for name in NAME_CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    train(config)


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_between_any_two_renames_change_nothing(
    tiny_pair, six: Path, tmp_path: Path, seed: int
) -> None:
    config = settings(tiny_pair, tmp_path / "run", steps=6)
    draw = random.Random(seed)
    killed = 0
    for _ in range(4):
        process = run_process(tmp_path, train_and_kill, config, draw.randrange(5, 70))
        assert process.exit_code in (0, -signal.SIGKILL), process.stderr[-2000:]
        killed += process.exit_code == -signal.SIGKILL
    process = run_process(tmp_path, train, config)
    assert process.exit_code == 0, process.stderr[-2000:]
    assert killed > 1
    assert_same_run(tmp_path / "run", six)
