"""Blame by token id (A-6, C-2, C-6): which entries of the vocabulary own the signal.

Shapes: B responses, T positions, V vocabulary. r = log p(y) - log q(y).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Accumulator, Mean, masked
from diagnostics.errors import InvalidInput
from diagnostics.metrics.signal import score_norm

CONFIDENT, IMPOSSIBLE = 0.9, 1e-4
BUCKETS = 4096
COLUMNS = ("count", "cost", "signal", "square", "energy")


@dataclass(frozen=True, eq=False)
class TokenAttribution(Accumulator):
    """Five sums for every id of the vocabulary; field (V, 5), columns as in COLUMNS.

    count = number of masked tokens with the id, then sums over them of r, |r|, r^2 and
    e = r^2 |one_hot(y) - p|^2 (NaN for every id that occurs where the batch has no functionals).
    Readout: "_top1" and "_top10" = the shares of sum |r| that the one and the ten largest ids
    hold, NaN when the sum is 0. `lines` prints the table itself.
    """

    sums: Tensor

    @classmethod
    def of(cls, batch: ScoredRollouts, mask: Tensor, vocabulary: int) -> Self:
        """Sums over the tokens of the mask (B, T).

        Raises:
          ValueError: vocabulary is not positive. An id beyond it is an index error of torch.
        """
        if vocabulary < 1:
            raise InvalidInput(f"vocabulary is {vocabulary}, expected its number of ids")
        r = masked(batch.log_ratio, mask)
        if batch.prefix is None:
            energy = torch.where(mask, torch.nan, torch.zeros_like(r))
        else:
            energy = (r * masked(score_norm(batch), mask)).square()
        columns = torch.stack([mask.double(), r, r.abs(), r.square(), energy], -1)
        ids = torch.where(mask, batch.tokens, 0).flatten()
        return cls(r.new_zeros(vocabulary, 5).index_add(0, ids, columns.flatten(0, 1)))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        signal = np.sort(sums[0][:, 2])[::-1]
        if not signal.sum() > 0:
            return {"_top1": float("nan"), "_top10": float("nan")}
        return {f"_top{n}": float(signal[:n].sum() / signal.sum()) for n in (1, 10)}

    def lines(
        self,
        decode: Callable[[int], str],
        *,
        by: str = "signal",
        top: int = 30,
        special: Collection[int] = (),
    ) -> list[str]:
        """A heading and the `top` ids with the largest share of column `by`, as aligned text.

        Each line: id, decoded string, "*" if special, count, mean r, and the id's shares of the
        tokens, of |r| and of the energy in percent. Ids that do not occur are left out.

        Raises:
          ValueError: `by` is not one of COLUMNS.
        """
        if by not in COLUMNS:
            raise InvalidInput(f"no column {by!r}; there are {', '.join(COLUMNS)}")
        table = self.sums.cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            share = 100 * table / table.sum(0)
        order = np.argsort(-table[:, COLUMNS.index(by)], kind="stable")[:top]
        found = [
            f"{'id':>8} {'token':24} {'count':>8} {'mean r':>9} {'% n':>6} {'% |r|':>6} {'% e':>6}"
        ]
        for i in (int(i) for i in order if table[i, 0] > 0):
            text = repr(decode(i)) + ("*" if i in special else "")
            found.append(
                f"{i:8d} {text:24} {int(table[i, 0]):8d} {table[i, 1] / table[i, 0]:9.3f} "
                f"{share[i, 0]:6.2f} {share[i, 2]:6.2f} {share[i, 4]:6.2f}"
            )
        return found


def token_table(vocabulary: int) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """A-6: the metric `tokens/all`, sums for every id of the vocabulary (`TokenAttribution`).

    Access: L0; the energy column L2. Cost: a table of V x 5 float64, which an all-reduce of totals
    carries along; read it every so many steps. Source: ours.
    Healthy: no single id holds more of the signal than a few times its share of the tokens. Special
    tokens, tags and fillers at the top mean that format, not content, is being distilled.
    """

    def measured(batch: ScoredRollouts) -> dict[str, Accumulator]:
        return {"tokens/all": TokenAttribution.of(batch, batch.mask, vocabulary)}

    return measured


def impossible(batch: ScoredRollouts) -> Tensor:
    """(B, T) bool: p(y) > 0.9 and q(y) < 1e-4, the student is sure of what the teacher excludes."""
    sure = batch.student_logp.exp() > CONFIDENT
    return sure & (batch.teacher_logp.exp() < IMPOSSIBLE) & batch.mask


def confident_impossible(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """C-2: tokens of which the student is sure and which the teacher holds impossible.

    confident_impossible_share = mean of 1[p(y) > 0.9 and q(y) < 1e-4];
    confident_impossible_signal = the share of sum |r| that they hold.
    Access: L0. Source: derived from the cases of 2603.25562, '<' at -0.07 against -19.16.
    Healthy: 0, or nearly so. Anything else is a fault of tokenizers, templates or end tokens rather
    than a disagreement; `impossible_table` names the ids.
    """
    bad, r = impossible(batch), batch.log_ratio.abs()
    return {
        "tokens/confident_impossible_share": Mean.of(bad, batch.mask, batch.prompt),
        "tokens/confident_impossible_signal": Mean.ratio(r * bad, r, batch.mask, batch.prompt),
    }


@dataclass(frozen=True, eq=False)
class LargestBucket(Accumulator):
    """Sums of a weight over ids modulo BUCKETS; reads out the largest one's share, NaN of 0."""

    sums: Tensor

    @classmethod
    def of(cls, batch: ScoredRollouts, weight: Tensor) -> Self:
        """weight: (B, T)."""
        x = masked(weight, batch.mask)
        place = torch.where(batch.mask, batch.tokens, 0) % BUCKETS
        return cls(x.new_zeros(BUCKETS).index_add(0, place.flatten(), x.flatten()))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        whole = sums[0].sum()
        return {"": float(sums[0].max() / whole) if whole > 0 else float("nan")}


