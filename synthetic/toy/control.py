"""The published toy: 1-D Gaussian control, two mirrored tasks, one student, two teachers.

(arXiv 2603.25562, section 2.1 and appendix E.) A state is a position, an action a step drawn from
N(mu, sigma); the episode lasts T steps. What the paper does not state is a field of `DistillationConfig`.

Shapes: R networks stacked, N inputs, B trajectories, T steps, H hidden units. float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts

HORIZON, BATCH, MICRO = 20, 64, 8
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
STARTS, TARGETS = (2.0, -2.0), (-3.0, 3.0)
"""Of the left and the right task."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What the paper leaves open, as chosen here."""

    hidden: int = 64
    """Units of both hidden layers: 3-64-64-2 has 4,546 parameters, the paper says about 4K."""
    optimizer: str = "adam"
    """Of the student, "adam" or "sgd"; Adam, because nearly every trainer uses it."""
    rate: float = 1e-3
    """Learning rate of the student."""
    clip: float = float("inf")
    """Largest gradient norm; none, because values of 1e24 rule clipping out."""
    sigma_floor: float = 0.0
    """Least standard deviation of the student; none, for the same reason."""
    teacher_sigma_floor: float = 0.2
    """Least standard deviation of a teacher: REINFORCE would shrink it without end."""
    teacher_iterations: int = 300
    """REINFORCE updates of each teacher."""
    teacher_rate: float = 5e-3
    """Learning rate of the teachers (Adam)."""
    teacher_batch: int = 128
    """Trajectories an update; the baseline is their mean return at each step."""
    reward_scale: float = 0.1
    """The teachers' reward is -reward_scale |position - target| after each step."""
    position_scale: float = 4.0
    """Positions are divided by it before they enter a network."""


@dataclass(frozen=True, eq=False)
class Networks:
    """R stacked MLPs with two tanh layers; weights[i] (R, in, out), the last row is the bias."""

    weights: tuple[Tensor, ...]
    sigma_floor: float

    def layers(self, x: Tensor) -> tuple[Tensor, ...]:
        """(R, N, in) -> inputs of each layer with a constant 1, and the outputs (R, N, 2)."""
        seen = []
        for i, weight in enumerate(self.weights):
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
            seen.append(x)
            x = x @ weight
            x = x if i == len(self.weights) - 1 else x.tanh()
        return (*seen, x)

    def gaussian(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2) -> mean and standard deviation (...)."""
        return out[..., 0], self.sigma_floor + out[..., 1].exp()

    def stepped(self, changes: Sequence[Tensor]) -> "Networks":
        """The networks after adding a change to each weight."""
        moved = (w + d for w, d in zip(self.weights, changes, strict=True))
        return Networks(tuple(moved), self.sigma_floor)

    def of(self, index: int, copies: int) -> "Networks":
        """`copies` of one of the networks."""
        kept = (w[index : index + 1].expand(copies, -1, -1).clone() for w in self.weights)
        return Networks(tuple(kept), self.sigma_floor)


def fresh(
    count: int, inputs: int, hidden: int, floor: float, generator: torch.Generator
) -> Networks:
    """`count` networks with one and the same random start, weights N(0, 1/in), biases 0."""
    weights = []
    for size, out in ((inputs, hidden), (hidden, hidden), (hidden, 2)):
        weight = torch.randn(size, out, generator=generator, dtype=torch.float64) / size**0.5
        weight = torch.cat([weight, torch.zeros(1, out, dtype=torch.float64)])
        weights.append(weight.expand(count, -1, -1).clone())
    weights[-1] *= 0.1
    return Networks(tuple(weights), floor)


def inputs(task: int, position: Tensor, step: Tensor | int, choices: DistillationConfig) -> Tensor:
    """(...) positions -> (..., 3) what the student sees: task -1 or 1, position, time in [0, 1]."""
    side = torch.full_like(position, (-1.0, 1.0)[task])
    time = torch.zeros_like(position) + step
    return torch.stack([side, position / choices.position_scale, time / HORIZON], -1)


def log_density(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log N(x; mean, sigma), sigma the standard deviation."""
    return -((x - mean) / sigma).square() / 2 - sigma.log() - 0.9189385332046727


