"""The gradient probe in a run: signal, noise and bias of the head's gradient as the weights are.

Shapes: N supervised tokens, D and D' hidden sizes of student and teacher.
"""

import torch
from torch import Tensor

from diagnostics.access import Missing
from diagnostics.batch import Scored
from diagnostics.probe import gradient_row, measured
from diagnostics.rows import Row
from diagnostics.sketch import random_signs
from opd.data import Prompts
from opd.head import chunks
from opd.model import Model, Pair, log_probabilities, micro_batches, response_hidden


@torch.no_grad()
def probe(
    pair: Pair,
    prompts: Prompts,
    scored: Scored,
    *,
    gamma: float,
    micro_tokens: int,
    chunk_elements: int,
) -> Row:
    """`diagnostics.probe.gradient_row` of a batch; empty where it has too few prompts for one.

    The batch is one that the student sampled with top_p 1 at the temperature of the scores. gamma
    is that of the objective, if the probe's grid has it, else the nearest one.
    """
    ours, theirs = (
        states(model, prompts, scored, micro_tokens) for model in (pair.student, pair.teacher)
    )
    tau, vocabulary = scored.score_temperature, pair.student.vocabulary
    signs = random_signs(vocabulary, ours.shape[1], seed=0).to(ours.device)

    def logp(c: slice) -> tuple[Tensor, Tensor]:
        return (
            log_probabilities(pair.student, ours[c], tau),
            log_probabilities(pair.teacher, theirs[c], tau),
        )

    size = chunks(len(ours), vocabulary, chunk_elements)[0].stop
    found = measured(scored, ours, logp, signs, chunk_tokens=size)
    nearest = min(found.gammas, key=lambda g: abs(g - gamma))
    try:
        return dict(gradient_row(found, trained=("plain", nearest)))
    except Missing:
        return {}


def states(model: Model, prompts: Prompts, scored: Scored, micro_tokens: int) -> Tensor:
    """(N, D) hidden states of all supervised tokens, row-major over the mask."""
    slot = (scored.mask.flatten().cumsum(0) - 1).reshape(scored.mask.shape)
    found: Tensor | None = None
    for rows in micro_batches(prompts, scored, micro_tokens):
        part = scored.rows(rows).trimmed()
        some = response_hidden(model, prompts.rows(rows), part)
        if found is None:
            found = some.new_zeros((int(scored.mask.sum()), some.shape[1]))
        found[slot[rows][:, : part.mask.shape[1]][part.mask]] = some
    if found is None:
        raise ValueError("the batch has no supervised token to probe")
    return found
