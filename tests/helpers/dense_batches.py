"""Batches of varying lengths with known full distributions, for reference implementations."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats

V, B, T = 24, 10, 40
STUDENT_ENDS, TEACHER_ENDS = (0, 1), (1, 2, 3)


@dataclass(frozen=True)
class DenseBatch:
    """A batch and the (B, T, V) log-probabilities that it was built from."""

    batch: ScoredRollouts
    p: torch.Tensor
    q: torch.Tensor

    def tokens(self) -> Iterator[tuple[int, int]]:
        """Yield the (response, position) of every supervised token."""
        yield from ((int(i), int(t)) for i, t in self.batch.mask.nonzero())


def make_dense_batch(
    seed: int = 0, source: str = "teacher", k: int = 10, gap: float = 1.0, sharpness: float = 2.0
) -> DenseBatch:
    """Build a batch of tokens sampled from p, with gaps in the mask and lengths from 0 and 1 on."""
    g = torch.Generator().manual_seed(seed)
    p = (sharpness * torch.randn(B, T, V, generator=g).double()).log_softmax(-1)
    noise = gap * torch.randn(p.shape, generator=g).double()
    q = (p + noise).log_softmax(-1) if gap else p.clone()
    y = torch.multinomial(p.exp().reshape(-1, V), 1, generator=g).reshape(B, T)
    ends = torch.tensor([0, 1, 2, 5, 9, 17, 25, 33, T, T])[:, None]
    mask = (torch.rand(B, T, generator=g) > 0.2) & (torch.arange(T) < ends)
    mask[1, 0] = True
    y = y * mask

    def masked(x: torch.Tensor) -> torch.Tensor:
        return x * (mask if x.dim() == 2 else mask[..., None])

    def pick(x: torch.Tensor) -> torch.Tensor:
        return masked(x.gather(-1, y[..., None])[..., 0])

    ids, present = support_ids(p, q, source, k)
    offset = 0.3 * torch.randn(B, T, generator=g).double()
    batch = ScoredRollouts(
        tokens=y,
        mask=mask,
        sampler_logp=masked((pick(p) + offset).clamp(max=-1e-3)),
        prompt=torch.arange(B) // 2,
        ended=torch.rand(B, generator=g) > 0.5,
        task=torch.arange(B) % 3,
        reward=torch.tensor([1.0, 0.0, torch.nan, 1.0, 0.0] * 2),
        student_logp=pick(p),
        teacher_logp=pick(q),
        support=Support(
            ids=ids * mask[..., None],
            student_logp=masked(p.gather(-1, ids)),
            teacher_logp=masked(q.gather(-1, ids)),
            source=source,
            present=present,
        ),
        prefix=DistributionStats(
            **{name: masked(x) for name, x in compute_distribution_stats(p, q, y).items()},
            student_end=masked(p[..., list(STUDENT_ENDS)].logsumexp(-1)),
            teacher_end=masked(q[..., list(TEACHER_ENDS)].logsumexp(-1)),
            ending=masked(torch.isin(y, torch.tensor(STUDENT_ENDS)).double()),
        ),
    )
    return DenseBatch(batch.validate(), p, q)


def support_ids(
    p: torch.Tensor, q: torch.Tensor, source: str, k: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ids (B, T, K or 2 K or V) of a support and which of them are present."""
    teacher_ids, student_ids = q.topk(k, -1).indices, p.topk(k, -1).indices
    in_both = (teacher_ids[..., None] == student_ids[..., None, :]).any(-1)
    if source == "full":
        return torch.arange(p.shape[-1]).expand_as(p).clone(), None
    if source == "union":
        new = ~(student_ids[..., None] == teacher_ids[..., None, :]).any(-1)
        return torch.cat([teacher_ids, student_ids], -1), torch.cat([torch.ones_like(new), new], -1)
    if source == "intersection":
        return teacher_ids, in_both
    return (teacher_ids if source == "teacher" else student_ids), None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
