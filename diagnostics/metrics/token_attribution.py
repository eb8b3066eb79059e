"""Attribution of the signal to token ids (A-6, C-2, C-6).

Shapes: B responses, T positions, V vocabulary. r = log p(y) - log q(y).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.cluster_sums import apply_mask
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.errors import InvalidInput
from diagnostics.metrics.signal import score_norm

CONFIDENT_PROBABILITY, IMPOSSIBLE_PROBABILITY = 0.9, 1e-4
NUM_BUCKETS = 4096
"""Number of buckets of token ids in `one_id`."""
COLUMNS = ("count", "cost", "signal", "square", "energy")
"""Columns of `TokenAttribution.sums`."""


@dataclass(frozen=True, eq=False)
class TokenAttribution(Accumulator):
    """Five sums for every id of the vocabulary.

    count is the number of masked tokens with the id, followed by the sums over them of r, |r|, r^2
    and e = r^2 |one_hot(y) - p|^2 (NaN for every id that occurs where the batch has no distribution
    stats). Readout: "_top1" and "_top10", the shares of sum |r| of the largest id and of the ten
    largest, NaN when the sum is 0. `lines` formats the table.
    """

    sums: Tensor
    """(V, 5), columns as in COLUMNS."""

    @classmethod
    def from_batch(cls, batch: ScoredRollouts, mask: Tensor, vocabulary: int) -> Self:
        """Sum over the tokens of the mask.

        Args:
            batch: Scored rollouts.
            mask: (B, T) bool.
            vocabulary: Number of ids V. A larger id is an index error of torch.

        Returns:
            The sums of every id.

        Raises:
            InvalidInput: The vocabulary size is not positive.
        """
        if vocabulary < 1:
            raise InvalidInput(
                f"vocabulary is {vocabulary}; pass the number of token ids, at least 1"
            )
        r = apply_mask(batch.log_ratio, mask)
        if batch.prefix is None:
            energy = torch.where(mask, torch.nan, torch.zeros_like(r))
        else:
            energy = (r * apply_mask(score_norm(batch), mask)).square()
        columns = torch.stack([mask.double(), r, r.abs(), r.square(), energy], -1)
        ids = torch.where(mask, batch.tokens, 0).flatten()
        return cls(r.new_zeros(vocabulary, 5).index_add(0, ids, columns.flatten(0, 1)))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Return the shares of sum |r| of the largest id and of the ten largest ids."""
        signal = np.sort(sums[0][:, 2])[::-1]
        if not signal.sum() > 0:
            return {"_top1": float("nan"), "_top10": float("nan")}
        return {f"_top{n}": float(signal[:n].sum() / signal.sum()) for n in (1, 10)}

    def lines(
        self,
        decode: Callable[[int], str],
        *,
        sort_by: str = "signal",
        top: int = 30,
        special: Collection[int] = (),
    ) -> list[str]:
        """Format the `top` ids with the largest share of column `sort_by` as aligned text.

        Each row: id, decoded string, "*" if special, count, mean r, and the id's shares of the
        tokens, of |r| and of the energy in percent. Ids that do not occur are left out.

        Args:
            decode: Token id to string.
            sort_by: One of COLUMNS.
            top: Number of ids.
            special: Ids marked with "*".

        Returns:
            A heading, then one line an id.

        Raises:
            InvalidInput: `sort_by` is not one of COLUMNS.
        """
        if sort_by not in COLUMNS:
            raise InvalidInput(f"no column {sort_by!r}; choose one of {', '.join(COLUMNS)}")
        table = self.sums.cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            share = 100 * table / table.sum(0)
        sorted_ids = np.argsort(-table[:, COLUMNS.index(sort_by)], kind="stable")[:top]
        rows = [
            f"{'id':>8} {'token':24} {'count':>8} {'mean r':>9} {'% n':>6} {'% |r|':>6} {'% e':>6}"
        ]
        for i in (int(i) for i in sorted_ids if table[i, 0] > 0):
            text = repr(decode(i)) + ("*" if i in special else "")
            rows.append(
                f"{i:8d} {text:24} {int(table[i, 0]):8d} {table[i, 1] / table[i, 0]:9.3f} "
                f"{share[i, 0]:6.2f} {share[i, 2]:6.2f} {share[i, 4]:6.2f}"
            )
        return rows


def token_table(vocabulary: int) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """A-6: Build the metric `tokens/all`, sums for every id of the vocabulary (`TokenAttribution`).

    Access: L0; the energy column L2.
    Cost: a table of V x 5 float64, which is part of the all-reduce of the accumulators; compute it
    only every few steps.
    Source: this toolkit.
    Healthy: no single id holds more of the signal than a few times its share of the tokens. Special
    tokens, tags and fillers at the top mean that format, not content, is being distilled.

    Args:
        vocabulary: Number of ids V.

    Returns:
        A metric with
        tokens/all: The sums of every id.
    """

    def token_metric(batch: ScoredRollouts) -> dict[str, Accumulator]:
        return {"tokens/all": TokenAttribution.from_batch(batch, batch.mask, vocabulary)}

    return token_metric


