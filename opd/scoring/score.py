"""Score rollouts: log-probabilities of both models without storing (tokens, V) logits.

A batch is scored in micro-batches: `teacher_micro_batches` yields them with the teacher's states,
and `score_micro_batch` computes the columns of their tokens from the states of both models.

Shapes: B responses, T positions, N sampled tokens, n sampled tokens of a micro-batch, D and D'
hidden sizes of student and teacher, V shared vocabulary, K support ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, Rollouts, ScoredRollouts, Support
from diagnostics.ragged import flat_index, scatter_to_mask
from opd.data.prompts import Prompts
from opd.models.forward import (
    micro_batches,
    product_logits,
    product_logp,
    response_hidden_states,
)
from opd.models.lm_head import block_slices, cached_elements, chunk_elements, chunk_slices
from opd.models.model import CausalLM
from opd.scoring.chosen_ids import STUDENT_SUPPORTS, chosen_columns, query_teacher
from opd.scoring.columns import TokenColumns, full_columns, teacher_top_k, top_k_columns
from opd.scoring.request import NOT_SCORED, ScoreRequest, check_request
from opd.teachers.teacher import Capability, Teacher


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


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Some rows of a batch, with the teacher's states or answers at their n sampled tokens."""

    rows: list[int]
    """Rows of the batch."""
    positions: Tensor
    """(n,) long, index of each token among the N sampled tokens of the batch."""
    prompts: Prompts
    """Prompts of the rows."""
    rollouts: Rollouts
    """Responses of the rows, trimmed to the longest."""
    teacher_states: Tensor | None
    """(n, D') teacher states; None for a teacher without hidden states."""
    answers: tuple[Tensor, Tensor, Tensor] | None
    """(n, K) ids and log-probabilities of a teacher that has no hidden states, and (n,) those of
    the tokens; None for another teacher."""
    sampler_logp: Tensor | None
    """(n,) log-probabilities under the sampler's softmax, where it is taken for the student's."""

    @property
    def tokens(self) -> Tensor:
        """(n,) long, the sampled tokens."""
        return self.rollouts.tokens[self.rollouts.sampled]

    def student_states(self, student: CausalLM) -> Tensor:
        """Return the (n, D) states of the student, by a forward pass."""
        rollouts = self.rollouts
        return response_hidden_states(student, self.prompts, rollouts, rollouts.sampled)


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
    check_request(student, teacher, request)
    if asks_student_ids(teacher, request):
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
        store = TokenColumns(int(rollouts.sampled.sum()))
        for micro_batch in teacher_micro_batches(student, teacher, prompts, rollouts, request):
            states = micro_batch.student_states(student)
            columns = score_micro_batch(student, teacher, micro_batch, states, request)
            if request.requirements.support == "full" and micro_batch.teacher_states is not None:
                columns["teacher_hidden"] = micro_batch.teacher_states
            store.put(micro_batch.positions, columns)
        columns = store.columns
    batch = assemble_batch(student, teacher, prompts, rollouts, columns, request)
    batch.scored.validate()
    return batch


def asks_student_ids(teacher: Teacher, request: ScoreRequest) -> bool:
    """Return whether a teacher on a server scores ids that the student chooses."""
    is_remote = bool(teacher.capabilities) and Capability.HIDDEN_STATES not in teacher.capabilities
    return is_remote and request.source in STUDENT_SUPPORTS


