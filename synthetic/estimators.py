"""Estimators compared in the study: an objective of `opd.objectives.catalogue` and a baseline each.

The exact engine describes an estimator by its effect on a single token. `terms` measures that
effect by running the objective itself on a batch of one-token responses, one for every state and
token. The exact results are therefore about the function that trains the language model.

Shapes: S states, A actions, T steps, G discounts. Everything is float64.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.catalogue import CONTROLS, KNOWN_ERRORS, OBJECTIVES
from opd.objectives.credit import BASELINES, NO_COST, RATIOS
from opd.objectives.objective import Objective
from opd.objectives.support import JOINT_SUPPORTS
from synthetic.sampling.monte_carlo import visit_gradients
from synthetic.sampling.trajectories import (
    Trajectories,
    score_with_tables,
    with_statistics,
    with_support,
)
from synthetic.worlds.mdp import TabularMDP
from synthetic.worlds.transitions import Moves, Transitions, backward_sums


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """An objective, and the baseline subtracted from its credit."""

    objective: Objective
    """The objective; the study sets its discount."""
    baseline: str = "none"
    """Baseline subtracted from the credit.

    "none"; "value", the mean credit given step and state; "optimal", the one of least variance;
    "position_value", the exact mean credit of the trajectories still running at a step, to which
    the sampled `position_mean` converges; "local_kl"; or "leave_one_out" over a group.
    """

    @property
    def family(self) -> bool:
        """Whether the objective depends on the discount."""
        return not self.objective.later_cost.is_zero

    @property
    def grouped(self) -> bool:
        """Whether rollouts of a group share information, so that they are not independent."""
        return self.baseline == "leave_one_out"

    def discounted(self, gamma: float) -> Objective:
        """Return the objective with a discount."""
        return replace(self.objective, gamma=gamma)

    def sampled_objective(self, gamma: float) -> Objective:
        """Return the objective for sampling; "value" and "optimal" use the batch's baseline."""
        baseline = BASELINES.get(self.baseline, BASELINES["given"])
        return replace(self.discounted(gamma), baseline=baseline)


_SAMPLED = OBJECTIVES["sampled_token"]

FAMILY: dict[str, Estimator] = {
    "plain": Estimator(objective=_SAMPLED),
    **{
        name: Estimator(objective=_SAMPLED, baseline=name)
        for name in ("position_value", "leave_one_out", "local_kl", "value", "optimal")
    },
    "rb_immediate": Estimator(objective=OBJECTIVES["full_sampled_future"]),
    "rb_future": Estimator(objective=OBJECTIVES["mean_future"]),
    "rb_all": Estimator(objective=OBJECTIVES["full_reverse_kl"]),
    "rb_all_value": Estimator(objective=OBJECTIVES["full_reverse_kl"], baseline="value"),
}
"""Estimators with the expected gradient of the gamma family."""

_TOKEN_LOCAL: dict[str, Estimator] = {
    name: Estimator(objective=objective)
    for name, objective in OBJECTIVES.items()
    if not objective.has_credit and objective.support != "full"
}
"""Objectives of the sampled token or of a top-K support only."""

_FROZEN_REVERSE_KL = replace(OBJECTIVES["full_reverse_kl"], later_cost=NO_COST)

LOCAL: dict[str, Estimator] = {
    "full_reverse_kl": Estimator(objective=_FROZEN_REVERSE_KL),
    **{
        name: estimator
        for name, estimator in _TOKEN_LOCAL.items()
        if estimator.objective.support not in JOINT_SUPPORTS
    },
    "k1": Estimator(objective=KNOWN_ERRORS["k1"][0]),
}
"""Estimators that depend on the prefix and the token only, without a discount."""

ADDITIONAL: dict[str, Estimator] = {
    "full_forward_kl": Estimator(objective=OBJECTIVES["full_forward_kl"]),
    "full_jsd": Estimator(objective=OBJECTIVES["full_jsd"]),
    "negative_log_likelihood": Estimator(objective=CONTROLS["negative_log_likelihood"]),
    **{
        name: estimator
        for name, estimator in _TOKEN_LOCAL.items()
        if estimator.objective.support in JOINT_SUPPORTS
    },
}
"""Further local estimators that have exact moments but are not compared in the study."""

ESTIMATORS: dict[str, Estimator] = {
    **FAMILY,
    "kl_advantage": Estimator(objective=KNOWN_ERRORS["kl_advantage"][0]),
    **LOCAL,
    **ADDITIONAL,
}


