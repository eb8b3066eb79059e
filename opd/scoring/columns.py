"""Columns of scored tokens from the logits of both models.

Shapes: n tokens of a block, D hidden size, V shared vocabulary, K support ids.
"""

import torch
from torch import Tensor

from diagnostics.core.distribution_stats import compute_distribution_stats
from opd.models.lm_head import apply_temperature, two_stage_topk
from opd.models.model import CausalLM
from opd.objectives.support import JOINT_SUPPORTS
from opd.scoring.request import ScoreRequest
from opd.tokens.eos import student_support, teacher_tokens


class TokenColumns:
    """Columns of a number of tokens, filled part by part."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.columns: dict[str, Tensor] = {}

    def put(self, positions: Tensor | slice, part: dict[str, Tensor]) -> None:
        """Set the values of some tokens; 0 stays where none are set.

        Args:
            positions: Which tokens.
            part: Their values by column.
        """
        for name, value in part.items():
            if name not in self.columns:
                self.columns[name] = value.new_zeros((self.num_tokens, *value.shape[1:]))
            self.columns[name][positions] = value


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


def teacher_top_k(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and log-probabilities (n, K) of the teacher's top-K, and (n,) of the tokens."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    values, ids = two_stage_topk(logits, k)
    return ids, values - normaliser, (logits.gather(-1, tokens[:, None]) - normaliser)[:, 0]


def top_k_columns(
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
