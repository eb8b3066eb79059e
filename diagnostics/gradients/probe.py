"""The gradient probe: one batch at a fixed policy to one row of numbers about its gradients.

Shapes: B responses, T positions, N supervised tokens, D hidden size, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField
from diagnostics.errors import InvalidInput
from diagnostics.gradients.bias import (
    coherence,
    cost_of_response,
    occupancy,
    recommend,
    squared_bias,
    without_each,
)
from diagnostics.gradients.estimators import GAMMAS, available, weights
from diagnostics.gradients.jackknife import squared
from diagnostics.gradients.signal_noise import Pairs, measures, pairs
from diagnostics.gradients.sketch import (
    LogProbs,
    Projection,
    Slopes,
    sequence_sketches,
    token_energies,
    token_sketches,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientSketches:
    """Gradients of the family on some batch: all that a readout needs, without the models.

    sketches (B, F, J, m); prompt (B,) ids; cost (B,) KL of a response; names and gammas of the F =
    names x gammas members. energies (B, F) of tokens, for the head; squares (B, F) exact squared
    lengths of sequences' gradients, for other blocks.
    """

    sketches: Tensor
    prompt: Tensor
    cost: Tensor
    names: tuple[str, ...]
    gammas: tuple[float, ...]
    energies: Tensor | None = None
    squares: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those with an axis of sequences."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}


@dataclass(frozen=True, kw_only=True, eq=False)
class LossGradients:
    """Gradients of the loss that trains, sequence by sequence, whatever its objective is.

    sketches (B, J, m); prompt (B,) ids; squares (B,) exact squared lengths, where they are known.
    """

    sketches: Tensor
    prompt: Tensor
    squares: Tensor | None = None


def measured(
    batch: ScoredRollouts,
    hidden: Tensor,
    logp: LogProbs,
    projection: Projection,
    *,
    teacher_known: bool = True,
    gammas: Sequence[float] = GAMMAS,
    chunk_tokens: int = 1024,
    among: tuple[ScoredRollouts, slice] | None = None,
    slopes: Slopes | None = None,
) -> GradientSketches:
    """One pass over a batch: every member of the family that it allows, sequence by sequence.

    Cost: both models' heads once, copies * rows * V products a token and F times as many sketch
    numbers. Memory: B F m float32. The batch must hold all rollouts of its prompts, and the student
    that sampled it.

    Args:
      hidden: (N, D) student states of the supervised tokens, row-major over the mask.
      logp: both models' whole log-probabilities of a slice of these tokens, (n, V) each.
      projection: the same one wherever results are joined or compared.
      teacher_known: False where `logp` has no teacher.
      among: the batch of all ranks and where this one's rows stand in it (`diagnostics.gradients.distributed`), for
        baselines; only this batch if None.
      slopes: of a head with a soft-cap or a scale (`diagnostics.gradients.sketch.Slopes`).

    Raises:
      Missing: the batch was not drawn from the distribution that was scored.
    """
    on_policy(batch)
    tokens = token_sketches(batch, hidden, logp, projection, chunk_tokens, slopes)
    whole, rows = among or (batch, slice(len(batch)))
    at = weights(whole, available(whole, teacher_known), gammas)
    own = at.values[rows, : batch.mask.shape[1]]
    return GradientSketches(
        sketches=sequence_sketches(tokens, batch.mask, own, at.local),
        energies=token_energies(tokens, batch.mask, own, at.local),
        prompt=batch.prompt,
        cost=cost_of_response(batch),
        names=at.names,
        gammas=at.gammas,
    )


def on_policy(batch: ScoredRollouts) -> None:
    """Refuse a batch that was not drawn from the distribution that was scored.

    Then scores do not average to 0, and neither bias nor baselines are what the formulas say.

    Raises:
      Missing: top_p below 1, or another temperature.
    """
    if batch.top_p < 1 or batch.temperature != batch.score_temperature:
        raise MissingField(
            f"the batch was sampled with top_p {batch.top_p} at temperature {batch.temperature} "
            f"and scored at {batch.score_temperature}; sample the probe's batch with top_p 1 at "
            "the temperature of the loss"
        )


def joined(parts: Sequence[GradientSketches]) -> GradientSketches:
    """The measurement of several micro-batches, ranks or steps with the policy all but unchanged.

    Prompts keep their ids: sequences with one id are taken as rollouts of one prompt.

    Raises:
      ValueError: no parts, or parts of different members or discounts.
    """
    kinds = {(part.names, part.gammas, *part.tensors()) for part in parts}
    if len(kinds) != 1:
        raise InvalidInput(f"parts of {len(kinds)} different families: {sorted(kinds)}")
    columns = [part.tensors() for part in parts]
    changed: dict[str, Any] = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
    return replace(parts[0], **changed)


def gradient_row(
    at: GradientSketches,
    trained: tuple[str, float] = ("plain", 0.0),
    sequences: int | None = None,
    seed: int = 0,
    prefix: str = "gradient",
    loss: LossGradients | None = None,
) -> dict[str, float]:
    """Everything E-1, E-3, E-4 and E-9 say about the gradient that was measured.

    Names begin with the prefix and a slash. "_low" and "_high" bound a 95 % interval over prompts;
    "_se" is the standard error over prompts, "_sketch_se" that of the sketch, which adds to it:
    - signal, variance, between, within, snr, noise_scale (`signal_and_noise`) of `loss`, the loss
      that trains; without one, of the member `trained`, which is then said to be what trains;
    - noise/MEMBER@GAMMA: n times the variance of the batch's mean gradient, at these rollouts a
      prompt, with both errors; coherence/MEMBER@GAMMA, the value alone, where token energies are
      known; sketch_excess, the mean squared length of sketches over the exact one, less 1, of
      what trains, where that is known;
    - bias2@GAMMA, and alpha, occupancy_square, bias_share, cosine (`occupancy`);
    - best_gamma for `sequences` a batch (this one's if None); chosen/MEMBER and chosen@GAMMA, how
      often under the sampling error; sequences and cost_of_response (with errors), the study's
      coordinates.

    Raises:
      Missing: fewer than 3 prompts, or `trained` was not measured.
    """
    if trained[0] not in at.names or trained[1] not in at.gammas:
        raise MissingField(f"{trained} is not among {', '.join(at.names)} at {list(at.gammas)}")
    found = pairs(at.sketches, at.prompt)
    grid = [(name, gamma) for name in at.names for gamma in at.gammas]
    nth = grid.index(trained)
    row: dict[str, float] = {}
    headline, index, squares = found, nth, None if at.squares is None else at.squares[:, nth]
    if loss is not None:
        headline, index, squares = pairs(loss.sketches[:, None], loss.prompt), 0, loss.squares
    for name, value in measures(headline, index).items():
        row |= value.row(name)
    for i, (name, gamma) in enumerate(grid):
        label = f"{name}@{gamma:g}"
        noise = found.positive(found.noise[:, i])
        row[f"noise/{label}"] = noise.value
        row[f"noise/{label}_se"] = noise.error
        row[f"noise/{label}_sketch_se"] = noise.sketch
        if at.energies is not None:
            together = coherence(found, at.energies, at.prompt, i)
            row[f"coherence/{label}"] = together.value
    if squares is not None:
        exact, sketched = float(squares.double().mean()), float(headline.own[0, index])
        row["sketch_excess"] = sketched / exact - 1 if exact > 0 else math.nan
    row["sequences"] = float(sequences or len(at.prompt))
    row |= found.positive(without_each(at.cost, at.prompt)).row("cost_of_response")
    row |= _bias_and_choice(found, at, sequences or len(at.prompt), seed)
    return {f"{prefix}/{name}": value for name, value in row.items()}


def _bias_and_choice(
    found: Pairs, at: GradientSketches, sequences: int, seed: int
) -> dict[str, float]:
    row: dict[str, float] = {}
    bias = squared_bias(found, at)
    for i, gamma in enumerate(at.gammas):
        row |= squared(found.estimate(bias[:, i])).row(f"bias2@{gamma:g}")
    for name, value in occupancy(found, at).items():
        row |= value.row(f"{name}")
    choice = recommend(found, at, sequences, torch.Generator().manual_seed(seed))
    share = choice.share.view(len(at.names), len(at.gammas))
    row["best_gamma"] = choice.gamma
    row |= {f"chosen/{n}": float(x) for n, x in zip(at.names, share.sum(1), strict=True)}
    row |= {f"chosen@{g:g}": float(x) for g, x in zip(at.gammas, share.sum(0), strict=True)}
    return row
