"""Exact sequence KL, expected gradients and total variances, without sampling.

Shapes: S states, A actions, T steps, G discounts, D parameters. Everything is float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.credit import RATIOS, check_gamma
from synthetic.estimators import ESTIMATORS, Estimator, Terms, terms, token_batch
from synthetic.exact import baselines
from synthetic.exact.parameters import SharedParameters, TableParameters
from synthetic.exact.recursion import EstimatorRows, propagate_moments
from synthetic.worlds.mdp import TabularMDP, log_probabilities

__all__ = ["ESTIMATORS", "SequenceKL", "baseline", "expected_gradient", "moments", "sequence_kl"]

LENGTHS = ("sequence_sum", "sequence_mean")
"""Denominators of `opd.objectives.factory` under which trajectories stay independent."""


EXPECTED_NUMBERS = 2**20
"""Numbers of an array of several steps; larger ones leave the processor's cache."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceKL:
    """Sequence KL J = E[sum_t r_t] and its parts; fields carry gradient if the logits do."""

    total: Tensor
    """() J in nats."""
    occupancy: Tensor
    """(T, S) probability of state c at step t."""
    local: Tensor
    """(S,) KL of the two policies at a state; 0 at the end state."""
    value: Tensor
    """(T, S) expected cost from step t on."""


