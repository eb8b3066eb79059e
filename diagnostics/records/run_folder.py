"""A run folder as other programs read it: what counts as one, and its record. Needs no torch.

`opd.runs.run_folder` writes and resumes run folders; a monitor in another trainer leaves a folder
with a file of rows and no settings, which counts as a run folder too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import check_fields, read_object, read_text, short_repr
from diagnostics.records.renamed import present_settings
from diagnostics.records.rows import Row, read_rows

MAX_NAME_LENGTH = 1000
"""Largest number of characters of a model's name; file systems allow fewer."""
EVALUATION_FIELDS = {"step": int, "accuracy": float, "outcomes": str}
"""Fields that every evaluation of a run of `opd train` has."""


class RecordedRow(dict[str, Any]):
    """A row of a run; reading an absent column raises an error that names the run.

    Args:
        row: The row.
        run: The folder that it comes from.
    """

    def __init__(self, row: Row, run: Path) -> None:
        super().__init__(row)
        self.run = run

    def __missing__(self, name: str) -> Any:
        raise InvalidInput(
            f"{self.run}: the row of step {self.get('step')} has no {name!r}, which the figure "
            "needs; leave the run out"
        )


@dataclass(frozen=True)
class RunFolder:
    """The record of a run; every method reads the files anew, as a run may be going on.

    Raises:
        MissingFile: The folder has neither config.json nor a file of rows.
    """

    path: Path
    """The folder."""

    def __post_init__(self) -> None:
        if not (self.path / "config.json").exists() and not self.rows_file.exists():
            raise MissingFile(
                f"{self.path} is not a run folder: it has neither config.json nor rows.jsonl, nor "
                "exactly one other .jsonl file with the rows of a monitor"
                f"{suggest_folders(self.path)}"
            )

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def group(self) -> str:
        """Name of the folder that contains it, such as a group of `opd paper`."""
        return self.path.resolve().parent.name

    @property
    def rows_file(self) -> Path:
        """rows.jsonl, or the only other .jsonl file if it does not exist; may not exist.

        A monitor in another trainer writes its rows to a file with a name that its user chose.
        """
        path = self.path / "rows.jsonl"
        reserved_names = ("evals.jsonl", "starts.jsonl")
        candidates = [
            file for file in sorted(self.path.glob("*.jsonl")) if file.name not in reserved_names
        ]
        return candidates[0] if not path.exists() and len(candidates) == 1 else path

    @property
    def evaluations_file(self) -> Path:
        """Path of evals.jsonl, which may not exist."""
        return self.path / "evals.jsonl"

    @property
    def starts_file(self) -> Path:
        """Path of starts.jsonl, which may not exist."""
        return self.path / "starts.jsonl"

    @property
    def seed(self) -> int:
        """Seed of the run; InvalidInput if its settings have none."""
        settings = self.settings()
        check_fields(settings, {"seed": int}, str(self.path / "config.json"))
        return int(settings["seed"])

    @property
    def method(self) -> str:
        """METHOD of a folder METHOD-SEED, or else the whole name."""
        return self.path.name.removesuffix(f"-{self.seed}")

    def settings(self) -> dict[str, Any]:
        """Read config.json under the present names of settings.

        Empty if there is none, or it belongs to another program: a trainer may store the
        configuration of its model under the same name next to the rows.

        Returns:
            The settings.

        Raises:
            InvalidInput: Not JSON, or a setting has an unusable value.
        """
        path = self.path / "config.json"
        settings = present_settings(read_object(path)) if path.exists() else {}
        models = [settings.get(name) for name in ("student", "teacher")]
        if "seed" not in settings and not all(isinstance(name, str) for name in models):
            return {}
        check_settings(settings, path)
        return settings

    def rows(self) -> list[RecordedRow]:
        """Read the rows of the run, one per step or per task of a step."""
        rows = read_rows(self.rows_file, {"step": int})
        return [RecordedRow(row, self.path) for row in rows]

    def evaluations(self, required: Mapping[str, type] = EVALUATION_FIELDS) -> list[RecordedRow]:
        """Read the evaluations of the run.

        Args:
            required: Fields that every evaluation must have.

        Returns:
            The rows.
        """
        rows = read_rows(self.evaluations_file, required)
        return [RecordedRow(row, self.path) for row in rows]

    def starts(self) -> list[Row]:
        """Read the starts of the run: the first, and one for each time that it resumed."""
        return read_rows(self.starts_file)

    def commit(self) -> str:
        """Read the commit of the first start, the first line of code.txt."""
        return read_text(self.path / "code.txt").partition("\n")[0]

    def identities(self) -> dict[str, str]:
        """Read the content hashes of the run's models and tasks; empty for older runs."""
        path = self.path / "identities.json"
        return read_object(path) if path.exists() else {}

    def batches(self) -> dict[int, Path]:
        """Return the saved batches by step, in rising order."""
        return step_files(self.path / "batches", "safetensors")

    def dumps(self) -> dict[int, Path]:
        """Return the token dumps by step, in rising order."""
        return step_files(self.path / "dumps", "parquet")

    def batch_path(self, step: int) -> Path:
        """Return the path of the saved batch of a step, which may not exist."""
        return self.path / "batches" / f"step_{step:06d}.safetensors"

    def resolve(self, name: str) -> Path:
        """Find a folder named in the settings; a relative one also from the run's parents."""
        parents = self.path.resolve().parents
        candidates = [parent / name for parent in parents if (parent / name).is_dir()]
        return Path(name) if Path(name).is_dir() or not candidates else candidates[0]

    def model_folder(self, role: str) -> Path:
        """Return the folder of the run's "student" or "teacher"; see `resolve`."""
        settings = self.settings()
        check_fields(settings, {role: str}, str(self.path / "config.json"))
        return self.resolve(settings[role])


def step_files(folder: Path, suffix: str) -> dict[int, Path]:
    """Return the files step_NUMBER.SUFFIX of a folder by number, in rising order."""
    files = folder.glob(f"step_*.{suffix}")
    return dict(sorted((int(file.stem.split("_")[1]), file) for file in files))


def suggest_folders(path: Path) -> str:
    """Return the end of an error message that names run folders near `path`, or ""."""
    if path.is_file():
        return f"; it is a file: pass its folder, {path.parent}"
    folders = sorted(str(file.parent) for file in path.glob("*/rows.jsonl"))
    return f"; it contains run folders: {' '.join(folders[:8])}" if folders else ""


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raise unless the seed, the tasks and the names of models have usable values.

    Args:
        settings: The settings under their present names.
        path: Their file, for messages.

    Raises:
        InvalidInput: The message contains the file, the field and the value.
    """
    present = {name: settings[name] for name in ("student", "teacher") if settings.get(name)}
    check_fields(present, dict.fromkeys(present, str), str(path))
    if "seed" in settings:
        check_fields(settings, {"seed": int}, str(path))
    tasks = settings.get("tasks") or []
    check_fields({"tasks": tasks}, {"tasks": list}, str(path))
    for i, task in enumerate(tasks):
        location = f"{path}, tasks[{i}]"
        if not isinstance(task, dict):
            raise InvalidInput(f"{location}: {short_repr(task)} is not an object")
        recorded = {name: value for name, value in task.items() if value is not None}
        check_fields({"teacher": "", **recorded}, {"name": str, "teacher": str}, location)
    for name in [*present.values(), *(task.get("teacher") for task in tasks)]:
        if name is not None and ("\0" in name or len(name) > MAX_NAME_LENGTH):
            raise InvalidInput(f"{path}: {short_repr(name)} is not a folder or the name of a model")
