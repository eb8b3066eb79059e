"""The world of the exact study: a tabular MDP, with students and teachers as logit tables."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """Finite horizon, S states, A actions (tokens), float64.

    transition (S, A, S) rows sum to 1; start (S,) sums to 1; horizon T >= 1; end: an optional
    absorbing state in which nothing is sampled and nothing costs.
    """

    transition: Tensor
    start: Tensor
    horizon: int
    end: int | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.transition.shape)
        if len(shape) != 3 or shape[0] != shape[2]:
            raise ValueError(f"transition has shape {shape}, expected (S, A, S)")
        if tuple(self.start.shape) != shape[:1]:
            raise ValueError(f"start has shape {tuple(self.start.shape)}, expected {shape[:1]}")
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}, expected at least 1")
        for name in ("transition", "start"):
            x = getattr(self, name).double()
            object.__setattr__(self, name, x)
            worst = float((x.sum(-1) - 1).abs().max())
            if worst > 1e-9 or float(x.min()) < 0:
                raise ValueError(
                    f"{name} is no distribution: sums are off by {worst}, smallest {float(x.min())}"
                )
        if self.end is not None:
            if not 0 <= self.end < shape[0]:
                raise ValueError(f"end is {self.end}, expected a state in 0..{shape[0] - 1}")
            if not bool((self.transition[self.end, :, self.end] == 1).all()):
                raise ValueError(f"end state {self.end} is not absorbing")

    @property
    def active(self) -> Tensor:
        """(S,) 1 where a token is sampled, 0 in the end state."""
        x = torch.ones_like(self.start)
        if self.end is not None:
            x[self.end] = 0
        return x
