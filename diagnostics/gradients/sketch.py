"""Gradients of the head, sequence by sequence, kept as small random sketches (E-3).

The gradient of log p(y_t) with respect to the head's weight (V, D) is the outer product of
delta_t = one_hot(y_t) - p and the hidden state h_t; that of the local KL(p || q) is the outer
product of p (l - KL), l = log p - log q, and h_t. A sketch keeps (R1 delta)(R2 h)^T for independent
random signs R1 and R2: inner products of sketches have those of the gradients as their mean. The
outer product is not formed until tokens are summed, so that a token costs J (m1 + m2) numbers, and
every weighted sum over tokens can be had later without the models.

Its error: an outer product of two vectors has a squared length with relative variance
((1 + 2/m1)(1 + 2/m2) - 1)/J, about 2/J (1/m1 + 1/m2), *not* 1/(J m1 m2). So copies J help more than
long rows. Sums over many different tokens do better.

The head with tied embeddings also receives gradient from the input side; that part is not here.

Shapes: B responses, T positions, N flat supervised tokens (row-major over the mask), n of a chunk,
V vocabulary, D hidden size, J copies, m1 and m2 rows, F weights a token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput

LogProbs = Callable[[slice], tuple[Tensor, Tensor | None]]
"""A slice of the flat tokens -> (n, V) student's and teacher's log-probabilities there, at the
temperature of the loss; None for a teacher whose whole distributions are not at hand."""

Slopes = Callable[[slice], Tensor]
"""A slice of the flat tokens -> (n, V) derivatives of the logits there, before the temperature, by
the products of the hidden state with the head's rows: what a soft-cap or a scale does."""

_BLOCK = 16384


@dataclass(frozen=True, eq=False)
class Projection:
    """R1 as (V, J, m1) and R2 as (D, J, m2): signs as int8 (or whatever numbers), and a scale."""

    vocabulary: Tensor
    hidden: Tensor
    scale: float

    def to(self, device: str | torch.device) -> "Projection":
        return Projection(self.vocabulary.to(device), self.hidden.to(device), self.scale)


def random_signs(
    vocabulary: int, hidden: int, seed: int, rows: int = 16, copies: int = 8
) -> Projection:
    """Independent signs, the same on every machine for one seed; m = copies * rows^2 numbers.

    Memory: copies * rows * (V + D) bytes, 19 MB at the default for V = 150 000.
    """
    if rows < 1 or copies < 2:
        raise InvalidInput(f"rows is {rows} and copies {copies}; need rows >= 1 and copies >= 2")
    generator = torch.Generator().manual_seed(seed)

    def signs(size: int) -> Tensor:
        shape = (size, copies, rows)
        return 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1

    return Projection(signs(vocabulary), signs(hidden), (rows * copies**0.5) ** -1)


def no_projection(vocabulary: int, hidden: int) -> Projection:
    """Identities: the gradients themselves, V * D numbers a sequence. For small models."""
    one, two = (torch.eye(size, dtype=torch.int8)[:, None] for size in (vocabulary, hidden))
    return Projection(one, two, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSketches:
    """What is kept of each token's two logit gradients and hidden state, and exact lengths.

    score, local: (N, J, m1) of delta and p (l - KL); hidden: (N, J, m2). score_square, cross,
    local_square: (N,) exact <delta, delta>, <delta, local>, <local, local> times |h|^2. The three
    fields of the local KL are None if the teacher's distributions were not at hand.
    """

    score: Tensor
    hidden: Tensor
    score_square: Tensor
    local: Tensor | None = None
    cross: Tensor | None = None
    local_square: Tensor | None = None


@torch.no_grad()
def token_sketches(
    batch: ScoredRollouts,
    hidden: Tensor,
    logp: LogProbs,
    projection: Projection,
    chunk_tokens: int = 1024,
    slopes: Slopes | None = None,
) -> TokenSketches:
    """One pass over the batch's supervised tokens; (n, V) exists for a chunk of them at a time.

    Args:
      hidden: (N, D) the student's states that predict the supervised tokens, row-major.
      slopes: of a head with a soft-cap or a scale; all 1 if None.

    Raises:
      ValueError: hidden or the projection does not fit the batch.
    """
    tokens, count = batch.tokens[batch.mask], int(batch.mask.sum())
    if hidden.dim() != 2 or len(hidden) != count:
        raise InvalidInput(f"hidden is {tuple(hidden.shape)}, the mask has {count} tokens: (N, D)")
    columns: dict[str, list[Tensor]] = {}
    for start in range(0, count, chunk_tokens):
        c = slice(start, min(start + chunk_tokens, count))
        h = _wide(hidden[c]) / batch.score_temperature
        ours, theirs = logp(c)
        slope = None if slopes is None else slopes(c)
        found = _of_chunk(tokens[c], h, _wide(ours), theirs, projection, slope)
        for name, x in found.items():
            columns.setdefault(name, []).append(x)
    return TokenSketches(**{name: torch.cat(parts) for name, parts in columns.items()})


def _of_chunk(
    tokens: Tensor,
    h: Tensor,
    logp: Tensor,
    theirs: Tensor | None,
    projection: Projection,
    slope: Tensor | None,
) -> dict[str, Tensor]:
    if logp.shape[-1] != len(projection.vocabulary) or h.shape[-1] != len(projection.hidden):
        raise InvalidInput(
            f"logits of {logp.shape[-1]} ids and states of size {h.shape[-1]}; the projection is "
            f"for {len(projection.vocabulary)} and {len(projection.hidden)}"
        )
    p = logp.exp()
    score = -p
    score.scatter_add_(1, tokens[:, None], torch.ones_like(p[:, :1]))
    if slope is not None:
        score = score * slope.to(score.dtype)
    length = h.square().sum(-1)
    found = {
        "score": projected(score, projection.vocabulary),
        "hidden": projected(h, projection.hidden) * projection.scale,
        "score_square": score.square().sum(-1) * length,
    }
    if theirs is not None:
        away = torch.where(p > 0, logp - theirs.to(logp.dtype), torch.zeros_like(p))
        local = p * (away - (p * away).sum(-1, keepdim=True))
        if slope is not None:
            local = local * slope.to(local.dtype)
        found["local"] = projected(local, projection.vocabulary)
        found["cross"] = (local * score).sum(-1) * length
        found["local_square"] = local.square().sum(-1) * length
    return found


def projected(x: Tensor, matrix: Tensor) -> Tensor:
    """x (n, S), matrix (S, J, m) -> (n, J, m), widening int8 a block of S at a time."""
    flat, out = matrix.flatten(1), x.new_zeros(len(x), matrix[0].numel())
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK].to(x.device, x.dtype)
        out.addmm_(x[:, start : start + _BLOCK], block)
    return out.view(len(x), *matrix.shape[1:])


