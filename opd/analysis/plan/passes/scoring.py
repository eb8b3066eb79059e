"""Scoring of a micro-batch by both models.

Shapes: B rows of a pass, P prompt and T response positions, L = P + T - 1 positions that a model
reads, N = B T response tokens, n tokens of a chunk, D hidden size, V shared vocabulary, K ids.
"""

import torch

from diagnostics.core.distribution_stats import compute_distribution_stats
from opd.analysis.plan.counts import Counts, OperationCounter
from opd.analysis.plan.machines import Machine
from opd.analysis.plan.networks import MetaNetwork
from opd.analysis.plan.passes.model import (
    Rows,
    make_states,
    over_layers,
    response_states,
    split_model,
)
from opd.config.settings import Config
from opd.models.forward import log_probabilities
from opd.models.lm_head import two_stage_topk
from opd.objectives.support import JOINT_SUPPORTS

STATISTICS_BLOCK = 1 << 17
"""Numbers of a block of `compute_distribution_stats` on a CPU."""


@torch.no_grad()
def count_forward(model: MetaNetwork, rows: Rows, vocabulary: int, machine: Machine) -> Counts:
    """Count a forward pass up to the states of the response tokens, without gradient.

    Args:
        model: The network.
        rows: Shape of the pass.
        vocabulary: V.
        machine: Machine whose time is counted.

    Returns:
        The counts; `kept_bytes` are the states.
    """

    def count() -> Counts:
        with OperationCounter(machine) as counter:
            states = response_states(split_model(model, vocabulary), model, rows, rows.tokens)
            counter.mark_kept()
            del states
        return counter.counts()

    return over_layers(model, count, (1, 2))


@torch.no_grad()
def count_score_chunk(
    student: MetaNetwork,
    teacher: MetaNetwork | None,
    vocabulary: int,
    num_tokens: int,
    config: Config,
    support: str,
    machine: Machine,
) -> Counts:
    """Count what scoring does with the logits of one chunk of tokens.

    Args:
        student: The student.
        teacher: A teacher in this process; None for another one.
        vocabulary: V.
        num_tokens: N of the pass.
        config: Settings.
        support: Whose top-K is the support (`Requirements.support`).
        machine: Machine whose time is counted.

    Returns:
        The counts of one chunk, scaled to all chunks of the pass.
    """
    model, k = split_model(student, vocabulary), config.objective.support_k
    size = min(num_tokens, max(1, config.hardware.max_logits_per_chunk // vocabulary))
    tokens = torch.zeros(size, dtype=torch.long, device="meta")
    blocks = 1.0
    with OperationCounter(machine) as counter:
        p = log_probabilities(model, make_states(model, student, size), config.rollout.temperature)
        p.gather(-1, tokens[:, None])
        if teacher is not None:
            teacher_model = split_model(teacher, vocabulary)
            states = make_states(teacher_model, teacher, size)
            q = log_probabilities(teacher_model, states, config.rollout.temperature)
            sources = {"student": (p,), "teacher": (q,)}.get(
                support, (q, p) if support in JOINT_SUPPORTS else (q,)
            )
            for logp in sources:
                ids = two_stage_topk(logp, k)[1]
                p.gather(-1, ids), q.gather(-1, ids)
    counts = counter.counts()
    if teacher is not None:
        block = size if machine.kind == "cuda" else max(1, STATISTICS_BLOCK // vocabulary)
        block = min(block, size)
        blocks = size / block
        with OperationCounter(machine) as counter:
            compute_distribution_stats(p[:block], q[:block], tokens[:block])
        statistics = counter.counts()
        kept_bytes = float(p.nbytes + q.nbytes)
        peak = max(counts.peak, kept_bytes + statistics.peak)
        sums = counts.then(statistics.scaled(blocks))
        counts = Counts(sums.flops, sums.moved_bytes, sums.operations, sums.seconds, peak)
    return counts.scaled(num_tokens / size)
