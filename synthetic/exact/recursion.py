"""Moment recursion: mean and mean square of a sum along a Markov chain, without sampling.

A trajectory's gradient is a sum of one vector a step,

    g_t = step_t + (F_{t+1} - b_t) score_t,      F_t = sum_{u >= t} gamma^(u-t+1) later_u,

over the logits of the state. The moments of F given a state follow backward recursions; those of
g_t follow from them. The mean square has the products of a step with itself, and those of a step
with all earlier ones. Of these it needs, at state c, the discounted earlier scores Z and the
earlier gradient G in the directions of the logits of c: with a table, only earlier visits to c
contribute (`synthetic.exact.returns`); with shared parameters, Z and G have D entries.

Memory grows linearly with the states, and transitions are operators, dense or sparse.

Shapes: S states, C states of a block, A actions, T steps, K = T - 1 lags, E estimators, G
discounts, U later costs, D parameters. Everything is float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from synthetic.estimators import Terms
from synthetic.exact.parameters import SharedParameters, TableParameters
from synthetic.exact.returns import convolve, convolve_tokens, return_measures
from synthetic.worlds.mdp import TabularMDP
from synthetic.worlds.transitions import backward_sums


@dataclass(frozen=True, kw_only=True, eq=False)
class EstimatorRows:
    """E estimators, propagated together at G discounts; U of their later costs are different."""

    gammas: Tensor
    """(G,) discounts."""
    costs: Tensor
    """(U, S, A) costs that count in the credit of earlier tokens."""
    cost_of: Tensor
    """(E,) long index of each estimator's later cost."""
    step: Tensor
    """(E, S, A, A) gradient of a token's own term."""
    score: Tensor
    """(E, S, A, A) vector that multiplies the credit."""
    baseline: Tensor
    """(E, G, T, S) baseline of step and state."""

    @classmethod
    def from_terms(cls, terms_and_baselines: Sequence[tuple[Terms, Tensor]]) -> "EstimatorRows":
        """Stack pairs of terms and baseline (G, T, S), which share their discounts."""
        terms, baselines = zip(*terms_and_baselines, strict=True)
        costs: list[Tensor] = []
        cost_of = []
        for x in terms:
            index = next((i for i, cost in enumerate(costs) if torch.equal(cost, x.later)), None)
            if index is None:
                index = len(costs)
                costs.append(x.later)
            cost_of.append(index)
        return cls(
            gammas=terms[0].gammas,
            costs=torch.stack(costs),
            cost_of=torch.tensor(cost_of),
            step=torch.stack([x.step for x in terms]),
            score=torch.stack([x.score for x in terms]),
            baseline=torch.stack(baselines),
        )


@dataclass(frozen=True, eq=False)
class Chain:
    """A world under a measure of its tokens, and the estimators along it."""

    mdp: TabularMDP
    """The world."""
    measure: Tensor
    """(S, A) weight of a token given the state, 0 at the end state."""
    visits: Tensor
    """(T, S) measure of a state at each step."""
    rows: EstimatorRows
    """Estimators and discounts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Future:
    """Moments of the later costs F given a state at step t, times the factor of the length."""

    weight: Tensor
    """(T + 1, S) E[factor]."""
    first: Tensor
    """(T + 1, U, G, S) E[F factor]."""
    second: Tensor
    """(T + 1, U, G, S) E[F^2 factor]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """Expectations of the gradients g of C states at T steps, given the state."""

    gradient: Tensor
    """(E, G, T, C, A) E[g_t factor], over the logits of the state."""
    paid: Tensor
    """(E, G, T, C, A) E[g_t F_t factor], which multiplies the earlier scores."""
    square: Tensor
    """(E, G, T, C) E[|g_t|^2 factor]."""