def sequence_kl(mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor) -> SequenceKL:
    """Compute J = sum_t d_t . K, the KL of the student's sequence distribution from the teacher's.

    With `occupancy` detached, sum_t d_t . K is the frozen-prefix objective of gamma = 0.

    Args:
        mdp: The world.
        student_logits: (S, A); gradients flow through.
        teacher_logits: (S, A), detached.

    Returns:
        J and its parts.
    """
    student = mdp.log_policy(student_logits, "student_logits")
    teacher = mdp.log_policy(teacher_logits, "teacher_logits").detach()
    p = student.exp()
    moves = mdp.transitions.under(p)
    local = (p * (student - teacher)).sum(-1) * mdp.active
    occupancy, value = [mdp.start], [local]
    for _ in range(mdp.horizon - 1):
        occupancy.append(moves.push(occupancy[-1]))
        value.append(local + moves.pull(value[-1]))
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
    """Compute the expected gradient of the gamma family, sum_t E[s_t (r_t + gamma V_(t+1))].

    gamma = 1 gives the gradient of the sequence KL, gamma = 0 that of the KL with frozen prefixes;
    values between them are not the gradient of any function (arXiv 2603.25562, eq. 3). This is
    implemented from the formula, independently of `moments`, so that each checks the other.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        gamma: A discount in [0, 1], or a sequence of G discounts.

    Returns:
        (S, A) expected gradient of one trajectory, or (G, S, A) for a sequence of discounts.
    """
    gammas = _grid(gamma)
    student = mdp.log_policy(student_logits, "student_logits")
    cost = student - mdp.log_policy(teacher_logits, "teacher_logits")
    p, cost = student.exp(), cost * mdp.active[:, None]
    moves, local = mdp.transitions.under(p), (p * cost).sum(-1)
    values = [p.new_zeros(len(gammas), mdp.num_states)]  # of the next state, last step first
    occupancy = [mdp.start]
    for _ in range(mdp.horizon - 1):
        values.append(torch.addcmul(local, gammas[:, None], moves.pull(values[-1])))
        occupancy.append(moves.push(occupancy[-1]))
    next_values, visits_of_step = torch.stack(values[::-1]), torch.stack(occupancy)
    future = p.new_zeros(len(gammas), *p.shape)
    size = max(1, EXPECTED_NUMBERS // future.numel())
    for some_visits, some_values in zip(
        visits_of_step.split(size), next_values.split(size), strict=True
    ):
        expected = mdp.transitions.expected(some_values)
        future += torch.einsum("tc,tgca->gca", some_visits, expected)
    visits = visits_of_step.sum(0)
    credit = visits[:, None] * cost + gammas[:, None, None] * future
    gradient = p * (credit - (p * credit).sum(-1, keepdim=True))
    return gradient[0] if isinstance(gamma, float | int) else gradient


@torch.no_grad()
def expected_gradients_of_students(
    mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor, gammas: Tensor
) -> Tensor:
    """Compute `expected_gradient` of several students at once, each with a discount of its own.

    With d_t the visits and V_t the costs to go, the sum over steps of d_t(c) V_(t+1)(c') is one
    matrix of pairs of states, and the transitions are applied to it once.

    Args:
        mdp: A world whose transitions are dense.
        student_logits: (R, S, A).
        teacher_logits: (S, A).
        gammas: (R,) discount of each student.

    Returns:
        (R, S, A) expected gradient of one trajectory of each student.

    Raises:
        InvalidInput: If the transitions are sparse or a value is not finite.
    """
    if not isinstance(mdp.transition, Tensor):
        raise InvalidInput("the transitions are sparse; use expected_gradient for each student")
    student = log_probabilities(student_logits, "student_logits")
    cost = student - mdp.log_policy(teacher_logits, "teacher_logits")
    p, cost = student.exp(), cost * mdp.active[:, None]
    count, horizon = len(p), mdp.horizon
    moves = torch.einsum("rca,cad->rcd", p, mdp.transition)
    # costs to go and visits advance together: V <- local + gamma M V and d <- M^T d
    factors = torch.cat([gammas[:, None, None] * moves, moves.mT])
    steps = p.new_zeros(horizon, 2 * count, mdp.num_states, 1)
    steps[0, count:] = mdp.start[:, None]
    constant = torch.zeros_like(steps[0])
    constant[:count, :, 0] = (p * cost).sum(-1)
    for t in range(horizon - 1):
        torch.baddbmm(constant, factors, steps[t], out=steps[t + 1])
    values, occupancy = steps[..., 0].flip(0)[:, :count], steps[:, count:, :, 0]
    pairs = torch.einsum("trc,trd->rcd", occupancy, values)
    future = torch.einsum("rcd,cad->rca", pairs, mdp.transition)
    credit = occupancy.sum(0)[..., None] * cost + gammas[:, None, None] * future
    return p * (credit - (p * credit).sum(-1, keepdim=True))


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
    """Compute the exact mean and total variance (trace of the covariance) of one gradient estimate.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        estimator: A name in `ESTIMATORS`, or several names, which then share one pass.
        gamma: A discount in [0, 1], or a sequence of G discounts.
        k: Size of the support, for top-K objectives.
        group: Rollouts per group, for leave_one_out; the returned variance is `group` times that of
            the group's mean.
        sampler: (S, A) probabilities of the sampling policy, if it is not the student.
        ratio: Importance weight of `opd.objectives.credit.RATIOS`: "none", "token" or "sequence".
        length: "sequence_sum", or "sequence_mean" to divide each trajectory by its own length.
        jacobian: (S, A, D) derivative of the logits with respect to shared parameters.

    Returns:
        The mean (S, A), or (D,) with a jacobian, and the variance (), of one trajectory's gradient.
        A sequence of estimators adds a leading axis to both, a sequence of discounts the next one.

    Raises:
        InvalidInput: If a name is unknown, a discount is outside [0, 1] or has no effect, or k or
            group is missing or has no effect.
    """
    gammas, names = _grid(gamma), [estimator] if isinstance(estimator, str) else list(estimator)
    definitions = [_estimator(name, gamma) for name in names]
    for kind, name, known_names in (("ratio", ratio, tuple(RATIOS)), ("length", length, LENGTHS)):
        if name not in known_names:
            raise InvalidInput(f"unknown {kind} {name!r}; known: {', '.join(known_names)}")
    if group is not None and not any(definition.grouped for definition in definitions):
        raise InvalidInput(
            f"group = {group} would have no effect on {', '.join(names)}; it is for leave_one_out"
        )
    space = _space(mdp, jacobian)
    tokens = token_batch(mdp, student_logits, teacher_logits, sampler)
    # estimators that differ in their baseline only have the same terms
    measured: list[tuple[Estimator, Terms]] = []
    terms_and_baselines = []
    for definition in definitions:
        token_terms = next(
            (x for known, x in measured if known.objective == definition.objective), None
        )
        if token_terms is None:
            token_terms = terms(tokens, definition.discounted(1.0), gammas, k, ratio)
            measured.append((definition, token_terms))
        kind = "none" if definition.grouped else definition.baseline
        terms_and_baselines.append(
            (token_terms, baselines.baseline_table(kind, token_terms, space))
        )
    rows, (token_terms, _) = EstimatorRows.from_terms(terms_and_baselines), terms_and_baselines[0]
    lengths = torch.arange(mdp.horizon + 1, dtype=torch.float64).clamp(min=1)
    by_length = 1 / lengths if length == "sequence_mean" else torch.ones_like(lengths)
    mean, square = propagate_moments(
        mdp, token_terms.acting * token_terms.ratio, rows, by_length, space
    )
    if ratio == "sequence":
        square = propagate_moments(
            mdp, token_terms.acting * token_terms.ratio.square(), rows, by_length, space
        )[1]
    variance = (square - mean.flatten(2).square().sum(2)).clamp(min=0)
    for i, (definition, (token_terms, _)) in enumerate(
        zip(definitions, terms_and_baselines, strict=True)
    ):
        if definition.grouped:
            group_size = _group(group, length)
            variance[i] = baselines.leave_one_out_variance(
                token_terms, space, variance[i], group_size
            )
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
    """Return the (T, S) exact baseline of an estimator, for sampling with `with_baseline`.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        estimator: A name in `ESTIMATORS`.
        gamma: Discount.
        jacobian: (S, A, D) derivative of the logits with respect to shared parameters.

    Returns:
        (T, S) baseline of step and state.
    """
    definition = _estimator(estimator, gamma)
    tokens = token_batch(mdp, student_logits, teacher_logits)
    token_terms = terms(tokens, definition.discounted(gamma), _grid(gamma))
    return baselines.baseline_table(definition.baseline, token_terms, _space(mdp, jacobian))[0]


def _estimator(name: str, gamma: float | Sequence[float]) -> Estimator:
    if name not in ESTIMATORS:
        raise InvalidInput(f"unknown estimator {name!r}; known: {', '.join(ESTIMATORS)}")
    definition = ESTIMATORS[name]
    if not definition.family and any(_grid(gamma)):
        raise InvalidInput(f"{name} is local, gamma = {gamma} would have no effect; set gamma = 0")
    return definition


def _space(mdp: TabularMDP, jacobian: Tensor | None) -> TableParameters | SharedParameters:
    if jacobian is None:
        return TableParameters(mdp.num_states, mdp.num_actions)
    shape = (mdp.num_states, mdp.num_actions)
    if jacobian.dim() != 3 or tuple(jacobian.shape[:2]) != shape:
        raise InvalidInput(f"jacobian has shape {tuple(jacobian.shape)}, expected {(*shape, 'D')}")
    return SharedParameters(jacobian.detach().to(torch.float64))


def _group(group: int | None, length: str) -> int:
    if group is None:
        raise InvalidInput("leave_one_out needs the number of rollouts per group; pass group=...")
    if length != "sequence_sum":
        raise InvalidInput(
            f"leave_one_out has exact moments for length 'sequence_sum' only, not {length!r}"
        )
    return group


def _grid(gamma: float | Sequence[float]) -> Tensor:
    values = [float(gamma)] if isinstance(gamma, float | int) else [float(x) for x in gamma]
    if not values:
        raise InvalidInput("gamma is an empty sequence; pass at least one discount")
    for value in values:
        check_gamma(value)
    return torch.tensor(values, dtype=torch.float64)
