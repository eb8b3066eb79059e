"""The teacher's own scores of rollouts, without a student: what a cache of them holds.

They are computed in the micro-batches and chunks in which `opd.scoring.score.score_batch` computes
them for training, so that they have the same bits.

Shapes: N sampled tokens, K ids per token.
"""

import torch

from diagnostics.batch import Rollouts
from diagnostics.ragged import flat_index
from opd.data.prompts import Prompts
from opd.models.forward import log_probabilities, micro_batches, response_hidden_states
from opd.models.lm_head import chunk_elements, chunk_slices, two_stage_topk
from opd.scoring.chosen_ids import query_teacher
from opd.scoring.columns import TokenColumns
from opd.scoring.request import ScoreRequest
from opd.teachers.remote_scores import TeacherScores
from opd.teachers.teacher import Capability, Teacher
from opd.tokens.eos import teacher_tokens


@torch.no_grad()
def score_teacher(
    teacher: Teacher, prompts: Prompts, rollouts: Rollouts, request: ScoreRequest
) -> TeacherScores:
    """Score rollouts with a teacher alone.

    Args:
        teacher: The teacher.
        prompts: B prompts, with those that the teacher reads where it reads others.
        rollouts: B responses.
        request: K, temperature, mapping of EOS ids and memory.

    Returns:
        Its K most probable ids of each token, and its log-probability of the sampled token. With
        `map_eos`, `chosen_logp` is (N, 1): that of the token which is read in the place of the
        sampled one.
    """
    k = request.requirements.support_k
    eos_map = request.eos_map if request.map_eos else None
    if Capability.HIDDEN_STATES not in teacher.capabilities:
        scores = query_teacher(teacher, prompts.teacher_prompts, rollouts, k, eos_map)
        chosen_logp = None if eos_map is None else scores.sampled[:, None]
        return TeacherScores(scores.ids, scores.logp, scores.sampled, chosen_logp)
    store = TokenColumns(int(rollouts.sampled.sum()))
    token_index = flat_index(rollouts.sampled)
    for rows in micro_batches(prompts, rollouts, request.max_tokens_per_microbatch):
        micro_batch = rollouts.rows(rows).trim()
        micro_prompts, sampled = prompts.rows(rows).teacher_prompts, micro_batch.sampled
        positions = token_index[rows][:, : sampled.shape[1]][sampled]
        tokens = micro_batch.tokens[sampled]
        states = response_hidden_states(teacher.model, micro_prompts, micro_batch, sampled)
        vocabulary = teacher.model.vocabulary
        size = chunk_elements(request.max_logits_per_chunk, vocabulary, states.device)
        for c in chunk_slices(len(tokens), vocabulary, size):
            q = log_probabilities(teacher.model, states[c], request.temperature)
            ids = two_stage_topk(q, k)[1]
            columns = {
                "ids": ids,
                "logp": q.gather(-1, ids),
                "sampled": q.gather(-1, tokens[c, None])[:, 0],
            }
            if eos_map is not None:
                columns["chosen_logp"] = q.gather(-1, teacher_tokens(tokens[c, None], eos_map))
            store.put(positions[c], columns)
    return TeacherScores(**store.columns)