@torch.no_grad()
def matrix_sketch(gradient: Tensor, projection: Projection) -> Tensor:
    """(V, D) -> (J, m1 m2): the sketch of any one matrix's gradient, as autograd left it.

    For blocks other than the head: take the gradient of a sequence's loss, sketch it, and stack the
    sequences for `diagnostics.gradients.signal_noise.signal_and_noise`.
    """
    half = projected(gradient.T, projection.vocabulary)  # (D, J, m1)
    right = projection.hidden.to(half)
    return torch.einsum("dja,djb->jab", half, right).flatten(1) * projection.scale


@torch.no_grad()
def outer_sketches(
    slopes: Iterable[tuple[slice, Tensor]], hidden: Tensor, mask: Tensor, projection: Projection
) -> Tensor:
    """(B, J, m1 m2) sketches of sum_t slope_t h_t^T by sequence: the gradient of any loss.

    Args:
      slopes: chunks of the flat tokens in order, and the loss's gradients (n, V) by the products of
        the hidden states with the head's rows. hidden: (N, D); mask: (B, T) of the N tokens.
    """
    parts = [projected(_wide(slope), projection.vocabulary) for _, slope in slopes]
    left, lengths = torch.cat(parts), mask.sum(1).tolist()
    right = projected(_wide(hidden), projection.hidden).to(left.dtype) * projection.scale
    pairs = zip(left.split(lengths), right.split(lengths), strict=True)
    return torch.stack([torch.einsum("tja,tjb->jab", x, h).flatten(1) for x, h in pairs])


@torch.no_grad()
def sequence_sketches(
    tokens: TokenSketches, mask: Tensor, weights: Tensor, local: Tensor
) -> Tensor:
    """(B, F, J, m1 m2) sketches of sum_t [w_tf grad log p(y_t) + local_f grad KL_t] by sequence.

    The one formula behind every estimator: with w_t = sum_{u >= t} gamma^(u-t) r_u it is what the
    eligibility trace Z <- gamma Z + grad log p(y_t), G <- G + r_t Z accumulates.

    Args:
      mask: (B, T) of the batch; weights: (B, T, F); local: (F,) bool.
    """
    if bool(local.any()) and tokens.local is None:
        raise InvalidInput("the local KL's gradient needs the teacher's whole distributions")
    lengths = mask.sum(1).tolist()
    flat = weights[mask].to(tokens.score)
    rows = []
    for score, h, w, mine in zip(
        tokens.score.split(lengths),
        tokens.hidden.split(lengths),
        flat.split(lengths),
        (tokens.score if tokens.local is None else tokens.local).split(lengths),
        strict=True,
    ):
        row = torch.einsum("tf,tja,tjb->fjab", w, score, h)
        if bool(local.any()):
            row += local.to(row)[:, None, None, None] * torch.einsum("tja,tjb->jab", mine, h)
        rows.append(row.flatten(2))
    return torch.stack(rows)


def token_energies(tokens: TokenSketches, mask: Tensor, weights: Tensor, local: Tensor) -> Tensor:
    """(B, F) sum over a sequence's tokens of the squared length of each one's part, exact."""
    flat = weights[mask].double()
    energy = flat.square() * tokens.score_square.double()[:, None]
    if tokens.cross is not None and tokens.local_square is not None:
        also = 2 * flat * tokens.cross.double()[:, None] + tokens.local_square.double()[:, None]
        energy = energy + local.to(also) * also
    return torch.stack([x.sum(0) for x in energy.split(mask.sum(1).tolist())])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
