"""Published toy problem: 1-D Gaussian control, two mirrored tasks, one student, two teachers.

(arXiv 2603.25562, section 2.1 and appendix E.) A state is a position, an action a step drawn from
N(mu, sigma); an episode has T steps. What the paper does not state is a field of
`DistillationConfig`.

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
"""Start and target position of the left and the right task."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Choices that the paper leaves open."""

    hidden: int = 64
    """Units of both hidden layers: 3-64-64-2 has 4,546 parameters; the paper says about 4K."""
    optimizer: str = "adam"
    """Optimizer of the student, "adam" or "sgd"; Adam, because nearly every trainer uses it."""
    rate: float = 1e-3
    """Learning rate of the student."""
    clip: float = float("inf")
    """Largest gradient norm; infinite, because published values of 1e24 rule clipping out."""
    sigma_floor: float = 0.0
    """Smallest standard deviation of the student; 0, for the same reason."""
    teacher_sigma_floor: float = 0.2
    """Smallest standard deviation of a teacher; without it REINFORCE shrinks it indefinitely."""
    teacher_iterations: int = 300
    """Number of REINFORCE updates of each teacher."""
    teacher_rate: float = 5e-3
    """Learning rate of the teachers (Adam)."""
    teacher_batch: int = 128
    """Trajectories per update; the baseline is their mean return at each step."""
    reward_scale: float = 0.1
    """The teachers' reward after each step is -reward_scale |position - target|."""
    position_scale: float = 4.0
    """Positions are divided by this before they enter a network."""


@dataclass(frozen=True, eq=False)
class Networks:
    """R stacked MLPs with two tanh layers."""

    weights: tuple[Tensor, ...]
    """One tensor (R, in, out) per layer; the last row is the bias."""
    sigma_floor: float
    """Smallest standard deviation of the output distribution."""

    def layer_outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the networks and keep the layers' inputs.

        Args:
            x: (R, N, in) inputs.

        Returns:
            The input of each layer with a constant 1 appended, then the outputs (R, N, 2).
        """
        layer_inputs = []
        for i, weight in enumerate(self.weights):
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
            layer_inputs.append(x)
            x = x @ weight
            x = x if i == len(self.weights) - 1 else x.tanh()
        return (*layer_inputs, x)

    def gaussian(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (...) of network outputs (..., 2)."""
        return out[..., 0], self.sigma_floor + out[..., 1].exp()

    def updated(self, changes: Sequence[Tensor]) -> "Networks":
        """Return the networks after adding an update to each weight."""
        weights = (w + d for w, d in zip(self.weights, changes, strict=True))
        return Networks(tuple(weights), self.sigma_floor)

    def repeat(self, index: int, copies: int) -> "Networks":
        """Return `copies` of the network at `index`."""
        weights = (w[index : index + 1].expand(copies, -1, -1).clone() for w in self.weights)
        return Networks(tuple(weights), self.sigma_floor)


def init_networks(
    count: int, inputs: int, hidden: int, sigma_floor: float, generator: torch.Generator
) -> Networks:
    """Return `count` networks with the same random start: weights N(0, 1/in), biases 0.

    Args:
        count: Number of networks R.
        inputs: Number of inputs.
        hidden: Units of both hidden layers.
        sigma_floor: Smallest standard deviation of the output distribution.
        generator: Source of randomness.

    Returns:
        The networks.
    """
    weights = []
    for size, out in ((inputs, hidden), (hidden, hidden), (hidden, 2)):
        weight = torch.randn(size, out, generator=generator, dtype=torch.float64) / size**0.5
        weight = torch.cat([weight, torch.zeros(1, out, dtype=torch.float64)])
        weights.append(weight.expand(count, -1, -1).clone())
    weights[-1] *= 0.1
    return Networks(tuple(weights), sigma_floor)


def network_inputs(
    task: int, position: Tensor, step: Tensor | int, config: DistillationConfig
) -> Tensor:
    """Build the student's inputs: task (-1 or 1), scaled position, and time in [0, 1].

    Args:
        task: Index of the task.
        position: (...) positions.
        step: Index of the step, or a tensor that broadcasts to the positions.
        config: Gives the scale of positions.

    Returns:
        (..., 3) inputs.
    """
    task_sign = torch.full_like(position, (-1.0, 1.0)[task])
    time = torch.zeros_like(position) + step
    return torch.stack([task_sign, position / config.position_scale, time / HORIZON], -1)


