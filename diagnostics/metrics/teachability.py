"""Teachability metrics (A-7, B-4): uncertainty by divergence, and what the teacher accepts.

Token selection rules of other work, computed as descriptions. Those rules normalise by the extremes
of a batch, which a single token determines and which cannot be merged over batches; here everything
is read from a histogram with fixed edges, by ranks where a rule needs them. Shapes: B responses, T
positions.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.cluster_sums import apply_mask
from diagnostics.core.optional_fields import require_distribution_stats
from diagnostics.core.totals import Accumulator, Mean, PositionMean
from diagnostics.metrics.gradient_noise import ENTROPY_THRESHOLD, prefix_noise
from diagnostics.metrics.signal import score_norm
from diagnostics.metrics.topk import top_k_list

EDGES = torch.cat([torch.zeros(1), torch.logspace(-4, 1, 16), torch.full((1,), torch.inf)])
"""Bin edges of both axes, nats: below 1e-4, fifteen steps of 10^(1/3), and above 10."""
SELECTED_SHARE = 0.2
"""Share of the tokens that the selection rule keeps."""
KL_THRESHOLD = 0.1
"""KL in nats above which the two models are divergent at a token."""
ACCEPTED_DEPTH, COMPATIBLE_DEPTH = 5, 16


@dataclass(frozen=True, eq=False)
class JointHistogram(Accumulator):
    """Sums of weights over tokens by two quantities, each binned by EDGES.

    The first weight counts tokens. Readout: "_selected_NAME" for each of the others: its share on
    the SELECTED_SHARE of the tokens with the largest soft-or s = a + b - a b of the two mean ranks
    a, b in [0, 1]; a bin that the limit splits counts in proportion. NaN where the weight sums to
    0.
    """

    sums: Tensor
    """(W, L, L): weight, bin of the first quantity, bin of the second."""

    @classmethod
    def from_tokens(cls, x: Tensor, y: Tensor, weights: list[Tensor], mask: Tensor) -> Self:
        """Build the histogram of the tokens of the mask.

        Args:
            x: (B, T) first quantity, nats.
            y: (B, T) second quantity, nats.
            weights: (B, T) each, besides the count.
            mask: (B, T) bool.

        Returns:
            The histogram.
        """
        edges = EDGES.to(x.device, torch.float64)[1:-1]
        levels = [torch.bucketize(apply_mask(values, mask), edges, right=True) for values in (x, y)]
        cell = (levels[0] * (len(EDGES) - 1) + levels[1]).flatten()
        columns = torch.stack([mask.double(), *(apply_mask(w, mask) for w in weights)])
        zeros = columns.new_zeros(len(columns), (len(EDGES) - 1) ** 2)
        histogram = zeros.index_add(1, cell, columns.flatten(1))
        return cls(histogram.view(len(columns), len(EDGES) - 1, len(EDGES) - 1))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Return the shares of the signal and the energy on the selected tokens."""
        count = sums[0][0]
        names = ("_selected_signal", "_selected_energy")
        if not count.sum() > 0:
            return dict.fromkeys(names, float("nan"))
        a, b = (mean_rank(count.sum(axis)) for axis in (1, 0))
        score = (a[:, None] + b[None, :] - a[:, None] * b[None, :]).ravel()
        order = np.argsort(-score, kind="stable")
        size = count.ravel()[order]
        selected = np.clip(SELECTED_SHARE * count.sum() - (np.cumsum(size) - size), 0, size)
        selected_fraction = selected / np.maximum(size, 1)
        shares = {}
        for name, weight in zip(names, sums[0][1:], strict=True):
            total = weight.sum()
            share = (
                (selected_fraction * weight.ravel()[order]).sum() / total if total > 0 else np.nan
            )
            shares[name] = float(share)
        return shares


def mean_rank(count: np.ndarray) -> np.ndarray:
    """Return the rank in [0, 1] of the middle of each bin, from the bins' counts."""
    num_below = np.cumsum(count) - count
    return (num_below + count / 2) / count.sum()


