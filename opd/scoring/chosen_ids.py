"""Scores of a teacher on a server at ids that it did not choose: the student's, or its own EOS.

A server is asked once for a batch, so the student scores first, and its states are kept where its
values at the teacher's ids are needed too.

Shapes: N sampled tokens, n tokens of a chunk, D hidden size, K ids of a support, C chosen ids, V
vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.ragged import flat_index
from opd.data.prompts import Prompts
from opd.models.forward import log_probabilities, micro_batches, response_hidden_states
from opd.models.lm_head import apply_temperature, chunk_slices, two_stage_topk
from opd.models.model import CausalLM
from opd.objectives.requirements import Requirements
from opd.objectives.support import union
from opd.serving.position_logprobs import PADDING_ID
from opd.teachers.remote_scores import TeacherScores
from opd.teachers.teacher import Teacher
from opd.tokens.eos import EosMap, teacher_tokens

STUDENT_SUPPORTS = ("student", "union")
"""Supports with ids that only the student knows."""


def num_chosen_ids(requirements: Requirements, map_eos: bool) -> int:
    """Return how many ids per position a teacher is asked for that are not among its own top-K.

    Args:
        requirements: What the loss reads.
        map_eos: Whether the teacher is read at its own EOS.

    Returns:
        C, without the sampled token; 0 for none.
    """
    if requirements.support in STUDENT_SUPPORTS:
        return requirements.support_k
    return 1 if map_eos else 0


def query_teacher(
    teacher: Teacher, prompts: Prompts, rollouts: Rollouts, k: int, eos_map: EosMap | None
) -> TeacherScores:
    """Query a teacher on a server for its top-K, and its own EOS where the student used another.

    Args:
        teacher: The teacher.
        prompts: B prompts, as the teacher reads them.
        rollouts: B responses.
        k: Number of ids per position.
        eos_map: EOS ids of both models to map; None to map none.

    Returns:
        The scores; `sampled` is read at the mapped tokens.
    """
    if eos_map is None:
        return teacher.top_k(prompts, rollouts, k)
    tokens = rollouts.tokens[rollouts.sampled]
    mapped = teacher_tokens(tokens, eos_map)
    differs = mapped != tokens
    if not differs.any():
        return teacher.top_k(prompts, rollouts, k)
    chosen_ids = torch.where(differs, mapped, PADDING_ID)[:, None]
    scores = teacher.top_k(prompts, rollouts, k, chosen_ids)
    if scores.chosen_logp is None:
        raise InvalidInput(f"the teacher {teacher.name} returned no scores of chosen ids")
    return replace(scores, sampled=torch.where(differs, scores.chosen_logp[:, 0], scores.sampled))


@torch.no_grad()
def chosen_columns(
    student: CausalLM,
    teacher: Teacher,
    prompts: Prompts,
    rollouts: Rollouts,
    *,
    source: str,
    k: int,
    temperature: float,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
) -> dict[str, Tensor]:
    """Score rollouts on a support with the student's ids, with a teacher on a server.

    Args:
        student: The student.
        teacher: The teacher, which scores chosen ids.
        prompts: B prompts.
        rollouts: B responses.
        source: One of STUDENT_SUPPORTS.
        k: K, the ids per model.
        temperature: Temperature of the student's log-probabilities.
        max_tokens_per_microbatch: Padded tokens of a forward pass.
        max_logits_per_chunk: Logits that exist at once.

    Returns:
        Columns of the N sampled tokens, row-major: both models' log-probabilities of the tokens
        and of the support's ids, and for a union which ids are present.

    Raises:
        InvalidInput: The teacher returns no scores of chosen ids.
    """
    is_union, num_tokens = source == "union", int(rollouts.sampled.sum())
    token_index, tokens = flat_index(rollouts.sampled), rollouts.tokens[rollouts.sampled]
    logp = torch.zeros(num_tokens, device=tokens.device)
    ids, ids_logp = tokens.new_zeros((num_tokens, k)), logp.new_zeros((num_tokens, k))
    kept_states: list[tuple[Tensor, Tensor]] = []
    for rows in micro_batches(prompts, rollouts, max_tokens_per_microbatch):
        micro_batch = rollouts.rows(rows).trim()
        sampled = micro_batch.sampled
        positions = token_index[rows][:, : sampled.shape[1]][sampled]
        states = response_hidden_states(student, prompts.rows(rows), micro_batch, sampled)
        for c in chunk_slices(len(states), student.vocabulary, max_logits_per_chunk):
            p, chunk = log_probabilities(student, states[c], temperature), positions[c]
            logp[chunk] = p.gather(-1, tokens[chunk, None])[:, 0]
            ids_logp[chunk], ids[chunk] = two_stage_topk(p, k)
        if is_union:
            kept_states.append((positions, states))
    scores = teacher.top_k(prompts.teacher_prompts, rollouts, k if is_union else 0, ids)
    if scores.chosen_logp is None:
        raise InvalidInput(f"the teacher {teacher.name} returned no scores of chosen ids")
    columns = {"student_logp": logp, "teacher_logp": scores.sampled}
    if not is_union:
        return columns | {
            "support.ids": ids,
            "support.student_logp": ids_logp,
            "support.teacher_logp": scores.chosen_logp,
        }
    support_ids, present = union(scores.ids, ids)
    teacher_ids_logp = torch.zeros_like(scores.logp)
    for positions, states in kept_states:
        for c in chunk_slices(len(states), student.vocabulary, max_logits_per_chunk):
            chunk = positions[c]
            head_ids = torch.cat([tokens[chunk, None], scores.ids[chunk]], 1)
            z = apply_temperature(student.head.gather(states[c], head_ids), temperature)
            # log p(v) = log p(y) + z_v - z_y
            teacher_ids_logp[chunk] = (logp[chunk, None] + z[:, 1:] - z[:, :1]).clamp(max=0.0)
    return columns | {
        "support.ids": support_ids,
        "support.student_logp": torch.cat([teacher_ids_logp, ids_logp], 1),
        "support.teacher_logp": torch.cat([scores.logp, scores.chosen_logp], 1),
        "support.present": present,
    }