def gaussian_kl(mean: Tensor, sigma: Tensor, other: Tensor, other_sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma) || N(other, other_sigma))."""
    ratio = sigma / other_sigma
    return (ratio.square() + ((mean - other) / other_sigma).square() - 1) / 2 - ratio.log()


@torch.no_grad()
def rollouts(
    networks: Networks, task: int, noise: Tensor, choices: DistillationConfig
) -> tuple[Tensor, Tensor]:
    """Positions (R, B, T + 1) and actions (R, B, T) of R policies on common noise (B, T)."""
    count = len(networks.weights[0])
    position = torch.full((count, len(noise)), STARTS[task], dtype=torch.float64)
    positions, actions = [position], []
    for t in range(noise.shape[1]):
        out = networks.layers(inputs(task, position, t, choices))[-1]
        mean, sigma = networks.gaussian(out)
        action = mean + sigma * noise[:, t]
        position = position + action
        actions.append(action)
        positions.append(position)
    return torch.stack(positions, -1), torch.stack(actions, -1)


def visited(task: int, positions: Tensor, choices: DistillationConfig) -> Tensor:
    """(R, B, T + 1) positions -> (R, B * T, 3) inputs at which actions were drawn."""
    count, batch, _ = positions.shape
    steps = torch.arange(HORIZON, dtype=torch.float64).expand(count, batch, -1)
    return inputs(task, positions[..., :-1], steps, choices).reshape(count, -1, 3)


def as_batch(student_logp: Tensor, teacher_logp: Tensor) -> ScoredRollouts:
    """(B, T) log-densities as the batch that every objective takes; there are no token ids."""
    count = len(student_logp)
    return ScoredRollouts(
        tokens=torch.zeros_like(student_logp, dtype=torch.long),
        mask=torch.ones_like(student_logp, dtype=torch.bool),
        sampler_logp=student_logp.detach(),
        prompt=torch.zeros(count, dtype=torch.long),
        ended=torch.ones(count, dtype=torch.bool),
        student_logp=student_logp.detach(),
        teacher_logp=teacher_logp,
    )


def train_teachers(
    choices: DistillationConfig, generator: torch.Generator
) -> tuple[Networks, Networks]:
    """One teacher a task, by REINFORCE with a position-mean baseline on the distance to the target.

    A teacher sees what the student sees; its task is constant.
    """
    return tuple(_teacher(task, choices, generator) for task in (0, 1))  # type: ignore[return-value]


def _teacher(task: int, choices: DistillationConfig, generator: torch.Generator) -> Networks:
    floor = choices.teacher_sigma_floor
    networks = fresh(1, 3, choices.hidden, floor, generator)
    adam = Adam(networks.weights, choices.teacher_rate)
    for _ in range(choices.teacher_iterations):
        shape = (choices.teacher_batch, HORIZON)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        positions, actions = rollouts(networks, task, noise, choices)
        cost = choices.reward_scale * (positions[..., 1:] - TARGETS[task]).abs()
        to_go = cost.flip(-1).cumsum(-1).flip(-1)
        weight = (to_go - to_go.mean(1, keepdim=True)) / choices.teacher_batch
        live = Networks(tuple(w.requires_grad_() for w in networks.weights), floor)
        out = live.layers(visited(task, positions, choices))[-1].view(*actions.shape, 2)
        loss = (log_density(actions, *live.gaussian(out)) * weight).sum()
        gradients = torch.autograd.grad(loss, live.weights)
        networks = Networks(tuple(w.detach() for w in live.weights), floor)
        networks = networks.stepped(adam.change(gradients))
    return networks


class Adam:
    """Adam's change of stacked weights, elementwise, so that stacked runs do not interact."""

    def __init__(self, weights: Sequence[Tensor], rate: float) -> None:
        self.rate, self.count = rate, 0
        self.first = [torch.zeros_like(w) for w in weights]
        self.second = [torch.zeros_like(w) for w in weights]

    def change(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """-rate m / (sqrt(v) + 1e-8), bias-corrected, with decay 0.9 and 0.999."""
        self.count += 1
        changes = []
        for first, second, g in zip(self.first, self.second, gradients, strict=True):
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.999).addcmul_(g, g, value=0.001)
            scale = (second / (1 - 0.999**self.count)).sqrt() + 1e-8
            changes.append(-self.rate * first / (1 - 0.9**self.count) / scale)
        return changes
