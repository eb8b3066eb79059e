"""Scoring of a micro-batch by both models.

Shapes: B rows of a pass, P prompt and T response positions, L = P + T - 1 positions that a model
reads, N = B T response tokens, n tokens of a chunk, D hidden size, V shared vocabulary, K ids.
"""

from dataclasses import replace

import torch

from opd.analysis.plan.counts import SUMS, Counts, OperationCounter
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
from opd.models.forward import product_logp
from opd.models.lm_head import block_slices, cached_elements, chunk_elements, chunk_slices
from opd.objectives.requirements import Requirements
from opd.scoring.columns import full_columns
from opd.scoring.request import ScoreRequest


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
    needs: Requirements,
    machine: Machine,
    *,
    has_distributions: bool = False,
) -> Counts:
    """Count what scoring does with the logits of one chunk of tokens.

    The products of a chunk exist at once; the rest is done in blocks, as in
    `opd.scoring.score.score_batch`.

    Args:
        student: The student.
        teacher: A teacher in this process; None for another one.
        vocabulary: V.
        num_tokens: N of the pass.
        config: Settings.
        needs: What the loss reads.
        machine: Machine whose time is counted.
        has_distributions: Whether the loss has computed the distributions that the columns read.

    Returns:
        The counts of one chunk, scaled to all chunks of the pass.
    """
    device, temperature = torch.device(machine.kind), config.rollout.temperature
    max_elements = chunk_elements(config.hardware.max_logits_per_chunk, vocabulary, device)
    chunk = chunk_slices(num_tokens, vocabulary, max_elements)[0]
    blocks = block_slices(chunk, vocabulary, cached_elements(device))
    request = ScoreRequest(requirements=needs, temperature=temperature)
    networks = [student] if teacher is None else [student, teacher]
    models = [split_model(network, vocabulary) for network in networks]
    states = [make_states(*pair, chunk.stop) for pair in zip(models, networks, strict=True)]
    with OperationCounter(machine) as counter:
        products = [m.head.products(x) for m, x in zip(models, states, strict=True)]
        before_block, block = counter.counts(), blocks[0]
        tokens = torch.zeros(block.stop, dtype=torch.long, device="meta")
        logp = [
            product_logp(model.head, z[block], temperature)
            for model, z in zip(models, products, strict=True)
        ]
        before_columns = counter.counts()
        if teacher is None:
            logp[0].gather(-1, tokens[:, None])
        else:
            full_columns(logp[0], logp[1], tokens, request)
    counts = counter.counts()
    blocks_per_chunk, sums = chunk.stop / block.stop, {}
    for name in SUMS:
        once, end = getattr(before_block, name), getattr(counts, name)
        if has_distributions:
            sums[name] = blocks_per_chunk * (end - getattr(before_columns, name))
        else:
            sums[name] = once + blocks_per_chunk * (end - once)
    peak = 0.0 if has_distributions else counts.peak  # the loss needs more at the same time
    return replace(counts, **sums, peak=peak, kept_bytes=0.0).scaled(num_tokens / chunk.stop)
