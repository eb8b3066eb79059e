"""What is compared: names of estimators, each an objective of `opd.objectives.factory` and a baseline.

The exact engine knows an estimator by its effect on a single token. `terms` finds that by running
the objective itself on a batch of one-token responses, one for every state and token, so that what
is proved here is proved about the function that trains the language model.

Shapes: S states, A actions, T steps, G discounts. Everything is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.credit import BASELINES, RATIOS, given
from opd.objectives.factory import (
    OBJECTIVES,
    SUPPORTS,
    Objective,
    full_forward_kl,
    full_jsd,
    full_reverse_kl,
    full_sampled_future,
    k1,
    kl_advantage,
    mean_future,
    sampled_token,
)
from opd.objectives.support import JOINED
from synthetic.sampling.monte_carlo import visit_gradients
from synthetic.sampling.trajectories import scored, with_support
from synthetic.worlds.mdp import TabularMDP


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """An objective by discount, and the baseline subtracted from its credit.

    baseline: "none"; "value", the mean credit given step and state; "optimal", the one of least
    variance; "position_value", the exact mean credit of the trajectories alive at a step, to which
    the sampled `position_mean` tends; "local_kl"; or "leave_one_out" over a group. family: whether
    the discount means anything.
    """

    objective: Callable[[float], Objective]
    baseline: str = "none"
    family: bool = True

    @property
    def grouped(self) -> bool:
        """Whether rollouts of a group share information, so that they are not independent."""
        return self.baseline == "leave_one_out"

    def sampled(self, gamma: float) -> Objective:
        """The objective for sampling; "value" and "optimal" come as the batch's own column."""
        baseline = BASELINES.get(self.baseline, given)
        return replace(self.objective(gamma), baseline=baseline)


def _local(constructor: Callable[[], Objective]) -> Estimator:
    return Estimator(objective=lambda gamma: constructor(), family=False)


FAMILY: dict[str, Estimator] = {
    "plain": Estimator(objective=sampled_token),
    "position_value": Estimator(objective=sampled_token, baseline="position_value"),
    "leave_one_out": Estimator(objective=sampled_token, baseline="leave_one_out"),
    "local_kl": Estimator(objective=sampled_token, baseline="local_kl"),
    "value": Estimator(objective=sampled_token, baseline="value"),
    "optimal": Estimator(objective=sampled_token, baseline="optimal"),
    "rb_immediate": Estimator(objective=full_sampled_future),
    "rb_future": Estimator(objective=mean_future),
    "rb_all": Estimator(objective=full_reverse_kl),
    "rb_all_value": Estimator(objective=full_reverse_kl, baseline="value"),
}
"""Estimators of the same mean field, that of the gamma family."""

_WITHOUT_CREDIT: dict[str, str] = {
    name: constructor().support
    for name, constructor in OBJECTIVES.items()
    if not constructor().scores_credit and constructor().support in ("none", *SUPPORTS)
}
"""Objectives of the sampled token or of a top-K support alone, with their support."""

LOCAL: dict[str, Estimator] = {
    "full_reverse_kl": _local(full_reverse_kl),
    **{n: _local(OBJECTIVES[n]) for n, support in _WITHOUT_CREDIT.items() if support not in JOINED},
    "k1": _local(k1),
}
"""Estimators of the prefix and the token alone, without a discount."""

FURTHER: dict[str, Estimator] = {
    "full_forward_kl": _local(full_forward_kl),
    "full_jsd": _local(full_jsd),
    **{n: _local(OBJECTIVES[n]) for n, support in _WITHOUT_CREDIT.items() if support in JOINED},
}
"""More of the same, known to the exact engine but not compared in the study."""

ESTIMATORS: dict[str, Estimator] = {
    **FAMILY,
    "kl_advantage": Estimator(objective=kl_advantage),
    **LOCAL,
    **FURTHER,
}


# --- terms --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """One trajectory's gradient, sum_t [step_t + (sum_{u>t} gamma^(u-t) later_u - b_t) score_t].

    acting (S, A): probabilities of the tokens drawn; ratio (S, A): a token's factor of the whole
    trajectory (sequence importance weight); own, later (S, A): costs; step, score (S, A, A): for
    each state and token a vector over that state's logits; mean_score is zero where the sampler is
    the student. move (S, S); occupancy (T, S); gammas (G,); values (G, T + 1, S): mean discounted
    later cost from t on, 0 at T.
    """

    transition: Tensor
    acting: Tensor
    ratio: Tensor
    own: Tensor
    later: Tensor
    local: Tensor
    step: Tensor
    score: Tensor
    move: Tensor
    active: Tensor
    occupancy: Tensor
    gammas: Tensor
    values: Tensor
    on_policy: bool

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
    """What the objective does with each token, found by running it.

    Args:
      ratio: importance weight of `opd.objectives.credit.RATIOS`, in place of the objective's own. That of the
        whole sequence is returned as `ratio`, the factor of a token.

    Raises:
      ValueError: the loss is not linear in its credit, or a top-k objective has no k.
    """
    s, a = mdp.num_states, mdp.num_actions
    states = torch.arange(s).repeat_interleave(a)[:, None]
    tokens = torch.arange(a).repeat(s)[:, None]
    at = scored(mdp, student_logits, teacher_logits, states, tokens, sampler)
    at = with_support(at, student_logits, teacher_logits, objective.support, k)
    factor, weight = ("sequence", "none") if ratio == "sequence" else ("none", ratio)
    token_factor = RATIOS[factor](at.batch)
    objective = replace(objective, ratio=RATIOS[weight])
    own, later = objective.own(at.batch), objective.later(at.batch)
    steps = [visit_gradients(at, student_logits, objective, own + x)[:, 0] for x in (0, 1, 2)]
    score = steps[1] - steps[0]
    if float((steps[2] - steps[0] - 2 * score).abs().max()) > 1e-9 * (1 + float(own.abs().max())):
        raise InvalidInput("the objective's gradient is not linear in its credit: no exact moments")

    acting = mdp.behaviour(student_logits, sampler)
    p, ours, theirs = (
        at.batch.student_logp.exp().view(s, a),
        mdp.log_policy(student_logits).detach(),
        mdp.log_policy(teacher_logits, "teacher_logits").detach(),
    )
    move = torch.einsum("ca,cad->cd", acting, mdp.transition)
    occupancy = [mdp.start]
    for _ in range(mdp.horizon - 1):
        occupancy.append(occupancy[-1] @ move)
    mean_later = (acting * later.view(s, a)).sum(-1)
    values = [torch.zeros(len(gammas), s, dtype=p.dtype)]
    for _ in range(mdp.horizon):
        values.append(mean_later + gammas[:, None] * (values[-1] @ move.T))
    return Terms(
        transition=mdp.transition,
        acting=acting,
        ratio=token_factor.view(s, a),
        own=own.view(s, a),
        later=later.view(s, a),
        local=(ours.exp() * (ours - theirs)).sum(-1) * mdp.active,
        step=steps[0].view(s, a, a),
        score=score.view(s, a, a),
        move=move,
        active=mdp.active,
        occupancy=torch.stack(occupancy),
        gammas=gammas,
        values=torch.stack(values[::-1], 1),
        on_policy=sampler is None,
    )
