"""Gradients of the LM head, sequence by sequence, stored as small random sketches (E-3).

The gradient of log p(y_t) with respect to the head's weight (V, D) is the outer product of delta_t
= one_hot(y_t) - p and the hidden state h_t; that of the local KL(p || q) is the outer product of p
(l - KL), l = log p - log q, and h_t. A sketch keeps (R1 delta)(R2 h)^T for independent random signs
R1 and R2: inner products of sketches have those of the gradients as their mean. The outer product
is not formed until tokens are summed, so that a token costs J (m1 + m2) numbers, and every weighted
sum over tokens can be computed later without the models.

Error: an outer product of two vectors has a squared length with relative variance ((1 + 2/m1)(1 +
2/m2) - 1)/J, about 2/J (1/m1 + 1/m2), *not* 1/(J m1 m2). So more copies J help more than long rows.
Sums over many different tokens have a smaller error.

A head with tied embeddings also receives gradient from the input side, which is not included.

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
"""A slice of the flat tokens -> (n, V) student's and teacher's log-probabilities.

At the loss temperature; None for a teacher without full distributions."""

LogitDerivatives = Callable[[slice], Tensor]
"""A slice of the flat tokens -> (n, V) derivatives of the logits, before the temperature.

With respect to the products of the hidden state and the head's rows: the effect of a soft-cap or a
scale."""

_BLOCK_SIZE = 16384


@dataclass(frozen=True, eq=False)
class Projection:
    """Random projections R1 and R2 of the two factors of a gradient."""

    vocabulary: Tensor
    """R1 as (V, J, m1): signs as int8, or other numbers."""
    hidden: Tensor
    """R2 as (D, J, m2)."""
    scale: float
    """Factor of each sketch."""

    def to(self, device: str | torch.device) -> "Projection":
        """Return the projection on a device."""
        return Projection(self.vocabulary.to(device), self.hidden.to(device), self.scale)


def random_projection(
    vocabulary: int, hidden: int, seed: int, rows: int = 16, copies: int = 8
) -> Projection:
    """Sample independent signs, the same on every machine for one seed.

    Memory: copies * rows * (V + D) bytes, 19 MB at the default for V = 150 000.

    Args:
        vocabulary: V.
        hidden: D.
        seed: Seed.
        rows: Rows of R1 and R2.
        copies: Independent copies J.

    Returns:
        The projection; a sketch has m = copies * rows^2 numbers.

    Raises:
        InvalidInput: rows is below 1 or copies below 2.
    """
    if rows < 1 or copies < 2:
        raise InvalidInput(f"rows={rows}, copies={copies}; rows >= 1 and copies >= 2 are required")
    generator = torch.Generator().manual_seed(seed)

    def signs(size: int) -> Tensor:
        shape = (size, copies, rows)
        return 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1

    return Projection(signs(vocabulary), signs(hidden), (rows * copies**0.5) ** -1)


def identity_projection(vocabulary: int, hidden: int) -> Projection:
    """Return identities: the gradients themselves, V * D numbers a sequence. For small models."""
    vocabulary_identity, hidden_identity = (
        torch.eye(size, dtype=torch.int8)[:, None] for size in (vocabulary, hidden)
    )
    return Projection(vocabulary_identity, hidden_identity, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSketches:
    """Sketches of each token's two logit gradients and hidden state, and exact lengths.

    The three fields of the local KL are None if the teacher's distributions are not available.
    """

    score: Tensor
    """(N, J, m1) of delta."""
    hidden: Tensor
    """(N, J, m2) of h."""
    score_square: Tensor
    """(N,) exact <delta, delta> |h|^2."""
    local: Tensor | None = None
    """(N, J, m1) of p (l - KL)."""
    cross: Tensor | None = None
    """(N,) exact <delta, local> |h|^2."""
    local_square: Tensor | None = None
    """(N,) exact <local, local> |h|^2."""


@torch.no_grad()
def token_sketches(
    batch: ScoredRollouts,
    hidden: Tensor,
    logp: LogProbs,
    projection: Projection,
    chunk_tokens: int = 1024,
    logit_derivatives: LogitDerivatives | None = None,
) -> TokenSketches:
    """Sketch the batch's supervised tokens, with (n, V) tensors of one chunk at a time.

    Args:
        batch: Scored rollouts.
        hidden: (N, D) student states that predict the supervised tokens, row-major.
        logp: Both models' full log-probabilities of a slice of these tokens.
        projection: Projection of the head.
        chunk_tokens: Tokens of a chunk.
        logit_derivatives: Of a head with a soft-cap or a scale; all 1 if None.

    Returns:
        The sketches.

    Raises:
        InvalidInput: hidden or the projection does not fit the batch.
    """
    tokens, num_tokens = batch.tokens[batch.mask], int(batch.mask.sum())
    if hidden.dim() != 2 or len(hidden) != num_tokens:
        raise InvalidInput(
            f"hidden is {tuple(hidden.shape)}, the mask has {num_tokens} tokens: (N, D)"
        )
    columns: dict[str, list[Tensor]] = {}
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, num_tokens))
        h = _at_least_float32(hidden[chunk]) / batch.score_temperature
        student_logp, teacher_logp = logp(chunk)
        derivative = None if logit_derivatives is None else logit_derivatives(chunk)
        chunk_sketches = _sketch_chunk(
            tokens[chunk], h, _at_least_float32(student_logp), teacher_logp, projection, derivative
        )
        for name, x in chunk_sketches.items():
            columns.setdefault(name, []).append(x)
    return TokenSketches(**{name: torch.cat(parts) for name, parts in columns.items()})


def _sketch_chunk(
    tokens: Tensor,
    h: Tensor,
    student_logp: Tensor,
    teacher_logp: Tensor | None,
    projection: Projection,
    logit_derivative: Tensor | None,
) -> dict[str, Tensor]:
    if student_logp.shape[-1] != len(projection.vocabulary) or h.shape[-1] != len(
        projection.hidden
    ):
        raise InvalidInput(
            f"got log-probabilities of {student_logp.shape[-1]} ids and states of size "
            f"{h.shape[-1]}; the projection is for {len(projection.vocabulary)} and "
            f"{len(projection.hidden)}"
        )
    p = student_logp.exp()
    score = -p
    score.scatter_add_(1, tokens[:, None], torch.ones_like(p[:, :1]))
    if logit_derivative is not None:
        score = score * logit_derivative.to(score.dtype)
    hidden_square = h.square().sum(-1)
    sketches = {
        "score": project(score, projection.vocabulary),
        "hidden": project(h, projection.hidden) * projection.scale,
        "score_square": score.square().sum(-1) * hidden_square,
    }
    if teacher_logp is not None:
        log_ratio = torch.where(
            p > 0, student_logp - teacher_logp.to(student_logp.dtype), torch.zeros_like(p)
        )
        local = p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True))
        if logit_derivative is not None:
            local = local * logit_derivative.to(local.dtype)
        sketches["local"] = project(local, projection.vocabulary)
        sketches["cross"] = (local * score).sum(-1) * hidden_square
        sketches["local_square"] = local.square().sum(-1) * hidden_square
    return sketches


def project(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply x by the projection, widening int8 a block of S at a time.

    Args:
        x: (n, S).
        matrix: (S, J, m).

    Returns:
        (n, J, m).
    """
    flat, products = matrix.flatten(1), x.new_zeros(len(x), matrix[0].numel())
    for start in range(0, len(flat), _BLOCK_SIZE):
        block = flat[start : start + _BLOCK_SIZE].to(x.device, x.dtype)
        products.addmm_(x[:, start : start + _BLOCK_SIZE], block)
    return products.view(len(x), *matrix.shape[1:])


