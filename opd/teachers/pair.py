"""The models of a run: a student and its teacher."""

from dataclasses import dataclass
from typing import Any

from opd.models.loading import (
    check_same_vocabulary,
    eos_ids,
    load_model,
    num_head_rows,
    tokenizer_eos_first,
)
from opd.models.model import CausalLM, split_head
from opd.teachers.client import TeacherClient
from opd.tokens.eos import EosMap


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A student and its frozen teacher, with the student's tokenizer."""

    student: CausalLM
    teacher: CausalLM
    """The teacher; without weights if `remote_teacher` is set."""
    tokenizer: Any
    """The student's tokenizer."""
    eos: list[int]
    """Ids that end a response of the student."""
    eos_map: EosMap | None = None
    """EOS ids of both models, each with its tokenizer's own EOS first."""
    remote_teacher: TeacherClient | None = None
    """Client of a teacher on a server (`opd.teachers.client`)."""


def load_pair(
    student: str,
    teacher: str,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    teacher_weights: str = "saved",
) -> ModelPair:
    """Load student and teacher.

    Args:
        student: Folder or hub name.
        teacher: Folder or hub name.
        device: Where both models are placed; "auto" for cuda if available, else cpu.
        dtype: Dtype of both models.
        trust_remote_code: Run Python code that comes with the models.
        teacher_weights: "saved", or the quantisation of the teacher's layers, "int8" or "nf4".

    Returns:
        The pair; the vocabulary is limited to the smaller of the two heads.

    Raises:
        InvalidInput: The tokenizers differ, or no end-of-sequence token is known.
    """
    tokenizer, network = load_model(student, device, dtype, trust_remote_code)
    teacher_tokenizer, teacher_network = load_model(
        teacher, device, dtype, trust_remote_code, teacher_weights
    )
    check_same_vocabulary(tokenizer, teacher_tokenizer)
    eos = eos_ids(tokenizer, network)
    vocabulary = min(num_head_rows(network), num_head_rows(teacher_network))
    teacher_network.requires_grad_(False)
    eos_map = EosMap(
        tokenizer_eos_first(tokenizer, eos),
        tokenizer_eos_first(teacher_tokenizer, eos_ids(teacher_tokenizer, teacher_network)),
    )
    return ModelPair(
        split_head(network, vocabulary),
        split_head(teacher_network, vocabulary),
        tokenizer,
        eos,
        eos_map,
    )
