"""Metrics of nested top-K lists (A-5, B-1, B-3, B-6), at several depths below the batch's own K.

Shapes: B responses, T positions, K ids of a list. p the student, q the teacher, y the sampled
token, r = log p(y) - log q(y), S_k the teacher's k most probable ids, I the ids in both lists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField, require_support
from diagnostics.core.totals import Accumulator, Mean, PositionMean

DEPTHS = (1, 8, 16, 32, 64)
"""Depths k of the nested lists."""
OVERLAP_DEPTH = 16
"""Depth at which the lists of both models are compared."""


@dataclass(frozen=True, eq=False)
class TopKList:
    """One model's K most probable ids a position, best first, with both log-probabilities.

    ids, student_logp, teacher_logp, present: (B, T, K).
    """

    ids: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    present: Tensor

    @property
    def k(self) -> int:
        """Number of ids K."""
        return self.ids.shape[-1]

    def truncate(self, depth: int) -> "TopKList":
        """Return the first `depth` ids."""
        parts = (self.ids, self.student_logp, self.teacher_logp, self.present)
        return TopKList(*(x[..., :depth] for x in parts))

    def position_of(self, tokens: Tensor) -> Tensor:
        """Return the (B, T) position of each token in its list, from 0; K where it is absent."""
        matches = (self.ids == tokens[..., None]) & self.present
        positions = torch.arange(self.k, device=tokens.device)
        return torch.where(matches, positions, self.k).amin(-1)


def top_k_list(batch: ScoredRollouts, model: str) -> TopKList:
    """Return the most probable ids of one model, as deep as the batch's support allows.

    A support of that source is the list itself, `student_support` the student's; from a "union" of
    two lists of equal length, or from a "full" support (then at most the largest of DEPTHS), it is
    found by sorting.

    Args:
        batch: Scored rollouts.
        model: "teacher" or "student".

    Returns:
        The list.

    Raises:
        MissingField: No support, or one that does not hold that model's most probable ids.
    """
    support = require_support(batch)
    if support.source != model == "student" and batch.student_support is not None:
        support = batch.student_support
    present = support.present
    if present is None:
        present = torch.ones_like(support.ids, dtype=torch.bool)
    full_list = TopKList(support.ids, support.student_logp, support.teacher_logp, present)
    if support.source == model:
        return full_list
    if support.source not in ("union", "full"):
        raise MissingField(
            f"the support has source {support.source!r} and does not contain the {model}'s top-K "
            f"ids; score with source {model!r} or 'union'"
        )
    depth = min(support.k, DEPTHS[-1]) if support.source == "full" else support.k // 2
    logp = support.teacher_logp if model == "teacher" else support.student_logp
    ranking_logp = logp.detach().masked_fill(~present, -torch.inf)
    order = ranking_logp.topk(depth, -1).indices
    parts = (support.ids, support.student_logp, support.teacher_logp, present)
    return TopKList(*(x.gather(-1, order) for x in parts))


def student_top_ids(batch: ScoredRollouts) -> Tensor:
    """Return the (B, T, K) most probable ids of the student.

    A teacher on a server has no log-probabilities of them, which `top_k_list` would need.

    Args:
        batch: Scored rollouts.

    Returns:
        The ids.
    """
    support = batch.student_support
    if support is not None and support.source == "student" and support.present is None:
        return support.ids
    return top_k_list(batch, "student").ids


def nested_outside(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-1, B-2: Compute the share of samples outside the teacher's top k at several depths k.

    Both over all sampled tokens, for every k of DEPTHS that the list reaches.

    Access: L1 (teacher's list, a union, or the full vocabulary).
    Source: 1 - P_S at several K is the main quantity of SimOPD; rank shares of 2604.13016.
    Healthy: outside_top1 is the teacher's disagreement with the student's sample and never small;
    outside_top64 near 0 and flat along the response. Comparable across runs with different K.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/outside_top{k}: Mean 1[y not in S_k], the share of teacher ranks above k.
        divergence/outside_top{k}_expected: Mean 1 - sum_{S_k} p, the same without the sampling
            noise.
    """
    teacher_list = top_k_list(batch, "teacher")
    position, student_prob = (
        teacher_list.position_of(batch.tokens),
        teacher_list.student_logp.exp() * teacher_list.present,
    )
    cumulative_mass = student_prob.cumsum(-1)
    accumulators: dict[str, Accumulator] = {}
    for k in (k for k in DEPTHS if k <= teacher_list.k):
        name = f"divergence/outside_top{k}"
        accumulators[name] = _sampled_profile(batch, position >= k)
        accumulators[f"{name}_expected"] = _sampled_profile(batch, 1 - cumulative_mass[..., k - 1])
    return accumulators