@torch.no_grad()
def outer_sketches(
    logit_gradients: Iterable[tuple[slice, Tensor]],
    hidden: Tensor,
    mask: Tensor,
    projection: Projection,
) -> Tensor:
    """Sketch sum_t d_t h_t^T of each sequence: the head gradient of any loss.

    Args:
        logit_gradients: Chunks of the flat tokens in order, and the loss's gradients d (n, V) with
            respect to the products of the hidden states and the head's rows.
        hidden: (N, D) h.
        mask: (B, T) of the N tokens.
        projection: Projection of the head.

    Returns:
        (B, J, m1 m2).
    """
    projected_chunks = [
        project(_at_least_float32(gradient), projection.vocabulary)
        for _, gradient in logit_gradients
    ]
    logit_sketches, lengths = torch.cat(projected_chunks), mask.sum(1).tolist()
    hidden_sketches = (
        project(_at_least_float32(hidden), projection.hidden).to(logit_sketches.dtype)
        * projection.scale
    )
    pairs = zip(logit_sketches.split(lengths), hidden_sketches.split(lengths), strict=True)
    return torch.stack([torch.einsum("tja,tjb->jab", x, h).flatten(1) for x, h in pairs])


@torch.no_grad()
def sequence_sketches(
    tokens: TokenSketches, mask: Tensor, weights: Tensor, local: Tensor
) -> Tensor:
    """Sketch sum_t [w_tf grad log p(y_t) + local_f grad KL_t] of each sequence.

    The common formula of all estimators: with w_t = sum_{u >= t} gamma^(u-t) r_u it is the result
    of the eligibility trace Z <- gamma Z + grad log p(y_t), G <- G + r_t Z.

    Args:
        tokens: Sketches of the tokens.
        mask: (B, T) of the batch.
        weights: (B, T, F).
        local: (F,) bool.

    Returns:
        (B, F, J, m1 m2).

    Raises:
        InvalidInput: local is requested without the teacher's distributions.
    """
    if bool(local.any()) and tokens.local is None:
        raise InvalidInput("the gradient of the local KL requires the teacher's full distributions")
    lengths = mask.sum(1).tolist()
    flat = weights[mask].to(tokens.score)
    rows = []
    for score, h, w, local_sketch in zip(
        tokens.score.split(lengths),
        tokens.hidden.split(lengths),
        flat.split(lengths),
        (tokens.score if tokens.local is None else tokens.local).split(lengths),
        strict=True,
    ):
        row = torch.einsum("tf,tja,tjb->fjab", w, score, h)
        if bool(local.any()):
            row += local.to(row)[:, None, None, None] * torch.einsum(
                "tja,tjb->jab", local_sketch, h
            )
        rows.append(row.flatten(2))
    return torch.stack(rows)


def token_energies(tokens: TokenSketches, mask: Tensor, weights: Tensor, local: Tensor) -> Tensor:
    """Return (B, F) sums over tokens of the squared length of each token's part, exact."""
    flat = weights[mask].double()
    energy = flat.square() * tokens.score_square.double()[:, None]
    if tokens.cross is not None and tokens.local_square is not None:
        local_energy = (
            2 * flat * tokens.cross.double()[:, None] + tokens.local_square.double()[:, None]
        )
        energy = energy + local.to(local_energy) * local_energy
    return torch.stack([x.sum(0) for x in energy.split(mask.sum(1).tolist())])


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
