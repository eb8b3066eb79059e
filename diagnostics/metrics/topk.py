"""Nested top-K lists (A-5, B-1, B-3, B-6): what shallower lists than the batch's would show.

Shapes: B responses, T positions, K ids of a list. p the student, q the teacher, y the sampled
token, r = log p(y) - log q(y), S_k the teacher's k most probable ids, I the ids in both lists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField, support_of
from diagnostics.core.totals import Accumulator, Mean, PositionMean

DEPTHS = (1, 8, 16, 32, 64)
OVERLAP = 16


@dataclass(frozen=True, eq=False)
class TopList:
    """One model's K most probable ids a position, best first, with both log-probabilities.

    ids, student_logp, teacher_logp, present: (B, T, K).
    """

    ids: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    present: Tensor

    @property
    def k(self) -> int:
        return self.ids.shape[-1]

    def to(self, depth: int) -> "TopList":
        """The first `depth` ids."""
        parts = (self.ids, self.student_logp, self.teacher_logp, self.present)
        return TopList(*(x[..., :depth] for x in parts))

    def place(self, tokens: Tensor) -> Tensor:
        """(B, T) long: the place of each token in its list from 0, K where it is not there."""
        hit = (self.ids == tokens[..., None]) & self.present
        slot = torch.arange(self.k, device=tokens.device)
        return torch.where(hit, slot, self.k).amin(-1)


def top_list(batch: ScoredRollouts, whose: str) -> TopList:
    """The list of the "teacher" or the "student", as deep as the batch's support tells.

    A support of that source is the list itself, `student_support` the student's; from a "union" of
    two lists of equal length, or from a "full" one (then no deeper than DEPTHS goes), it is found
    by sorting.

    Raises:
      Missing: no support, or one that does not hold that model's most probable ids.
    """
    support = support_of(batch)
    if support.source != whose == "student" and batch.student_support is not None:
        support = batch.student_support
    present = support.present
    if present is None:
        present = torch.ones_like(support.ids, dtype=torch.bool)
    everything = TopList(support.ids, support.student_logp, support.teacher_logp, present)
    if support.source == whose:
        return everything
    if support.source not in ("union", "full"):
        raise MissingField(
            f"the support is the {support.source}'s and does not hold the {whose}'s top ids "
            f"(score with source {whose!r} or 'union')"
        )
    depth = min(support.k, DEPTHS[-1]) if support.source == "full" else support.k // 2
    logp = support.teacher_logp if whose == "teacher" else support.student_logp
    ranked = logp.detach().masked_fill(~present, -torch.inf)
    order = ranked.topk(depth, -1).indices
    parts = (support.ids, support.student_logp, support.teacher_logp, present)
    return TopList(*(x.gather(-1, order) for x in parts))


def nested_outside(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-1, B-2: samples outside the teacher's top k for every k of DEPTHS that the list reaches.

    outside_top{k} = mean 1[y not in S_k], the share of teacher ranks above k;
    outside_top{k}_expected = mean 1 - sum_{S_k} p, the same without the sampling noise; both over
    all sampled tokens.
    Access: L1 (teacher's list, a union, or everything). Source: 1 - P_S at several K is the
    headline of SimOPD; rank shares of 2604.13016.
    Healthy: outside_top1 is the teacher's disagreement with the student's own draw and never small;
    outside_top64 near 0 and flat along the response. Comparable across runs, whatever K they keep.
    """
    best = top_list(batch, "teacher")
    place, ours = best.place(batch.tokens), best.student_logp.exp() * best.present
    mass = ours.cumsum(-1)
    found: dict[str, Accumulator] = {}
    for k in (k for k in DEPTHS if k <= best.k):
        name = f"divergence/outside_top{k}"
        found[name] = _profile(batch, place >= k)
        found[f"{name}_expected"] = _profile(batch, 1 - mass[..., k - 1])
    return found


