"""Worlds with a hidden context: the teacher reads it, the student does not.

A context is what a privileged teacher is shown: a solution, feedback, another system message. It is
drawn once per response, c ~ prior; the prior is that of one prompt, which both models read. A state
is a whole prefix, so that how much a prefix says about the context is exact.

Shapes: C contexts, S prefixes, A actions (tokens), T steps. Everything is float64.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.worlds.mdp import TabularMDP, to_dense
from synthetic.worlds.transitions import SparseTransitions

_FASTER_DENSE = 2**16
"""Number of transition probabilities up to which dense products take less time than sparse ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextWorld:
    """One prompt: all prefixes of T tokens, a prior over contexts and a teacher for each.

    Prefixes are numbered level by level: prefix s continued by token a is prefix s * A + 1 + a.
    """

    prior: Tensor
    """(C,) probability of each context given the prompt."""
    teacher_logp: Tensor
    """(C, S, A) log-probabilities of the teacher that reads context c."""
    horizon: int
    """Number of steps T."""

    def __post_init__(self) -> None:
        num_contexts, num_prefixes, num_actions = self.teacher_logp.shape
        expected = count_prefixes(num_actions, self.horizon)
        if num_prefixes != expected:
            raise InvalidInput(
                f"teacher_logp has {num_prefixes} prefixes, expected {expected}: all of fewer "
                f"than {self.horizon} of {num_actions} tokens"
            )
        if tuple(self.prior.shape) != (num_contexts,):
            raise InvalidInput(
                f"prior has shape {tuple(self.prior.shape)}, expected ({num_contexts},)"
            )
        total = float(self.prior.sum())
        if bool((self.prior < 0).any()) or abs(total - 1) > 1e-9:
            raise InvalidInput(
                f"prior is {self.prior.tolist()} with sum {total}, expected a distribution"
            )

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        return self.teacher_logp.shape[2]

    @property
    def levels(self) -> list[slice]:
        """The prefixes of each length, from the empty one on; T slices."""
        bounds = [count_prefixes(self.num_actions, t) for t in range(self.horizon + 1)]
        return [slice(low, high) for low, high in itertools.pairwise(bounds)]

    @cached_property
    def mdp(self) -> TabularMDP:
        """The tree of prefixes as a tabular world, for `synthetic.exact.moments`."""
        s, a = self.teacher_logp.shape[1:]
        children = a * torch.arange(s)[:, None] + 1 + torch.arange(a)
        # whole responses have no state: where the last token leads does not matter
        children = torch.where(children < s, children, 0)
        transition = SparseTransitions(children[..., None], torch.ones(s, a, 1))
        start = torch.nn.functional.one_hot(torch.tensor(0), s).to(torch.float64)
        world = TabularMDP(transition, start, self.horizon)
        return to_dense(world) if s * s * a <= _FASTER_DENSE else world


def count_prefixes(num_actions: int, horizon: int) -> int:
    """Return the number of prefixes of fewer than `horizon` tokens."""
    return sum(num_actions**t for t in range(horizon))


def random_contexts(
    num_contexts: int,
    num_actions: int,
    horizon: int,
    generator: torch.Generator,
    strength: float = 1.0,
) -> ContextWorld:
    """Draw a world whose contexts each prefer some tokens, the same ones at every prefix.

    The logits of teacher c at prefix s are base(s) + strength * preference(c), both standard
    normal. Early tokens therefore say something about the context that the later ones depend on,
    as a first line of a solution does.

    Args:
        num_contexts: Number of contexts C, at least 2.
        num_actions: Number of actions A, at least 2.
        horizon: Number of steps T, at least 1.
        generator: Source of randomness.
        strength: Standard deviation of a context's logits; 0 for contexts without effect.

    Returns:
        The world, with a uniform prior.

    Raises:
        InvalidInput: If a number is out of range.
    """
    for name, value, least in (
        ("num_contexts", num_contexts, 2),
        ("num_actions", num_actions, 2),
        ("horizon", horizon, 1),
    ):
        if value < least:
            raise InvalidInput(f"{name} is {value}, expected at least {least}")
    if not (math.isfinite(strength) and strength >= 0):
        raise InvalidInput(f"strength is {strength}, expected a finite number of at least 0")
    preference = torch.randn(num_contexts, 1, num_actions, generator=generator, dtype=torch.float64)
    prefixes = count_prefixes(num_actions, horizon)
    base = torch.randn(prefixes, num_actions, generator=generator, dtype=torch.float64)
    return ContextWorld(
        prior=torch.full((num_contexts,), 1 / num_contexts, dtype=torch.float64),
        teacher_logp=(base + strength * preference).log_softmax(-1),
        horizon=horizon,
    )
