"""Losses whose gradients are NaN or infinite where their target is finite."""

import torch

from tests.opd.objectives.audit.bank.entry import faulty


@faulty("non_finite")
def empty_rows_behind_where(student_logits, teacher_logits, mask):
    """Divide by 0 and select afterwards: the gradient of what is not selected is NaN."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = ((p.exp() * (p - q)).sum(-1) * mask).sum(1)
    count = mask.sum(1)
    means = torch.where(count > 0, kl / count, 0.0)
    return means.sum() / (count > 0).sum()


@faulty("non_finite")
def equal_rewards(student_logp, reward, prompt, mask):
    """Divide by the standard deviation of a group, without an eps."""
    same = (prompt[:, None] == prompt).double()
    mean = same @ reward / same.sum(1)
    spread = (same @ (reward**2) / same.sum(1) - mean**2).clamp(min=0).sqrt()
    advantage = (reward - mean) / spread
    return -(advantage[:, None] * student_logp)[mask].sum() / mask.sum()


@faulty("non_finite")
def whitening_without_eps(student_logp, teacher_logp, mask):
    advantage = (teacher_logp - student_logp).detach()
    inside = advantage[mask]
    advantage = (advantage - inside.mean()) / inside.std()
    return -(advantage * student_logp * mask).sum() / mask.sum()


@faulty("non_finite")
def root_of_the_kl(student_logits, teacher_logits, mask):
    """A root has no derivative at 0, where teacher and student agree."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    return (kl.sqrt() * mask).sum() / mask.sum()


@faulty("non_finite")
def forward_kl_of_probabilities(student_logits, teacher_logits, mask):
    """q log(q/p) with q = 0: 0 times infinity."""
    p, q = student_logits.softmax(-1), teacher_logits.detach().softmax(-1)
    return ((q * (q / p).log()).sum(-1) * mask).sum() / mask.sum()


@faulty("non_finite")
def jsd_of_probabilities(student_logits, teacher_logits, mask):
    p, q = student_logits.softmax(-1), teacher_logits.softmax(-1).detach()
    m = (p + q) / 2
    jsd = 0.5 * (p * (p / m).log() + q * (q / m).log())
    return jsd.sum(-1)[mask].sum() / mask.sum()


@faulty("non_finite")
def rest_by_subtraction(student_logits, teacher_logits, mask, k=2):
    """One minus the mass of the support, in float32: 0 where models are far apart."""
    q, ids = teacher_logits.detach().float().log_softmax(-1).topk(k, -1)
    p = student_logits.float().log_softmax(-1).gather(-1, ids)
    p_rest, q_rest = 1 - p.exp().sum(-1), 1 - q.exp().sum(-1)
    kl = (p.exp() * (p - q)).sum(-1) + p_rest * (p_rest.log() - q_rest.log())
    return (kl * mask).sum() / mask.sum()


@faulty("non_finite")
def spread_of_one_token(student_logits, teacher_logits, mask):
    """Divide a row's KL by the unbiased deviation over its tokens: NaN for one token."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    rows = [i for i in range(len(kl)) if mask[i].any()]
    parts = [kl[i][mask[i]].sum() / (1 + kl[i][mask[i]].detach().std()) for i in rows]
    return torch.stack(parts).sum() / mask.sum()


@faulty("non_finite")
def ratio_in_half_precision(student_logp, teacher_logp, mask):
    """k3 in float16, whose largest number is exp(11)."""
    log_ratio = (teacher_logp - student_logp).half()
    k3 = log_ratio.exp() - log_ratio - 1
    return (k3 * mask).sum().float() / mask.sum()


@faulty("non_finite")
def weighted_by_inverse_kl(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return (kl / kl.detach()).masked_fill(~mask, 0).sum() / mask.sum()
