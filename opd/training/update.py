"""The optimizer steps on what was rolled out: shares, credit and weights, backward passes.

Shapes: B responses of this process, T response positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.gradients.distributed import among
from opd.data.prompts import Prompts
from opd.models.contexts import awake, recomputing
from opd.models.forward import micro_batches, response_hidden
from opd.models.fsdp import whole
from opd.objectives.factory import DENOMINATORS
from opd.objectives.token_selection import most_uncertain
from opd.runtime import distributed
from opd.scoring.loss import loss_from_hidden
from opd.teachers.factory import follow
from opd.training.checks.expected_loss import credit_of, expected_loss, loss_numbers, ratio_of
from opd.training.checks.update import after_step, before_step, kept_gradients, leftover, lost_share
from opd.training.gradient_probe import TrainedLoss
from opd.training.optimizer import learning_rate
from opd.training.state import ScoredTaskBatch, TaskRun


def update(parts: Sequence[ScoredTaskBatch], step: int) -> dict[str, Tensor | float]:
    """`updates` optimizer steps, each on its share of every part; returns numbers for the row.

    The loss is the mean of the parts' losses by weight, each over its own denominator, which counts
    the tokens of its own optimizer step. Credit, ratio and selection are made once, on all
    rollouts. loss and grad_norm are means over the updates; skipped counts those whose gradient was
    not finite.
    """
    run = parts[0].run
    config, optimizer = run.config, run.optimizer
    rate = learning_rate(config.lr, step, config.steps, config.warmup, config.schedule)
    weights = [part.run.weight / sum(part.run.weight for part in parts) for part in parts]
    ready = [shared_out(part) for part in parts]
    losses, norms, skipped = [], [], 0
    checks: dict[str, Tensor | float] = {}
    for u in range(config.updates_per_batch):
        optimizer.zero_grad()
        left = leftover(optimizer)
        loss, gradients = torch.zeros((), device=run.pair.student.device), None
        for part, weight, work in zip(parts, weights, ready, strict=True):
            some, first = backward(part, work[u], weight)
            loss, gradients = loss + some, gradients or first
        lost = lost_share(gradients or [])
        optimizer.gather()
        before = before_step(optimizer) if u == 0 else None
        norm, taken = optimizer.step(rate, config.max_grad_norm)
        if before is not None:
            checks |= after_step(optimizer, before, taken)
            checks |= {"update/leftover_gradient": left, "update/lost_gradient": lost}
            checks |= loss_columns(parts, weights, ready, distributed.summed(loss.clone()))
        if taken and config.teacher == "ema":
            with whole(run.pair.student):
                follow(run.pair.teacher, run.pair.student, config.ema_decay)
        losses.append(distributed.summed(loss))
        norms.append(norm)
        skipped += not taken
    means = {"loss": torch.stack(losses).mean(), "grad_norm": torch.stack(norms).mean()}
    return {**means, **checks, "lr": rate, "skipped": float(skipped)}


@dataclass(frozen=True, eq=False)
class UpdateSlice:
    """What an update does with a part: rows, and for all rows of the part what the loss needs.

    kept: the tokens that the loss is taken over; credit, ratio (B, T): of every token; denominator
    (B,): of every response, right on `rows` alone. counted: the rows of the update of all
    processes; places: of `rows` among them; expected_credit, expected_ratio (B, T): by the
    settings, not by the run's objective.
    """

    rows: list[int]
    kept: ScoredRollouts
    credit: Tensor
    ratio: Tensor
    denominator: Tensor
    counted: ScoredRollouts
    places: list[int]
    expected_credit: Tensor
    expected_ratio: Tensor

    @property
    def weight(self) -> Tensor:
        """(B, T) of a token's loss."""
        return self.ratio / self.denominator[:, None]


def loss_columns(
    parts: Sequence[ScoredTaskBatch],
    weights: Sequence[float],
    ready: Sequence[list[UpdateSlice]],
    loss: Tensor,
) -> dict[str, Tensor]:
    """The first update's loss against what the scored batches say it is (opd.training.checks.expected_loss).

    weights: of the parts; loss: of all processes.
    """
    vectors = []
    for part, weight, work in zip(parts, weights, ready, strict=True):
        first = work[0]
        groups = [rows for rows, counts in in_step(part.run, part.prompts, first) if counts]
        vector = expected_loss(
            part.run.config,
            first.kept,
            first.expected_credit,
            first.expected_ratio,
            rows=first.rows,
            micro_batches=groups,
            counted=first.counted,
            places=first.places,
        )
        if vector is None:
            return {}
        scale = torch.full_like(vector, weight)
        scale[-2] = weight**2  # a variance
        vectors.append(vector * scale)
    return loss_numbers(loss, distributed.summed(torch.stack(vectors).sum(0)))


