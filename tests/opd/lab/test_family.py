"""A pair of the family at its tiny size: its files, shared bases, resumption, other knobs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from opd.data.chain_task import solve
from opd.lab.family import build_pair
from opd.lab.knobs import PairKnobs

KNOBS = PairKnobs(size="tiny", foreign_tags=2.0, second_end=True, foreign_ends=0.5)
"""Knobs of a pair whose training covers every kind of text but loops and terse steps."""


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pair with its own bases."""
    folder = tmp_path_factory.mktemp("family") / "pair"
    build_pair(folder, KNOBS, 3)
    return folder


def weights(folder: Path, role: str) -> bytes:
    """Return the saved weights of a model."""
    return (folder / role / "model.safetensors").read_bytes()


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a data file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shared_bases_give_the_same_weights(pair_folder: Path, tmp_path: Path) -> None:
    other_knobs = replace(KNOBS, foreign_tags=1.0, teacher_errors=0.5)
    build_pair(tmp_path / "other", other_knobs, 3, tmp_path / "bases")
    bases = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bases").iterdir()}
    build_pair(tmp_path / "pair", KNOBS, 3, tmp_path / "bases")
    assert bases == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bases").iterdir()}
    for role in ("student", "teacher"):
        assert weights(tmp_path / "pair", role) == weights(pair_folder, role)
        assert weights(tmp_path / "other", role) != weights(pair_folder, role)
    for name in ("train", "validation", "test", "other_task"):
        path = f"{name}.jsonl"
        assert (tmp_path / "pair" / path).read_text() == (pair_folder / path).read_text()


def test_an_interrupted_build_is_continued(pair_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pair"
    shutil.copytree(pair_folder, folder)
    record = json.loads((folder / "pair.json").read_text())
    (folder / "pair.json").write_text(
        json.dumps({k: v for k, v in record.items() if k not in ("facts", "seconds")})
    )
    shutil.rmtree(folder / "teacher")
    stamp = (folder / "student" / "model.safetensors").stat().st_mtime_ns
    build_pair(folder, KNOBS, 3)
    assert (folder / "student" / "model.safetensors").stat().st_mtime_ns == stamp
    assert weights(folder, "teacher") == weights(pair_folder, "teacher")
    assert json.loads((folder / "pair.json").read_text())["facts"] == record["facts"]


def test_a_folder_with_another_pair_is_refused(pair_folder: Path) -> None:
    assert build_pair(pair_folder, KNOBS, 3) == (pair_folder / "student", pair_folder / "teacher")
    with pytest.raises(ValueError, match=r"foreign_tags: 2.0 -> 1.0, seed: 3 -> 4"):
        build_pair(pair_folder, replace(KNOBS, foreign_tags=1.0), 4)


def test_the_files_hold_right_problems_and_share_none(pair_folder: Path) -> None:
    prompts = []
    for name in ("train", "validation", "test"):
        rows = rows_of(pair_folder / f"{name}.jsonl")
        prompts += [row["prompt"] for row in rows]
        for row in rows:
            assert solve(row["prompt"]) == (row["answer"], row["solution"])
            assert row["grader"] == "lab"
            assert ("response" in row) == (name == "train")
    assert len(set(prompts)) == len(prompts)
    for row in rows_of(pair_folder / "other_task.jsonl"):
        assert "".join(sorted(row["prompt"].removeprefix("sort "))) == row["answer"]
