"""The gradient probe: one batch at a fixed policy to one row of numbers about its gradients.

Shapes: B responses, T positions, N supervised tokens, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.access import Missing
from diagnostics.batch import Scored
from diagnostics.family import GAMMAS, available, weights
from diagnostics.gradients import Pairs, measures, pairs
from diagnostics.jackknife import squared
from diagnostics.sketch import (
    LogProbs,
    Projection,
    sequence_sketches,
    token_energies,
    token_sketches,
)
from diagnostics.tradeoff import coherence, cost_of_response, occupancy, recommend, squared_bias


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Gradients of the family on some batch: all that a readout needs, without the models.

    sketches (B, F, J, m); energies (B, F) of tokens; prompt (B,) ids; cost (B,) KL of a response;
    names and gammas of the F = names x gammas members.
    """

    sketches: Tensor
    energies: Tensor
    prompt: Tensor
    cost: Tensor
    names: tuple[str, ...]
    gammas: tuple[float, ...]


def measured(
    batch: Scored,
    hidden: Tensor,
    logp: LogProbs,
    projection: Projection,
    *,
    teacher_known: bool = True,
    gammas: Sequence[float] = GAMMAS,
    chunk_tokens: int = 1024,
) -> Measured:
    """One pass over a batch: every member of the family that it allows, sequence by sequence.

    Cost: both models' heads once, copies * rows * V products a token and F times as many sketch
    numbers. Memory: B F m float32. The batch must hold all rollouts of its prompts, and the student
    that sampled it.

    Args:
      hidden: (N, D) student states of the supervised tokens, row-major over the mask.
      logp: both models' whole log-probabilities of a slice of these tokens, (n, V) each.
      projection: the same one wherever results are joined or compared.
      teacher_known: False where `logp` has no teacher.

    Raises:
      Missing: the batch was not drawn from the distribution that was scored, so that scores do not
        average to 0 and neither bias nor baselines are what the formulas say.
    """
    if batch.top_p < 1 or batch.temperature != batch.score_temperature:
        raise Missing(
            f"the batch was sampled with top_p {batch.top_p} at temperature {batch.temperature} "
            f"and scored at {batch.score_temperature}; sample the probe's batch with top_p 1 at "
            "the temperature of the loss"
        )
    tokens = token_sketches(batch, hidden, logp, projection, chunk_tokens)
    at = weights(batch, available(batch, teacher_known), gammas)
    return Measured(
        sketches=sequence_sketches(tokens, batch.mask, at.values, at.local),
        energies=token_energies(tokens, batch.mask, at.values, at.local),
        prompt=batch.prompt,
        cost=cost_of_response(batch),
        names=at.names,
        gammas=at.gammas,
    )


def joined(parts: Sequence[Measured]) -> Measured:
    """The measurement of several micro-batches, ranks or steps with the policy all but unchanged.

    Prompts keep their ids: sequences with one id are taken as rollouts of one prompt.

    Raises:
      ValueError: no parts, or parts of different members or discounts.
    """
    kinds = {(part.names, part.gammas) for part in parts}
    if len(kinds) != 1:
        raise ValueError(f"parts of {len(kinds)} different families: {sorted(kinds)}")
    first = parts[0]
    return Measured(
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("sketches", "energies", "prompt", "cost")
        },
        names=first.names,
        gammas=first.gammas,
    )


def gradient_row(
    at: Measured,
    trained: tuple[str, float] = ("plain", 0.0),
    sequences: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Everything E-1, E-3, E-4 and E-9 say about the head's gradient.

    Names begin with "gradient/". "_low" and "_high" bound a 95 % interval over prompts; "_se" is
    the standard error over prompts and "_sketch_se" that of the sketch, which adds to it:
    - signal, variance, between, within, snr, noise_scale of `trained` (`signal_and_noise`);
    - noise/MEMBER@GAMMA: n times the variance of the batch's mean gradient, at these rollouts a
      prompt, with both errors; coherence/MEMBER@GAMMA, the value alone;
    - bias2@GAMMA, and alpha, occupancy_square, bias_share, cosine (`occupancy`);
    - best_gamma for `sequences` a batch (this one's if None); chosen/MEMBER and chosen@GAMMA, how
      often under the sampling error; sequences and cost_of_response, the study's coordinates.

    Raises:
      Missing: fewer than 3 prompts, or `trained` was not measured.
    """
    if trained[0] not in at.names or trained[1] not in at.gammas:
        raise Missing(f"{trained} is not among {', '.join(at.names)} at {list(at.gammas)}")
    found = pairs(at.sketches, at.prompt)
    grid = [(name, gamma) for name in at.names for gamma in at.gammas]
    row: dict[str, float] = {}
    for name, value in measures(found, grid.index(trained)).items():
        row |= value.row(f"gradient/{name}")
    for i, (name, gamma) in enumerate(grid):
        label = f"{name}@{gamma:g}"
        noise = found.positive(found.noise[:, i])
        row[f"gradient/noise/{label}"] = noise.value
        row[f"gradient/noise/{label}_se"] = noise.error
        row[f"gradient/noise/{label}_sketch_se"] = noise.sketch
        together = coherence(found, at.energies, at.prompt, i)
        row[f"gradient/coherence/{label}"] = together.value
    row |= {
        "gradient/sequences": float(sequences or len(at.prompt)),
        "gradient/cost_of_response": float(at.cost.mean()),
    }
    return row | _bias_and_choice(found, at, sequences or len(at.prompt), seed)


def _bias_and_choice(found: Pairs, at: Measured, sequences: int, seed: int) -> dict[str, float]:
    row: dict[str, float] = {}
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
