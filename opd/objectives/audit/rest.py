"""Where descent on a loss comes to rest, from several starts, by its exact mean gradient.

Shapes: D starts, N prefixes, U responses or pairs of a start, B rows of a batch, V vocabulary.
"""

import time
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from opd.objectives.audit.structure import Structure
from opd.objectives.audit.targets import reverse_kl
from opd.objectives.audit.units import FACTORS, Units, additive_gradient
from opd.objectives.audit.worlds import Batch, World, make_batch
from opd.objectives.user_loss import UserLoss

STARTS, FEW_STARTS = 10, 3
"""Students from which descent starts; the first is the teacher. Few where calls are slow."""
ITERATIONS = 500
"""Steps of descent."""
SECONDS = 8.0
"""Duration of descent beyond which there are fewer starts, then fewer steps."""
MOVES = 0.02
"""Change of a log-probability in the last tenth of the steps, in nats, of a student not at rest."""
RESTS_AT_TEACHER = 1e-2
"""KL in nats a prefix up to which a student at rest is the teacher."""


@dataclass(frozen=True)
class Rest:
    """Where descent ends."""

    mean_at_teacher: float
    """Norm of the mean gradient at teacher = student, relative to that at the world's student."""
    noise_at_teacher: float
    """Root mean square of a single gradient at teacher = student, relative to the same."""
    starts: int
    """Number of starts."""
    largest_kl: float
    """Largest KL(student || teacher) at rest, mean over prefixes, in nats."""
    smallest_kl: float
    """Smallest of these."""
    teacher_mass: float
    """Teacher's probability of its own K most probable ids, mean over prefixes."""
    student_mass: float
    """Student's probability of the same ids at rest, mean over prefixes and starts."""
    log_mass_ratio: float
    """log of student's over teacher's mass of these ids, mean over prefixes and starts; -1 for the
    un-normalised reverse KL on the teacher's top-K, whose fixed point is p(S) = q(S)/e.
    """
    moves: float
    """Largest change of a log-probability in the last tenth of the steps, in nats."""
    near_kl: float
    """KL at rest of the start next to the teacher."""
    near_start_kl: float
    """KL of that start."""

    @property
    def repels(self) -> bool:
        """Whether a student that begins close to the teacher ends further away."""
        return self.near_kl > max(2 * self.near_start_kl, RESTS_AT_TEACHER)

    @property
    def at_teacher(self) -> bool:
        """Whether every start ends at the teacher."""
        return self.largest_kl <= RESTS_AT_TEACHER


def find_rest(loss: UserLoss, world: World, structure: Structure, factor: str) -> Rest:
    """Descend on the mean gradient from several students at once.

    Steps are Adam's on the gradient divided by how often a prefix is visited, so that rare prefixes
    do not slow descent; the learning rate falls to 0. Rewards are 0: where the reward pulls, the
    teacher is no place of rest.

    Args:
        loss: The loss.
        world: A small world.
        structure: How rows combine; the unit is "row" or "group".
        factor: One of `opd.objectives.audit.gradients.FACTORS`.

    Returns:
        Where the students end.
    """
    tables = _starts(world, STARTS)
    begin = time.perf_counter()
    mean_gradients(loss, world, structure, factor, tables)
    seconds = time.perf_counter() - begin
    if seconds * ITERATIONS > SECONDS:
        tables = _starts(world, FEW_STARTS)
        seconds *= FEW_STARTS / STARTS
    iterations = max(50, min(ITERATIONS, int(SECONDS / seconds)))
    start_gradient, _ = mean_gradients(loss, world, structure, factor, world.student[None])
    teacher_gradient, square = mean_gradients(loss, world, structure, factor, world.teacher[None])
    scale = max(float(start_gradient.norm()), 1e-300)
    before = _teacher_kl(world, tables[1])
    tables, moves = _descend(loss, world, structure, factor, tables, iterations)
    student, teacher = tables.log_softmax(-1), world.teacher.log_softmax(-1)
    kl = reverse_kl(student, teacher.expand_as(student)).mean(1)
    ids = teacher.topk(world.k, -1).indices
    teacher_mass = teacher.gather(-1, ids).exp().sum(-1)
    student_mass = student.gather(-1, ids.expand(len(tables), -1, -1)).exp().sum(-1)
    return Rest(
        mean_at_teacher=float(teacher_gradient.norm()) / scale,
        noise_at_teacher=float(square.clamp(min=0).sqrt()[0]) / scale,
        starts=len(tables),
        largest_kl=float(kl.max()),
        smallest_kl=float(kl.min()),
        teacher_mass=float(teacher_mass.mean()),
        student_mass=float(student_mass.mean()),
        log_mass_ratio=float((student_mass.log() - teacher_mass.log()).mean()),
        moves=moves,
        near_kl=float(kl[1]),
        near_start_kl=before,
    )


def _starts(world: World, count: int) -> Tensor:
    """Return (D, N, V) students, from the teacher to one far from it."""
    generator = torch.Generator().manual_seed(17)
    noise = torch.randn(count, *world.student.shape, generator=generator, dtype=torch.float64)
    spread = torch.linspace(0, 3, count, dtype=torch.float64)[:, None, None]
    return world.teacher + spread * noise