def tail_share(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-5: how much of the cost lies on tokens outside the teacher's top k, k in DEPTHS.

    tail{k}_cost_share = sum m r 1[y not in S_k] / sum m r;
    tail{k}_signal_share = the same with |r|.
    Access: L1, as `nested_outside`. Source: ours; others count such tokens and do not weigh them.
    Healthy: falls to near 0 with k. What is left at the k of the objective is signal that a
    renormalised top-k loss discards. The cost share is a ratio of signed sums: it may exceed 1, and
    its error explodes where the mean cost is near 0.
    """
    best = top_list(batch, "teacher")
    place, r = best.place(batch.tokens), batch.log_ratio
    found: dict[str, Accumulator] = {}
    for k in (k for k in DEPTHS if k <= best.k):
        for name, x in (("cost", r), ("signal", r.abs())):
            total = Mean.ratio(x * (place >= k), x, batch.mask, batch.prompt)
            found[f"signal/tail{k}_{name}_share"] = total
    return found


def overlap(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-3: the ids that both models have among their top k, k = 16 or what the lists hold.

    Means over all sampled tokens, with p' and q' renormalised on I:
    overlap_ratio = |I| / k; overlap_student_mass = sum_I p; overlap_teacher_mass = sum_I q;
    overlap_empty_share = 1[I empty]; and over tokens where I is not empty:
    overlap_advantage = -KL(p' || q') / |I|, the paper's; overlap_kl = KL(p' || q'), which does not
    shrink merely because I grows; overlap_advantage_verl = sum_I q (log p - log q) / |I|, verl's:
    weighted by the teacher, not renormalised, of either sign; the ratio is the same in both.
    Access: L1 with both lists (`student_support`, a "union" support, or everything). Source:
    2604.13016; verl's distillation losses. The paper does not say what an empty I counts; here it
    is left out.
    Healthy: rises over training with masses near 1, while overlap_kl falls. The level is no
    verdict: better teachers start lower in the paper's own tables. Read the trend.
    """
    ours, theirs = top_list(batch, "student"), top_list(batch, "teacher")
    k = min(OVERLAP, ours.k, theirs.k)
    ours, theirs = ours.to(k), theirs.to(k)
    both = torch.zeros_like(theirs.present)
    for j in range(k):  # slot by slot, so that no (B, T, K, K) comparison exists
        both |= theirs.ids == ours.ids[..., j : j + 1]
    size = both.sum(-1)
    p, q = theirs.student_logp.exp() * both, theirs.teacher_logp.exp() * both
    mass_p, mass_q = p.sum(-1), q.sum(-1)
    ratio = torch.where(both, theirs.student_logp - theirs.teacher_logp, 0.0)
    some = (size > 0) & batch.sampled
    safe = [torch.where(some, x, torch.ones_like(x)) for x in (mass_p, mass_q)]
    kl = (p * ratio).sum(-1) / safe[0] - (safe[0] / safe[1]).log()
    count = size.clamp(min=1)
    return {
        "divergence/overlap_ratio": _profile(batch, size.double() / k),
        "divergence/overlap_student_mass": _profile(batch, mass_p),
        "divergence/overlap_teacher_mass": _profile(batch, mass_q),
        "divergence/overlap_empty_share": _profile(batch, size == 0),
        "divergence/overlap_advantage": PositionMean.of(-kl / count, some, batch.prompt),
        "divergence/overlap_kl": PositionMean.of(kl, some, batch.prompt),
        "divergence/overlap_advantage_verl": PositionMean.of(
            (q * ratio).sum(-1) / count, some, batch.prompt
        ),
    }


def top_uncertainty(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-6: from a top-K list alone, the teacher's largest probability and a bound on its entropy.

    Over all sampled tokens: top_teacher_max = mean of q's largest, exact;
    top_teacher_entropy_least = mean of -sum_S q log q - (1 - Q_S) log (1 - Q_S), nats: the entropy
    with all that lies outside as one id, a lower bound; the entropy exceeds it by at most
    (1 - Q_S) log(V - K).
    Access: L1 (the teacher's list). Source: derived; fidelity as in 2605.30833.
    Healthy: as `uncertainty`, of which these are the forms without whole distributions.
    """
    best = top_list(batch, "teacher")
    q = best.teacher_logp.exp() * best.present
    rest = (1 - q.sum(-1)).clamp(min=0)
    inside = -(q * torch.where(best.present, best.teacher_logp, 0.0)).sum(-1)
    return {
        "divergence/top_teacher_max": _profile(batch, q.amax(-1)),
        "divergence/top_teacher_entropy_least": _profile(batch, inside - torch.xlogy(rest, rest)),
    }


def _profile(batch: ScoredRollouts, x: Tensor) -> PositionMean:
    return PositionMean.of(x, batch.sampled, batch.prompt)
