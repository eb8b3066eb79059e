"""Which tokens can teach (A-7, B-4): uncertainty by divergence, and what the teacher accepts.

Selection rules of others read as descriptions. They normalise by the extremes of a batch, which one
token sets and which no sum can carry to another batch; here everything is read from a histogram
with fixed edges, by ranks where a rule needs them. Shapes: B responses, T positions.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import prefix_of
from diagnostics.core.totals import Accumulator, Mean, PositionMean, masked
from diagnostics.metrics.gradient_noise import UNDECIDED, prefix_noise
from diagnostics.metrics.signal import score_norm
from diagnostics.metrics.topk import top_list

EDGES = torch.cat([torch.zeros(1), torch.logspace(-4, 1, 16), torch.full((1,), torch.inf)])
"""Of both axes, nats: below 1e-4, fifteen steps of 10^(1/3), and above 10."""
SELECTED = 0.2
APART = 0.1
"""Nats of KL from which two models are apart."""
ACCEPTED, COMPATIBLE = 5, 16


@dataclass(frozen=True, eq=False)
class Joint(Accumulator):
    """Sums of weights (W, L, L) over tokens by two quantities, each in the levels of EDGES.

    The first weight counts tokens. Readout: "_selected_NAME" for each of the others: the share of
    it on the SELECTED tokens with the largest soft-or s = a + b - a b of the two mean ranks a, b in
    [0, 1]; a level that the limit cuts counts in proportion. NaN where the weight sums to 0.
    """

    sums: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weights: list[Tensor], mask: Tensor) -> Self:
        """x, y, weights: (B, T) at the tokens of the mask."""
        edges = EDGES.to(x.device, torch.float64)[1:-1]
        place = [torch.bucketize(masked(v, mask), edges, right=True) for v in (x, y)]
        cell = (place[0] * (len(EDGES) - 1) + place[1]).flatten()
        columns = torch.stack([mask.double(), *(masked(w, mask) for w in weights)])
        empty = columns.new_zeros(len(columns), (len(EDGES) - 1) ** 2)
        found = empty.index_add(1, cell, columns.flatten(1))
        return cls(found.view(len(columns), len(EDGES) - 1, len(EDGES) - 1))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        count = sums[0][0]
        names = ("_selected_signal", "_selected_energy")
        if not count.sum() > 0:
            return dict.fromkeys(names, float("nan"))
        a, b = (mean_rank(count.sum(axis)) for axis in (1, 0))
        score = (a[:, None] + b[None, :] - a[:, None] * b[None, :]).ravel()
        order = np.argsort(-score, kind="stable")
        size = count.ravel()[order]
        taken = np.clip(SELECTED * count.sum() - (np.cumsum(size) - size), 0, size)
        part = taken / np.maximum(size, 1)
        found = {}
        for name, weight in zip(names, sums[0][1:], strict=True):
            whole = weight.sum()
            share = (part * weight.ravel()[order]).sum() / whole if whole > 0 else np.nan
            found[name] = float(share)
        return found


def mean_rank(count: np.ndarray) -> np.ndarray:
    """Rank in [0, 1] of the middle of each level, from the levels' counts."""
    below = np.cumsum(count) - count
    return (below + count / 2) / count.sum()


def teachability(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-7: what a fifth of the tokens would carry, chosen by entropy or divergence.

    teachable_selected_signal, teachable_selected_energy = shares of sum |r| and of the update's
    sum r^2 |one_hot(y) - p|^2 on the 20 % of tokens with the largest h + d - h d, h and d the ranks
    of the student's entropy and of KL(p || q).
    Access: L2. Source: the soft-or of 2604.14084, with ranks for its min-max scaling, which one
    outlier decides.
    Healthy: 0.2 if the rule knows nothing; near 1 if training on its choice loses nothing. A
    description: whether such a selection trains better is not said by it.
    """
    prefix = prefix_of(batch)
    r = batch.log_ratio.abs()
    weights = [r, (r * score_norm(batch)).square()]
    joint = Joint.of(prefix.student_entropy, prefix.reverse_kl, weights, batch.mask)
    return {"signal/teachable": joint}


def quadrants(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-7, E-5: tokens, signal, energy and noise by certainty of the student and divergence.

    QUADRANT is decided or torn (student entropy up to 1 nat, or above) with near or apart (KL up to
    0.1 nats, or above); QUADRANT_tokens, _signal, _energy = shares of the tokens, of sum |r|, of
    sum r^2 |one_hot(y) - p|^2; QUADRANT_signal_to_noise = sum |E g|^2 / sum tr Var g of a token's
    gradient (`gradient_noise`).
    Access: L2 with sum p^2 l and sum p^2 l^2. Source: the quadrants of 2604.14084 with fixed
    thresholds, so that runs compare.
    Healthy: most tokens decided and near, most energy torn and apart. Much energy on decided and
    apart tokens is a student that is sure and wrong, or a special token.
    """
    prefix, mask, prompt = prefix_of(batch), batch.mask, batch.prompt
    noise, r = prefix_noise(prefix), batch.log_ratio.abs()
    energy = (r * score_norm(batch)).square()
    torn, apart = prefix.student_entropy > UNDECIDED, prefix.reverse_kl > APART
    found: dict[str, Accumulator] = {}
    for first, a in (("decided", ~torn), ("torn", torn)):
        for second, b in (("near", ~apart), ("apart", apart)):
            name, inside = f"signal/{first}_{second}", (a & b).double()
            found[f"{name}_tokens"] = Mean.of(inside, mask, prompt)
            found[f"{name}_signal"] = Mean.ratio(r * inside, r, mask, prompt)
            found[f"{name}_energy"] = Mean.ratio(energy * inside, energy, mask, prompt)
            found[f"{name}_signal_to_noise"] = Mean.ratio(
                noise.signal, noise.zero, mask & a & b, prompt
            )
    return found


def compatibility(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-7, B-4: does the teacher know what the student would say?

    compatibility = mean sum of q over the student's 16 likeliest ids (or as many as the list has);
    first_accepted = share of positions whose likeliest id of the student is among the teacher's 5;
    both over all sampled tokens.
    Access: L1 with both lists (a "union" support, or everything). Source: TA-OPD (2605.26844) for
    the mass, SelecTKD for the acceptance.
    Healthy: both high and flat along the response. Acceptance falling while the cost does not is a
    teacher that has become flat there.
    """
    ours, theirs = top_list(batch, "student"), top_list(batch, "teacher")
    some = ours.to(min(COMPATIBLE, ours.k))
    mass = (some.teacher_logp.exp() * some.present).sum(-1)
    accepted = theirs.to(min(ACCEPTED, theirs.k)).place(ours.ids[..., 0]) < ACCEPTED
    accepted &= ours.present[..., 0]
    return {
        "divergence/compatibility": PositionMean.of(mass, batch.sampled, batch.prompt),
        "divergence/first_accepted": PositionMean.of(accepted, batch.sampled, batch.prompt),
    }
