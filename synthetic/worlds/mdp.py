"""Tabular worlds whose states are prefixes, and random students and teachers for them.

A policy is a table of logits (S, A). A step at state c samples token y ~ softmax(table[c]), pays
the cost log student - log teacher of y, and moves to c' ~ transition[c, y].

Shapes: S states, A actions (tokens), T horizon.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.worlds.transitions import DenseTransitions, SparseTransitions, Transitions

LARGEST_DENSE = 2 * 1024**3
"""Bytes of (S, A, S) transition probabilities beyond which a dense world is refused."""


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """A finite world of `horizon` steps; tensors are stored as float64."""

    transition: Tensor | SparseTransitions
    """(S, A, S) probability of the next state, or the few successors of every state and token."""
    start: Tensor
    """(S,) probability of the first state."""
    horizon: int
    """Number of steps T."""
    end: int | None = None
    """Optional absorbing state without token, cost or score, which makes lengths random."""

    def __post_init__(self) -> None:
        transition, start = self.transition, torch.as_tensor(self.start)
        object.__setattr__(self, "start", start.detach().to(torch.float64))
        if not isinstance(transition, SparseTransitions):
            transition = torch.as_tensor(transition).detach().to(torch.float64)
            object.__setattr__(self, "transition", transition)
            shape = tuple(transition.shape)
            if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
                raise InvalidInput(f"transition has shape {shape}, expected (S, A, S)")
        if tuple(self.start.shape) != (self.num_states,):
            raise InvalidInput(
                f"start has shape {tuple(self.start.shape)}, expected {(self.num_states,)}"
            )
        if self.horizon < 1 or int(self.horizon) != self.horizon:
            raise InvalidInput(f"horizon is {self.horizon}, expected an integer of at least 1")
        _check_distribution("transition", self.transitions.probabilities)
        _check_distribution("start", self.start)
        if self.end is not None:
            self._check_end(self.end)

    def _check_end(self, end: int) -> None:
        if not 0 <= end < self.num_states:
            raise InvalidInput(f"end is {end}, expected a state below {self.num_states}")
        at_end = (torch.arange(self.num_states) == end).to(torch.float64)
        stay_probability = float(self.transitions.expected(at_end)[end].min())
        if stay_probability < 1:
            raise InvalidInput(
                f"end state {end} is not absorbing: it has self-transition probability "
                f"{stay_probability}, expected 1"
            )
        if float(self.start[end]) > 0:
            raise InvalidInput(
                f"start gives end state {end} probability {float(self.start[end])}, expected 0"
            )

    @cached_property
    def transitions(self) -> Transitions:
        """The transitions as an operator, dense or sparse."""
        if isinstance(self.transition, SparseTransitions):
            return self.transition
        return DenseTransitions(self.transition)

    @property
    def num_states(self) -> int:
        """Number of states S."""
        return self.transition.shape[0]

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        return self.transition.shape[1]

    @property
    def active(self) -> Tensor:
        """(S,) 1 where a token is emitted, 0 at the end state."""
        active = torch.ones(self.num_states, dtype=torch.float64)
        if self.end is not None:
            active[self.end] = 0
        return active

    def log_policy(self, logits: Tensor, name: str = "logits") -> Tensor:
        """Return (S, A) float64 log-probabilities of a table of logits; gradients flow through.

        Args:
            logits: (S, A).
            name: Name of the argument in error messages.

        Returns:
            (S, A) log-probabilities.

        Raises:
            InvalidInput: If the shape is wrong or a value is not finite.
        """
        shape = (self.num_states, self.num_actions)
        if tuple(logits.shape) != shape:
            raise InvalidInput(f"{name} has shape {tuple(logits.shape)}, expected {shape}")
        return log_probabilities(logits, name)

    def behaviour(self, student_logits: Tensor, sampler: Tensor | None) -> Tensor:
        """Return (S, A) probabilities of the sampling policy: the sampler's, or the student's.

        Args:
            student_logits: (S, A).
            sampler: (S, A) probabilities, or None for the student's.

        Returns:
            (S, A) probabilities.

        Raises:
            InvalidInput: If the sampler has the wrong shape or is no distribution.
        """
        if sampler is None:
            return self.log_policy(student_logits, "student_logits").detach().exp()
        shape = (self.num_states, self.num_actions)
        if tuple(sampler.shape) != shape:
            raise InvalidInput(f"sampler has shape {tuple(sampler.shape)}, expected {shape}")
        sampler = sampler.detach().to(torch.float64)
        _check_distribution("sampler", sampler)
        return sampler


def log_probabilities(logits: Tensor, name: str = "logits") -> Tensor:
    """Return (..., A) float64 log-probabilities of logits; gradients flow through.

    Args:
        logits: (..., A).
        name: Name of the argument in error messages.

    Returns:
        (..., A) log-probabilities.

    Raises:
        InvalidInput: If a value is not finite.
    """
    if not bool(logits.isfinite().all()):
        count = int((~logits.isfinite()).sum())
        raise InvalidInput(f"{name}: {count} of {logits.numel()} values are not finite")
    return logits.to(torch.float64).log_softmax(-1)


def _check_distribution(name: str, x: Tensor) -> None:
    invalid = x[~(x.isfinite() & (x >= 0))]
    if len(invalid):
        raise InvalidInput(
            f"{name} contains {float(invalid[0])}, expected probabilities of at least 0"
        )
    totals = x.sum(-1)
    largest_error = float((totals - 1).abs().max())
    if largest_error > 1e-9:
        row_sum = float(totals.flatten()[(totals - 1).abs().argmax()])
        raise InvalidInput(f"{name}: a row sums to {row_sum}, expected 1")


# --- worlds -------------------------------------------------------------------------------------


def random_chain(
    num_states: int,
    num_actions: int,
    horizon: int,
    generator: torch.Generator,
    mixing: float = 1.0,
    blocks: int = 2,
    successors: int | None = None,
) -> TabularMDP:
    """Draw a random chain with `blocks` groups of states and a `mixing` factor between them.

    Rows are uniform on the simplex, then multiplied by `mixing` outside the state's own block and
    renormalised: 1 mixes fast, 0 never leaves the block of the start state. With `successors`, a
    row has that many different next states: one in the state's own block and others anywhere.

    Args:
        num_states: Number of states S.
        num_actions: Number of actions A.
        horizon: Number of steps.
        generator: Source of randomness.
        mixing: Factor in [0, 1] on the probability of leaving a block.
        blocks: Number of blocks, 1 to S.
        successors: Number of next states K of a state and token, 1 to S, for a sparse world; None
            for a dense one.

    Returns:
        The world, with a uniform start.

    Raises:
        InvalidInput: If mixing, blocks or successors is out of range, or a dense world is too
            large.
    """
    if not 0 <= mixing <= 1:
        raise InvalidInput(f"mixing is {mixing}, expected a number in [0, 1]")
    if not 1 <= blocks <= num_states:
        raise InvalidInput(f"blocks is {blocks}, expected 1 to {num_states} (the number of states)")
    start = torch.full((num_states,), 1 / num_states, dtype=torch.float64)
    block = torch.arange(num_states) * blocks // num_states
    if successors is not None:
        next_states = _draw_successors(block, num_actions, successors, generator)
        same_block = block[next_states] == block[:, None, None]
        weights = _exponential(tuple(next_states.shape), generator)
        weights = weights * torch.where(same_block, 1.0, mixing)
        probabilities = weights / weights.sum(-1, keepdim=True)
        return TabularMDP(SparseTransitions(next_states, probabilities), start, horizon)
    _check_dense_size(num_states, num_actions)
    weights = _exponential((num_states, num_actions, num_states), generator)
    same_block = block[:, None] == block[None, :]
    weights = weights * torch.where(same_block, 1.0, mixing)[:, None, :]
    return TabularMDP(weights / weights.sum(-1, keepdim=True), start, horizon)


def _draw_successors(
    block: Tensor, num_actions: int, successors: int, generator: torch.Generator
) -> Tensor:
    """Return (S, A, K) different next states, the first in the own block, given blocks (S,)."""
    s = len(block)
    if not 1 <= successors <= s:
        raise InvalidInput(f"successors is {successors}, expected 1 to {s} (the number of states)")
    sizes = torch.bincount(block)
    first = (sizes.cumsum(0) - sizes)[block]
    own_size = sizes[block]
    rows = []
    # one state at a time, so that memory does not grow as S^2
    for state in range(s):
        keys = torch.rand(num_actions, s, generator=generator, dtype=torch.float64)
        low = int(first[state])
        own = low + keys[:, low : low + int(own_size[state])].argmin(-1, keepdim=True)
        rows.append(keys.scatter(-1, own, -1.0).topk(successors, largest=False).indices)
    return torch.stack(rows)


def token_chain(num_actions: int, horizon: int) -> TabularMDP:
    """Return the deterministic world whose state is the last token; the first state is token 0."""
    transition = torch.eye(num_actions, dtype=torch.float64).expand(num_actions, -1, -1)
    return TabularMDP(transition, torch.eye(num_actions, dtype=torch.float64)[0], horizon)


def with_end_state(mdp: TabularMDP, stop: Tensor) -> TabularMDP:
    """Add one absorbing end state, reached with probability `stop`.

    Args:
        mdp: A world without end state.
        stop: (S, A) probability of ending, or a shape that broadcasts to it.

    Returns:
        The world with S + 1 states.

    Raises:
        InvalidInput: If the world already has an end state.
    """
    stop = torch.as_tensor(stop, dtype=torch.float64).expand(mdp.num_states, mdp.num_actions)
    if mdp.end is not None:
        raise InvalidInput(f"the world already has an end state, {mdp.end}")
    s, a = mdp.num_states, mdp.num_actions
    start = torch.cat([mdp.start, torch.zeros(1)])
    if isinstance(mdp.transition, SparseTransitions):
        # one more successor, the end state, which follows itself
        successors = torch.cat([mdp.transition.successors, torch.full((s, a, 1), s)], -1)
        probabilities = torch.cat(
            [mdp.transition.probabilities * (1 - stop)[..., None], stop[..., None]], -1
        )
        end_row = torch.zeros_like(probabilities[:1])
        end_row[..., -1] = 1
        sparse = SparseTransitions(
            torch.cat([successors, torch.full_like(successors[:1], s)]),
            torch.cat([probabilities, end_row]),
        )
        return TabularMDP(sparse, start, mdp.horizon, end=s)
    transition = torch.zeros(s + 1, a, s + 1, dtype=torch.float64)
    transition[:s, :, :s] = mdp.transition * (1 - stop)[..., None]
    transition[:s, :, s] = stop
    transition[s, :, s] = 1
    return TabularMDP(transition, start, mdp.horizon, end=s)


def to_dense(mdp: TabularMDP) -> TabularMDP:
    """Return the same world with (S, A, S) transitions, for comparisons at small sizes."""
    if isinstance(mdp.transition, SparseTransitions):
        _check_dense_size(*mdp.transition.shape)
        return replace(mdp, transition=mdp.transition.to_dense())
    return mdp


def _check_dense_size(num_states: int, num_actions: int) -> None:
    size = 8 * num_states**2 * num_actions
    if size > LARGEST_DENSE:
        raise InvalidInput(
            f"a dense world of {num_states} states and {num_actions} actions needs "
            f"{size / 1024**3:.1f} GiB for its transitions, more than {LARGEST_DENSE >> 30} GiB; "
            "use a sparse one, such as random_chain(..., successors=4)"
        )


# --- policies -----------------------------------------------------------------------------------


def random_pair(
    mdp: TabularMDP,
    generator: torch.Generator,
    distance: float = 1.0,
    heterogeneity: float = 0.0,
    sharpness: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draw student and teacher logits: student = sharpness * noise, teacher = student + offset.

    The offset has root mean square `distance` in expectation; its scale varies over states as
    exp(heterogeneity * noise), so that 0 spreads the local KL evenly.

    Args:
        mdp: The world.
        generator: Source of randomness.
        distance: Root mean square of the offset.
        heterogeneity: Standard deviation of the log-scale over states.
        sharpness: Standard deviation of the student's logits.

    Returns:
        Student and teacher logits, (S, A) each.
    """
    shape = (mdp.num_states, mdp.num_actions)
    student = sharpness * _normal(shape, generator)
    offset = _normal(shape, generator)
    scale = (heterogeneity * _normal(shape[:1], generator)).exp()
    scale = scale / scale.square().mean().sqrt()
    return student, student + distance * scale[:, None] * offset


def nucleus_probabilities(logits: Tensor, top_p: float, temperature: float = 1.0) -> Tensor:
    """Return (S, A) probabilities of a top-p sampler at a temperature.

    The temperature is applied first; then the fewest tokens of mass >= top_p are kept.

    Args:
        logits: (S, A).
        top_p: Nucleus mass in (0, 1].
        temperature: Positive temperature.

    Returns:
        (S, A) probabilities.

    Raises:
        InvalidInput: If top_p or the temperature is out of range.
    """
    if not 0 < top_p <= 1:
        raise InvalidInput(f"top_p is {top_p}, expected a number in (0, 1]")
    if not temperature > 0:
        raise InvalidInput(f"temperature is {temperature}, expected a positive number")
    p, order = (logits.to(torch.float64) / temperature).softmax(-1).sort(-1, descending=True)
    nucleus = p * (p.cumsum(-1) - p < top_p)
    nucleus = torch.zeros_like(p).scatter(-1, order, nucleus)
    return nucleus / nucleus.sum(-1, keepdim=True)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _exponential(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # 1 - u lies in (0, 1]: no logarithm of zero
    return -torch.log1p(-torch.rand(shape, generator=generator, dtype=torch.float64))
