"""Transitions of a tabular world as linear operators, dense or with few successors per token.

Both kinds have the same methods, so that every recursion is written once. `Moves` are the
transitions between states under given weights of the tokens, such as a policy's probabilities.

Shapes: S states, A actions (tokens), K successors of a state and token, N columns.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput

if TYPE_CHECKING:
    from scipy.sparse import csr_array

ALL = slice(None)
"""Every state."""
_LARGEST_PART = 2**18
"""Numbers in the largest temporary array of a sparse product."""


@dataclass(frozen=True, eq=False)
class DenseTransitions:
    """Transitions stored as one probability for every next state."""

    probabilities: Tensor
    """(S, A, S) probability of the next state."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of states and of actions, (S, A)."""
        return self.probabilities.shape[0], self.probabilities.shape[1]

    def expected(self, values: Tensor, states: slice = ALL) -> Tensor:
        """Return (..., C, A) mean of values (..., S) of the next state, for C of the states."""
        s, a = self.shape
        rows = self.probabilities[states].reshape(-1, s)
        return (values @ rows.T).unflatten(-1, (-1, a))

    def expected_own(self, columns: Tensor, states: slice) -> Tensor:
        """Return (X, C, A) mean of values (S, X, C) of the next state, state c in column c."""
        # a batched product: einsum costs more than the product in a small world
        return (self.probabilities[states] @ columns.permute(2, 0, 1)).permute(2, 0, 1)

    def push(self, measure: Tensor) -> Tensor:
        """Return (..., S) measure of the next state, from one of state and token (..., S, A)."""
        s, a = self.shape
        return measure.flatten(-2) @ self.probabilities.reshape(s * a, s)

    def next_states(self, states: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
        """Return (B,) next states, given (B,) states, tokens and indices of `probabilities`."""
        return indices

    def under(self, weights: Tensor) -> "DenseMoves":
        """Return the moves under weights (S, A) of the tokens; gradients flow through."""
        return DenseMoves(torch.einsum("ca,cad->cd", weights, self.probabilities))


@dataclass(frozen=True, eq=False)
class DenseMoves:
    """Moves between states as one matrix."""

    matrix: Tensor
    """(S, S) weight of the move from a state to the next."""

    def pull(self, values: Tensor) -> Tensor:
        """Return (..., S) weighted sum of values (..., S) over the next state."""
        return values @ self.matrix.T

    def push(self, measure: Tensor) -> Tensor:
        """Return (..., S) measure after a move, from (..., S) before it."""
        return measure @ self.matrix

    def pull_columns(self, columns: Tensor) -> Tensor:
        """Return (S, N) weighted sums of values (S, N) over the next state."""
        return self.matrix @ columns


@dataclass(frozen=True, eq=False)
class SparseTransitions:
    """Transitions stored as K successors of every state and token, and their probabilities."""

    successors: Tensor
    """(S, A, K) long states; one may occur twice, its probabilities then add up."""
    probabilities: Tensor
    """(S, A, K) probability of each successor; 0 where there are fewer."""

    def __post_init__(self) -> None:
        successors = torch.as_tensor(self.successors).detach().to(torch.long)
        probabilities = torch.as_tensor(self.probabilities).detach().to(torch.float64)
        object.__setattr__(self, "successors", successors)
        object.__setattr__(self, "probabilities", probabilities)
        shape = tuple(successors.shape)
        if len(shape) != 3 or 0 in shape or shape != tuple(probabilities.shape):
            raise InvalidInput(
                f"successors have shape {shape} and probabilities "
                f"{tuple(probabilities.shape)}, expected (S, A, K) of both"
            )
        outside = successors[(successors < 0) | (successors >= shape[0])]
        if len(outside):
            raise InvalidInput(
                f"successors contain state {int(outside[0])}, expected 0 to {shape[0] - 1}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of states and of actions, (S, A)."""
        return self.successors.shape[0], self.successors.shape[1]

    def to_dense(self) -> Tensor:
        """Return the (S, A, S) probabilities of the next state."""
        s, a = self.shape
        return self.probabilities.new_zeros(s, a, s).scatter_add(
            -1, self.successors, self.probabilities
        )

    def expected(self, values: Tensor, states: slice = ALL) -> Tensor:
        """Return (..., C, A) mean of values (..., S) of the next state, for C of the states."""
        successors, probabilities = self.successors[states], self.probabilities[states]
        result = values[..., successors[..., 0]] * probabilities[..., 0]
        for k in range(1, successors.shape[-1]):
            result = result + values[..., successors[..., k]] * probabilities[..., k]
        return result

    def expected_own(self, columns: Tensor, states: slice) -> Tensor:
        """Return (X, C, A) mean of values (S, X, C) of the next state, state c in column c."""
        successors, probabilities = self.successors[states], self.probabilities[states]
        own = torch.arange(len(successors))[:, None, None]
        return torch.einsum("cakx,cak->xca", columns[successors, :, own], probabilities)

    def push(self, measure: Tensor) -> Tensor:
        """Return (..., S) measure of the next state, from one of state and token (..., S, A)."""
        return _scatter(measure[..., None] * self.probabilities, self.successors)

    def next_states(self, states: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
        """Return (B,) next states, given (B,) states, tokens and indices of `probabilities`."""
        return self.successors[states, tokens, indices]

    def under(self, weights: Tensor) -> "SparseMoves":
        """Return the moves under weights (S, A) of the tokens; gradients flow through."""
        return SparseMoves(self.successors, weights[..., None] * self.probabilities)


@dataclass(frozen=True, eq=False)
class SparseMoves:
    """Moves between states as a weight of every successor."""

    successors: Tensor
    """(S, A, K) long states."""
    weights: Tensor
    """(S, A, K) weight of each."""

    def pull(self, values: Tensor) -> Tensor:
        """Return (..., S) weighted sum of values (..., S) over the next state."""
        rows = values.reshape(-1, values.shape[-1])
        parts = rows.split(max(1, _LARGEST_PART // self.weights.numel()))
        sums = [(x[:, self.successors] * self.weights).sum((-1, -2)) for x in parts]
        return torch.cat(sums).view(values.shape)

    def push(self, measure: Tensor) -> Tensor:
        """Return (..., S) measure after a move, from (..., S) before it."""
        return _scatter(measure[..., None, None] * self.weights, self.successors)

    def pull_columns(self, columns: Tensor) -> Tensor:
        """Return (S, N) weighted sums of values (S, N) over the next state; no gradients."""
        return torch.from_numpy(self._matrix @ columns.numpy())

    @cached_property
    def _matrix(self) -> "csr_array":
        from scipy.sparse import csr_array

        s, a, k = self.successors.shape
        entries = self.weights.flatten().numpy(), self.successors.flatten().numpy()
        starts = torch.arange(0, s * a * k + 1, a * k).numpy()
        # a copy: the sum of duplicates sorts the arrays in place
        matrix = csr_array((*entries, starts), shape=(s, s), copy=True)
        matrix.sum_duplicates()
        return matrix


Transitions = DenseTransitions | SparseTransitions
Moves = DenseMoves | SparseMoves


def backward_sums(moves: Moves, sources: Tensor, decay: Tensor, last: Tensor) -> Tensor:
    """Compute x_t = sources_t + decay * E[x_{t+1} of the next state], from the last step back.

    Args:
        moves: Moves between states.
        sources: (T, ..., S) what each step and state adds.
        decay: () or (..., 1) factor of a step.
        last: (..., S) x_T, after the last step.

    Returns:
        (T + 1, ..., S) sums.
    """
    sums = [last]
    for source in reversed(sources.unbind()):
        sums.append(torch.addcmul(source, decay, moves.pull(sums[-1])))
    return torch.stack(sums[::-1])


def _scatter(measure: Tensor, successors: Tensor) -> Tensor:
    """Return (..., S) sums of a measure (..., S, A, K) over the state that it moves to."""
    batch = measure.shape[:-3]
    zeros = measure.new_zeros(*batch, len(successors))
    return zeros.index_add(-1, successors.flatten(), measure.flatten(-3))
