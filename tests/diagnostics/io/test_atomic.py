"""Atomic writes: content reaches the disk before its final name, and a failure changes nothing."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import OperationFailed
from diagnostics.io.atomic import atomic_write, is_disk_full, replace_folder, write_text
from diagnostics.records.token_dumps import DumpWriter
from diagnostics.records.writer import save_records
from tests.helpers.warm_process import file_size_limit, run_process


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record system calls in order: ("sync", path) and ("rename", new path)."""
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def record_rename(source: Any, target: Any) -> None:
        calls.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    return calls


def batch() -> ScoredRollouts:
    logp = [-torch.ones(2, 3) for _ in range(3)]
    return ScoredRollouts(
        tokens=torch.ones(2, 3, dtype=torch.long),
        mask=torch.ones(2, 3, dtype=torch.bool),
        sampler_logp=logp[0],
        prompt=torch.zeros(2, dtype=torch.long),
        ended=torch.ones(2, dtype=torch.bool),
        student_logp=logp[1],
        teacher_logp=logp[2],
    )


WRITERS = {
    "text": (lambda folder: write_text(folder / "x", "text"), "x"),
    "text of several": (lambda folder: write_text(folder / "x", "text", concurrent=True), "x"),
    "batch": (lambda folder: batch().save(folder / "x.safetensors"), "x.safetensors"),
    "dump": (
        lambda folder: DumpWriter(folder=folder, responses=1)(3, batch()),
        "step_00000003.parquet",
    ),
    "records": (lambda folder: save_records(folder / "x.jsonl", [batch()]), "x.jsonl"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_content_is_on_the_disk_before_the_name_and_the_name_at_the_end(
    name: str, tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    write_file, final = WRITERS[name]
    write_file(tmp_path)
    assert [kind for kind, _ in events] == ["sync", "rename", "sync"]
    (_, content), (_, target), (_, folder) = events
    assert content.startswith(str(tmp_path / final))
    assert content != target == str(tmp_path / final)
    assert folder == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [final]


def test_every_file_and_folder_is_on_the_disk_before_a_folder_gets_its_name(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    source, target = tmp_path / "x.part", tmp_path / "x"
    (source / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (source / name).write_text(name)
    target.mkdir()
    (target / "old").touch()
    replace_folder(source, target)
    synced_names = {
        Path(path).name for kind, path in events[: events.index(("rename", str(target)))]
    }
    assert synced_names == {"a", "b", "inner", "x.part", "x.old"}
    assert events[-1] == ("sync", str(tmp_path))
    assert {path.name for path in tmp_path.rglob("*")} == {"x", "a", "inner", "b"}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def write_limited(name: str, folder: Path, limit: int) -> None:
    with file_size_limit(limit):
        WRITERS[name][0](folder)


@pytest.mark.parametrize("name", ["text", "batch", "records", "dump"])
def test_a_full_disk_is_said_and_the_old_file_stays(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Runs in a process whose files are limited to 2 bytes."""
    final = tmp_path / WRITERS[name][1]
    final.write_text("old")
    process = run_process(tmp_path_factory.mktemp("output"), write_limited, name, tmp_path, 2)
    last_line = process.stderr.strip().splitlines()[-1]
    assert f"OperationFailed: could not write {final}: is the disk full?" in last_line
    assert final.read_text() == "old"


def test_a_full_disk_is_recognised_in_other_languages_words() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = full
    assert is_disk_full(full)
    assert is_disk_full(wrapped)
    assert is_disk_full(RuntimeError("I/O error: File too large (os error 27)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(RuntimeError("I/O error: no such file (os error 2)"))
    with pytest.raises(OperationFailed, match="is the disk full"), atomic_write("/tmp/x"):
        raise full