def _teacher_kl(world: World, table: Tensor) -> float:
    """Return KL(student || teacher) of a table of logits, mean over prefixes."""
    return float(reverse_kl(table.log_softmax(-1), world.teacher.log_softmax(-1)).mean())


def _descend(
    loss: UserLoss,
    world: World,
    structure: Structure,
    factor: str,
    tables: Tensor,
    iterations: int,
) -> tuple[Tensor, float]:
    """Return the (D, N, V) students at the end, and how far they moved in the last tenth."""
    mean = torch.zeros_like(tables)
    square = torch.zeros_like(tables)
    late = tables
    for i in range(iterations):
        if i == iterations * 9 // 10:
            late = tables.log_softmax(-1)
        gradient, _ = mean_gradients(loss, world, structure, factor, tables)
        visits = world.visits(world.probabilities(tables))
        gradient = (gradient / visits.clamp(min=1e-6)[..., None]).nan_to_num(0.0, 0.0, 0.0)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient.square()
        corrected = mean / (1 - 0.9 ** (i + 1))
        size = (square / (1 - 0.99 ** (i + 1))).sqrt() + 1e-8
        tables = tables - 0.2 * (1 - i / iterations) * corrected / size
    return tables, float((tables.log_softmax(-1) - late).abs().max())


def mean_gradients(
    loss: UserLoss, world: World, structure: Structure, factor: str, tables: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean gradients of several students in one call of the loss.

    Args:
        loss: The loss.
        world: The world.
        structure: How rows combine; the unit is "row" or "group".
        factor: One of `opd.objectives.audit.gradients.FACTORS`.
        tables: (D, N, V) logits of the students.

    Returns:
        (D, N, V) mean gradients, and (D,) mean squared norms of a unit's rows.
    """
    num_starts, nodes = len(tables), len(world.student)
    rows, unplaced, indices = _batch_of_starts(world, structure.unit, num_starts)
    width = rows.shape[1]
    batch = _with_students(unplaced, indices, tables)
    gradient = additive_gradient(loss, batch, structure)
    gradient = torch.where(batch.mask[..., None], gradient, 0.0)
    probability = world.probabilities(tables)  # (D, R)
    share = probability[:, rows].prod(-1)
    if width == 2:
        share = share * world.num_prompts * torch.where(rows[:, 0] == rows[:, 1], 1.0, 2.0)
    parts = Units(
        logits=gradient.unflatten(0, (-1, width)),
        nodes=indices.unflatten(0, (-1, width)),
        mask=batch.mask.unflatten(0, (-1, width)),
        probability=share.flatten(),
    )
    scaled = parts.logits * FACTORS[factor](parts)[..., None, None]
    weighted = scaled * parts.probability[:, None, None, None]
    means = tables.new_zeros(num_starts * nodes, tables.shape[-1])
    means.index_add_(0, indices.flatten(), weighted.flatten(0, 2))
    square = (parts.probability * scaled.square().sum((1, 2, 3))).view(num_starts, -1).sum(1)
    return means.view_as(tables), square


@lru_cache(maxsize=2)
def _batch_of_starts(world: World, unit: str, num_starts: int) -> tuple[Tensor, Batch, Tensor]:
    """Return what a step of descent does not change; it is kept for all steps.

    Args:
        world: The world.
        unit: "row" or "group".
        num_starts: D.

    Returns:
        (U, W) responses of each unit, W being 1 or 2; the batch of all units of all starts, with
        the world's student and without rewards; and (B, T) the row of each position in the tables
        of all starts, flattened to (D N, V).
    """
    num_responses = len(world.tokens)
    if unit == "row":
        rows = torch.arange(num_responses)[:, None]
    else:
        pairs = torch.triu_indices(num_responses, num_responses).T
        rows = pairs[world.prompt[pairs[:, 0]] == world.prompt[pairs[:, 1]]]
    units, width = rows.shape
    flat = rows.flatten().repeat(num_starts)
    prompt = torch.arange(units * num_starts).repeat_interleave(width)
    batch = make_batch(world, flat, prompt=prompt, reward=torch.zeros(len(flat)).double())
    start = torch.arange(num_starts).repeat_interleave(units * width)[:, None]
    return rows, batch, batch.nodes + start * len(world.student)


def _with_students(batch: Batch, indices: Tensor, tables: Tensor) -> Batch:
    """Return a batch with other students, who are also the samplers.

    Args:
        batch: The batch.
        indices: (B, T) row of each position in the flattened tables.
        tables: (D, N, V) logits.

    Returns:
        The batch; what is outside its mask stays.
    """
    logits = tables.flatten(0, 1)
    student_logits = torch.where(batch.mask[..., None], logits[indices], batch.student_logits)
    logp = logits.log_softmax(-1)[indices, batch.arguments["tokens"]]
    sampler_logp = torch.where(batch.mask, logp, batch.arguments["sampler_logp"])
    arguments = batch.arguments | {"sampler_logp": sampler_logp}
    return replace(batch, student_logits=student_logits, arguments=arguments)
