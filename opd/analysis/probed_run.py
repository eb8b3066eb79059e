"""The settings and models of a recorded run, for probes of its teacher after the run."""

from pathlib import Path

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.records.run_folder import RunFolder
from opd.config.files import read_config
from opd.config.recorded_code import without_unreviewed_code
from opd.config.settings import Config, with_settings
from opd.data.prompts import Prompts, encode_prompts
from opd.data.tasks import Task
from opd.data.teacher_view.view import with_teacher_prompts
from opd.models.model import CausalLM
from opd.teachers.factory import make_pair
from opd.teachers.pair import ModelPair
from opd.teachers.teacher import teacher_type
from opd.training.teacher_view import make_view

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
            f"teacher is {config.teacher!r}, but probes need a teacher with weights of its own in "
            "this process; probe a run whose teacher is a model"
        )
    return config


def held_out_prompts(config: Config, pair: ModelPair, task: Task, count: int) -> Prompts:
    """Encode held-out problems, for the teacher as it reads them in the run.

    Args:
        config: Settings of the run.
        pair: Student and teacher.
        task: The task.
        count: Number of problems.

    Returns:
        One row per problem, on the student's device.

    Raises:
        InvalidInput: The teacher's view needs graded responses, which do not exist here.
    """
    problems = task.test(count)
    prompts = encode_prompts(pair.tokenizer, problems, 1, config.data.max_prompt)
    view = make_view(config, pair, task)
    if view is not None and view.reads_attempts:
        raise InvalidInput(
            f"teacher_view {config.view.teacher_view} uses responses, but this probe samples the "
            "teacher before there is one; probe a run with another view"
        )
    if view is not None:
        prompts = with_teacher_prompts(view, pair.tokenizer, prompts, problems, None)
    return prompts.to(pair.student.device)


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
