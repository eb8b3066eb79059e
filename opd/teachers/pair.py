"""The pair of models of a run: a student and its teacher."""

from dataclasses import dataclass
from typing import Any

from opd.models.loading import check_same_vocabulary, end_ids, head_rows, load, own_first
from opd.models.model import CausalLM, split
from opd.teachers.client import TeacherClient
from opd.tokens.eos import EosMap


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A student, its frozen teacher, the student's tokenizer and the ids that end a response.

    eos: the student's; endings: both models', each with its tokenizer's own first; remote: the
    teacher if it is on a server, in which case `teacher` has no weights (`opd.teachers.client`).
    """

    student: CausalLM
    teacher: CausalLM
    tokenizer: Any
    eos: list[int]
    endings: EosMap | None = None
    remote: TeacherClient | None = None


def load_pair(
    student: str,
    teacher: str,
    device: str,
    dtype: str,
    trust: bool = False,
    teacher_weights: str = "saved",
) -> ModelPair:
    """Load both models; the teacher's layers quantised, if so wanted.

    Raises:
      ValueError: the tokenizers differ, or no end-of-sequence token is known.
    """
    tokenizer, network = load(student, device, dtype, trust)
    other, frozen = load(teacher, device, dtype, trust, teacher_weights)
    check_same_vocabulary(tokenizer, other)
    eos = end_ids(tokenizer, network)
    vocabulary = min(head_rows(network), head_rows(frozen))
    frozen.requires_grad_(False)
    endings = EosMap(own_first(tokenizer, eos), own_first(other, end_ids(other, frozen)))
    return ModelPair(split(network, vocabulary), split(frozen, vocabulary), tokenizer, eos, endings)
