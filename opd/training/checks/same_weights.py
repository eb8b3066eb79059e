"""Refuse a teacher that is the student: the divergence is 0, and what trains is rounding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.config.settings import Config
from opd.serving.addresses import is_url
from opd.teachers.pair import ModelPair


def refuse_same_weights(settings: Sequence[Config], pairs: Sequence[ModelPair]) -> None:
    """Refuse a run all of whose teachers have the student's weights.

    Of several tasks, one that holds the student where it began is a task while another moves it.

    Args:
      settings, pairs: of each task of the run.

    Raises:
      ValueError: names both models.
    """
    if all(is_student(config, pair) for config, pair in zip(settings, pairs, strict=True)):
        config = settings[0]
        raise InvalidInput(
            f"the teacher {config.teacher} has the weights of the student {config.student}: the "
            "divergence is zero up to rounding, and training on it would follow the rounding; name "
            "another teacher, or set outcome, the weight of a reward"
        )


def is_student(config: Config, pair: ModelPair) -> bool:
    """Whether a named teacher has the student's weights, and nothing else would train.

    "base" and "ema" are made of the student on purpose and need a reward anyway; a server shows no
    weights. Quantised layers cannot be compared, so that a quantised teacher is known by its folder
    or name alone.
    """
    if config.teacher in ("base", "ema") or is_url(config.teacher):
        return False
    if config.reward_weight or not config.steps:
        return False
    if same_place(config.student, config.teacher):
        return True
    compared = config.teacher_weights == "saved"
    return compared and same_weights(pair.student.network, pair.teacher.network)


def same_place(student: str, teacher: str) -> bool:
    """Whether two names are one folder, links followed, or one model of the hub."""
    if student == teacher:
        return True
    folders = Path(student), Path(teacher)
    return all(folder.exists() for folder in folders) and folders[0].samefile(folders[1])


def same_weights(student: Any, teacher: Any) -> bool:
    """Whether two networks have the same parameters, to the precision of bfloat16.

    So that a copy that was saved in bfloat16 counts as one. Adapters of the student are left out.
    """
    ours = {
        own_name(name): weight for name, weight in student.named_parameters() if "lora_" not in name
    }
    theirs = dict(teacher.named_parameters())
    if ours.keys() != theirs.keys():
        return False
    return all(rounded_equal(ours[name], weight) for name, weight in theirs.items())


def own_name(name: str) -> str:
    """A parameter's name without what adapters put around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def rounded_equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    first, second = (x.detach().to(b.device, torch.bfloat16) for x in (a, b))
    return torch.equal(first, second)