def teacher_micro_batches(
    student: CausalLM,
    teacher: Teacher,
    prompts: Prompts,
    rollouts: Rollouts,
    request: ScoreRequest,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a batch, with what the teacher says of each.

    Args:
        student: The student.
        teacher: The teacher; without hidden states it is asked once, for the whole batch.
        prompts: B prompts.
        rollouts: B responses.
        request: What is needed.

    Yields:
        The micro-batches.
    """
    has_states = Capability.HIDDEN_STATES in teacher.capabilities
    answers = None
    if teacher.capabilities and not has_states:
        k, eos_map = request.requirements.support_k, request.eos_map if request.map_eos else None
        answers = query_teacher(teacher, prompts.teacher_prompts, rollouts, k, eos_map)
    reuses_sampler = request.allows_sampler_softmax(rollouts, student.network.dtype)
    token_index = flat_index(rollouts.sampled)
    for rows in micro_batches(prompts, rollouts, request.max_tokens_per_microbatch):
        part, part_prompts = rollouts.rows(rows).trim(), prompts.rows(rows)
        positions = token_index[rows][:, : part.sampled.shape[1]][part.sampled]
        teacher_states = sampler_logp = None
        if has_states:
            with torch.no_grad():
                teacher_states = response_hidden_states(
                    teacher.model, part_prompts.teacher_prompts, part, part.sampled
                )
        if reuses_sampler and part.softmax_logp is not None:
            sampler_logp = part.softmax_logp[part.sampled].float()
        yield MicroBatch(
            rows=rows,
            positions=positions,
            prompts=part_prompts,
            rollouts=part,
            teacher_states=teacher_states,
            answers=None if answers is None else answers.select(positions),
            sampler_logp=sampler_logp,
        )


@torch.no_grad()
def score_micro_batch(
    student: CausalLM,
    teacher: Teacher,
    micro_batch: MicroBatch,
    states: Tensor,
    request: ScoreRequest,
) -> dict[str, Tensor]:
    """Return the columns of the n tokens of a micro-batch.

    Products with the head are computed for a chunk at once, everything else in blocks that fit a
    CPU's cache.

    Args:
        student: The student.
        teacher: The teacher.
        micro_batch: The micro-batch.
        states: (n, D) states of the student.
        request: What is needed.

    Returns:
        The columns by name.
    """
    states, teacher_states = states.detach(), micro_batch.teacher_states
    tokens, temperature = micro_batch.tokens, request.temperature
    k = request.requirements.support_k
    sampler_logp = micro_batch.sampler_logp
    store, vocabulary = TokenColumns(len(tokens)), student.vocabulary
    size = chunk_elements(request.max_logits_per_chunk, vocabulary, states.device)
    for c in chunk_slices(len(tokens), vocabulary, size):
        p_products = student.head.products(states[c]) if sampler_logp is None else None
        q_products = None
        if teacher_states is not None:
            q_products = teacher.model.head.products(teacher_states[c])
        for b in block_slices(c, vocabulary, cached_elements(states.device)):
            part = slice(b.start - c.start, b.stop - c.start)
            p, q_logits = None, None
            if p_products is not None:
                p = product_logp(student.head, p_products[part], temperature)
            if q_products is not None:
                q_logits = product_logits(teacher.model.head, q_products[part], temperature)
            if p is not None and q_logits is not None:
                columns = full_columns(p, q_logits.log_softmax(-1), tokens[b], request)
            elif p is not None and not teacher.capabilities:
                columns = {"student_logp": p.gather(-1, tokens[b, None])[:, 0]}
            else:
                if q_logits is not None:
                    top_k = teacher_top_k(q_logits, tokens[b], k)
                else:
                    assert micro_batch.answers is not None
                    ids, ids_logp, tokens_logp = micro_batch.answers
                    top_k = ids[b], ids_logp[b], tokens_logp[b]
                logp = None if sampler_logp is None else sampler_logp[b]
                columns = top_k_columns(student, states[b], tokens[b], top_k, p, logp, request)
            store.put(b, columns)
    return store.columns


def assemble_batch(
    student: CausalLM,
    teacher: Teacher,
    prompts: Prompts,
    rollouts: Rollouts,
    columns: dict[str, Tensor],
    request: ScoreRequest,
) -> ScoredBatch:
    """Return the scored batch of the columns of its N tokens.

    Args:
        student: The student.
        teacher: The teacher.
        prompts: B prompts.
        rollouts: B responses.
        columns: The columns by name, row-major.
        request: What was needed.

    Returns:
        The batch, whose values are not checked.
    """
    has_teacher = bool(teacher.capabilities)
    tensors = {
        name: scatter_to_mask(value, rollouts.sampled)
        for name, value in columns.items()
        if name != "teacher_hidden"
    }
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
    reuses_sampler = request.allows_sampler_softmax(rollouts, student.network.dtype)
    return ScoredBatch(prompts, scored, columns.get("teacher_hidden"), reuses_sampler)


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with the prefix, under the rest of their name."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
