"""Score rollouts: log-probabilities of both models without storing (tokens, V) logits.

Shapes: B responses, T positions, N sampled tokens, n tokens of a chunk, D and D' hidden sizes of
student and teacher, V shared vocabulary, K support ids.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, Rollouts, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.errors import InvalidInput
from diagnostics.missing import Missing
from diagnostics.ragged import flat_index, scatter_to_mask
from opd.data.prompts import Prompts
from opd.models.forward import (
    micro_batches,
    product_logits,
    product_logp,
    response_hidden_states,
)
from opd.models.lm_head import (
    apply_temperature,
    block_slices,
    cached_elements,
    chunk_elements,
    chunk_slices,
    two_stage_topk,
)
from opd.models.model import CausalLM
from opd.objectives.requirements import Requirements
from opd.objectives.support import JOINT_SUPPORTS
from opd.scoring.chosen_ids import STUDENT_SUPPORTS, chosen_columns, query_teacher
from opd.teachers.teacher import Capability, Teacher
from opd.tokens.eos import EosMap, student_support, teacher_tokens

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


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """Prompts and rollouts, scored by both models."""

    prompts: Prompts
    scored: ScoredRollouts
    """The rollouts with both models' log-probabilities."""
    teacher_hidden: Tensor | None = None
    """(N, D') teacher hidden states at all N sampled tokens, row-major; only for losses on the full
    vocabulary.
    """
    reuses_sampler: bool = False
    """Whether `student_logp` is the sampler's, not computed again."""

    def rows(self, rows: list[int]) -> "ScoredBatch":
        """Return some rows, trimmed to the longest of their responses."""
        scored, hidden = self.scored.rows(rows).trim(), self.teacher_hidden
        if hidden is not None:
            token_index = flat_index(self.scored.sampled)[rows][:, : scored.mask.shape[1]]
            hidden = hidden[token_index[scored.sampled]]
        return replace(self, prompts=self.prompts.rows(rows), scored=scored, teacher_hidden=hidden)


@torch.no_grad()
def score_batch(
    student: CausalLM,
    teacher: Teacher,
    prompts: Prompts,
    rollouts: Rollouts,
    request: ScoreRequest,
) -> ScoredBatch:
    """Score rollouts with both models, in the cheapest way that provides what is requested.

    The support holds the K most probable ids of its source. Logits exist for one chunk of tokens at
    a time. Without full statistics, the student's full softmax is skipped where the sampler's is
    valid: its log-probabilities on the support then follow from K + 1 head rows, log p(v) = log
    p(y) + z_v - z_y. Statistics of distributions need a teacher with hidden states.

    Args:
        student: The student.
        teacher: The teacher.
        prompts: B prompts, with those that the teacher reads where it reads others.
        rollouts: B responses.
        request: What is needed.

    Returns:
        The scored batch.

    Raises:
        InvalidInput: K is larger than the vocabulary, the support is unknown, or the teacher or the
            EOS mapping cannot provide it.
    """
    _check_request(student, teacher, request)
    is_local = Capability.HIDDEN_STATES in teacher.capabilities
    has_teacher = bool(teacher.capabilities)
    reuses_sampler = request.allows_sampler_softmax(rollouts, student.network.dtype)
    if has_teacher and not is_local and request.source in STUDENT_SUPPORTS:
        columns = chosen_columns(
            student,
            teacher,
            prompts,
            rollouts,
            source=request.source,
            k=request.requirements.support_k,
            temperature=request.temperature,
            max_tokens_per_microbatch=request.max_tokens_per_microbatch,
            max_logits_per_chunk=request.max_logits_per_chunk,
        )
    else:
        columns = _token_columns(student, teacher, prompts, rollouts, request)
    teacher_hidden = columns.pop("teacher_hidden", None)
    tensors = {name: scatter_to_mask(value, rollouts.sampled) for name, value in columns.items()}
    statistics = _without_prefix(tensors, "prefix.")
    scored = ScoredRollouts(
        **vars(rollouts),
        student_logp=tensors["student_logp"],
        teacher_logp=tensors["teacher_logp"] if has_teacher else NOT_SCORED,
        support=Support(source=request.source, **_without_prefix(tensors, "support."))
        if has_teacher
        else None,
        prefix=DistributionStats(**statistics) if statistics else None,
        score_temperature=request.temperature,
        teacher_reads=request.teacher_reads,
    )
    return ScoredBatch(prompts, scored.validate(), teacher_hidden, reuses_sampler)


