"""The gradient probe in a run: signal, noise and bias of gradients as the weights are.

Shapes: B responses, N supervised tokens, F members, D and D' hidden sizes of student and teacher.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField
from diagnostics.errors import InvalidInput
from diagnostics.gradients.bias import REFERENCES, cost_of_response
from diagnostics.gradients.distributed import across_ranks, among, loss_across_ranks
from diagnostics.gradients.estimators import GAMMAS, available, weights
from diagnostics.gradients.layers import Block, block, sequence_gradients
from diagnostics.gradients.probe import (
    GradientSketches,
    LossGradients,
    gradient_row,
    measured,
    on_policy,
)
from diagnostics.gradients.sketch import Projection, outer_sketches, random_signs
from diagnostics.records.rows import Row
from opd.data.prompts import Prompts
from opd.models.forward import log_probabilities, micro_batches, response_hidden, spread
from opd.models.lm_head import LmHead, chunks, cooled, full_logits, logit_slopes, products, shaped
from opd.models.model import CausalLM
from opd.objectives.factory import Objective
from opd.runtime import distributed
from opd.scoring.loss import product_gradients
from opd.teachers.pair import ModelPair


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedLoss:
    """The loss that trains, response by response: all that the update puts into it.

    prompts and batch: with the mask of the loss and the objective's support; credit, weight (B, T):
    what `opd.scoring.loss.loss_from_hidden` is given, the weight being ratio over denominator;
    teacher_hidden (N, D'): at the N supervised tokens, for objectives on the whole vocabulary.
    """

    objective: Objective
    prompts: Prompts
    batch: ScoredRollouts
    credit: Tensor
    weight: Tensor
    teacher_hidden: Tensor | None = None


@torch.no_grad()
def probe(
    pair: ModelPair,
    prompts: Prompts,
    scored: ScoredRollouts,
    trained: TrainedLoss,
    *,
    gamma: float,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
    blocks: Sequence[str] = (),
) -> Row:
    """`diagnostics.gradients.probe.gradient_row` of a batch; empty where it has too few prompts for one.

    Signal, variance, their ratio and the noise scale are those of the loss that trains, with its
    objective, credit, mask, ratio and denominator; every member of the family has its own name. The
    family's batch is one that the student sampled with top_p 1 at the temperature of the scores.
    gamma is that of the objective, if the probe's grid has it, else the nearest one. The head's
    numbers begin with "gradient/", those of a block (`diagnostics.gradients.layers`) with
    "gradient/blocks/PATTERN/". Of several processes every one gets the row of all sequences.

    Raises:
      ValueError: blocks, and several processes; or a student whose head is not one matrix.
    """
    several, head = distributed.size() > 1, pair.student.head
    if blocks and several:
        raise InvalidInput(
            f"probe_blocks is {blocks}, which one process alone can measure; the head's gradient "
            "is measured over all of them: leave probe_blocks out, or start one process"
        )
    if head.weight is None:
        raise InvalidInput(
            "the gradient probe measures the gradient of the head's matrix, and this student's "
            "logits are not its hidden states times one matrix; set probe_every to 0"
        )
    ours, theirs = (
        states(model, prompts, scored, max_tokens_per_microbatch)
        for model in (pair.student, pair.teacher)
    )
    tau, vocabulary = scored.score_temperature, pair.student.vocabulary
    signs = random_signs(vocabulary, ours.shape[1], seed=0).to(ours.device)

    def logp(c: slice) -> tuple[Tensor, Tensor]:
        return (
            log_probabilities(pair.student, ours[c], tau),
            log_probabilities(pair.teacher, theirs[c], tau),
        )

    def slopes_of_logits(c: slice) -> Tensor:
        return logit_slopes(full_logits(ours[c], head), head)

    shaping = slopes_of_logits if head.softcap is not None or head.scale != 1 else None
    size = chunks(len(ours), vocabulary, max_logits_per_chunk)[0].stop
    everybody = among(scored) if several else None
    found = measured(scored, ours, logp, signs, chunk_tokens=size, among=everybody, slopes=shaping)
    found = across_ranks(found) if several else found
    loss, slopes = loss_gradients(
        pair, trained, signs, max_tokens_per_microbatch, max_logits_per_chunk, bool(blocks)
    )
    loss = loss_across_ranks(loss) if several else loss
    nearest = ("plain", min(GAMMAS, key=lambda g: abs(g - gamma)))
    below: dict[str, tuple[GradientSketches, LossGradients]] = {}
    if slopes is not None:
        chosen = [block(pair.student.network, pattern) for pattern in blocks]
        of_family = hidden_slopes(pair, scored, ours, theirs, size)
        family = below_head(
            pair.student, prompts, scored, of_family, chosen, nearest[1], max_tokens_per_microbatch
        )
        losses = loss_below_head(pair.student, trained, slopes, chosen, max_tokens_per_microbatch)
        below = {name: (family[name], losses[name]) for name in family}
    try:
        row = gradient_row(found, nearest, loss=loss)
        for pattern, (members, own) in below.items():
            row |= gradient_row(members, nearest, prefix=f"gradient/blocks/{pattern}", loss=own)
    except MissingField:
        return {}
    return dict(row)


def loss_gradients(
    pair: ModelPair,
    trained: TrainedLoss,
    signs: Projection,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
    with_slopes: bool,
) -> tuple[LossGradients, Tensor | None]:
    """The head's gradients by response; with_slopes, (N, D) the loss's by the hidden states."""
    batch, head, mask = trained.batch, pair.student.head, trained.batch.mask
    hidden = states(pair.student, trained.prompts, batch, max_tokens_per_microbatch)
    by_hidden: list[Tensor] = []

    def slopes() -> Iterator[tuple[slice, Tensor]]:
        for c, slope in product_gradients(
            pair,
            trained.objective,
            hidden,
            trained.teacher_hidden,
            batch,
            trained.credit,
            trained.weight[mask],
            max_logits_per_chunk=max_logits_per_chunk,
        ):
            if with_slopes:
                by_hidden.append(pulled_back(slope, head, hidden.shape[1]))
            yield c, slope

    sketches = outer_sketches(slopes(), hidden, mask, signs)
    gradients = LossGradients(sketches=sketches, prompt=batch.prompt)
    return gradients, torch.cat(by_hidden) if with_slopes else None


def loss_below_head(
    student: CausalLM,
    trained: TrainedLoss,
    slopes: Tensor,
    blocks: Sequence[Block],
    max_tokens_per_microbatch: int,
) -> dict[str, LossGradients]:
    """The same of blocks below the head; one forward and one backward pass.

    slopes: (N, D) gradients of the loss by the hidden states of the supervised tokens.
    """
    prompts, batch = trained.prompts, trained.batch
    spread_slopes = spread(slopes, batch.mask)
    parts: dict[str, list[tuple[list[int], Tensor, Tensor]]] = {b.name: [] for b in blocks}
    for rows in micro_batches(prompts, batch, max_tokens_per_microbatch):
        part = batch.rows(rows).trimmed()
        slope = spread_slopes[rows][:, : part.mask.shape[1]][part.mask]

        def forward(rows: list[int] = rows, part: ScoredRollouts = part) -> Tensor:
            return response_hidden(student, prompts.rows(rows), part)

        for name, (x, square) in sequence_gradients(blocks, forward, [slope]).items():
            parts[name].append((rows, x[:, 0], square[:, 0]))
    gradients = {}
    for name, pieces in parts.items():
        order = torch.tensor([i for rows, _, _ in pieces for i in rows]).argsort()
        order = order.to(slopes.device)
        gradients[name] = LossGradients(
            sketches=torch.cat([x for _, x, _ in pieces])[order],
            squares=torch.cat([square for _, _, square in pieces])[order],
            prompt=batch.prompt,
        )
    return gradients


def hidden_slopes(
    pair: ModelPair, scored: ScoredRollouts, ours: Tensor, theirs: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """(N, D) gradients of each token's log p(y) and of its KL(p || q), by the student's state."""
    tokens, tau, head = scored.tokens[scored.mask], scored.score_temperature, pair.student.head
    parts = []
    for start in range(0, len(ours), chunk_tokens):
        c = slice(start, start + chunk_tokens)
        theirs_logp = log_probabilities(pair.teacher, theirs[c], tau)
        with torch.enable_grad():
            z = products(ours[c], head)[..., : head.vocabulary].requires_grad_()
            logp = cooled(shaped(z, head), tau).log_softmax(-1)
            away = torch.where(logp > -torch.inf, logp - theirs_logp, 0.0)
            picked = logp.gather(1, tokens[c, None]).sum()
            slopes = torch.autograd.grad(picked, z, retain_graph=True)
            slopes += torch.autograd.grad((logp.exp() * away).sum(), z)
        parts.append([pulled_back(slope, head, ours.shape[1]) for slope in slopes])
    scores, locals_ = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(locals_)


def pulled_back(slope: Tensor, head: LmHead, width: int) -> Tensor:
    """(n, V) gradients by the head's products -> (n, D) by its hidden states."""
    if head.weight is None:
        return torch.nn.functional.pad(slope, (0, width - slope.shape[1]))
    return slope.to(head.weight.dtype) @ head.weight[: head.vocabulary]


def below_head(
    student: CausalLM,
    prompts: Prompts,
    scored: ScoredRollouts,
    slopes: tuple[Tensor, Tensor],
    blocks: Sequence[Block],
    gamma: float,
    max_tokens_per_microbatch: int,
) -> dict[str, GradientSketches]:
    """The plain member, and the one of least noise, at the discounts 0, gamma and 1, by block.

    What the head does is done once for all of them (`hidden_slopes`). Cost beyond that: one forward
    pass of the student, and 4 backward passes without gradients of weights (6 if gamma is neither 0
    nor 1).
    """
    on_policy(scored)
    known = available(scored, teacher_known=True)
    names = ("plain", next(name for name in REFERENCES if name in known))
    at = weights(scored, tuple(dict.fromkeys(names)), sorted({0.0, gamma, 1.0}))
    score, local = (spread(x, scored.mask) for x in slopes)
    count = at.values.shape[-1]
    kept: dict[str, list[tuple[list[int], Tensor, Tensor]]] = {b.name: [] for b in blocks}
    for rows in micro_batches(prompts, scored, max_tokens_per_microbatch):
        part = scored.rows(rows).trimmed()
        cut = slice(part.mask.shape[1])
        w = at.values[rows][:, cut][part.mask].to(score.dtype)
        s, k = (x[rows][:, cut][part.mask] for x in (score, local))

        def forward(rows: list[int] = rows, part: ScoredRollouts = part) -> Tensor:
            return response_hidden(student, prompts.rows(rows), part)

        members = (w[:, f, None] * s + at.local[f] * k for f in range(count))
        for name, (x, square) in sequence_gradients(blocks, forward, members).items():
            kept[name].append((rows, x, square))
    found = {}
    for name, parts in kept.items():
        order = torch.tensor([i for rows, _, _ in parts for i in rows]).argsort()
        found[name] = GradientSketches(
            sketches=torch.cat([x for _, x, _ in parts])[order.to(score.device)],
            squares=torch.cat([x for _, _, x in parts])[order.to(score.device)],
            prompt=scored.prompt,
            cost=cost_of_response(scored),
            names=at.names,
            gammas=at.gammas,
        )
    return found


def states(
    model: CausalLM, prompts: Prompts, scored: ScoredRollouts, max_tokens_per_microbatch: int
) -> Tensor:
    """(N, D) hidden states of all supervised tokens, row-major over the mask."""
    slot = (scored.mask.flatten().cumsum(0) - 1).reshape(scored.mask.shape)
    found: Tensor | None = None
    for rows in micro_batches(prompts, scored, max_tokens_per_microbatch):
        part = scored.rows(rows).trimmed()
        some = response_hidden(model, prompts.rows(rows), part)
        if found is None:
            found = some.new_zeros((int(scored.mask.sum()), some.shape[1]))
        found[slot[rows][:, : part.mask.shape[1]][part.mask]] = some
    if found is None:
        raise InvalidInput("the batch has no supervised token to probe")
    return found
