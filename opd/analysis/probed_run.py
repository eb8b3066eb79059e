"""The settings and models of a recorded run, for probes of its teacher after the run."""

from pathlib import Path

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.records.run_folder import RunFolder
from opd.config.files import read_config
from opd.config.recorded_code import without_unreviewed_code
from opd.config.settings import Config, with_settings
from opd.models.model import CausalLM
from opd.teachers.factory import make_pair
from opd.teachers.teacher import teacher_type

UNREAD_SETTINGS = ("objective", "metrics")
"""Settings that may name functions, none of which a probe reads."""


def read_probed_config(run: Path, trust_remote_code: bool) -> Config:
    """Read the settings of a run with one local teacher.

    Args:
        run: A run folder.
        trust_remote_code: Run Python code stored with the models that the settings name. The
            settings' own value is ignored, since the folder may come from somebody else.

    Returns:
        The settings.

    Raises:
        MissingFile: It is not a run folder.
        InvalidInput: The run has several tasks, or its teacher is not a separate local model.
    """
    path = RunFolder(run).path / "config.json"
    config = without_unreviewed_code(read_config(path), path, trust_remote_code, UNREAD_SETTINGS)
    if config.tasks:
        raise InvalidInput(f"{run} has {len(config.tasks)} tasks; probes support one teacher")
    if not teacher_type(config.teacher).is_separate:
        raise InvalidInput(
            f"teacher is {config.teacher!r}, which is derived from the student or remote; probes "
            "need a separate local teacher"
        )
    return config


def load_trained_student(run: Path, config: Config) -> CausalLM:
    """Load the trained student of a finished run.

    Args:
        run: The run folder.
        config: Its settings.

    Returns:
        The student, with the head rows that it shares with the teacher.

    Raises:
        MissingFile: The run has no final/.
    """
    if not (run / "final").exists():
        raise MissingFile(f"{run / 'final'} does not exist; finish the run first")
    return make_pair(with_settings(config, student=str(run / "final"), lora_rank=0)).student
