"""Repetition (A-3): which tokens close an n-gram that the same response already holds.

Shapes: B responses, T response positions.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Accumulator, Mean

NGRAM = 8
TAIL, COMPRESSION = 10_000, 10.0


def repeated(tokens: Tensor, mask: Tensor, n: int = NGRAM) -> Tensor:
    """(B, T) bool: the n-gram ending at this token occurred earlier in the response.

    n-grams run over the tokens of the mask in order, the student's own: what it leaves out (tool
    output, padding) is skipped, so that the same call made every turn counts as repeated whatever
    came back. The first n - 1 tokens are never repeated; occurrences may overlap.

    Exact, in O(T log T) time and O(T) memory a response: windows get dense ranks by doubling.
    The rank of a window of width w and of the one `step` <= w before it together determine the
    window of width w + step; the pair is packed into one integer and ranked again.
    """
    width = tokens.shape[1]
    slot = torch.where(mask, mask.cumsum(1) - 1, width)
    own = tokens.new_full((len(tokens), width + 1), -1).scatter(1, slot, tokens)[:, :width]
    key, reach = own + 1, 1
    while reach < n:
        step = min(reach, n - reach)
        rank = _rank(key)
        before = torch.zeros_like(rank)
        before[:, step:] = rank[:, :-step] + 1
        key, reach = before * (width + 1) + rank, reach + step
    ordered, order = key.sort(dim=1, stable=True)
    again = torch.zeros_like(mask)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    seen = torch.zeros_like(mask).scatter(1, order, again)
    seen[:, : n - 1] = False
    return seen.gather(1, slot.clamp(max=width - 1)) & mask


def _rank(key: Tensor) -> Tensor:
    """Dense rank of each entry in its row, below T: (B, T) -> (B, T)."""
    ordered, order = key.sort(1)
    fresh = torch.zeros_like(key)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(key).scatter(1, order, fresh.cumsum(1))


def repetition(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-3, D-3: repeated n-grams (n = 8), and how the cost differs inside and outside of them.

    repetition/repeated_share = the share of repeated tokens among all sampled ones, and over the
    supervised ones: signal/repeated_cost, regular_cost = mean of r over repeated and over
    other tokens; signal/repeated_signal_share = sum m rep |r| / sum m |r|.
    Access: L0; four row sorts. Source: the split of 2604.08527, with an exact rule for "repeated".
    Healthy: share near 0 and, if anything, repeated tokens cost more than others. A teacher that
    rewards loops shows as a growing share with repeated_cost far below regular_cost.
    """
    rep = repeated(batch.tokens, batch.sampled)
    r, mask, prompt = batch.log_ratio, batch.mask, batch.prompt
    return {
        "repetition/repeated_share": Mean.of(rep, batch.sampled, prompt),
        "signal/repeated_cost": Mean.of(r, mask & rep, prompt),
        "signal/regular_cost": Mean.of(r, mask & ~rep, prompt),
        "signal/repeated_signal_share": Mean.ratio(r.abs() * rep, r.abs(), mask, prompt),
    }


def compressible(text: str, tail: int = TAIL, threshold: float = COMPRESSION) -> bool:
    """Whether the last `tail` characters compress more than `threshold`-fold; no if shorter."""
    last = text[-tail:].encode()
    return len(text) >= tail and len(last) / len(zlib.compress(last)) > threshold


def compression(
    decode: Callable[[Sequence[int]], str], tail: int = TAIL, threshold: float = COMPRESSION
) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """D-3: share of responses whose last 10 000 characters zlib compresses more than tenfold.

    compressible_share = mean over responses of 1[characters >= tail and bytes / zlib bytes >
    threshold], of the student's own tokens decoded.
    Access: tokens and a decoder; copies them to the host. Source: 2604.08527.
    Healthy: 0; 0.3 to 0.6 at a collapse. Short responses never count, so `repetition` is the one to
    watch early.
    """

    def measured(batch: ScoredRollouts) -> dict[str, Accumulator]:
        rows = zip(batch.tokens.cpu(), batch.sampled.cpu(), strict=True)
        found = [compressible(decode(ids[own].tolist()), tail, threshold) for ids, own in rows]
        flag = torch.tensor(found, dtype=torch.bool, device=batch.mask.device)
        share = Mean.of(flag, torch.ones_like(flag), batch.prompt)
        return {"repetition/compressible_share": share}

    return measured