def propagate_moments(
    mdp: TabularMDP,
    measure: Tensor,
    rows: EstimatorRows,
    by_length: Tensor,
    space: TableParameters | SharedParameters,
) -> tuple[Tensor, Tensor]:
    """Compute the mean and the mean squared norm of the estimate.

    Args:
        mdp: The world.
        measure: (S, A) weight of a token given the state; need not sum to 1 (an importance weight).
        rows: Estimators and discounts.
        by_length: (T + 1,) factor of a trajectory by its number of tokens.
        space: Space of the parameters.

    Returns:
        (E, G, *shape) mean and (E, G) mean squared norm under the measure.
    """
    measure = measure * mdp.active[:, None]
    moves = mdp.transitions.under(measure)
    visits = [mdp.start]
    for _ in range(mdp.horizon - 1):
        visits.append(moves.push(visits[-1]))
    chain = _centre_costs(Chain(mdp, measure, torch.stack(visits), rows))
    rows = chain.rows
    once = expected_future(chain, by_length)
    squares = by_length.square()
    twice = once if torch.equal(squares, by_length) else expected_future(chain, squares)
    table = mdp.start.new_zeros(*rows.baseline.shape[:2], *measure.shape)
    square = mdp.start.new_zeros(rows.baseline.shape[:2])
    gram = (
        space.inner_products(rows.score, rows.score),
        space.inner_products(rows.score, rows.step),
        space.inner_products(rows.step, rows.step),
    )
    shared = isinstance(space, SharedParameters)
    earlier = SharedHistory(chain, space) if isinstance(space, SharedParameters) else None
    for steps, states in _blocks(chain, by_steps=shared):
        effects = _effects(chain, once, gram, steps, states)
        visited = chain.visits[steps, states]
        table[:, :, states] += torch.einsum("tc,egtca->egca", visited, effects.gradient)
        if twice is not once:
            effects = _effects(chain, twice, gram, steps, states)
        square += torch.einsum("tc,egtc->eg", visited, effects.square)
        square += 2 * (
            _table_cross(chain, effects, states)
            if earlier is None
            else earlier.cross(effects, steps)
        )
    return space.to_gradient(table), square


def _centre_costs(chain: Chain) -> Chain:
    """Subtract the mean later cost from each cost, and what it adds up to from the baseline.

    This changes no estimate, but without it the costs of T steps would cancel against baselines of
    their size, and their squares would lose digits. It needs trajectories of one length.
    """
    rows, horizon = chain.rows, chain.mdp.horizon
    if chain.mdp.end is not None:
        return chain
    weights = chain.visits.sum(0)[:, None] * chain.measure
    means = (weights * rows.costs).sum((-1, -2)) / weights.sum()
    # what a cost of 1 at each step adds up to after step t, gamma + ... + gamma^(T-1-t)
    powers = rows.gammas[:, None] ** torch.arange(1, horizon, dtype=rows.gammas.dtype)
    sums = torch.nn.functional.pad(powers.cumsum(1).flip(1), (0, 1))
    shift = means[rows.cost_of][:, None, None] * sums
    centred = replace(
        rows,
        costs=rows.costs - means[:, None, None],
        baseline=rows.baseline - shift[..., None],
    )
    return replace(chain, rows=centred)


