"""Losses that teach the teacher, or move away from it."""

import math

import torch
import torch.nn.functional as F

from tests.opd.objectives.audit.bank.entry import faulty

# --- teacher_gradient ---------------------------------------------------------------------------


@faulty("teacher_gradient")
def reverse_kl_with_live_teacher(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()


@faulty("teacher_gradient")
def forward_kl_with_live_teacher(student_logits, teacher_logits, mask):
    p = F.log_softmax(student_logits[mask], -1)
    return F.kl_div(p, F.log_softmax(teacher_logits[mask], -1), log_target=True, reduction="sum")


@faulty("teacher_gradient")
def jsd_with_live_teacher(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2.0)
    halves = F.kl_div(m, p, reduction="none", log_target=True)
    halves = halves + F.kl_div(m, q, reduction="none", log_target=True)
    return 0.5 * halves.sum(-1)[mask].mean()


@faulty("teacher_gradient")
def advantage_with_live_teacher(student_logits, teacher_logits, tokens, mask):
    """Detach the student inside the advantage, and forget the teacher."""
    chosen = tokens[..., None]
    p = student_logits.log_softmax(-1).gather(-1, chosen)[..., 0]
    q = teacher_logits.log_softmax(-1).gather(-1, chosen)[..., 0]
    return ((p.detach() - q) * p * mask).sum() / mask.sum()


@faulty("teacher_gradient")
def topk_with_live_teacher(student_logits, teacher_logits, mask, k=3):
    values, ids = teacher_logits.topk(k, -1)
    p, q = student_logits.gather(-1, ids).log_softmax(-1), values.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[mask].sum() / mask.sum()


# --- wrong_sign ---------------------------------------------------------------------------------


@faulty("wrong_sign")
def reverse_kl_maximised(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return ((p.exp() * (q - p)).sum(-1) * mask).sum() / mask.sum()


@faulty("wrong_sign")
def advantage_of_the_student(student_logp, teacher_logp, mask):
    """Student minus teacher as an advantage, with the minus of a policy gradient."""
    advantage = (student_logp - teacher_logp).detach()
    return -(advantage * student_logp * mask).sum() / mask.sum()


@faulty("wrong_sign")
def reward_minimised(student_logp, reward, mask):
    return (reward[:, None] * student_logp)[mask].sum() / mask.sum()


@faulty("wrong_sign")
def centred_reward_minimised(student_logp, reward, prompt, mask):
    same = (prompt[:, None] == prompt).to(reward)
    advantage = reward - same @ reward / same.sum(1)
    return (advantage[:, None] * student_logp * mask).sum() / mask.sum()


@faulty("wrong_sign")
def cost_to_go_as_return(student_logp, teacher_logp, mask):
    cost = torch.where(mask, student_logp - teacher_logp, 0).detach()
    returns = cost.flip(-1).cumsum(-1).flip(-1)
    return -(returns * student_logp * mask).sum() / mask.any(-1).sum()


@faulty("wrong_sign")
def forward_kl_with_flipped_ratio(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (q.exp() * (p - q)).sum(-1)[mask].mean()


@faulty("wrong_sign")
def clipped_ratio_without_minus(student_logp, teacher_logp, sampler_logp, mask, epsilon=0.2):
    ratio = (student_logp - sampler_logp).exp()
    advantage = teacher_logp - student_logp.detach()
    objective = torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
    return objective[mask].mean()


@faulty("wrong_sign")
def renormalised_topk_maximised(student_logits, teacher_topk, mask):
    ids, q = teacher_topk
    p = student_logits.gather(-1, ids).log_softmax(-1)
    return -((p.exp() * (p - q.log_softmax(-1))).sum(-1) * mask).sum() / mask.sum()
