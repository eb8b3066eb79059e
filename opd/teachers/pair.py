"""A student with its teacher and tokenizer."""

from dataclasses import dataclass
from typing import Any

from opd.models.loading import (
    check_same_vocabulary,
    eos_ids,
    load_or_use,
    num_head_rows,
    object_name,
    tokenizer_eos_first,
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
        return EosMap(tokenizer_eos_first(self.tokenizer, self.eos), self.teacher.eos)


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
    given = tokenizer
    tokenizer, network = load_or_use(student, given, device, dtype, trust_remote_code)
    teacher_tokenizer, teacher_network = load_or_use(
        teacher, given, device, dtype, trust_remote_code, teacher_weights
    )
    check_same_vocabulary(tokenizer, teacher_tokenizer)
    eos = eos_ids(tokenizer, network)
    vocabulary = min(num_head_rows(network), num_head_rows(teacher_network))
    teacher_network.requires_grad_(False)
    teacher_eos = eos_ids(teacher_tokenizer, teacher_network)
    loaded_teacher = LocalTeacher(
        teacher if isinstance(teacher, str) else object_name(teacher),
        split_head(teacher_network, vocabulary),
        tokenizer_eos_first(teacher_tokenizer, teacher_eos),
        is_quantised=teacher_weights != "saved",
        offload=offload_teacher,
    )
    return ModelPair(split_head(network, vocabulary), loaded_teacher, tokenizer, eos)