def one_id(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-6: the largest share of sum |r| that one token id holds.

    one_id_signal = max_v sum_{y = v} |r| / sum |r|, ids taken modulo 4096, so that it needs no
    vocabulary and may be a little high where two large ids collide.
    Access: L0. Source: ours. Concentration by *token* is high in any sure student, a few undecided
    tokens carry all there is; by *id* it is not, unless something is wrong with that id.
    Healthy: 0.05 to 0.3. Above 1/2 one id, a tag, an end or a filler, owns the signal: see
    `token_table` for which. Near a teacher that is reached, few tokens are left and it rises too.
    """
    return {"tokens/one_id_signal": LargestBucket.of(batch, batch.log_ratio.abs())}


def impossible_table(vocabulary: int) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """C-2: the metric `tokens/impossible`, a `TokenAttribution` of the confident-impossible tokens.

    Access: L0. Cost: as `token_table`. Source: ours.
    Healthy: empty. An id that stands here often is the one to mask or to map.
    """

    def measured(batch: ScoredRollouts) -> dict[str, Accumulator]:
        return {"tokens/impossible": TokenAttribution.of(batch, impossible(batch), vocabulary)}

    return measured


def coverage(ids: Collection[int], name: str) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """C-6: what masking some ids would take away: shares of tokens, of |r| and of the energy.

    tokens/NAME_share = mean of 1[y in ids]; NAME_signal = their share of sum |r|; NAME_energy =
    their share of sum r^2 |one_hot(y) - p|^2, where the batch has functionals.
    Access: L0; energy L2. Source: ours.
    Healthy: for special tokens, a signal share near the share of tokens. A mask that takes far
    more of the energy than of the tokens changes the objective, not only its noise.
    """
    wanted = sorted(ids)

    def measured(batch: ScoredRollouts) -> dict[str, Accumulator]:
        inside = torch.isin(
            batch.tokens, torch.tensor(wanted, dtype=torch.long, device=batch.tokens.device)
        )
        parts = {"share": torch.ones_like(batch.log_ratio), "signal": batch.log_ratio.abs()}
        if batch.prefix is not None:
            parts["energy"] = (batch.log_ratio * score_norm(batch)).square()
        return {
            f"tokens/{name}_{part}": Mean.ratio(x * inside, x, batch.mask, batch.prompt)
            for part, x in parts.items()
        }

    return measured
