"""Checks of single faults: each returns the evidence that decides it, or None.

Shapes: N prefixes, B rows of a batch, T positions, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.audit.gradients import (
    TINY,
    Layout,
    equal_gradients,
    loss_gradients,
    same_layout,
)
from opd.objectives.audit.matching import MATCH, Fit, Mean, find_target
from opd.objectives.audit.structure import Structure, find_structure
from opd.objectives.audit.targets import Target
from opd.objectives.audit.units import FACTORS, enumerate_units, mean_gradient, total_variance
from opd.objectives.audit.worlds import Batch, World, make_batch
from opd.objectives.user_loss import UserLoss

EMPTY_ROWS = "two empty rows"
"""Start of the evidence where empty rows alone change the gradient."""
RANDOM_TOLERANCE = 0.05
"""Relative difference up to which averages of a loss that draws random numbers are equal."""


def world_mean(
    loss: UserLoss,
    world: World,
    structure: Structure,
    factor: str,
    *,
    layout: Layout = same_layout,
    left: int = 0,
) -> Mean:
    """Return the mean gradient of a loss in a world.

    Args:
        loss: The loss.
        world: The world.
        structure: How rows combine; the unit is "row" or "group".
        factor: One of `opd.objectives.audit.gradients.FACTORS`.
        layout: Change of the batch before the call.
        left: Masked columns before the first token.

    Returns:
        The mean and the size of single contributions.
    """
    units = enumerate_units(loss, world, structure, left=left, layout=layout)
    nodes = len(world.student)
    gradient = mean_gradient(units, nodes, factor)
    square = total_variance(units, nodes, factor) + float(gradient.square().sum())
    tolerance = MATCH if structure.draws == 1 else RANDOM_TOLERANCE
    return Mean(world, gradient, max(square, 0.0) ** 0.5, tolerance)


def factors_of(structure: Structure) -> list[str]:
    """Return the factors that may undo a mean within a unit, the plainest first."""
    return [x for x in FACTORS if structure.unit == "group" or x != "unit_tokens"]


def sample_batch(
    world: World,
    *,
    right: int = 1,
    left: int = 0,
    empty_rows: int = 0,
    seed: int = 0,
    teacher: Tensor | None = None,
    reward: Tensor | None = None,
) -> Batch:
    """Return a batch of two groups of three responses of different lengths."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for prompt in range(world.num_prompts):
        members = (world.prompt == prompt).nonzero()[:, 0]
        short = members[world.lengths[members].argmin()]
        chosen = members[torch.randperm(len(members), generator=generator)[:2]]
        rows.append(torch.cat([short[None], chosen]))
    return make_batch(
        world,
        torch.cat(rows),
        right=right,
        left=left,
        empty_rows=empty_rows,
        seed=seed,
        teacher=teacher,
        reward=reward,
    )


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest entry."""
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-300)
    return float((a - b).abs().max()) / scale


def mask_leak(
    loss: UserLoss, world: World, draws: int, *, layout: Layout = same_layout, left: int = 0
) -> str | None:
    """Look for gradients that reach, or depend on, what lies behind the end.

    Args:
        loss: The loss.
        world: A world with random lengths.
        draws: Calls to average.
        layout: Change of every batch before the call.
        left: Masked columns before the first token.

    Returns:
        Evidence, or None.
    """
    first, second = (sample_batch(world, seed=x, left=left) for x in (1, 2))
    g, h = (loss_gradients(loss, layout(x), draws=draws).student for x in (first, second))
    mask, scale = first.mask, float(g[first.mask].abs().max())
    leaked = float(g[~mask].abs().max())
    if leaked > TINY * scale or leaked != leaked:
        return (
            f"student logits outside the mask receive a gradient of {leaked:.3g} "
            f"({leaked / max(scale, 1e-300):.3g} of the largest inside)"
        )
    if not equal_gradients(g[mask], h[mask], draws):
        return (
            "other garbage behind the end changes the gradient of supervised tokens by "
            f"{_difference(g[mask], h[mask]):.3g} of its largest entry"
        )
    return None


def padding_dependent(loss: UserLoss, world: World, draws: int) -> str | None:
    """Compare a batch with the same batch in wider padding, and with empty rows.

    Args:
        loss: The loss, which does not read what lies behind the end.
        world: A world with random lengths.
        draws: Calls to average.

    Returns:
        Evidence, or None.
    """
    base = sample_batch(world, right=0)
    try:
        gradient = loss_gradients(loss, base, draws=draws).student[base.mask]
    except InvalidInput as error:
        return f"a batch without masked columns: {error}"
    for what, other in (
        ("one masked column", sample_batch(world)),
        ("four masked columns", sample_batch(world, right=4)),
        (EMPTY_ROWS, sample_batch(world, right=0, empty_rows=2)),
    ):
        try:
            changed = loss_gradients(loss, other, draws=draws).student[other.mask]
        except InvalidInput as error:
            return f"{what}: {error}"
        if not bool(changed.isfinite().all()):
            continue  # the fault `non_finite`
        if not equal_gradients(gradient, changed, draws):
            ratio = float((changed * gradient).sum() / gradient.square().sum())
            return (
                f"{what} change the gradient by {_difference(gradient, changed):.3g} of its "
                f"largest entry (times {ratio:.4g})"
            )
    return None


def teacher_gradient(loss: UserLoss, world: World, draws: int) -> str | None:
    """Look for a gradient of teacher logits that require one."""
    batch = sample_batch(world)
    try:
        gradients = loss_gradients(loss, batch, teacher_requires_grad=True, draws=draws)
    except InvalidInput:
        return None
    assert gradients.teacher is not None
    largest = float(gradients.teacher.abs().max())
    student = gradients.student[gradients.student.isfinite()]
    if largest == 0 or largest <= TINY * float(student.abs().max()):
        return None
    return f"teacher logits that require grad receive up to {largest:.3g}; detach the teacher"


def non_causal(loss: UserLoss, world: World, draws: int) -> str | None:
    """Change what the teacher says at earlier positions of a row, and compare later gradients.

    Args:
        loss: The loss.
        world: A world.
        draws: Calls to average.

    Returns:
        Evidence, or None.
    """
    base = sample_batch(world)
    gradient = loss_gradients(loss, base, draws=draws).student
    generator = torch.Generator().manual_seed(3)
    for row in range(len(gradient)):
        length = int(base.mask[row].sum())
        for t in range(length - 1):
            teacher = base.arguments["teacher_logits"].clone()
            teacher[row, t] += torch.randn(teacher.shape[-1], generator=generator).double()
            changed = replace(base, arguments=base.arguments | {"teacher_logits": teacher})
            other = loss_gradients(loss, changed, draws=draws).student
            later = base.mask[row].clone()
            later[: t + 1] = False
            before, after = gradient[row, later], other[row, later]
            if not equal_gradients(before, after, draws, scale=gradient[base.mask]):
                return (
                    f"another teacher at token {t} changes the student's gradient at later tokens "
                    f"by {_difference(before, after):.3g} of its largest entry"
                )
    return None


# --- values that are not finite -----------------------------------------------------------------


def non_finite(loss: UserLoss, world: World, target: Target | None) -> Iterator[str]:
    """Yield the situations in which a gradient is NaN or infinite though the target is finite.

    Args:
        loss: The loss.
        world: A world with random lengths.
        target: The loss's target, or None.

    Yields:
        Evidence.
    """
    situations = {
        "empty rows": sample_batch(world, empty_rows=2),
        "teacher = student": sample_batch(world, teacher=world.student),
        "teacher and student 30 nats apart": sample_batch(world, teacher=_distant(world, 30.0)),
        "student 30 nats below the teacher": _distant_student(world, 30.0),
        "rows of one token": _one_token_rows(world),
    }
    if "reward" in loss.asks:
        situations["equal rewards"] = sample_batch(world, reward=torch.ones(6).double())
    if target is not None and _finite_without_teacher(target, world.student.shape[1]):
        situations["a teacher probability of 0"] = _zero_probability(world)
    for name, batch in situations.items():
        try:
            gradient = loss_gradients(loss, batch).student
        except InvalidInput:
            continue
        if not bool(gradient.isfinite().all()):
            value = "NaN" if bool(gradient.isnan().any()) else "infinite"
            yield f"{name}: the gradient is {value}"


def _distant(world: World, nats: float) -> Tensor:
    """Return teacher logits that prefer another token than the student by so many nats."""
    unlikely = world.student.argmin(-1, keepdim=True)
    return world.student.scatter_add(-1, unlikely, torch.full_like(world.student[:, :1], nats))


def _distant_student(world: World, nats: float) -> Batch:
    """Return a batch whose student gives sampled tokens so many nats less than the teacher does."""
    batch = sample_batch(world)
    tokens = batch.arguments["tokens"][..., None]
    lower = torch.where(batch.mask[..., None], -nats, 0.0).to(batch.student_logits)
    logits = batch.student_logits.scatter_add(-1, tokens, lower)
    sampler_logp = logits.log_softmax(-1).gather(-1, tokens)[..., 0]
    arguments = batch.arguments | {"sampler_logp": sampler_logp}
    return replace(batch, student_logits=logits, arguments=arguments)


def _one_token_rows(world: World) -> Batch:
    """Return a batch in which every response has one token."""
    short = (world.lengths == 1).nonzero()[:, 0]
    rows = short.repeat_interleave(3) if len(short) else torch.arange(6)
    return make_batch(world, rows)


def _zero_probability(world: World) -> Batch:
    """Return a batch whose teacher excludes, at each prefix, a token that was not sampled."""
    batch = sample_batch(world)
    logits = batch.arguments["teacher_logits"].clone()
    candidates = logits.scatter(-1, batch.arguments["tokens"][..., None], torch.inf)
    logits.scatter_(-1, candidates.argmin(-1, keepdim=True), -torch.inf)
    return replace(batch, arguments=batch.arguments | {"teacher_logits": logits})


def _finite_without_teacher(target: Target, vocabulary: int) -> bool:
    """Return whether a target stays finite where the teacher excludes a token."""
    if "bucket" in target.name and target.composition is not None:
        k = int(target.composition.rpartition("=")[2])
        return "teacher" in target.name and k < vocabulary - 1  # one token alone would be the rest
    infinite = ("reverse_kl(", "sequence", "token_reverse", "discounted", "student")
    kinds = target.name.replace("topk_reverse_kl(renormalised, teacher)", "topk")
    return not any(x in kinds for x in infinite)


# --- shifts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift:
    """Arguments moved along the positions before a loss sees them."""

    what: str
    """What is moved, in words."""
    names: tuple[str, ...]
    """Arguments that are moved."""
    by: int
    """Columns to the right."""

    def describe(self, target: str) -> str:
        """Return what it means that a loss estimates a target once they are moved."""
        direction = "later" if self.by > 0 else "earlier"
        return (
            f"as called it estimates no target; with {self.what} one position {direction} it "
            f"estimates {target} exactly"
        )

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the arguments moved."""
        return replace(batch, rolls=dict.fromkeys(self.names, self.by))


