"""Students whose states share parameters, too few to represent the teacher.

With a table the score of one state does not touch another, and sequence- and token-level optima
coincide at the teacher. Here neither holds. Parameters are (R, D): R students at once.

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
    """Logits from fixed features (S, F): linear, or through H tanh units if `hidden` > 0."""

    features: Tensor
    num_actions: int
    hidden: int = 0

    @property
    def shapes(self) -> list[tuple[int, int]]:
        f, a = self.features.shape[1], self.num_actions
        return [(f, self.hidden), (self.hidden, a)] if self.hidden else [(f, a)]

    @property
    def size(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    def logits(self, parameters: Tensor) -> Tensor:
        """(R, D) -> (R, S, A); gradients flow through."""
        x, begin = self.features.expand(len(parameters), -1, -1), 0
        for i, (rows, columns) in enumerate(self.shapes):
            weight = parameters[:, begin : begin + rows * columns].view(-1, rows, columns)
            x = (x.tanh() if i else x) @ weight
            begin += rows * columns
        return x

    def jacobian(self, parameters: Tensor) -> Tensor:
        """(D,) -> (S, A, D), for `exact.moments`."""
        return torch.autograd.functional.jacobian(
            lambda x: self.logits(x[None])[0], parameters.detach(), vectorize=True
        )

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """(R, D) small random parameters, the same for every student."""
        return (0.3 * _normal((self.size,), generator)).expand(count, -1).clone()


@dataclass(frozen=True, eq=False)
class Task:
    """A world, a student, a teacher's logits (S, A), and a state reward (S,) that neither sees."""

    mdp: TabularMDP
    student: Student
    teacher: Tensor
    reward: Tensor


def capacity_limited(
    shape: tuple[int, int, int],
    features: int,
    hidden: int,
    mixing: float,
    generator: torch.Generator,
) -> Task:
    """A random chain (S, A, T) whose teacher leans to rewarded states and is no function of F
    features; its local KL to any student is heterogeneous.

    Raises:
      ValueError: as many features, or hidden units, as states: such a student can be its teacher.
    """
    s, a, _ = shape
    if max(features, hidden) >= s:
        raise InvalidInput(
            f"{features} features and {hidden} hidden units tell all {s} states apart, expected "
            f"fewer than {s} of each, so that the student cannot be its teacher"
        )
    mdp = random_chain(*shape, generator, mixing)
    reward = _normal((s,), generator)
    scale = (0.7 * _normal((s, 1), generator)).exp()
    lean = torch.einsum("cad,d->ca", mdp.transition, reward)
    lean = (lean - lean.mean(-1, keepdim=True)) / lean.std(-1, keepdim=True)
    teacher = scale * (_normal((s, a), generator) + 0.7 * lean)
    student = Student(_normal((s, features), generator) / features**0.5, a, hidden)
    return Task(mdp, student, teacher, reward)


def optimum(task: Task, starts: Tensor) -> Tensor:
    """(D,) parameters of least sequence KL found by L-BFGS on the exact J from N starts (N, D)."""
    found = torch.stack([_minimised(task, start, None) for start in starts])
    return found[progress(task, found).sequence_kl.argmin()]


def token_optimum(task: Task, start: Tensor, rounds: int = 30) -> Tensor:
    """(D,) the fixed point of token level (gamma = 0) reached from a start (D,).

    Minimises sum_t d_t . K with the visits d frozen at the current student, and repeats until the
    visits are its own.
    """
    parameters = start.clone()
    for _ in range(rounds):
        logits = task.student.logits(parameters[None])[0]
        visits = moments.sequence_kl(task.mdp, logits, task.teacher).occupancy.detach()
        parameters = _minimised(task, parameters, visits)
    return parameters


def _minimised(task: Task, parameters: Tensor, visits: Tensor | None) -> Tensor:
    live = parameters.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [live],
        max_iter=500,
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        parts = moments.sequence_kl(task.mdp, task.student.logits(live[None])[0], task.teacher)
        value = parts.total if visits is None else (visits @ parts.local).sum()
        value.backward()
        return value

    search.step(loss)
    return live.detach()


@dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """Exact, of R students (R,): J; KL a token on the student's and on the teacher's visits; the
    mean reward of a visited state.
    """

    sequence_kl: Tensor
    student_kl: Tensor
    teacher_kl: Tensor
    reward: Tensor


@torch.no_grad()
def progress(task: Task, parameters: Tensor) -> Progress:
    """Where R students (R, D) stand."""
    horizon = task.mdp.horizon
    ours = task.student.logits(parameters).log_softmax(-1)
    theirs = task.teacher.log_softmax(-1)
    local = (ours.exp() * (ours - theirs)).sum(-1) * task.mdp.active
    visits = occupancy(task.mdp, ours.exp())
    teacher_visits = occupancy(task.mdp, theirs.exp()[None])
    total = (visits * local).sum(-1)
    return Progress(
        sequence_kl=total,
        student_kl=total / horizon,
        teacher_kl=(teacher_visits * local).sum(-1) / horizon,
        reward=visits @ task.reward / horizon,
    )


def occupancy(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """(R, S) expected visits of policies (R, S, A) within the horizon."""
    move = torch.einsum("rca,cad->rcd", policy, mdp.transition)
    here = mdp.start.expand(len(policy), 1, -1)
    visits = here.clone()
    for _ in range(mdp.horizon - 1):
        here = here @ move
        visits = visits + here
    return visits[:, 0]


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
