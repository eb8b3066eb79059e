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
    occupancy,
    prompt_jackknife_means,
    recommend_estimator,
    response_cost,
    squared_bias,
)
from diagnostics.gradients.estimators import GAMMAS, available_estimators, estimator_weights
from diagnostics.gradients.jackknife import squared_length_estimate
from diagnostics.gradients.signal_noise import PairProducts, pair_products, signal_noise_estimates
from diagnostics.gradients.sketch import (
    LogitDerivatives,
    LogProbs,
    Projection,
    sequence_sketches,
    token_energies,
    token_sketches,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientSketches:
    """Gradients of the family on some batch: all that the row needs, without the models."""

    sketches: Tensor
    """(B, F, J, m)."""
    prompt: Tensor
    """(B,) ids."""
    cost: Tensor
    """(B,) KL of a response."""
    names: tuple[str, ...]
    """Names of the F = names x gammas estimators."""
    gammas: tuple[float, ...]
    """Discounts of the estimators."""
    energies: Tensor | None = None
    """(B, F) energies of tokens, for the head."""
    squares: Tensor | None = None
    """(B, F) exact squared lengths of sequences' gradients, for other blocks."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields with an axis of sequences, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, Tensor)}


@dataclass(frozen=True, kw_only=True, eq=False)
class LossGradients:
    """Gradients of the training loss, sequence by sequence, for any objective."""

    sketches: Tensor
    """(B, J, m)."""
    prompt: Tensor
    """(B,) ids."""
    squares: Tensor | None = None
    """(B,) exact squared lengths, where they are known."""


def sketch_gradients(
    batch: ScoredRollouts,
    hidden: Tensor,
    logp: LogProbs,
    projection: Projection,
    *,
    has_teacher: bool = True,
    gammas: Sequence[float] = GAMMAS,
    chunk_tokens: int = 1024,
    gathered: tuple[ScoredRollouts, slice] | None = None,
    logit_derivatives: LogitDerivatives | None = None,
) -> GradientSketches:
    """Sketch the gradients of every estimator that the batch allows, sequence by sequence.

    Cost: both models' heads once, copies * rows * V products a token and F times as many sketch
    numbers.
    Memory: B F m float32.

    The batch must hold all rollouts of its prompts and must be sampled by the scored student.

    Args:
        batch: Scored rollouts.
        hidden: (N, D) student states of the supervised tokens, row-major over the mask.
        logp: Both models' full log-probabilities of a slice of these tokens, (n, V) each.
        projection: The same one wherever results are concatenated or compared.
        has_teacher: False where `logp` has no teacher.
        gammas: Discounts.
        chunk_tokens: Tokens whose (n, V) log-probabilities are held at a time.
        gathered: The batch of all ranks and this rank's rows in it
            (`diagnostics.gradients.distributed`), for baselines; only this batch if None.
        logit_derivatives: Of a head with a soft-cap or a scale
            (`diagnostics.gradients.sketch.LogitDerivatives`).

    Returns:
        The sketches.

    Raises:
        MissingField: The batch was not sampled from the distribution that was scored.
    """
    check_on_policy(batch)
    tokens = token_sketches(batch, hidden, logp, projection, chunk_tokens, logit_derivatives)
    full_batch, rows = gathered or (batch, slice(len(batch)))
    estimators = estimator_weights(
        full_batch, available_estimators(full_batch, has_teacher), gammas
    )
    weights = estimators.values[rows, : batch.mask.shape[1]]
    return GradientSketches(
        sketches=sequence_sketches(tokens, batch.mask, weights, estimators.local),
        energies=token_energies(tokens, batch.mask, weights, estimators.local),
        prompt=batch.prompt,
        cost=response_cost(batch),
        names=estimators.names,
        gammas=estimators.gammas,
    )


def check_on_policy(batch: ScoredRollouts) -> None:
    """Raise MissingField if the batch was not sampled from the distribution that was scored.

    Otherwise scores do not average to 0, and neither bias nor baselines follow the formulas.

    Args:
        batch: Scored rollouts.

    Raises:
        MissingField: top_p below 1, or another temperature.
    """
    if batch.top_p < 1 or batch.temperature != batch.score_temperature:
        raise MissingField(
            f"the batch was sampled with top_p={batch.top_p} at temperature {batch.temperature} "
            f"but scored at temperature {batch.score_temperature}; sample the probe's batch with "
            "top_p=1 at the temperature of the loss"
        )


def concatenate_sketches(parts: Sequence[GradientSketches]) -> GradientSketches:
    """Concatenate the sketches of micro-batches, ranks or steps with a nearly unchanged policy.

    Prompts keep their ids: sequences with the same id count as rollouts of one prompt.

    Args:
        parts: Sketches of the same estimators and discounts.

    Returns:
        The sketches of all sequences.

    Raises:
        InvalidInput: No parts, or parts of different estimators or discounts.
    """
    families = {(part.names, part.gammas, *part.tensors()) for part in parts}
    if len(families) != 1:
        raise InvalidInput(
            f"cannot concatenate sketches of {len(families)} different families: {sorted(families)}"
        )
    columns = [part.tensors() for part in parts]
    concatenated: dict[str, Any] = {
        name: torch.cat([tensors[name] for tensors in columns]) for name in columns[0]
    }
    return replace(parts[0], **concatenated)


def gradient_row(
    sketches: GradientSketches,
    trained: tuple[str, float] = ("plain", 0.0),
    num_sequences: int | None = None,
    seed: int = 0,
    prefix: str = "gradient",
    loss: LossGradients | None = None,
) -> dict[str, float]:
    """Compute all quantities of E-1, E-3, E-4 and E-9 of the measured gradient.

    Names begin with the prefix and a slash. "_low" and "_high" bound a 95 % interval over prompts;
    "_se" is the standard error over prompts, "_sketch_se" that of the sketch, which adds to it.

    Args:
        sketches: Gradients of the family.
        trained: Estimator and discount that train, for the first group of columns.
        num_sequences: Sequences of an update, for `best_gamma`; this batch's number if None.
        seed: Seed of the sampling in `recommend_estimator`.
        prefix: Prefix of the column names.
        loss: Gradients of the training loss, used in place of `trained`.

    Returns:
        signal, variance, between, within, snr, noise_scale: `signal_and_noise` of `loss`, the
        training loss; without it, of the estimator `trained`.
        noise/NAME@GAMMA: n times the variance of the batch's mean gradient, at this number of
            rollouts a prompt, with both errors.
        coherence/NAME@GAMMA: Value without errors, where token energies are known.
        sketch_excess: Mean squared length of the sketches of the training gradient divided by the
            exact one, minus 1, where the exact one is known.
        bias2@GAMMA: Squared bias at the discount.
        alpha, occupancy_square, bias_share, cosine: `occupancy`.
        best_gamma: Discount of the best estimator for `num_sequences` a batch.
        chosen/NAME, chosen@GAMMA: How often each estimator, and each discount, is the best under
            the sampling error.
        sequences, cost_of_response: The study's coordinates, the second with errors.

    Raises:
        MissingField: Fewer than 3 prompts, or `trained` was not measured.
    """
    if trained[0] not in sketches.names or trained[1] not in sketches.gammas:
        raise MissingField(
            f"{trained} is not among {', '.join(sketches.names)} at {list(sketches.gammas)}"
        )
    products = pair_products(sketches.sketches, sketches.prompt)
    grid = [(name, gamma) for name in sketches.names for gamma in sketches.gammas]
    trained_index = grid.index(trained)
    row: dict[str, float] = {}
    headline, index, squares = (
        products,
        trained_index,
        None if sketches.squares is None else sketches.squares[:, trained_index],
    )
    if loss is not None:
        headline, index, squares = (
            pair_products(loss.sketches[:, None], loss.prompt),
            0,
            loss.squares,
        )
    for name, value in signal_noise_estimates(headline, index).items():
        row |= value.columns(name)
    for i, (name, gamma) in enumerate(grid):
        label = f"{name}@{gamma:g}"
        noise = products.positive_estimate(products.noise[:, i])
        row[f"noise/{label}"] = noise.value
        row[f"noise/{label}_se"] = noise.error
        row[f"noise/{label}_sketch_se"] = noise.sketch
        if sketches.energies is not None:
            estimate = coherence(products, sketches.energies, sketches.prompt, i)
            row[f"coherence/{label}"] = estimate.value
    if squares is not None:
        exact, sketched = float(squares.double().mean()), float(headline.self_products[0, index])
        row["sketch_excess"] = sketched / exact - 1 if exact > 0 else math.nan
    row["sequences"] = float(num_sequences or len(sketches.prompt))
    row |= products.positive_estimate(
        prompt_jackknife_means(sketches.cost, sketches.prompt)
    ).columns("cost_of_response")
    row |= _bias_columns(products, sketches, num_sequences or len(sketches.prompt), seed)
    return {f"{prefix}/{name}": value for name, value in row.items()}


def _bias_columns(
    products: PairProducts, sketches: GradientSketches, num_sequences: int, seed: int
) -> dict[str, float]:
    """Return the columns of the bias, the occupancy and the best estimator."""
    row: dict[str, float] = {}
    bias = squared_bias(products, sketches)
    for i, gamma in enumerate(sketches.gammas):
        row |= squared_length_estimate(products.mean_estimate(bias[:, i])).columns(
            f"bias2@{gamma:g}"
        )
    for name, estimate in occupancy(products, sketches).items():
        row |= estimate.columns(f"{name}")
    choice = recommend_estimator(
        products, sketches, num_sequences, torch.Generator().manual_seed(seed)
    )
    share = choice.share.view(len(sketches.names), len(sketches.gammas))
    row["best_gamma"] = choice.gamma
    row |= {
        f"chosen/{label}": float(count)
        for label, count in zip(sketches.names, share.sum(1), strict=True)
    }
    row |= {
        f"chosen@{discount:g}": float(count)
        for discount, count in zip(sketches.gammas, share.sum(0), strict=True)
    }
    return row