TOKEN_VALUES = ("sampler_logp", "student_logp", "teacher_logp")
"""Arguments that belong to tokens."""
SHIFTS = [
    Shift(what, names, by)
    for what, names in (
        ("the teacher", ("teacher_logits", "teacher_logp", "teacher_topk")),
        ("the mask", ("mask",)),
        ("tokens and mask", ("tokens", "mask", *TOKEN_VALUES)),
    )
    for by in (1, -1)
]
"""Shifts by one position that a misaligned loss may need."""


def misaligned(
    loss: UserLoss, worlds: Sequence[World], draws: int
) -> tuple[Shift, Fit, int] | None:
    """Look for a shift by one under which the loss has a target that it lacks as called.

    Args:
        loss: The loss.
        worlds: Worlds of random and of equal lengths, the first of random lengths.
        draws: Calls to average.

    Returns:
        The shift, the target, and the masked columns before the first token with which it was
        found; or None.
    """
    # a column on the left is needed where the first token would drop out, and none where a loss
    # takes it that responses begin at the first column
    for left, shift in itertools.product((1, 0), SHIFTS):
        try:
            structure = find_structure(loss, worlds[0], draws, layout=shift, left=left)
            if structure.unit == "batch":
                continue
            for factor in factors_of(structure):
                means = [
                    world_mean(loss, world, structure, factor, layout=shift, left=left)
                    for world in worlds
                ]
                if any(mean.is_zero for mean in means):
                    continue
                match, _ = find_target(means)
                if match is not None:
                    return shift, match, left
        except InvalidInput:
            continue
    return None


def ignores_reward_scale(loss: UserLoss, world: World) -> bool:
    """Return whether three times the rewards give the same gradient, as after standardisation."""
    if "reward" not in loss.asks:
        return False
    base = sample_batch(world)
    scaled = sample_batch(world, reward=3 * base.arguments["reward"])
    gradients = [loss_gradients(loss, x).student[base.mask] for x in (base, scaled)]
    return _difference(*gradients) < 1e-3