def _token_columns(
    student: CausalLM,
    teacher: Teacher,
    prompts: Prompts,
    rollouts: Rollouts,
    request: ScoreRequest,
) -> dict[str, Tensor]:
    """Return the columns of the N sampled tokens where the student reads the teacher's ids.

    With a teacher of hidden states, these may be any ids.

    Args:
        student: The student.
        teacher: The teacher.
        prompts: B prompts.
        rollouts: B responses.
        request: What is needed.

    Returns:
        The columns by name, row-major; "teacher_hidden" for losses on the full vocabulary.
    """
    is_local, temperature = Capability.HIDDEN_STATES in teacher.capabilities, request.temperature
    k = request.requirements.support_k
    has_teacher, answers = bool(teacher.capabilities), None
    if has_teacher and not is_local:
        eos_map = request.eos_map if request.map_eos else None
        answers = query_teacher(teacher, prompts.teacher_prompts, rollouts, k, eos_map)
    sampler_logp = None
    reuses_sampler = request.allows_sampler_softmax(rollouts, student.network.dtype)
    if reuses_sampler and rollouts.softmax_logp is not None:
        sampler_logp = rollouts.softmax_logp[rollouts.sampled]
    num_tokens, columns = int(rollouts.sampled.sum()), dict[str, Tensor]()
    token_index = flat_index(rollouts.sampled)

    def store(name: str, positions: Tensor, value: Tensor) -> None:
        if name not in columns:
            columns[name] = value.new_zeros((num_tokens, *value.shape[1:]))
        columns[name][positions] = value

    for rows in micro_batches(prompts, rollouts, request.max_tokens_per_microbatch):
        micro_batch, micro_prompts = rollouts.rows(rows).trim(), prompts.rows(rows)
        sampled = micro_batch.sampled
        positions, tokens = token_index[rows][:, : sampled.shape[1]][sampled], micro_batch.tokens
        states = response_hidden_states(student, micro_prompts, micro_batch, sampled)
        teacher_states = states[:, :0]
        if is_local:
            teacher_states = response_hidden_states(
                teacher.model, micro_prompts.teacher_prompts, micro_batch, sampled
            )
            if request.requirements.support == "full":
                store("teacher_hidden", positions, teacher_states)
        tokens = tokens[sampled]
        reads_student = sampler_logp is None
        size = chunk_elements(request.max_logits_per_chunk, student.vocabulary, states.device)
        for c in chunk_slices(len(tokens), student.vocabulary, size):
            # products of a chunk at once, everything else in blocks that fit a CPU's cache
            p_products = student.head.products(states[c]) if reads_student else None
            q_products = teacher.model.head.products(teacher_states[c]) if is_local else None
            for b in block_slices(c, student.vocabulary, cached_elements(states.device)):
                part = slice(b.start - c.start, b.stop - c.start)
                p, q_logits = None, None
                if p_products is not None:
                    p = product_logp(student.head, p_products[part], temperature)
                if q_products is not None:
                    q_logits = product_logits(teacher.model.head, q_products[part], temperature)
                if p is not None and q_logits is not None:
                    values = full_columns(p, q_logits.log_softmax(-1), tokens[b], request)
                elif p is not None and not has_teacher:
                    values = {"student_logp": p.gather(-1, tokens[b, None])[:, 0]}
                else:
                    if q_logits is not None:
                        top_k = _teacher_top_k(q_logits, tokens[b], k)
                    else:
                        assert answers is not None
                        top_k = answers.select(positions[b])
                    logp = None if sampler_logp is None else sampler_logp[positions[b]].float()
                    values = _top_k_columns(student, states[b], tokens[b], top_k, p, logp, request)
                for name, value in values.items():
                    store(name, positions[b], value)
    return columns