def confident_impossible_mask(batch: ScoredRollouts) -> Tensor:
    """Return (B, T) bool: p(y) > 0.9 and q(y) < 1e-4, confident student and excluding teacher."""
    confident = batch.student_logp.exp() > CONFIDENT_PROBABILITY
    return confident & (batch.teacher_logp.exp() < IMPOSSIBLE_PROBABILITY) & batch.mask


def confident_impossible(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """C-2: Compute the share of tokens with a confident student to which the teacher gives no mass.

    Access: L0.
    Source: derived from the cases of 2603.25562, '<' at -0.07 against -19.16.
    Healthy: 0, or nearly so. Other values indicate a fault of tokenizers, templates or EOS tokens
    rather than a disagreement; `impossible_table` lists the ids.

    Args:
        batch: Scored rollouts.

    Returns:
        tokens/confident_impossible_share: Mean of 1[p(y) > 0.9 and q(y) < 1e-4].
        tokens/confident_impossible_signal: Their share of sum |r|.
    """
    flagged, r = confident_impossible_mask(batch), batch.log_ratio.abs()
    return {
        "tokens/confident_impossible_share": Mean.from_values(flagged, batch.mask, batch.prompt),
        "tokens/confident_impossible_signal": Mean.ratio(r * flagged, r, batch.mask, batch.prompt),
    }


@dataclass(frozen=True, eq=False)
class LargestBucket(Accumulator):
    """Sums of a weight over ids modulo NUM_BUCKETS.

    Computed value: the share of the largest bucket, NaN if the sum is 0.
    """

    sums: Tensor
    """(NUM_BUCKETS,)."""

    @classmethod
    def from_batch(cls, batch: ScoredRollouts, weight: Tensor) -> Self:
        """Sum the weight (B, T) over the tokens of the mask."""
        weights = apply_mask(weight, batch.mask)
        bucket = torch.where(batch.mask, batch.tokens, 0) % NUM_BUCKETS
        return cls(weights.new_zeros(NUM_BUCKETS).index_add(0, bucket.flatten(), weights.flatten()))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Return the share of the largest bucket."""
        total = sums[0].sum()
        return {"": float(sums[0].max() / total) if total > 0 else float("nan")}


def one_id(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-6: Compute the largest share of sum |r| that a single token id holds.

    Concentration by *token* is high for any confident student, whose few undecided tokens carry all
    of the signal; by *id* it is not, unless something is wrong with that id.

    Access: L0.
    Source: this toolkit.
    Healthy: 0.05 to 0.3. Above 1/2 a single id, a tag, an EOS token or a filler, dominates the
    signal: see `token_table` for which. It also rises when the student has nearly reached the
    teacher and few tokens carry signal.

    Args:
        batch: Scored rollouts.

    Returns:
        tokens/one_id_signal: max_v sum_{y = v} |r| / sum |r|, ids taken modulo 4096, so that no
            vocabulary size is needed; slightly too high where two large ids collide.
    """
    return {"tokens/one_id_signal": LargestBucket.from_batch(batch, batch.log_ratio.abs())}


def impossible_table(vocabulary: int) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """C-2: Build the metric `tokens/impossible`, sums over confident-impossible tokens by id.

    Access: L0.
    Cost: as `token_table`.
    Source: this toolkit.
    Healthy: empty. Mask or map an id that is often listed here.

    Args:
        vocabulary: Number of ids V.

    Returns:
        A metric with
        tokens/impossible: The sums of every id.
    """

    def token_metric(batch: ScoredRollouts) -> dict[str, Accumulator]:
        return {
            "tokens/impossible": TokenAttribution.from_batch(
                batch, confident_impossible_mask(batch), vocabulary
            )
        }

    return token_metric


def coverage(ids: Collection[int], name: str) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """C-6: Compute what masking some ids would remove: shares of tokens, of |r| and of the energy.

    Access: L0; energy L2.
    Source: this toolkit.
    Healthy: for special tokens, a signal share near the share of tokens. A mask that removes far
    more of the energy than of the tokens changes the objective, not only its noise.

    Args:
        ids: Token ids.
        name: Name of the group in the keys.

    Returns:
        A metric with
        tokens/NAME_share: Mean of 1[y in ids].
        tokens/NAME_signal: Their share of sum |r|.
        tokens/NAME_energy: Their share of sum r^2 |one_hot(y) - p|^2, where the batch has
            distribution stats.
    """
    sorted_ids = sorted(ids)

    def coverage_metric(batch: ScoredRollouts) -> dict[str, Accumulator]:
        inside = torch.isin(
            batch.tokens, torch.tensor(sorted_ids, dtype=torch.long, device=batch.tokens.device)
        )
        weights = {"share": torch.ones_like(batch.log_ratio), "signal": batch.log_ratio.abs()}
        if batch.prefix is not None:
            weights["energy"] = (batch.log_ratio * score_norm(batch)).square()
        return {
            f"tokens/{name}_{suffix}": Mean.ratio(weight * inside, weight, batch.mask, batch.prompt)
            for suffix, weight in weights.items()
        }

    return coverage_metric
