"""The gradient probe: one batch at a fixed policy to one row of numbers about its gradients.

Shapes: B responses, T positions, N supervised tokens, D hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.access import Missing
from diagnostics.batch import Scored
from diagnostics.family import GAMMAS, Weights, available, weights
from diagnostics.gradients import Pairs, measures, pairs, squared
from diagnostics.sketch import (
    LogProbs,
    Projection,
    sequence_sketches,
    token_energies,
    token_sketches,
)
from diagnostics.tradeoff import coherence, cost_of_response, occupancy, recommend, squared_bias


def gradient_row(
    batch: Scored,
    hidden: Tensor,
    logp: LogProbs,
    projection: Projection,
    *,
    teacher_known: bool = True,
    gammas: Sequence[float] = GAMMAS,
    trained: tuple[str, float] = ("plain", 0.0),
    sequences: int | None = None,
    seed: int = 0,
    chunk_tokens: int = 1024,
) -> dict[str, float]:
    """Everything E-1, E-3, E-4 and E-9 say about the head's gradient on this batch.

    Names begin with "gradient/"; "_low" and "_high" bound a 95 % interval over prompts, "_se" is
    its standard error and "_sketch_se" that of the sketch:
    - signal, variance, between, within, snr, noise_scale of `trained` (`signal_and_noise`);
    - noise/MEMBER@GAMMA: n times the variance of the batch's mean gradient, at these rollouts a
      prompt; coherence/MEMBER@GAMMA;
    - bias2@GAMMA, and alpha, occupancy_square, bias_share, cosine (`occupancy`);
    - best_gamma for `sequences` a batch (this one's if None); chosen/MEMBER and chosen@GAMMA, how
      often under the sampling error; sequences and cost_of_response, the study's coordinates.
    The projection must be the same from step to step if rows are to be compared. Cost: a forward
    pass of both heads, and J m1 V products a token.

    Args:
      hidden: (N, D) student states of the supervised tokens, row-major over the mask.
      logp: both models' whole log-probabilities of a slice of these tokens, (n, V) each.
      teacher_known: False where `logp` has no teacher.

    Raises:
      Missing: fewer than 3 prompts, or `trained` cannot be had from this batch.
    """
    names, member = available(batch, teacher_known), trained[0]
    if member not in names or trained[1] not in gammas:
        raise Missing(f"{trained} is not among {', '.join(names)} at {list(gammas)} on this batch")
    tokens = token_sketches(batch, hidden, logp, projection, chunk_tokens)
    at = weights(batch, names, gammas)
    found = pairs(sequence_sketches(tokens, batch.mask, at.values, at.local), batch.prompt)
    energies = token_energies(tokens, batch.mask, at.values, at.local)

    row: dict[str, float] = {}
    for name, value in measures(found, at.index(*trained)).items():
        row |= value.row(f"gradient/{name}")
    for name in at.names:
        for gamma in at.gammas:
            i, label = at.index(name, gamma), f"{name}@{gamma:g}"
            row |= found.positive(found.noise[:, i]).row(f"gradient/noise/{label}")
            together = coherence(found, energies, batch.prompt, i)
            row |= together.row(f"gradient/coherence/{label}")
    return (
        row
        | _bias_and_choice(found, at, sequences or len(batch), seed)
        | {"gradient/cost_of_response": cost_of_response(batch)}
    )


def _bias_and_choice(found: Pairs, at: Weights, sequences: int, seed: int) -> dict[str, float]:
    row: dict[str, float] = {"gradient/sequences": float(sequences)}
    bias = squared_bias(found, at)
    for i, gamma in enumerate(at.gammas):
        row |= squared(found.estimate(bias[:, i])).row(f"gradient/bias2@{gamma:g}")
    for name, value in occupancy(found, at).items():
        row |= value.row(f"gradient/{name}")
    choice = recommend(found, at, sequences, torch.Generator().manual_seed(seed))
    share = choice.share.view(len(at.names), len(at.gammas))
    row["gradient/best_gamma"] = choice.gamma
    row |= {f"gradient/chosen/{n}": float(x) for n, x in zip(at.names, share.sum(1), strict=True)}
    row |= {
        f"gradient/chosen@{g:g}": float(x) for g, x in zip(at.gammas, share.sum(0), strict=True)
    }
    return row