def _blocks(chain: Chain, by_steps: bool) -> list[tuple[slice, slice]]:
    """Return blocks of steps or of states whose arrays stay near 16 MiB each."""
    (s, a), horizon, rows = chain.measure.shape, chain.mdp.horizon, chain.rows
    numbers = rows.baseline.shape[0] * len(rows.gammas) * a
    if by_steps:
        size = max(1, 2**21 // (numbers * s))
        steps = [slice(i, min(i + size, horizon)) for i in range(0, horizon, size)]
        return [(x, slice(0, s)) for x in steps]
    columns = 1 + len(rows.costs) * len(rows.gammas)
    # beyond about 128 columns, sparse products leave the processor's cache
    size = max(1, min(2**21 // (numbers * horizon), 128 // columns))
    return [(slice(0, horizon), slice(i, min(i + size, s))) for i in range(0, s, size)]


def expected_future(chain: Chain, length_weights: Tensor) -> Future:
    """Compute the moments of the later costs, from the last step to the first.

    Args:
        chain: World and estimators.
        length_weights: (T + 1,) factor of a trajectory by its number of tokens.

    Returns:
        The moments.
    """
    transitions, costs = chain.mdp.transitions, chain.rows.costs
    discounts, ones = chain.rows.gammas[:, None], torch.ones_like(chain.mdp.start)
    moves = transitions.under(chain.measure)
    paid, paid_square = (
        [transitions.under(chain.measure * x) for x in factors]
        for factors in (costs, costs.square())
    )
    # a trajectory is weighted by its length when it reaches the end state, and stops there
    ended = length_weights[:-1, None] * (1 - chain.mdp.active)
    weight = backward_sums(moves, ended, ones[0], length_weights[-1] * ones)
    none = ones.new_zeros(len(costs), *discounts.shape[:1], len(ones))
    sources = torch.stack([x.pull(weight[1:]) for x in paid], 1)[:, :, None]
    first = backward_sums(moves, discounts * sources, discounts, none)
    sources = torch.stack([x.pull(weight[1:]) for x in paid_square], 1)[:, :, None]
    products = torch.stack([x.pull(first[1:, i]) for i, x in enumerate(paid)], 1)
    second = backward_sums(moves, discounts**2 * (sources + 2 * products), discounts**2, none)
    return Future(weight=weight, first=first, second=second)


def _effects(
    chain: Chain,
    future: Future,
    gram: tuple[Tensor, Tensor, Tensor],
    steps: slice,
    states: slice,
) -> Effects:
    """Compute the expectations at some steps and states.

    Args:
        chain: World and estimators.
        future: Moments of the later costs.
        gram: (E, S, A) inner products of score with score, score with step, step with step.
        steps: Steps T of the result.
        states: States C of the result.

    Returns:
        The expectations.
    """
    rows = chain.rows
    following = slice(steps.start + 1, steps.stop + 1)
    weight, first, second = (
        chain.mdp.transitions.expected(x[following], states) * chain.measure[states]
        for x in (future.weight, future.first, future.second)
    )
    # (E, G, T, C, A) each; the weight of a step is the same for all estimators
    first, second = (x.permute(1, 2, 0, 3, 4)[rows.cost_of] for x in (first, second))
    later = rows.costs[rows.cost_of][:, None, None, states]
    ss, sv, vv = (x[:, None, None, states] for x in gram)
    b = rows.baseline[:, :, steps, states, None]
    step, score = rows.step[:, states], rows.score[:, states]
    centred = first - b * weight
    owed = later * weight + first
    gradient = _weighted(weight.expand_as(first), step) + _weighted(centred, score)
    paid = _weighted(owed, step) + _weighted(later * first + second - b * owed, score)
    square = vv * weight + 2 * sv * centred + ss * (second - b * (first + centred))
    return Effects(
        gradient=gradient,
        paid=rows.gammas[:, None, None, None] * paid,
        square=square.sum(-1),
    )


def _weighted(weights: Tensor, vectors: Tensor) -> Tensor:
    """Return (E, G, T, C, A) sums over tokens y of weights (E, G, T, C, Y) and (E, C, Y, A)."""
    return torch.einsum("egtcy,ecya->egtca", weights, vectors)


def _table_cross(chain: Chain, effects: Effects, states: slice) -> Tensor:
    """Return (E, G) sum of the products of steps with earlier ones, for a table's block of states.

    Args:
        chain: World and estimators.
        effects: Expectations of all steps of the block.
        states: The block.

    Returns:
        The sum over steps and states.
    """
    rows, horizon = chain.rows, chain.mdp.horizon
    square = rows.baseline.new_zeros(rows.baseline.shape[:2])
    if horizon == 1:
        return square
    # pairs of a later cost and a discount with an effect on earlier steps
    has_effect = (rows.costs.flatten(1).abs().amax(1) > 0)[:, None] & (rows.gammas > 0)
    costs, discounts = has_effect.nonzero(as_tuple=True)
    measures = return_measures(
        chain.mdp.transitions,
        horizon,
        chain.measure,
        rows.costs,
        costs,
        rows.gammas[discounts],
        states,
    )
    x, g = len(costs), len(rows.gammas)
    ages = rows.gammas[:, None] ** torch.arange(horizon - 1, dtype=rows.gammas.dtype)
    kernels = torch.cat(
        [
            measures[:, :1],
            ages.T[:, :, None, None] * measures[:, :1],
            measures[:, 1:],
            torch.zeros_like(measures[:, :1]),
        ],
        1,
    )  # (K, 1 + G + X + 1, C, A); the last one is that of pairs without an effect
    left = chain.visits[:-1, states].T.contiguous()
    right = kernels.permute(2, 0, 1, 3)
    sums = convolve(left, right.flatten(2)).view(right.shape).permute(2, 1, 0, 3)
    fixed, scored = sums[0], sums[1 : 1 + g]
    pair_of = torch.full(has_effect.shape, x)
    pair_of[costs, discounts] = torch.arange(x)
    paid = sums[1 + g :][pair_of[rows.cost_of]]  # (E, G, K, C, A)

    step, score = rows.step[:, states], rows.score[:, states]
    gradient, future_gradient = effects.gradient[:, :, 1:], effects.paid[:, :, 1:]
    along_step, along_score, scores_paid = (
        torch.einsum("egtca,ecya->egtcy", *pair)
        for pair in ((gradient, step), (gradient, score), (future_gradient, score))
    )
    square += (along_step * fixed + scores_paid * scored + along_score * paid).sum((-1, -2, -3))
    subtracted = rows.baseline.flatten(1).abs().amax(1) > 0
    if bool(subtracted.any()):
        weighted = rows.baseline[subtracted, :, :-1, states] * chain.visits[:-1, states]
        sequences = weighted[..., None].expand(-1, -1, -1, -1, measures.shape[-1])
        past = convolve_tokens(measures[:, 0], sequences.flatten(0, 1)).view(sequences.shape)
        square[subtracted] -= (along_score[subtracted] * past).sum((-1, -2, -3))
    return square


class SharedHistory:
    """Earlier scores and gradients of shared parameters, step by step."""

    def __init__(self, chain: Chain, space: SharedParameters) -> None:
        rows, d = chain.rows, space.shape[0]
        self._chain, self._space = chain, space
        # E[Z 1(state)] and E[G 1(state)] before a step
        self._scores = chain.measure.new_zeros(*rows.baseline.shape[:2], d, chain.mdp.num_states)
        self._gradients = torch.zeros_like(self._scores)
        self._score, self._step = (
            (x @ space.jacobian).permute(0, 3, 1, 2)[:, None] for x in (rows.score, rows.step)
        )  # (E, 1, D, S, A)

    def cross(self, effects: Effects, steps: slice) -> Tensor:
        """Return (E, G) sum of the products of the next steps with earlier ones, and advance."""
        rows = self._chain.rows
        square = rows.baseline.new_zeros(rows.baseline.shape[:2])
        for i, t in enumerate(range(steps.start, steps.stop)):
            for earlier, later in (
                (self._gradients, effects.gradient[:, :, i]),
                (self._scores, effects.paid[:, :, i]),
            ):
                square += (self._space.own_products(earlier.mT) * later).sum((-1, -2))
            self._advance(t)
        return square

    def _advance(self, step: int) -> None:
        chain, rows = self._chain, self._chain.rows
        later = rows.costs[rows.cost_of][:, None, None]
        discounted = rows.gammas[:, None, None, None] * self._scores[..., None]
        visits = chain.visits[step, :, None]
        b = rows.baseline[:, :, None, step, :, None]
        scores = discounted + visits * self._score
        gradients = (
            self._gradients[..., None]
            + later * discounted
            + visits * (self._step - b * self._score)
        )
        self._scores, self._gradients = (
            chain.mdp.transitions.push(chain.measure * x) for x in (scores, gradients)
        )