def shared_out(part: ScoredTaskBatch) -> list[UpdateSlice]:
    """The work of each update, from what all processes' tokens say of credit and denominators."""
    config, objective = part.run.config, part.run.objective
    alone = distributed.size() == 1
    batch, mine = (part.scored, slice(None)) if alone else among(part.scored)
    here = (mine, slice(part.scored.mask.shape[1]))
    credit, ratio = objective.credit(batch)[here], objective.ratio(batch)[here]
    expected_credit, expected_ratio = credit_of(config, batch)[here], ratio_of(config, batch)[here]
    kept = part.scored
    if config.entropy_top_fraction < 1:
        chosen = most_uncertain(batch, config.entropy_top_fraction)
        kept, batch = kept.supervise(chosen[here]), batch.supervise(chosen)
    counted = replace(batch, support=None, prefix=None)
    found, place = [], torch.arange(len(batch))[mine].tolist()
    for number, rows in enumerate(shares(batch.prompt.tolist(), config.updates_per_batch), 1):
        if bool(batch.mask.any()) and not bool(batch.mask[rows].any()):
            raise InvalidInput(
                f"update {number} of {config.updates_per_batch} has no supervised token, of "
                f"{int(batch.mask.sum())} in the step; lower updates, raise entropy_top_fraction "
                f"({config.entropy_top_fraction:g}), or look at the mask rule"
            )
        below = batch.student_logp.new_ones(len(batch))
        some = counted.rows(rows)
        below[rows] = DENOMINATORS[config.denominator](some)
        position = {row: i for i, row in enumerate(rows)}
        own = [i for i, row in enumerate(place) if row in position]
        found.append(
            UpdateSlice(
                rows=own,
                kept=kept,
                credit=credit,
                ratio=ratio,
                denominator=below[mine],
                counted=some,
                places=[position[place[i]] for i in own],
                expected_credit=expected_credit,
                expected_ratio=expected_ratio,
            )
        )
    return found


def probed_loss(part: ScoredTaskBatch) -> TrainedLoss:
    """The loss of the step's updates, response by response, for the gradient probe.

    Each update's weights, before ratios, are scaled to a mean of 1 over its tokens, so that a
    response is the sum over its tokens where all count alike. The scale changes neither a
    signal-to-noise ratio nor a noise scale.
    """
    ready = shared_out(part)
    batch = ready[0].kept
    weight = torch.zeros_like(ready[0].ratio)
    for work in ready:
        tokens = batch.mask[work.rows].sum(1).to(weight.dtype)
        shares_of_loss = tokens / work.denominator[work.rows]
        total, loss_total = (distributed.summed(x.sum()) for x in (tokens, shares_of_loss))
        weight[work.rows] = work.weight[work.rows] * total / loss_total
    hidden = part.teacher_hidden
    if hidden is not None:
        hidden = hidden[batch.mask[part.scored.sampled]]
    return TrainedLoss(
        objective=part.run.objective,
        prompts=part.prompts,
        batch=batch,
        credit=ready[0].credit,
        weight=weight,
        teacher_hidden=hidden,
    )


def backward(
    part: ScoredTaskBatch, work: UpdateSlice, share: float
) -> tuple[Tensor, list[tuple[Tensor, Tensor]] | None]:
    """Add the gradient of `share` times the loss of these rows.

    Returns that loss, detached, and some gradients as they were after the first micro-batch.
    """
    run, config, slot = part.run, part.run.config, slots(part.scored.sampled)
    loss, first = torch.zeros((), device=part.scored.tokens.device), None
    asleep = config.offload_teacher and run.objective.support == "full"
    with awake(run.pair.teacher, run.pair.student.device, asleep):
        for some, counts in in_step(run, part.prompts, work):
            batch = work.kept.rows(some).trimmed()
            width = batch.mask.shape[1]
            hidden = part.teacher_hidden
            if hidden is not None:
                hidden = hidden[slot[some][:, :width][batch.mask]]
            with recomputing(run.pair.student.network, config.gradient_checkpointing):
                partial = loss_from_hidden(
                    run.pair,
                    run.objective,
                    response_hidden(run.pair.student, part.prompts.rows(some), batch),
                    hidden,
                    batch,
                    work.credit[some][:, :width],
                    share * counts * work.weight[some][:, :width][batch.mask],
                    max_logits_per_chunk=config.max_logits_per_chunk,
                )
                partial.backward()
            loss = loss + partial.detach()
            first = first or kept_gradients(run.optimizer)
    return loss, first


def in_step(run: TaskRun, prompts: Prompts, work: UpdateSlice) -> list[tuple[list[int], float]]:
    """Micro-batches of rows, and whether they count.

    Processes that share the weights go through them together, so that all have equally many; one
    that has fewer goes through its smallest again, for nothing.
    """
    groups = micro_batches(
        prompts.rows(work.rows), work.kept.rows(work.rows), run.config.max_tokens_per_microbatch
    )
    found = [([work.rows[i] for i in group], 1.0) for group in groups]
    if run.config.sharding == "none":
        return found
    lengths = work.kept.lengths.tolist()
    idle = [min(range(len(lengths)), key=lengths.__getitem__)]
    missing = distributed.largest(len(found)) - len(found)
    return found + [(idle, 0.0)] * missing


def shares(prompt: list[int], updates: int) -> list[list[int]]:
    """Rows of each update: equally many prompts, by their numbers, all rollouts of one together.

    Nearly equally many where games failed.

    Raises:
      ValueError: fewer prompts than updates.
    """
    order = sorted(set(prompt))
    if len(order) < updates:
        raise InvalidInput(f"{len(order)} games were played, too few for {updates} updates")
    place = {number: i * updates // len(order) for i, number in enumerate(order)}
    return [[r for r, number in enumerate(prompt) if place[number] == u] for u in range(updates)]


def slots(mask: Tensor) -> Tensor:
    """(B, T) row of each token of the mask in the flat order."""
    return (mask.flatten().cumsum(0) - 1).reshape(mask.shape)
