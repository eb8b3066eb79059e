"""Students whose states share parameters, too few to represent the teacher.

With a table of logits, the score of one state does not affect another, and sequence- and
token-level optima coincide at the teacher. Here neither holds. Parameters are (R, D): R students
at once.

Shapes: R students, D parameters, S states, F features, H hidden units, A actions. float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.exact import moments
from synthetic.worlds.mdp import TabularMDP, random_chain


@dataclass(frozen=True, eq=False)
class Student:
    """Logits computed from fixed features: linear, or through tanh units if `hidden` > 0."""

    features: Tensor
    """(S, F) features of the states."""
    num_actions: int
    """Number of actions A."""
    hidden: int = 0
    """Number of hidden units H; 0 for a linear student."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the weight matrices."""
        f, a = self.features.shape[1], self.num_actions
        return [(f, self.hidden), (self.hidden, a)] if self.hidden else [(f, a)]

    @property
    def size(self) -> int:
        """Number of parameters D."""
        return sum(rows * columns for rows, columns in self.shapes)

    def logits(self, parameters: Tensor) -> Tensor:
        """Return (R, S, A) logits of parameters (R, D); gradients flow through."""
        x, begin = self.features.expand(len(parameters), -1, -1), 0
        for i, (rows, columns) in enumerate(self.shapes):
            weight = parameters[:, begin : begin + rows * columns].view(-1, rows, columns)
            x = (x.tanh() if i else x) @ weight
            begin += rows * columns
        return x

    def jacobian(self, parameters: Tensor) -> Tensor:
        """Return the (S, A, D) Jacobian of the logits at parameters (D,), for `exact.moments`."""
        return torch.autograd.functional.jacobian(
            lambda x: self.logits(x[None])[0], parameters.detach(), vectorize=True
        )

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return (R, D) small random parameters, the same for every student."""
        return (0.3 * _normal((self.size,), generator)).expand(count, -1).clone()


@dataclass(frozen=True, eq=False)
class LearningProblem:
    """A world, a student, a teacher, and a reward that neither of the two observes."""

    mdp: TabularMDP
    """The world."""
    student: Student
    """The student's architecture."""
    teacher: Tensor
    """(S, A) logits."""
    reward: Tensor
    """(S,) reward of a state."""


def capacity_limited_problem(
    shape: tuple[int, int, int],
    features: int,
    hidden: int,
    mixing: float,
    generator: torch.Generator,
) -> LearningProblem:
    """Draw a random chain and a teacher that the student cannot represent.

    The teacher prefers rewarded states and is not a function of F features; its local KL to any
    student is heterogeneous.

    Args:
        shape: (S, A, T) states, actions and horizon.
        features: Number of features F.
        hidden: Number of hidden units; 0 for a linear student.
        mixing: Factor on leaving a block, see `random_chain`.
        generator: Source of randomness.

    Returns:
        The problem.

    Raises:
        InvalidInput: If there are as many features or hidden units as states, so that the student
            could equal its teacher.
    """
    s, a, _ = shape
    if max(features, hidden) >= s:
        raise InvalidInput(
            f"{features} features and {hidden} hidden units distinguish all {s} states; use "
            f"fewer than {s} of each, so that the student cannot equal its teacher"
        )
    mdp = random_chain(*shape, generator, mixing)
    reward = _normal((s,), generator)
    scale = (0.7 * _normal((s, 1), generator)).exp()
    reward_logits = mdp.transitions.expected(reward)
    reward_logits = (reward_logits - reward_logits.mean(-1, keepdim=True)) / reward_logits.std(
        -1, keepdim=True
    )
    teacher = scale * (_normal((s, a), generator) + 0.7 * reward_logits)
    student = Student(_normal((s, features), generator) / features**0.5, a, hidden)
    return LearningProblem(mdp, student, teacher, reward)


def sequence_optimum(problem: LearningProblem, starts: Tensor) -> Tensor:
    """Minimise the sequence KL by L-BFGS on the exact J from N starts.

    Args:
        problem: World, student and teacher.
        starts: (N, D) initial parameters.

    Returns:
        (D,) the best parameters found.
    """
    candidates = torch.stack([_minimize(problem, start, None) for start in starts])
    return candidates[evaluate_students(problem, candidates).sequence_kl.argmin()]


def token_optimum(problem: LearningProblem, start: Tensor, rounds: int = 30) -> Tensor:
    """Find the token-level (gamma = 0) fixed point reached from a start.

    Minimises sum_t d_t . K with the visits d frozen at the current student, and repeats until they
    are consistent.

    Args:
        problem: World, student and teacher.
        start: (D,) initial parameters.
        rounds: Number of minimisations.

    Returns:
        (D,) parameters.
    """
    parameters = start.clone()
    for _ in range(rounds):
        logits = problem.student.logits(parameters[None])[0]
        visits = moments.sequence_kl(problem.mdp, logits, problem.teacher).occupancy.detach()
        parameters = _minimize(problem, parameters, visits)
    return parameters


def _minimize(problem: LearningProblem, parameters: Tensor, visits: Tensor | None) -> Tensor:
    """Minimise the sequence KL by L-BFGS, or the local KL at fixed visits."""
    live_parameters = parameters.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [live_parameters],
        max_iter=500,
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        divergence = moments.sequence_kl(
            problem.mdp, problem.student.logits(live_parameters[None])[0], problem.teacher
        )
        value = divergence.total if visits is None else (visits @ divergence.local).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return live_parameters.detach()


@dataclass(frozen=True, kw_only=True, eq=False)
class StudentMetrics:
    """Exact metrics of R students, (R,) each."""

    sequence_kl: Tensor
    """Sequence KL J."""
    student_kl: Tensor
    """KL per token on the student's visits."""
    teacher_kl: Tensor
    """KL per token on the teacher's visits."""
    reward: Tensor
    """Mean reward of a visited state."""


@torch.no_grad()
def evaluate_students(problem: LearningProblem, parameters: Tensor) -> StudentMetrics:
    """Compute the exact metrics of R students with parameters (R, D)."""
    horizon = problem.mdp.horizon
    student_logp = problem.student.logits(parameters).log_softmax(-1)
    teacher_logp = problem.teacher.log_softmax(-1)
    local_kl = (student_logp.exp() * (student_logp - teacher_logp)).sum(-1) * problem.mdp.active
    visits = expected_visits(problem.mdp, student_logp.exp())
    teacher_visits = expected_visits(problem.mdp, teacher_logp.exp()[None])
    total = (visits * local_kl).sum(-1)
    return StudentMetrics(
        sequence_kl=total,
        student_kl=total / horizon,
        teacher_kl=(teacher_visits * local_kl).sum(-1) / horizon,
        reward=visits @ problem.reward / horizon,
    )


def expected_visits(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """Return (R, S) expected visits of policies (R, S, A) within the horizon."""
    occupancy = mdp.start.expand(len(policy), -1)
    visits = occupancy.clone()
    for _ in range(mdp.horizon - 1):
        occupancy = mdp.transitions.push(occupancy[..., None] * policy)
        visits = visits + occupancy
    return visits


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