def tail_share(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-5: Compute the share of the cost on tokens outside the teacher's top k, k in DEPTHS.

    Access: L1, as `nested_outside`.
    Source: this toolkit; other work counts such tokens without weighting them.
    Healthy: falls to near 0 with k. What remains at the k of the objective is signal that a
    renormalised top-k loss discards. The cost share is a ratio of signed sums: it may exceed 1, and
    its error is very large where the mean cost is near 0.

    Args:
        batch: Scored rollouts.

    Returns:
        signal/tail{k}_cost_share: sum m r 1[y not in S_k] / sum m r.
        signal/tail{k}_signal_share: The same with |r|.
    """
    teacher_list = top_k_list(batch, "teacher")
    position, r = teacher_list.position_of(batch.tokens), batch.log_ratio
    accumulators: dict[str, Accumulator] = {}
    for k in (k for k in DEPTHS if k <= teacher_list.k):
        for name, x in (("cost", r), ("signal", r.abs())):
            total = Mean.ratio(x * (position >= k), x, batch.mask, batch.prompt)
            accumulators[f"signal/tail{k}_{name}_share"] = total
    return accumulators


def overlap(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-3: Compute the overlap of both models' top k, k = 16 or the length of the lists.

    Means over all sampled tokens, with p' and q' renormalised on I. The last three are over tokens
    where I is not empty.

    Access: L1 with both lists (`student_support`, a "union" support, or the full vocabulary).
    Source: 2604.13016; verl's distillation losses. The paper does not define the value of an empty
    I; here it is left out.
    Healthy: rises over training with masses near 1, while overlap_kl falls. The level alone is not
    conclusive: better teachers start lower in the paper's own tables. Read the trend.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/overlap_ratio: |I| / k.
        divergence/overlap_student_mass: sum_I p.
        divergence/overlap_teacher_mass: sum_I q.
        divergence/overlap_empty_share: 1[I empty].
        divergence/overlap_advantage: -KL(p' || q') / |I|, as in the paper.
        divergence/overlap_kl: KL(p' || q'), which does not shrink merely because I grows.
        divergence/overlap_advantage_verl: sum_I q (log p - log q) / |I|, as in verl: weighted by
            the teacher, not renormalised, of either sign. The overlap ratio is the same in both.
    """
    student_ids, teacher_list = student_top_ids(batch), top_k_list(batch, "teacher")
    k = min(OVERLAP_DEPTH, student_ids.shape[-1], teacher_list.k)
    teacher_list = teacher_list.truncate(k)
    in_both = torch.zeros_like(teacher_list.present)
    for j in range(k):  # one slot at a time, to avoid a (B, T, K, K) tensor
        in_both |= teacher_list.ids == student_ids[..., j : j + 1]
    size = in_both.sum(-1)
    p, q = teacher_list.student_logp.exp() * in_both, teacher_list.teacher_logp.exp() * in_both
    mass_p, mass_q = p.sum(-1), q.sum(-1)
    ratio = torch.where(in_both, teacher_list.student_logp - teacher_list.teacher_logp, 0.0)
    has_overlap = (size > 0) & batch.sampled
    safe_masses = [torch.where(has_overlap, x, torch.ones_like(x)) for x in (mass_p, mass_q)]
    kl = (p * ratio).sum(-1) / safe_masses[0] - (safe_masses[0] / safe_masses[1]).log()
    count = size.clamp(min=1)
    return {
        "divergence/overlap_ratio": _sampled_profile(batch, size.double() / k),
        "divergence/overlap_student_mass": _sampled_profile(batch, mass_p),
        "divergence/overlap_teacher_mass": _sampled_profile(batch, mass_q),
        "divergence/overlap_empty_share": _sampled_profile(batch, size == 0),
        "divergence/overlap_advantage": PositionMean.from_values(
            -kl / count, has_overlap, batch.prompt
        ),
        "divergence/overlap_kl": PositionMean.from_values(kl, has_overlap, batch.prompt),
        "divergence/overlap_advantage_verl": PositionMean.from_values(
            (q * ratio).sum(-1) / count, has_overlap, batch.prompt
        ),
    }


def top_uncertainty(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-6: Compute the teacher's largest probability and an entropy bound from a top-K list alone.

    Over all sampled tokens.

    Access: L1 (the teacher's list).
    Source: derived; fidelity as in 2605.30833.
    Healthy: as `uncertainty`, whose forms without full distributions these are.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/top_teacher_max: Mean of the largest q, exact.
        divergence/top_teacher_entropy_least: Mean of -sum_S q log q - (1 - Q_S) log (1 - Q_S),
            nats: the entropy with everything outside S as one id, a lower bound; the entropy
            exceeds it by at most (1 - Q_S) log(V - K).
    """
    teacher_list = top_k_list(batch, "teacher")
    q = teacher_list.teacher_logp.exp() * teacher_list.present
    outside_mass = (1 - q.sum(-1)).clamp(min=0)
    inside_entropy = -(q * torch.where(teacher_list.present, teacher_list.teacher_logp, 0.0)).sum(
        -1
    )
    return {
        "divergence/top_teacher_max": _sampled_profile(batch, q.amax(-1)),
        "divergence/top_teacher_entropy_least": _sampled_profile(
            batch, inside_entropy - torch.xlogy(outside_mass, outside_mass)
        ),
    }


def _sampled_profile(batch: ScoredRollouts, x: Tensor) -> PositionMean:
    """Return the mean of x (B, T) over all sampled tokens, overall and by position."""
    return PositionMean.from_values(x, batch.sampled, batch.prompt)
