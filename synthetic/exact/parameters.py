"""Parameter spaces: the logits themselves, or parameters that the logits are functions of.

Shapes: S states, A actions, D parameters. Everything is float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TableParameters:
    """Parameter space of a table: the parameters are the logits, and a gradient is (S, A).

    Gradients at different states are orthogonal, so that only returns to a state make products.
    """

    num_states: int
    num_actions: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one gradient, (S, A)."""
        return self.num_states, self.num_actions

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Return (..., S, Y, X) products of (..., S, Y, A) and (..., S, X, A) over the logits."""
        return left @ right.mT

    def inner_products(self, left: Tensor, right: Tensor) -> Tensor:
        """Return (..., S, A) inner products of (..., S, A, A) vectors over one state's logits."""
        return (left * right).sum(-1)

    def to_gradient(self, vectors: Tensor) -> Tensor:
        """Map (..., S, A) vectors over the logits to (..., *shape), a sum over states."""
        return vectors


@dataclass(frozen=True, eq=False)
class SharedParameters:
    """Parameter space of D parameters that all logits are functions of; a gradient is (D,)."""

    jacobian: Tensor
    """(S, A, D) derivative of the logits."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one gradient, (D,)."""
        return (self.jacobian.shape[-1],)

    def own_products(self, vectors: Tensor) -> Tensor:
        """Return (..., S, A) products of gradients (..., S, D) with the logits of their state."""
        return torch.einsum("...cd,cad->...ca", vectors, self.jacobian)

    def inner_products(self, left: Tensor, right: Tensor) -> Tensor:
        """Return (..., S, A) inner products in parameter space of vectors over a state's logits."""
        return (left @ self.jacobian * (right @ self.jacobian)).sum(-1)

    def to_gradient(self, vectors: Tensor) -> Tensor:
        """Map (..., S, A) vectors over the logits to (..., D), a sum over states."""
        return torch.einsum("...ca,cad->...d", vectors, self.jacobian)
