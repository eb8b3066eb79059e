"""The teacher scored without its view, to measure what the view changes.

Shapes: B responses, T positions, N sampled tokens, n tokens of a chunk.
"""

from dataclasses import replace

import torch

from diagnostics.core.totals import Accumulator
from diagnostics.metrics.teacher_view import view_effect
from diagnostics.ragged import flat_index, scatter_to_mask
from opd.models.forward import log_probabilities, micro_batches, response_hidden_states
from opd.models.lm_head import chunk_slices
from opd.scoring.chosen_ids import query_teacher
from opd.scoring.request import ScoreRequest
from opd.scoring.score import ScoredBatch
from opd.teachers.teacher import Capability, Teacher
from opd.tokens.eos import teacher_tokens


@torch.no_grad()
def measure_view(
    teacher: Teacher, batch: ScoredBatch, request: ScoreRequest
) -> dict[str, Accumulator]:
    """Score a batch with the teacher that reads the student's prompts, and compare.

    Costs two further passes of a teacher in this process, or one query of a server.

    Args:
        teacher: The teacher.
        batch: Scored batch, with the loss mask.
        request: What it was scored for.

    Returns:
        Accumulators of `diagnostics.metrics.teacher_view.view_effect`; none without a view, or for
        a cache, which has no scores of other prompts.
    """
    if batch.prompts.view is None or teacher.is_recorded:
        return {}
    scored, prompts = batch.scored, batch.prompts
    if Capability.HIDDEN_STATES not in teacher.capabilities:
        eos_map = request.eos_map if request.map_eos else None
        scores = query_teacher(teacher, replace(prompts, view=None), scored, 0, eos_map)
        return view_effect(scored, scatter_to_mask(scores.sampled, scored.sampled), None)
    num_tokens = int(scored.sampled.sum())
    plain_logp = scored.teacher_logp.new_zeros(num_tokens)
    kl = torch.zeros_like(plain_logp)
    token_index = flat_index(scored.sampled)
    for rows in micro_batches(prompts, scored, request.max_tokens_per_microbatch):
        part, part_prompts = scored.rows(rows).trim(), prompts.rows(rows)
        positions = token_index[rows][:, : part.sampled.shape[1]][part.sampled]
        tokens = part.tokens[part.sampled]
        if request.map_eos and request.eos_map is not None:
            tokens = teacher_tokens(tokens, request.eos_map)
        viewed_states, plain_states = (
            response_hidden_states(teacher.model, model_prompts, part, part.sampled)
            for model_prompts in (part_prompts.teacher_prompts, part_prompts)
        )
        vocabulary = teacher.model.vocabulary
        for c in chunk_slices(len(tokens), vocabulary, request.max_logits_per_chunk):
            viewed, plain = (
                log_probabilities(teacher.model, states[c], request.temperature)
                for states in (viewed_states, plain_states)
            )
            plain_logp[positions[c]] = plain.gather(-1, tokens[c, None])[:, 0].to(plain_logp)
            difference = torch.where(viewed > -torch.inf, viewed - plain, 0.0)
            kl[positions[c]] = (viewed.exp() * difference).sum(-1).to(kl)
    return view_effect(
        scored,
        scatter_to_mask(plain_logp, scored.sampled),
        scatter_to_mask(kl, scored.sampled),
    )