def _check_request(student: CausalLM, teacher: Teacher, request: ScoreRequest) -> None:
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


def full_columns(p: Tensor, q: Tensor, tokens: Tensor, request: ScoreRequest) -> dict[str, Tensor]:
    """Return the columns of n tokens from (n, V) log-probabilities of student and teacher."""
    k, source, y = request.requirements.support_k, request.source, tokens[:, None]
    present: Tensor | None = None
    if source in JOINT_SUPPORTS:
        teacher_ids, student_ids = two_stage_topk(q, k)[1], two_stage_topk(p, k)[1]
        support_ids, present = JOINT_SUPPORTS[source](teacher_ids, student_ids)
    else:
        support_ids = two_stage_topk(q if source == "teacher" else p, k)[1]
    ids, teacher_token = support_ids, y
    if request.map_eos and request.eos_map is not None:
        teacher_token = teacher_tokens(y, request.eos_map)
        ids, present = student_support(support_ids, request.eos_map)
    columns = {
        "student_logp": p.gather(-1, y)[:, 0],
        "teacher_logp": q.gather(-1, teacher_token)[:, 0],
        "support.ids": ids,
        "support.student_logp": p.gather(-1, ids),
        "support.teacher_logp": q.gather(-1, support_ids),
    }
    if present is not None:
        columns["support.present"] = present
    if (eos_map := request.eos_map) is not None:
        columns["prefix.student_end"] = p[:, list(eos_map.student)].logsumexp(-1)
        columns["prefix.teacher_end"] = q[:, list(eos_map.teacher)].logsumexp(-1)
        student_eos = torch.tensor(eos_map.student, device=tokens.device)
        columns["prefix.ending"] = torch.isin(tokens, student_eos).to(p.dtype)
    statistics = compute_distribution_stats(p, q, tokens)
    return columns | {f"prefix.{name}": x for name, x in statistics.items()}


def _teacher_top_k(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and log-probabilities (n, K) of the teacher's top-K, and (n,) of the tokens."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    values, ids = two_stage_topk(logits, k)
    return ids, values - normaliser, (logits.gather(-1, tokens[:, None]) - normaliser)[:, 0]


def _top_k_columns(
    student: CausalLM,
    states: Tensor,
    tokens: Tensor,
    top_k: tuple[Tensor, Tensor, Tensor],
    p: Tensor | None,
    logp: Tensor | None,
    request: ScoreRequest,
) -> dict[str, Tensor]:
    """Return the columns of n tokens from the teacher's top-K, without distributions of it.

    Args:
        student: The student.
        states: (n, D) student states.
        tokens: (n,) sampled tokens.
        top_k: (n, K) ids of the teacher, their log-probabilities, and (n,) those of the tokens.
        p: (n, V) log-probabilities of the student; None where `logp` is given.
        logp: (n,) log-probabilities of the tokens under the sampler's softmax.
        request: What is needed.

    Returns:
        The columns by name.
    """
    ids, support_logp, teacher_logp = top_k
    y, present = tokens[:, None], None
    if request.map_eos and request.eos_map is not None:
        ids, present = student_support(ids, request.eos_map)
    if p is None:
        assert logp is not None
        logits = student.head.gather(states, torch.cat([y, ids], 1))
        z = apply_temperature(logits, request.temperature)
        student_support_logp = (logp[:, None] + z[:, 1:] - z[:, :1]).clamp(max=0.0)
    else:
        logp, student_support_logp = p.gather(-1, y)[:, 0], p.gather(-1, ids)
        if request.source in JOINT_SUPPORTS:
            present = JOINT_SUPPORTS[request.source](ids, two_stage_topk(p, ids.shape[1])[1])[1]
    columns = {
        "student_logp": logp,
        "teacher_logp": teacher_logp,
        "support.ids": ids,
        "support.student_logp": student_support_logp,
        "support.teacher_logp": support_logp,
    }
    return columns if present is None else columns | {"support.present": present}


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with the prefix, under the rest of their name."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
