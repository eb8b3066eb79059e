"""Returns of a chain to its own states, in memory that grows linearly with the states.

The score of a table's state is orthogonal to those of all others, so that the second moments of a
gradient depend on pairs of visits to the same state only. For each state c and token y, this needs
the measure of a return to c after k steps, and the same measure weighted by the discounted costs
on the way. Both follow from backward recursions from c, for a block of states at a time:

    h_0 = 1[c],  h_k = P h_{k-1};      w_0 = 0,  w_k = gamma (L h_{k-1} + P w_{k-1}),

with P the moves between states, and L those weighted by the token's later cost. Steps are then
summed as causal convolutions with the visits to c. Shapes: S states, C states of a block, A
actions, T steps, K = T - 1 lags, X pairs of a later cost and a discount. Everything is float64.
"""

import torch
from torch import Tensor

from synthetic.worlds.transitions import Transitions

_CHECK_EVERY = 16
"""Lags between two tests of whether any state can still be returned to."""


def return_measures(
    transitions: Transitions,
    horizon: int,
    measure: Tensor,
    costs: Tensor,
    cost_of: Tensor,
    discounts: Tensor,
    states: slice,
) -> Tensor:
    """Compute the measures of returns of a block of states to themselves, after 1, 2, ... steps.

    Args:
        transitions: Transitions of the world.
        horizon: Number of steps T.
        measure: (S, A) weight of a token given the state, 0 at the end state.
        costs: (U, S, A) later costs.
        cost_of: (X,) index of the later cost of each pair.
        discounts: (X,) discount of each pair.
        states: The block.

    Returns:
        (K, 1 + X, C, A) measure of taking a token and returning after k steps; then the same times
        the discounted later costs after the token and before the return.
    """
    lags, x = horizon - 1, len(discounts)
    first, last = states.start, states.stop
    moves = transitions.under(measure)
    paid_moves = [
        transitions.under(measure * costs[i]) for i in cost_of.unique_consecutive().tolist()
    ]
    paid_of = cost_of.unique_consecutive(return_inverse=True)[1]
    columns = measure.new_zeros(len(measure), 1 + x, last - first)
    columns[torch.arange(first, last), 0, torch.arange(last - first)] = 1
    result = measure.new_zeros(lags, 1 + x, last - first, measure.shape[1])
    for lag in range(lags):
        result[lag] = transitions.expected_own(columns, states)
        if lag % _CHECK_EVERY == 0 and not bool(columns.any()):
            break
        moved = moves.pull_columns(columns.flatten(1)).view(columns.shape)
        if x:
            reached = columns[:, 0].contiguous()
            paid = torch.stack([move.pull_columns(reached) for move in paid_moves], 1)
            moved[:, 1:] += paid[:, paid_of]
            moved[:, 1:] *= discounts[:, None]
        columns = moved
    return result * measure[states]


def convolve(left: Tensor, right: Tensor) -> Tensor:
    """Return sum_{i <= t} left[t - i] right[i], a causal convolution over K steps.

    Args:
        left: (B, K).
        right: (B, K, N).

    Returns:
        (B, K, N) sums.
    """
    steps = left.shape[-1]
    padded, reverse = torch.nn.functional.pad(left, (steps - 1, 0)), right.flip(1)
    size = max(1, 2**22 // steps**2)
    # row t of a window has left[t - (K - 1)], ..., left[t]
    windows = padded.unfold(-1, steps, 1).split(size)
    return torch.cat([x @ y for x, y in zip(windows, reverse.split(size), strict=True)])


def convolve_tokens(kernel: Tensor, sequences: Tensor) -> Tensor:
    """Return sum_{i <= t} kernel[t - i] sequences[i] for every state and token.

    Args:
        kernel: (K, C, A).
        sequences: (N, K, C, A).

    Returns:
        (N, K, C, A) sums.
    """
    (k, c, a), n = kernel.shape, len(sequences)
    left = kernel.permute(1, 2, 0).reshape(c * a, k)
    right = sequences.permute(2, 3, 1, 0).reshape(c * a, k, n)
    return convolve(left, right).view(c, a, k, n).permute(3, 2, 0, 1)
