"""Losses that rest away from the teacher, or whose mean is no target's gradient."""

import torch
import torch.nn.functional as F

from tests.opd.objectives.audit.bank.entry import faulty

# --- off_teacher_fixed_point --------------------------------------------------------------------


@faulty("off_teacher_fixed_point")
def teacher_topk_unnormalised(student_logits, teacher_topk, mask):
    ids, q = teacher_topk
    p = student_logits.log_softmax(-1).gather(-1, ids)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()


@faulty("off_teacher_fixed_point")
def student_topk_unnormalised(student_topk, teacher_logits, mask):
    ids, p = student_topk
    q = teacher_logits.detach().log_softmax(-1).gather(-1, ids)
    return (p.exp() * (p - q)).sum(-1)[mask].mean()


@faulty("off_teacher_fixed_point")
def topk_unnormalised_clamped_at_zero(student_logits, teacher_topk, mask):
    """The same, with negative values of the truncated sum cut off."""
    ids, q = teacher_topk
    p = student_logits.log_softmax(-1).gather(-1, ids)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    return (kl * mask).sum() / mask.sum()


@faulty("off_teacher_fixed_point")
def forward_topk_unnormalised(student_logits, teacher_topk, mask):
    ids, q = teacher_topk
    p = student_logits.log_softmax(-1).gather(-1, ids)
    return ((q.exp() * (q - p)).sum(-1) * mask).sum() / mask.sum()


@faulty("off_teacher_fixed_point")
def head_and_tail_of_two_kinds(student_logits, teacher_logits, tokens, mask, k=2):
    """The sum over the support with gradient of its log-ratio, the sampled tail without."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    ids = q.topk(k, -1).indices
    head = (p.exp() * (p - q)).gather(-1, ids).sum(-1)
    chosen = tokens[..., None]
    tail = ((p - q).detach() * p).gather(-1, chosen)[..., 0]
    tail = tail * ~(ids == chosen).any(-1)
    return (head + tail)[mask].sum() / mask.sum()


@faulty("off_teacher_fixed_point")
def advantage_with_gradient(student_logp, teacher_logp, mask):
    """Forget to detach the advantage: descent ends at the root of the teacher."""
    advantage = teacher_logp - student_logp
    return -(advantage * student_logp * mask).sum() / mask.sum()


@faulty("off_teacher_fixed_point")
def teacher_at_another_temperature(student_logits, teacher_logits, mask, temperature=2.0):
    p = student_logits.log_softmax(-1)
    q = (teacher_logits.detach() / temperature).log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()


@faulty("off_teacher_fixed_point")
def smoothed_teacher(student_logits, teacher_logits, mask, smoothing=0.1):
    q = teacher_logits.detach().softmax(-1)
    q = (1 - smoothing) * q + smoothing / q.shape[-1]
    return F.cross_entropy(student_logits[mask], q[mask])


@faulty("off_teacher_fixed_point")
def entropy_bonus(student_logits, teacher_logits, mask, bonus=0.2):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    entropy = -(p.exp() * p).sum(-1)
    return (kl - bonus * entropy)[mask].mean()


@faulty("off_teacher_fixed_point")
def teacher_probabilities_floored(student_logits, teacher_logits, mask, floor=0.1):
    q = teacher_logits.detach().softmax(-1).clamp(min=floor).log()
    p = student_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[mask].mean()


# --- biased -------------------------------------------------------------------------------------


@faulty("biased")
def weighted_by_teacher_probability(student_logp, teacher_logp, mask):
    cost = (student_logp - teacher_logp).detach() * teacher_logp.exp()
    return (cost * student_logp * mask).sum() / mask.sum()


@faulty("biased")
def absolute_log_ratio(student_logp, teacher_logp, mask):
    return ((student_logp - teacher_logp).abs() * mask).sum() / mask.sum()


@faulty("biased")
def discounted_from_the_start(student_logp, teacher_logp, mask, gamma=0.8):
    """Powers of the position in the response, not of the distance to the token."""
    power = gamma ** torch.arange(mask.shape[1])
    cost = (student_logp - teacher_logp).detach() * mask * power
    to_go = cost.flip(1).cumsum(1).flip(1)
    return (to_go * student_logp)[mask].sum() / mask.sum()


@faulty("biased")
def square_of_logits(student_logits, teacher_logits, mask):
    return F.mse_loss(student_logits[mask], teacher_logits[mask].detach())


@faulty("biased")
def total_variation(student_logits, teacher_logits, mask):
    gap = (student_logits.softmax(-1) - teacher_logits.detach().softmax(-1)).abs().sum(-1)
    return 0.5 * (gap * mask).sum() / mask.sum()


@faulty("biased")
def both_at_temperature_two(student_logits, teacher_logits, mask, temperature=2.0):
    p = (student_logits / temperature).log_softmax(-1)
    q = (teacher_logits.detach() / temperature).log_softmax(-1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return temperature**2 * kl[mask].mean()


@faulty("biased")
def reward_and_a_kl_of_the_wrong_sign(
    student_logits, teacher_logits, student_logp, reward, mask, beta=0.5
):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return -((reward[:, None] * student_logp + beta * kl) * mask).sum() / mask.sum()


@faulty("biased")
def weighted_by_entropy(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1).detach()
    return ((p.exp() * (p - q)).sum(-1) * entropy * mask).sum() / mask.sum()


@faulty("biased")
def probability_for_its_log(student_logp, teacher_logp, mask):
    """The score of the probability in place of that of its logarithm."""
    advantage = teacher_logp - student_logp.detach()
    return -(advantage * student_logp.exp())[mask].sum() / mask.sum()


@faulty("biased")
def constant_head_without_tail(student_logits, teacher_topk, mask):
    ids, q = teacher_topk
    p = student_logits.log_softmax(-1).gather(-1, ids)
    return ((p.exp() * (p - q).detach()).sum(-1) * mask).sum() / mask.sum()


@faulty("biased")
def early_positions_count_more(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    weight = 1.0 / (1.0 + torch.arange(mask.shape[1]))
    return ((p.exp() * (p - q)).sum(-1) * weight * mask).sum() / mask.sum()


@faulty("biased")
def logarithm_of_the_advantage(student_logp, teacher_logp, mask):
    cost = (student_logp - teacher_logp).detach()
    soft = cost.sign() * torch.log1p(cost.abs())
    return (soft * student_logp)[mask].mean()
