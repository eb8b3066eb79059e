"""A student with its teacher and tokenizer."""

from dataclasses import dataclass
from typing import Any

from opd.data.chat_template import chat_format_of
from opd.models.loading import (
    check_has_eos,
    check_same_vocabulary,
    known_eos_ids,
    load_or_use,
    num_head_rows,
    object_name,
)
from opd.models.model import CausalLM, split_head
from opd.teachers.teacher import LocalTeacher, Teacher
from opd.tokens.eos import EosMap


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A student and its teacher, with the student's tokenizer."""

    student: CausalLM
    teacher: Teacher
    tokenizer: Any
    """The student's tokenizer."""
    eos: list[int]
    """Ids that end a response of the student."""

    @property
    def eos_map(self) -> EosMap | None:
        """EOS ids of both models, each with its tokenizer's own first; None if not known."""
        if self.teacher.eos is None:
            return None
        own_id = self.tokenizer.eos_token_id
        return EosMap(tuple(sorted(self.eos, key=lambda i: i != own_id)), self.teacher.eos)


def load_pair(
    student: Any,
    teacher: Any,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    teacher_weights: str = "saved",
    offload_teacher: bool = False,
    tokenizer: Any = None,
) -> ModelPair:
    """Load student and teacher, or use models that are in memory.

    Args:
        student: Folder, hub name or model (`opd.models.loading.load_or_use`).
        teacher: Folder, hub name or model.
        device: Where both models are placed; "auto" for cuda if available, else cpu.
        dtype: Dtype of both models.
        trust_remote_code: Run Python code that comes with the models.
        teacher_weights: "saved", or the quantisation of the teacher's layers, "int8" or "nf4".
        offload_teacher: Keep the teacher in host memory once it has scored, while it does not.
        tokenizer: Tokenizer of the models that are objects.

    Returns:
        The pair; the vocabulary is limited to the smaller of the two heads.

    Raises:
        InvalidInput: The tokenizers differ, no end-of-sequence token is known, or an object cannot
            be used.
    """
    loaded_student = load_or_use(student, tokenizer, device, dtype, trust_remote_code)
    loaded_teacher = load_or_use(
        teacher, tokenizer, device, dtype, trust_remote_code, teacher_weights
    )
    check_same_vocabulary(loaded_student[0], loaded_teacher[0])
    for loaded in (loaded_student, loaded_teacher):
        check_has_eos(*loaded)
    return join_models(
        loaded_student,
        teacher if isinstance(teacher, str) else object_name(teacher),
        loaded_teacher,
        is_quantised=teacher_weights != "saved",
        offload=offload_teacher,
    )


def join_models(
    student: tuple[Any, Any],
    teacher_name: str,
    teacher: tuple[Any, Any],
    *,
    is_quantised: bool = False,
    offload: bool = False,
) -> ModelPair:
    """Make a pair of two loaded models, whatever their tokenizers contain.

    Args:
        student: Tokenizer and network, as `load_model` returns them.
        teacher_name: Folder or hub name.
        teacher: Tokenizer and network.
        is_quantised: Whether the teacher's layers have fewer bits than its files.
        offload: Keep the teacher in host memory while it does not score.

    Returns:
        The pair; the vocabulary is limited to the smaller of the two heads.
    """
    tokenizer, network = student
    vocabulary = min(num_head_rows(network), num_head_rows(teacher[1]))
    return ModelPair(
        split_head(network, vocabulary),
        freeze_teacher(
            teacher_name, teacher, vocabulary, is_quantised=is_quantised, offload=offload
        ),
        tokenizer,
        sorted(known_eos_ids(*student)),
    )


def freeze_teacher(
    name: str, teacher: tuple[Any, Any], vocabulary: int, *, is_quantised: bool, offload: bool
) -> LocalTeacher:
    """Make a teacher of a loaded model.

    Args:
        name: Folder or hub name.
        teacher: Tokenizer and network.
        vocabulary: Number of rows of the head that the student has too.
        is_quantised: Whether its layers have fewer bits than its files.
        offload: Keep it in host memory while it does not score.

    Returns:
        The teacher, without gradients.
    """
    tokenizer, network = teacher
    network.requires_grad_(False)
    return LocalTeacher(
        name,
        split_head(network, vocabulary),
        known_eos_ids(tokenizer, network),
        is_quantised=is_quantised,
        offload=offload,
        chat_format=chat_format_of(tokenizer),
    )
