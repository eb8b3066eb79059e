"""Estimators compared in the study: an objective of `opd.objectives.catalogue` and a baseline each.

The exact engine describes an estimator by its effect on a single token. `terms` measures that
effect by running the objective itself on a batch of one-token responses, one for every state and
token. The exact results are therefore about the function that trains the language model.

Shapes: S states, A actions, T steps, G discounts. Everything is float64.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.catalogue import CONTROLS, KNOWN_ERRORS, OBJECTIVES
from opd.objectives.credit import BASELINES, NO_COST, RATIOS
from opd.objectives.objective import Objective
from opd.objectives.support import JOINT_SUPPORTS
from synthetic.sampling.monte_carlo import visit_gradients
from synthetic.sampling.trajectories import score_trajectories, with_support
from synthetic.worlds.mdp import TabularMDP


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

    transition: Tensor
    """(S, A, S) probability of the next state."""
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
    move: Tensor
    """(S, S) state transition matrix of the sampler."""
    active: Tensor
    """(S,) 1, or 0 at the end state."""
    occupancy: Tensor
    """(T, S) probability of state c at step t."""
    gammas: Tensor
    """(G,) discounts."""
    values: Tensor
    """(G, T + 1, S) mean discounted later cost from t on, 0 at T."""
    on_policy: bool
    """Whether the student is the sampler."""

    @property
    def next_values(self) -> Tensor:
        """(G, T, S, A) mean discounted later cost from the next step on, after each token."""
        return torch.einsum("cad,gtd->gtca", self.transition, self.values[:, 1:])

    @property
    def credit(self) -> Tensor:
        """(G, T, S, A) mean credit of a token, before any baseline."""
        return self.own + self.gammas[:, None, None, None] * self.next_values

    @property
    def value(self) -> Tensor:
        """(G, T, S) mean credit at a step and state."""
        return (self.acting * self.credit).sum(-1)


def terms(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    objective: Objective,
    gammas: Tensor,
    k: int | None = None,
    sampler: Tensor | None = None,
    ratio: str = "none",
) -> Terms:
    """Measure the objective's effect on each token by running it.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        objective: The objective; its own discount is not used.
        gammas: (G,) discounts.
        k: Size of the support, for top-K objectives.
        sampler: (S, A) probabilities of the sampling policy; the student's if None.
        ratio: Importance weight of `opd.objectives.credit.RATIOS`, in place of the objective's own.
            That of the whole sequence is returned as `Terms.ratio`, the factor of a token.

    Returns:
        The terms of one trajectory's gradient.

    Raises:
        InvalidInput: If the loss is not affine in its credit, or a top-K objective has no k.
    """
    s, a = mdp.num_states, mdp.num_actions
    states = torch.arange(s).repeat_interleave(a)[:, None]
    tokens = torch.arange(a).repeat(s)[:, None]
    trajectories = score_trajectories(mdp, student_logits, teacher_logits, states, tokens, sampler)
    trajectories = with_support(trajectories, student_logits, teacher_logits, objective.support, k)
    factor, weight = ("sequence", "none") if ratio == "sequence" else ("none", ratio)
    token_factor = RATIOS[factor](trajectories.batch)
    objective = replace(objective, ratio=RATIOS[weight])
    own_cost, later_cost = (
        objective.own_cost.function(trajectories.batch),
        objective.later_cost.function(trajectories.batch),
    )
    # The loss is affine in the credit, so two evaluations give its intercept and its slope (the
    # score). A third one verifies that it is affine: its difference must be twice the slope.
    gradients = [
        visit_gradients(trajectories, student_logits, objective, own_cost + offset)[:, 0]
        for offset in (0, 1, 2)
    ]
    score = gradients[1] - gradients[0]
    if float((gradients[2] - gradients[0] - 2 * score).abs().max()) > 1e-9 * (
        1 + float(own_cost.abs().max())
    ):
        raise InvalidInput(
            "the objective's gradient is not affine in its credit; exact moments need one that is"
        )

    acting = mdp.behaviour(student_logits, sampler)
    sampled_probs, student_logp, teacher_logp = (
        trajectories.batch.student_logp.exp().view(s, a),
        mdp.log_policy(student_logits).detach(),
        mdp.log_policy(teacher_logits, "teacher_logits").detach(),
    )
    move = torch.einsum("ca,cad->cd", acting, mdp.transition)
    occupancy = [mdp.start]
    for _ in range(mdp.horizon - 1):
        occupancy.append(occupancy[-1] @ move)
    mean_later = (acting * later_cost.view(s, a)).sum(-1)
    values = [torch.zeros(len(gammas), s, dtype=sampled_probs.dtype)]
    for _ in range(mdp.horizon):
        values.append(mean_later + gammas[:, None] * (values[-1] @ move.T))
    return Terms(
        transition=mdp.transition,
        acting=acting,
        ratio=token_factor.view(s, a),
        own=own_cost.view(s, a),
        later=later_cost.view(s, a),
        local=(student_logp.exp() * (student_logp - teacher_logp)).sum(-1) * mdp.active,
        step=gradients[0].view(s, a, a),
        score=score.view(s, a, a),
        move=move,
        active=mdp.active,
        occupancy=torch.stack(occupancy),
        gammas=gammas,
        values=torch.stack(values[::-1], 1),
        on_policy=sampler is None,
    )