# --- terms --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """One trajectory's gradient, sum_t [step_t + (sum_{u>t} gamma^(u-t) later_u - b_t) score_t]."""

    transitions: Transitions
    """Probabilities of the next state."""
    moves: Moves
    """Moves between states under the sampler."""
    acting: Tensor
    """(S, A) probabilities with which tokens are sampled."""
    ratio: Tensor
    """(S, A) a token's factor of the sequence importance weight."""
    own: Tensor
    """(S, A) cost that counts in the token's own credit."""
    later: Tensor
    """(S, A) cost that counts in the credit of earlier tokens."""
    local: Tensor
    """(S,) KL of the two policies at a state."""
    step: Tensor
    """(S, A, A) gradient of the token's own term, a vector over the logits of its state."""
    score: Tensor
    """(S, A, A) vector over the state's logits that multiplies the credit; its mean is zero where
    the sampler is the student.
    """
    active: Tensor
    """(S,) 1, or 0 at the end state."""
    occupancy: Tensor
    """(T, S) probability of state c at step t."""
    gammas: Tensor
    """(G,) discounts."""
    on_policy: bool
    """Whether the student is the sampler."""

    @cached_property
    def values(self) -> Tensor:
        """(G, T + 1, S) mean discounted later cost from t on, 0 at T."""
        mean_later = (self.acting * self.later).sum(-1)
        sources = mean_later.expand(len(self.occupancy), len(self.gammas), -1)
        last = torch.zeros_like(sources[0])
        return backward_sums(self.moves, sources, self.gammas[:, None], last).transpose(0, 1)

    @cached_property
    def value(self) -> Tensor:
        """(G, T, S) mean credit at a step and state, before any baseline."""
        later = self.moves.pull(self.values[:, 1:])
        return (self.acting * self.own).sum(-1) + self.gammas[:, None, None] * later


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Every state and token as a response of one token, three times, and visits of the sampler."""

    mdp: TabularMDP
    """The world."""
    logits: tuple[Tensor, Tensor]
    """(S, A) of student and teacher."""
    trajectories: Trajectories
    """3 S A scored responses of one token, without statistics of the distributions."""
    acting: Tensor
    """(S, A) probabilities with which tokens are sampled."""
    moves: Moves
    """Moves between states under the sampler."""
    local: Tensor
    """(S,) KL of the two policies at a state."""
    occupancy: Tensor
    """(T, S) probability of state c at step t."""
    on_policy: bool
    """Whether the student is the sampler."""

    @cached_property
    def with_statistics(self) -> Trajectories:
        """The responses with statistics of the distributions, which some objectives read."""
        student, teacher = (self.mdp.log_policy(logits).detach() for logits in self.logits)
        return with_statistics(self.trajectories, student, teacher)


def token_batch(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    sampler: Tensor | None = None,
) -> TokenBatch:
    """Score every state and token once, for the terms of any number of objectives.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        sampler: (S, A) probabilities of the sampling policy; the student's if None.

    Returns:
        The batch.
    """
    s, a = mdp.num_states, mdp.num_actions
    states = torch.arange(s).repeat_interleave(a).repeat(3)[:, None]
    tokens = torch.arange(a).repeat(3 * s)[:, None]
    acting = mdp.behaviour(student_logits, sampler)
    student_logp, teacher_logp = (
        mdp.log_policy(student_logits, "student_logits").detach(),
        mdp.log_policy(teacher_logits, "teacher_logits").detach(),
    )
    trajectories = score_with_tables(student_logp, teacher_logp, acting, mdp.active, states, tokens)
    moves = mdp.transitions.under(acting)
    occupancy = [mdp.start]
    for _ in range(mdp.horizon - 1):
        occupancy.append(moves.push(occupancy[-1]))
    return TokenBatch(
        mdp=mdp,
        logits=(student_logits, teacher_logits),
        trajectories=trajectories,
        acting=acting,
        moves=moves,
        local=(student_logp.exp() * (student_logp - teacher_logp)).sum(-1) * mdp.active,
        occupancy=torch.stack(occupancy),
        on_policy=sampler is None,
    )


def terms(
    tokens: TokenBatch,
    objective: Objective,
    gammas: Tensor,
    k: int | None = None,
    ratio: str = "none",
) -> Terms:
    """Measure the objective's effect on each token by running it.

    Args:
        tokens: Every state and token, scored.
        objective: The objective; its own discount is not used.
        gammas: (G,) discounts.
        k: Size of the support, for top-K objectives.
        ratio: Importance weight of `opd.objectives.credit.RATIOS`, in place of the objective's own.
            That of the whole sequence is returned as `Terms.ratio`, the factor of a token.

    Returns:
        The terms of one trajectory's gradient.

    Raises:
        InvalidInput: If the loss is not affine in its credit, or a top-K objective has no k.
    """
    mdp, (s, a) = tokens.mdp, tokens.acting.shape
    costs = (objective.own_cost, objective.later_cost)
    reads_statistics = any(cost.distributions for cost in costs)  # of any discount
    trajectories = tokens.with_statistics if reads_statistics else tokens.trajectories
    trajectories = with_support(trajectories, *tokens.logits, objective.support, k)
    factor, weight = ("sequence", "none") if ratio == "sequence" else ("none", ratio)
    token_factor = RATIOS[factor](trajectories.batch)[: s * a]
    objective = replace(objective, ratio=RATIOS[weight])
    own_cost, later_cost = (
        objective.own_cost.function(trajectories.batch),
        objective.later_cost.function(trajectories.batch),
    )
    # The loss is affine in the credit, so two evaluations give its intercept and its slope (the
    # score). A third one verifies that it is affine: its difference must be twice the slope.
    offset = torch.arange(3, dtype=own_cost.dtype).repeat_interleave(s * a)[:, None]
    gradients = visit_gradients(trajectories, tokens.logits[0], objective, own_cost + offset)
    step, once, twice = gradients[:, 0].view(3, s, a, a)
    score = once - step
    if float((twice - step - 2 * score).abs().max()) > 1e-9 * (1 + float(own_cost.abs().max())):
        raise InvalidInput(
            "the objective's gradient is not affine in its credit; exact moments need one that is"
        )
    own, later = own_cost[: s * a].view(s, a), later_cost[: s * a].view(s, a)
    return Terms(
        transitions=mdp.transitions,
        moves=tokens.moves,
        acting=tokens.acting,
        ratio=token_factor.view(s, a),
        own=own,
        later=later,
        local=tokens.local,
        step=step,
        score=score,
        active=mdp.active,
        occupancy=tokens.occupancy,
        gammas=gammas,
        on_policy=tokens.on_policy,
    )
