"""What each exact estimator is made of, as coefficients of the moment recursion in `exact`.

Adding an estimator is adding a function and its line in `ESTIMATORS`.

Shapes: S states, A actions, T steps, G discounts. Everything is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from synthetic.mdp import TabularMDP

_ZERO = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """What an estimator is made of.

    p (S, A) student; r (S, A) cost of a token; local (S,) its mean K; move (S, S) the next state
    averaged over tokens; active (S,) 0 at the end state; occupancy (T, S); gammas (G,);
    values (G, T + 1, S) discounted cost from t on, 0 at T.
    """

    p: Tensor
    r: Tensor
    local: Tensor
    move: Tensor
    active: Tensor
    occupancy: Tensor
    gammas: Tensor
    values: Tensor

    @property
    def local_gradient(self) -> Tensor:
        """(S, A) gradient of K at a fixed state."""
        return self.p * (self.r - self.local[:, None])


def terms(mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor, gamma: Tensor) -> Terms:
    student = mdp.log_policy(student_logits, "student_logits")
    teacher = mdp.log_policy(teacher_logits, "teacher_logits").detach()
    p, r = student.exp(), (student - teacher) * mdp.active[:, None]
    move = torch.einsum("ca,cad->cd", p, mdp.transition)
    local = (p * r).sum(-1)
    occupancy, values = [mdp.start], [torch.zeros(len(gamma), mdp.num_states, dtype=p.dtype)]
    for _ in range(mdp.horizon - 1):
        occupancy.append(occupancy[-1] @ move)
    for _ in range(mdp.horizon):
        values.append(local + gamma[:, None] * (values[-1] @ move.T))
    return Terms(
        p=p,
        r=r,
        local=local,
        move=move,
        active=mdp.active,
        occupancy=torch.stack(occupancy),
        gammas=gamma,
        values=torch.stack(values[::-1], 1),
    )


# --- estimators ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator:
    """One trajectory's gradient, sum_t [(w - b_t) s_t + v] + sum_{t<u} gamma^(u-t) f_u s_t.

    future f (S, A); weight w (S, A); vector v (S, A), added to block c at every visit to c;
    baseline b broadcastable to (G, T, S).
    """

    future: Tensor
    weight: Tensor
    vector: Tensor = _ZERO
    baseline: Tensor = _ZERO


def plain(at: Terms) -> Estimator:
    """The gamma family as sampled."""
    return Estimator(future=at.r, weight=at.r)


def position_mean(at: Terms) -> Estimator:
    """Minus the mean discounted cost to go of the trajectories still alive at step t."""
    alive = at.occupancy * at.active
    share = alive / alive.sum(-1, keepdim=True).clamp(min=torch.finfo(alive.dtype).tiny)
    mean = (share * at.values[:, :-1]).sum(-1, keepdim=True)
    return Estimator(future=at.r, weight=at.r, baseline=mean)


def value(at: Terms) -> Estimator:
    """Minus the state's discounted value at that step."""
    return Estimator(future=at.r, weight=at.r, baseline=at.values[:, :-1])


def rb_immediate(at: Terms) -> Estimator:
    """Immediate term r s replaced by its conditional mean, the local KL gradient."""
    return Estimator(future=at.r, weight=torch.zeros_like(at.r), vector=at.local_gradient)


def rb_future(at: Terms) -> Estimator:
    """Later costs replaced by their conditional means K."""
    return Estimator(future=at.local[:, None].expand_as(at.r), weight=at.r)


def rb_all(at: Terms) -> Estimator:
    """Both replacements. Along one trajectory this need not lower the variance."""
    future = at.local[:, None].expand_as(at.r)
    return Estimator(future=future, weight=torch.zeros_like(at.r), vector=at.local_gradient)


def rb_all_value(at: Terms) -> Estimator:
    """Both replacements, minus the mean discounted value of the next state."""
    future = at.local[:, None].expand_as(at.r)
    next_value = at.gammas[:, None, None] * (at.values[:, 1:] @ at.move.T)
    return Estimator(
        future=future,
        weight=torch.zeros_like(at.r),
        vector=at.local_gradient,
        baseline=next_value,
    )


ESTIMATORS: dict[str, Callable[[Terms], Estimator]] = {
    "plain": plain,
    "position_mean": position_mean,
    "value": value,
    "rb_immediate": rb_immediate,
    "rb_future": rb_future,
    "rb_all": rb_all,
    "rb_all_value": rb_all_value,
}
