"""Refuse a teacher with the student's weights, since the divergence is 0 up to rounding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.config.settings import Config
from opd.config.view import has_view
from opd.models.loading import OBJECT_PREFIX
from opd.objectives.catalogue import CONTROLS
from opd.teachers.pair import ModelPair


def refuse_same_weights(settings: Sequence[Config], pairs: Sequence[ModelPair]) -> None:
    """Refuse a run in which every teacher has the student's weights.

    With several tasks, one teacher may equal the initial student: it keeps the student close to its
    start while another task moves it.

    Args:
        settings: Settings of each task.
        pairs: Student and teacher of each task.

    Raises:
        InvalidInput: All teachers have the student's weights; the message names both models.
    """
    if all(has_student_weights(config, pair) for config, pair in zip(settings, pairs, strict=True)):
        config = settings[0]
        raise InvalidInput(
            f"the teacher {config.teacher} has the weights of the student {config.student}, so the "
            "divergence is zero and training would follow rounding errors; show the teacher more "
            "(teacher_view), use another teacher, or set reward_weight to train on rewards"
        )


def has_student_weights(config: Config, pair: ModelPair) -> bool:
    """Return whether a teacher has the student's weights, and nothing else would train.

    Teachers "base" and "ema" are derived from the student on purpose and need a reward anyway;
    weights on a server are not accessible. Quantised layers cannot be compared, so a quantised
    teacher is recognised by its folder or name only.

    Args:
        config: Settings of the task.
        pair: Student and teacher.

    Returns:
        Whether they have the same weights.
    """
    teacher = pair.teacher
    if not teacher.is_separate:
        return False
    if config.objective.reward_weight or not config.steps or has_view(config):
        return False
    if config.objective.objective in CONTROLS:
        return False
    if is_same_source(config.student, config.teacher):
        return True
    return not teacher.is_quantised and same_weights(pair.student.network, teacher.model.network)


def is_same_source(student: str, teacher: str) -> bool:
    """Return whether two names are the same folder (following links) or the same hub model."""
    if student.startswith(OBJECT_PREFIX) or teacher.startswith(OBJECT_PREFIX):
        return False  # models in memory may have the same name and other weights
    if student == teacher:
        return True
    folders = Path(student), Path(teacher)
    return all(folder.exists() for folder in folders) and folders[0].samefile(folders[1])


def same_weights(student: Any, teacher: Any) -> bool:
    """Return whether two networks have the same parameters, compared in bfloat16.

    A copy that was saved in bfloat16 counts as the same. LoRA adapters of the student are ignored.

    Args:
        student: Network of the student.
        teacher: Network of the teacher.

    Returns:
        Whether all parameters are equal.
    """
    student_weights = {
        base_parameter_name(name): weight
        for name, weight in student.named_parameters()
        if "lora_" not in name
    }
    teacher_weights = dict(teacher.named_parameters())
    if student_weights.keys() != teacher_weights.keys():
        return False
    return all(
        equal_in_bfloat16(student_weights[name], weight) for name, weight in teacher_weights.items()
    )


def base_parameter_name(name: str) -> str:
    """Return a parameter's name without the prefixes that peft adds."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def equal_in_bfloat16(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape and the same values in bfloat16."""
    if a.shape != b.shape:
        return False
    first, second = (x.detach().to(b.device, torch.bfloat16) for x in (a, b))
    return torch.equal(first, second)
