"""What the scores of a batch have to provide, and whether both models can provide it."""

from dataclasses import dataclass
from typing import Any

import torch

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.missing import Missing
from opd.models.model import CausalLM
from opd.objectives.requirements import Requirements
from opd.objectives.support import JOINT_SUPPORTS
from opd.scoring.chosen_ids import STUDENT_SUPPORTS
from opd.teachers.teacher import Capability, Teacher
from opd.tokens.eos import EosMap

METRICS_ONLY = Requirements(
    support="teacher",
    support_k=16,
    sampled_logp=True,
    teacher_sampled_logp=True,
    normalised=True,
    distributions=True,
    whole_groups=False,
    on_policy=False,
    own_samples=False,
    teacher=True,
)
"""Requirements of metrics without an objective: the teacher's top-K, and statistics of the
distributions."""


EXACT_DTYPES = frozenset({torch.float32, torch.float64})
"""Dtypes of a student in which the logits of two forward passes can be combined."""
NOT_SCORED: Any = Missing("a run without a teacher has")
"""`teacher_logp` of rollouts that no teacher scored."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What the scores of a batch have to provide, and the memory that scoring may take."""

    requirements: Requirements = METRICS_ONLY
    """What the loss reads, such as the objective's `requirements`."""
    temperature: float = 1.0
    """Temperature of the log-probabilities."""
    full_statistics: bool = True
    """Whether metrics of whole distributions are wanted. Without them the student's softmax is
    that of the sampler, where it is known, exact enough, and the loss needs no more.
    """
    eos_map: EosMap | None = None
    """EOS ids of both models, for their metrics."""
    map_eos: bool = False
    """Read the teacher at its own EOS where the student used another one, and the student at its
    own EOS where the teacher's top-K holds another one. Distribution statistics still compare id
    with id. (The published code of arXiv 2603.25562 does so since its fix for figure 5.)
    """
    teacher_reads: str = "prompt"
    """Whether the teacher's prompts depend on the responses (`ScoredRollouts.teacher_reads`)."""
    max_tokens_per_microbatch: int = 1 << 14
    """Padded tokens of a forward pass."""
    max_logits_per_chunk: int = 1 << 24
    """Logits that exist at once."""

    @property
    def source(self) -> str:
        """Whose top-K is the support; the teacher's if the loss needs none."""
        support = self.requirements.support
        return "teacher" if support in ("none", "full") else support

    def allows_sampler_softmax(self, rollouts: Rollouts, dtype: torch.dtype) -> bool:
        """Return whether the student's softmax of the rollouts can be taken from the sampler.

        It is that of the weights that sampled, so they must be the student's present ones, and
        rounding differences of another inference engine stay hidden. The normaliser is then of the
        sampler's pass and the logits of the support of another one, each rounded to half a unit in
        the last place: in bfloat16 1/16 for a logit of 16 to 32, so that a support of mass 1 gets
        1.06 or more, and 2^-20 in float32. A student in half precision is therefore scored whole.

        Args:
            rollouts: The rollouts.
            dtype: The student's.

        Returns:
            Whether a full pass of the student's head can be skipped.
        """
        needs = self.requirements
        if dtype not in EXACT_DTYPES:
            return False
        if self.full_statistics or self.map_eos or needs.distributions or needs.normalised:
            return False
        known = rollouts.softmax_logp is not None and rollouts.temperature == self.temperature
        known &= bool(rollouts.own_rows.all())
        return needs.support == "teacher" and known and not bool((rollouts.age > 0).any())


def check_request(student: CausalLM, teacher: Teacher, request: ScoreRequest) -> None:
    """Refuse an unknown support, one that the teacher or map_eos lacks, and a K beyond V."""
    if not teacher.capabilities:
        if request.requirements.teacher:
            raise InvalidInput(
                "the loss reads a teacher, but teacher is none; set one, or use "
                "negative_log_likelihood or reward_only"
            )
        return
    source, k = request.source, request.requirements.support_k
    if k > student.vocabulary:
        raise InvalidInput(
            f"support_k is {k}, but the shared vocabulary has {student.vocabulary} tokens; lower "
            "support_k"
        )
    known_sources = ("teacher", "student", *JOINT_SUPPORTS)
    if source not in known_sources:
        raise InvalidInput(f"unknown support source {source!r}; known: {', '.join(known_sources)}")
    if request.map_eos and source != "teacher":
        raise InvalidInput(
            f"EOS ids can be mapped in the teacher's top-K only, not in the {source!r} support; "
            "set map_eos to False, or use a teacher support"
        )
    reads_others = source in STUDENT_SUPPORTS or request.map_eos
    if reads_others and Capability.CHOSEN_IDS not in teacher.capabilities:
        what = "map_eos" if request.map_eos else f"a {source!r} support"
        raise InvalidInput(
            f"the teacher {teacher.name} was connected for its own top-K only, not for {what}; "
            "connect it with num_chosen, or use a teacher_topk objective without map_eos, or a "
            "local teacher"
        )
    if Capability.DISTRIBUTIONS not in teacher.capabilities:
        if request.requirements.support == "full":
            raise InvalidInput(
                f"the teacher {teacher.name} is {teacher.place} and does not support full "
                "distributions"
            )
        if request.temperature != teacher.temperature:
            raise InvalidInput(
                f"temperature is {request.temperature}, but the teacher {teacher.name} is "
                f"{teacher.place}, which scores at {teacher.temperature:g}; set that"
            )
