"""Repetition metrics (A-3): which tokens end an n-gram that occurred earlier in the response.

Shapes: B responses, T response positions.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Accumulator, Mean

NGRAM = 8
"""Tokens of an n-gram."""
TAIL_CHARACTERS, COMPRESSION_RATIO = 10_000, 10.0


def repeated_ngram_mask(tokens: Tensor, mask: Tensor, n: int = NGRAM) -> Tensor:
    """Mark tokens that end an n-gram which occurred earlier in the response.

    n-grams run over the tokens of the mask in order, the sampled tokens: other tokens (tool output,
    padding) are skipped, so that the same tool call in every turn counts as repeated whatever the
    tool returned. The first n - 1 tokens are never repeated; occurrences may overlap.

    Exact, in O(T log T) time and O(T) memory a response: windows get dense ranks by doubling. The
    rank of a window of width w and that of the window `step` <= w before it together determine the
    window of width w + step; the pair is packed into one integer and ranked again.

    Args:
        tokens: (B, T) ids.
        mask: (B, T) bool.
        n: Tokens of an n-gram.

    Returns:
        (B, T) bool.
    """
    width = tokens.shape[1]
    slot = torch.where(mask, mask.cumsum(1) - 1, width)
    packed = tokens.new_full((len(tokens), width + 1), -1).scatter(1, slot, tokens)[:, :width]
    window_key, window = packed + 1, 1
    while window < n:
        step = min(window, n - window)
        rank = _dense_rank(window_key)
        previous_rank = torch.zeros_like(rank)
        previous_rank[:, step:] = rank[:, :-step] + 1
        window_key, window = previous_rank * (width + 1) + rank, window + step
    sorted_key, order = window_key.sort(dim=1, stable=True)
    equals_previous = torch.zeros_like(mask)
    equals_previous[:, 1:] = sorted_key[:, 1:] == sorted_key[:, :-1]
    repeated = torch.zeros_like(mask).scatter(1, order, equals_previous)
    repeated[:, : n - 1] = False
    return repeated.gather(1, slot.clamp(max=width - 1)) & mask


def _dense_rank(key: Tensor) -> Tensor:
    """Return the dense rank, below T, of each entry in its row: (B, T) -> (B, T)."""
    sorted_key, order = key.sort(1)
    is_new = torch.zeros_like(key)
    is_new[:, 1:] = sorted_key[:, 1:] != sorted_key[:, :-1]
    return torch.empty_like(key).scatter(1, order, is_new.cumsum(1))


def repetition(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-3, D-3: Compute the share of repeated n-grams (n = 8) and the cost inside and outside them.

    The share is over all sampled tokens, the other numbers over the supervised ones.

    Access: L0; four row sorts.
    Source: the split of 2604.08527, with an exact rule for "repeated".
    Healthy: share near 0 and, if anything, repeated tokens cost more than others. A teacher that
    rewards loops gives a growing share with repeated_cost far below regular_cost.

    Args:
        batch: Scored rollouts.

    Returns:
        repetition/repeated_share: Share of repeated tokens among all sampled tokens.
        signal/repeated_cost: Mean of r over repeated tokens.
        signal/regular_cost: Mean of r over other tokens.
        signal/repeated_signal_share: sum m rep |r| / sum m |r|.
    """
    rep = repeated_ngram_mask(batch.tokens, batch.sampled)
    r, mask, prompt = batch.log_ratio, batch.mask, batch.prompt
    return {
        "repetition/repeated_share": Mean.from_values(rep, batch.sampled, prompt),
        "signal/repeated_cost": Mean.from_values(r, mask & rep, prompt),
        "signal/regular_cost": Mean.from_values(r, mask & ~rep, prompt),
        "signal/repeated_signal_share": Mean.ratio(r.abs() * rep, r.abs(), mask, prompt),
    }


def is_compressible(
    text: str, tail: int = TAIL_CHARACTERS, threshold: float = COMPRESSION_RATIO
) -> bool:
    """Return whether the last `tail` characters compress more than `threshold`-fold.

    False for a text of fewer characters.

    Args:
        text: The text.
        tail: Number of characters at its end that are compressed.
        threshold: Ratio of bytes to zlib bytes above which a text is compressible.

    Returns:
        True if it is compressible.
    """
    tail_bytes = text[-tail:].encode()
    return len(text) >= tail and len(tail_bytes) / len(zlib.compress(tail_bytes)) > threshold


def compression(
    decode: Callable[[Sequence[int]], str],
    tail: int = TAIL_CHARACTERS,
    threshold: float = COMPRESSION_RATIO,
) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """D-3: Compute the share of responses whose last 10 000 characters compress more than tenfold.

    Access: tokens and a decoder; copies them to the host.
    Source: 2604.08527; zlib.
    Healthy: 0; 0.3 to 0.6 at a collapse. Short responses never count, so `repetition` is the
    earlier indicator.

    Args:
        decode: Token ids to text.
        tail: Characters at the end of a response that are compressed.
        threshold: Compression ratio above which a response counts.

    Returns:
        A metric with
        repetition/compressible_share: Mean over responses of 1[characters >= tail and bytes / zlib
            bytes > threshold], of the decoded sampled tokens.
    """

    def compression_metric(batch: ScoredRollouts) -> dict[str, Accumulator]:
        rows = zip(batch.tokens.cpu(), batch.sampled.cpu(), strict=True)
        flags = [
            is_compressible(decode(ids[sampled].tolist()), tail, threshold) for ids, sampled in rows
        ]
        compressible = torch.tensor(flags, dtype=torch.bool, device=batch.mask.device)
        share = Mean.from_values(compressible, torch.ones_like(compressible), batch.prompt)
        return {"repetition/compressible_share": share}

    return compression_metric
