"""A scored batch with all optional parts, and supports of a single prefix, from logits."""

import torch

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats
from opd.objectives.support import JOINT_SUPPORTS


def batch(seed: int = 0, top_p: float = 1.0, size: int = 12, width: int = 40) -> ScoredRollouts:
    """Sample tokens from a random student on 16 ids, with gaps in the mask."""
    g = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(size, width, 16, generator=g)).log_softmax(-1)
    q = (p + torch.randn(p.shape, generator=g)).log_softmax(-1)
    sampling_prob = p.exp()
    if top_p < 1:
        sorted_prob, order = sampling_prob.sort(-1, descending=True)
        is_outside = sorted_prob.cumsum(-1) - sorted_prob >= top_p
        removed_ids = torch.zeros_like(is_outside).scatter(-1, order, is_outside)
        sampling_prob = sampling_prob.masked_fill(removed_ids, 0)
    tokens = torch.multinomial(sampling_prob.reshape(-1, 16), 1, generator=g).reshape(size, width)
    mask = torch.rand(size, width, generator=g) > 0.2
    ids = q.topk(4, -1).indices

    def apply_mask(x: torch.Tensor) -> torch.Tensor:
        return x * (mask if x.dim() == 2 else mask[..., None])

    def pick(x: torch.Tensor) -> torch.Tensor:
        return apply_mask(x.gather(-1, tokens[..., None])[..., 0])

    return ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=pick(p),
        prompt=torch.arange(size) // 2,
        ended=torch.rand(size, generator=g) > 0.5,
        student_logp=pick(p),
        teacher_logp=pick(q),
        support=Support(
            ids=ids,
            student_logp=apply_mask(p.gather(-1, ids)),
            teacher_logp=apply_mask(q.gather(-1, ids)),
            source="teacher",
        ),
        prefix=DistributionStats(
            **{k: apply_mask(v) for k, v in compute_distribution_stats(p, q, tokens).items()}
        ),
    ).validate()


def support_of_every_token(
    source: str, student_logp: torch.Tensor, teacher_logp: torch.Tensor, k: int
) -> Support | None:
    """Return the support of V responses of one token, each another id; None for source "none".

    The log-probabilities are (V,), those after the prefix that the responses share.
    """
    if source == "none":
        return None
    vocabulary = len(student_logp)
    lists = {"teacher": teacher_logp.topk(k).indices, "student": student_logp.topk(k).indices}
    ids, present = torch.arange(vocabulary), None
    if source in JOINT_SUPPORTS:
        ids, present = JOINT_SUPPORTS[source](lists["teacher"], lists["student"])
    elif source in lists:
        ids = lists[source]
    ids = ids.expand(vocabulary, 1, -1)
    return Support(
        ids=ids,
        student_logp=student_logp[ids],
        teacher_logp=teacher_logp[ids],
        source=source,
        present=None if present is None else present.expand(vocabulary, 1, -1),
    )
