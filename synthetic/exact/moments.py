"""The truth: sequence KL, expected gradients and total variances without sampling.

Shapes: S states, A actions, T steps, G discounts, D parameters. Everything is float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.credit import RATIOS, check_gamma
from synthetic.estimators import ESTIMATORS, Estimator, terms
from synthetic.exact import baselines
from synthetic.exact.recursion import Rows, Shared, Table, propagate
from synthetic.worlds.mdp import TabularMDP

__all__ = ["ESTIMATORS", "SequenceKL", "baseline", "expected_gradient", "moments", "sequence_kl"]

LENGTHS = ("sequence_sum", "sequence_mean")
"""Denominators of `opd.objectives.factory` under which trajectories stay independent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceKL:
    """J = E[sum_t r_t] and its parts; with live student logits every field carries gradient.

    total (): J in nats; occupancy (T, S): probability of state c at step t; local (S,): KL of the
    two policies at a state (0 at the end state); value (T, S): expected cost from step t on.
    """

    total: Tensor
    occupancy: Tensor
    local: Tensor
    value: Tensor


def sequence_kl(mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor) -> SequenceKL:
    """KL of the student's distribution over sequences from the teacher's, J = sum_t d_t . K.

    With `occupancy` detached, sum_t d_t . K is the frozen-prefix objective of gamma = 0.
    """
    student = mdp.log_policy(student_logits, "student_logits")
    teacher = mdp.log_policy(teacher_logits, "teacher_logits").detach()
    p = student.exp()
    move = torch.einsum("ca,cad->cd", p, mdp.transition)
    local = (p * (student - teacher)).sum(-1) * mdp.active
    occupancy, value = [mdp.start], [local]
    for _ in range(mdp.horizon - 1):
        occupancy.append(occupancy[-1] @ move)
        value.append(local + move @ value[-1])
    visits = torch.stack(occupancy)
    total = (visits @ local).sum()
    return SequenceKL(total=total, occupancy=visits, local=local, value=torch.stack(value[::-1]))


@torch.no_grad()
def expected_gradient(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    gamma: float | Sequence[float],
) -> Tensor:
    """Expected gradient of the gamma family, sum_t E[s_t (r_t + gamma V_(t+1))].

    gamma = 1 is the gradient of the sequence KL; gamma = 0 that of the KL with frozen prefixes;
    between them it is not the gradient of anything. (arXiv 2603.25562, eq. 3.) Written out from
    the formula, apart from `moments`, so that the two check each other.

    Returns:
      (S, A) per trajectory, or (G, S, A) for a sequence of discounts.
    """
    grid = _grid(gamma)
    student = mdp.log_policy(student_logits, "student_logits")
    cost = student - mdp.log_policy(teacher_logits, "teacher_logits")
    p, cost = student.exp(), cost * mdp.active[:, None]
    move, local = torch.einsum("ca,cad->cd", p, mdp.transition), (p * cost).sum(-1)
    values = [torch.zeros(len(grid), mdp.num_states, dtype=p.dtype)]
    for _ in range(mdp.horizon - 1):
        values.append(local + grid[:, None] * (values[-1] @ move.T))
    # transitions do not depend on the step, so occupancy-weighted values suffice
    here, visits = mdp.start, torch.zeros_like(mdp.start)
    weighted = torch.zeros(len(grid), mdp.num_states, mdp.num_states, dtype=p.dtype)
    for after in reversed(values):
        visits = visits + here
        weighted += here[:, None] * after[:, None]
        here = here @ move
    future = torch.einsum("cad,gcd->gca", mdp.transition, weighted)
    whole = visits[:, None] * cost + grid[:, None, None] * future
    gradient = p * (whole - (p * whole).sum(-1, keepdim=True))
    return gradient[0] if isinstance(gamma, float | int) else gradient