def teachability(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-7: Compute the signal share of the 20 % of tokens with high entropy or divergence.

    The selected tokens have the largest h + d - h d, h and d the ranks of the
    student's entropy and of KL(p || q).

    Access: L2.
    Source: the soft-or of 2604.14084, with ranks in place of its min-max scaling, which a single
    outlier determines.
    Healthy: 0.2 if the rule is uninformative; near 1 if training on the selected tokens loses
    nothing. A description: it does not show whether such a selection trains better.

    Args:
        batch: Scored rollouts.

    Returns:
        signal/teachable: teachable_selected_signal and teachable_selected_energy, the shares of sum
            |r| and of the update's sum r^2 |one_hot(y) - p|^2 on the selected tokens.
    """
    prefix = require_distribution_stats(batch)
    r = batch.log_ratio.abs()
    weights = [r, (r * score_norm(batch)).square()]
    joint = JointHistogram.from_tokens(
        prefix.student_entropy, prefix.reverse_kl, weights, batch.mask
    )
    return {"signal/teachable": joint}


def quadrants(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-7, E-5: Compute tokens, signal, energy and noise by student certainty and divergence.

    QUADRANT is decided or torn (student entropy up to 1 nat, or above) with near or apart (KL up to
    0.1 nats, or above).

    Access: L2 with sum p^2 l and sum p^2 l^2.
    Source: the quadrants of 2604.14084 with fixed thresholds, so that runs are comparable.
    Healthy: most tokens decided and near, most energy torn and apart. Much energy on decided and
    apart tokens means a student that is confidently wrong, or a special token.

    Args:
        batch: Scored rollouts.

    Returns:
        signal/QUADRANT_tokens: Share of the tokens.
        signal/QUADRANT_signal: Share of sum |r|.
        signal/QUADRANT_energy: Share of sum r^2 |one_hot(y) - p|^2.
        signal/QUADRANT_signal_to_noise: sum |E g|^2 / sum tr Var g of a token's gradient
            (`gradient_noise`).
    """
    prefix, mask, prompt = require_distribution_stats(batch), batch.mask, batch.prompt
    noise, r = prefix_noise(prefix), batch.log_ratio.abs()
    energy = (r * score_norm(batch)).square()
    undecided, divergent = (
        prefix.student_entropy > ENTROPY_THRESHOLD,
        prefix.reverse_kl > KL_THRESHOLD,
    )
    accumulators: dict[str, Accumulator] = {}
    for certainty, certainty_mask in (("decided", ~undecided), ("torn", undecided)):
        for distance, distance_mask in (("near", ~divergent), ("apart", divergent)):
            name, inside = (
                f"signal/{certainty}_{distance}",
                (certainty_mask & distance_mask).double(),
            )
            accumulators[f"{name}_tokens"] = Mean.from_values(inside, mask, prompt)
            accumulators[f"{name}_signal"] = Mean.ratio(r * inside, r, mask, prompt)
            accumulators[f"{name}_energy"] = Mean.ratio(energy * inside, energy, mask, prompt)
            accumulators[f"{name}_signal_to_noise"] = Mean.ratio(
                noise.signal, noise.zero, mask & certainty_mask & distance_mask, prompt
            )
    return accumulators


def compatibility(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-7, B-4: Compute the teacher's mass on, and acceptance of, the student's most likely tokens.

    Over all sampled tokens.

    Access: L1 with both lists (a "union" support, or the full vocabulary).
    Source: TA-OPD (2605.26844) for the mass, SelecTKD for the acceptance.
    Healthy: both high and flat along the response. If acceptance falls while the cost does not, the
    teacher's distribution has become flat there.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/compatibility: Mean sum of q over the student's 16 most likely ids (or as many as
            the list has).
        divergence/first_accepted: Share of positions whose most likely student id is among the
            teacher's 5 most likely.
    """
    student_list, teacher_list = top_k_list(batch, "student"), top_k_list(batch, "teacher")
    compatible_list = student_list.truncate(min(COMPATIBLE_DEPTH, student_list.k))
    mass = (compatible_list.teacher_logp.exp() * compatible_list.present).sum(-1)
    accepted = (
        teacher_list.truncate(min(ACCEPTED_DEPTH, teacher_list.k)).position_of(
            student_list.ids[..., 0]
        )
        < ACCEPTED_DEPTH
    )
    accepted &= student_list.present[..., 0]
    return {
        "divergence/compatibility": PositionMean.from_values(mass, batch.sampled, batch.prompt),
        "divergence/first_accepted": PositionMean.from_values(
            accepted, batch.sampled, batch.prompt
        ),
    }