def log_density(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Return log N(x; mean, sigma), with sigma the standard deviation."""
    return -((x - mean) / sigma).square() / 2 - sigma.log() - 0.9189385332046727


def gaussian_kl(mean: Tensor, sigma: Tensor, other_mean: Tensor, other_sigma: Tensor) -> Tensor:
    """Return KL(N(mean, sigma) || N(other_mean, other_sigma))."""
    ratio = sigma / other_sigma
    return (ratio.square() + ((mean - other_mean) / other_sigma).square() - 1) / 2 - ratio.log()


@torch.no_grad()
def rollouts(
    networks: Networks, task: int, noise: Tensor, config: DistillationConfig
) -> tuple[Tensor, Tensor]:
    """Roll out R policies on common noise.

    Args:
        networks: The policies.
        task: Index of the task.
        noise: (B, T) standard normal noise.
        config: Gives the scale of positions.

    Returns:
        Positions (R, B, T + 1) and actions (R, B, T).
    """
    count = len(networks.weights[0])
    position = torch.full((count, len(noise)), STARTS[task], dtype=torch.float64)
    positions, actions = [position], []
    for t in range(noise.shape[1]):
        outputs = networks.layer_outputs(network_inputs(task, position, t, config))[-1]
        mean, sigma = networks.gaussian(outputs)
        action = mean + sigma * noise[:, t]
        position = position + action
        actions.append(action)
        positions.append(position)
    return torch.stack(positions, -1), torch.stack(actions, -1)


def visited_inputs(task: int, positions: Tensor, config: DistillationConfig) -> Tensor:
    """Return the (R, B * T, 3) network inputs at which actions were drawn.

    Args:
        task: Index of the task.
        positions: (R, B, T + 1) positions.
        config: Gives the scale of positions.

    Returns:
        (R, B * T, 3) inputs.
    """
    count, batch, _ = positions.shape
    steps = torch.arange(HORIZON, dtype=torch.float64).expand(count, batch, -1)
    return network_inputs(task, positions[..., :-1], steps, config).reshape(count, -1, 3)


def as_batch(student_logp: Tensor, teacher_logp: Tensor) -> ScoredRollouts:
    """Wrap (B, T) log-densities as the batch type that objectives take; there are no token ids."""
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
    config: DistillationConfig, generator: torch.Generator
) -> tuple[Networks, Networks]:
    """Train one teacher per task by REINFORCE, with a position-mean baseline.

    The reward is the negative distance to the target. A teacher has the student's inputs, with a
    constant task.

    Args:
        config: Settings of the teachers.
        generator: Source of randomness.

    Returns:
        The left and the right teacher.
    """
    return tuple(_teacher(task, config, generator) for task in (0, 1))  # type: ignore[return-value]


def _teacher(task: int, config: DistillationConfig, generator: torch.Generator) -> Networks:
    sigma_floor = config.teacher_sigma_floor
    networks = init_networks(1, 3, config.hidden, sigma_floor, generator)
    adam = Adam(networks.weights, config.teacher_rate)
    for _ in range(config.teacher_iterations):
        shape = (config.teacher_batch, HORIZON)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        positions, actions = rollouts(networks, task, noise, config)
        cost = config.reward_scale * (positions[..., 1:] - TARGETS[task]).abs()
        cost_to_go = cost.flip(-1).cumsum(-1).flip(-1)
        weight = (cost_to_go - cost_to_go.mean(1, keepdim=True)) / config.teacher_batch
        live_networks = Networks(tuple(w.requires_grad_() for w in networks.weights), sigma_floor)
        outputs = live_networks.layer_outputs(visited_inputs(task, positions, config))[-1].view(
            *actions.shape, 2
        )
        loss = (log_density(actions, *live_networks.gaussian(outputs)) * weight).sum()
        gradients = torch.autograd.grad(loss, live_networks.weights)
        networks = Networks(tuple(w.detach() for w in live_networks.weights), sigma_floor)
        networks = networks.updated(adam.change(gradients))
    return networks


class Adam:
    """Adam's update of stacked weights, elementwise, so that stacked runs do not interact."""

    def __init__(self, weights: Sequence[Tensor], rate: float) -> None:
        self.rate, self.count = rate, 0
        self.first = [torch.zeros_like(w) for w in weights]
        self.second = [torch.zeros_like(w) for w in weights]

    def change(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return -rate m / (sqrt(v) + 1e-8), bias-corrected, with decay 0.9 and 0.999."""
        self.count += 1
        changes = []
        for first, second, g in zip(self.first, self.second, gradients, strict=True):
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.999).addcmul_(g, g, value=0.001)
            scale = (second / (1 - 0.999**self.count)).sqrt() + 1e-8
            changes.append(-self.rate * first / (1 - 0.9**self.count) / scale)
        return changes