@torch.no_grad()
def moments(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    estimator: str | Sequence[str] = "plain",
    gamma: float | Sequence[float] = 0.0,
    *,
    k: int | None = None,
    group: int | None = None,
    sampler: Tensor | None = None,
    ratio: str = "none",
    length: str = "sequence_sum",
    jacobian: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact mean and total variance (trace of the covariance) of one trajectory's gradient.

    Args:
      estimator: a name in ESTIMATORS, or several, which then share one pass.
      k: size of the support, for top-K objectives.
      group: rollouts a group, for leave_one_out; its variance is `group` times that of the mean.
      sampler: (S, A) probabilities of the policy that acts, if it is not the student.
      ratio: importance weight of `opd.objectives.credit.RATIOS`: none, token or sequence.
      length: "sequence_sum", or "sequence_mean" to divide each trajectory by its own length.
      jacobian: (S, A, D) of the logits with respect to shared parameters.

    Returns:
      mean (S, A), or (D,) with a jacobian, and variance (); with a leading axis for a sequence of
      estimators, and then one for a sequence of discounts.

    Raises:
      ValueError: an unknown name, a discount outside [0, 1] or without effect, no k or group.
    """
    grid, names = _grid(gamma), [estimator] if isinstance(estimator, str) else list(estimator)
    chosen = [_estimator(name, gamma) for name in names]
    for kind, name, known in (("ratio", ratio, tuple(RATIOS)), ("length", length, LENGTHS)):
        if name not in known:
            raise InvalidInput(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    if group is not None and not any(one.grouped for one in chosen):
        raise InvalidInput(f"group = {group} would have no effect on {', '.join(names)}")
    space = _space(mdp, jacobian)
    parts = []
    for one in chosen:
        at = terms(mdp, student_logits, teacher_logits, one.objective(1.0), grid, k, sampler, ratio)
        parts.append((at, baselines.table("none" if one.grouped else one.baseline, at, space)))
    rows, (at, _) = Rows.of(parts), parts[0]
    steps = torch.arange(mdp.horizon + 1, dtype=torch.float64).clamp(min=1)
    by_length = 1 / steps if length == "sequence_mean" else torch.ones_like(steps)
    mean, square = propagate(mdp, at.acting * at.ratio, rows, by_length, space)
    if ratio == "sequence":
        square = propagate(mdp, at.acting * at.ratio.square(), rows, by_length, space)[1]
    variance = (square - mean.flatten(1).square().sum(1)).clamp(min=0).view(len(names), -1)
    for i, (one, (at, _)) in enumerate(zip(chosen, parts, strict=True)):
        if one.grouped:
            size = _group(group, length)
            variance[i] = baselines.leave_one_out_variance(at, space, variance[i], size)
    mean = mean.view(len(names), len(grid), *space.shape)
    # a single name or a single discount has no axis
    if isinstance(gamma, float | int):
        mean, variance = mean[:, 0], variance[:, 0]
    return (mean[0], variance[0]) if isinstance(estimator, str) else (mean, variance)


@torch.no_grad()
def baseline(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    estimator: str,
    gamma: float,
    jacobian: Tensor | None = None,
) -> Tensor:
    """(T, S) the exact baseline of an estimator, for sampling with it (`sample.with_baseline`)."""
    chosen = _estimator(estimator, gamma)
    at = terms(mdp, student_logits, teacher_logits, chosen.objective(gamma), _grid(gamma))
    return baselines.table(chosen.baseline, at, _space(mdp, jacobian))[0]


def _estimator(name: str, gamma: float | Sequence[float]) -> Estimator:
    if name not in ESTIMATORS:
        raise InvalidInput(f"unknown estimator {name!r}; known: {', '.join(ESTIMATORS)}")
    found = ESTIMATORS[name]
    if not found.family and any(_grid(gamma)):
        raise InvalidInput(f"{name} is local, gamma = {gamma} would have no effect; use gamma = 0")
    return found


def _space(mdp: TabularMDP, jacobian: Tensor | None) -> Table | Shared:
    if jacobian is None:
        return Table(mdp.num_states, mdp.num_actions)
    shape = (mdp.num_states, mdp.num_actions)
    if jacobian.dim() != 3 or tuple(jacobian.shape[:2]) != shape:
        raise InvalidInput(f"jacobian has shape {tuple(jacobian.shape)}, expected {(*shape, 'D')}")
    return Shared(jacobian.detach().to(torch.float64))


def _group(group: int | None, length: str) -> int:
    if group is None:
        raise InvalidInput("leave_one_out needs the number of rollouts a group: group=...")
    if length != "sequence_sum":
        raise InvalidInput(f"leave_one_out is exact for length 'sequence_sum', not {length!r}")
    return group


def _grid(gamma: float | Sequence[float]) -> Tensor:
    values = [float(gamma)] if isinstance(gamma, float | int) else [float(x) for x in gamma]
    if not values:
        raise InvalidInput("gamma is an empty sequence")
    for value in values:
        check_gamma(value)
    return torch.tensor(values, dtype=torch.float64)
