"""Losses that read one position off, or what the teacher said before."""

import torch
import torch.nn.functional as F

from tests.opd.objectives.audit.bank.entry import faulty

# --- misaligned ---------------------------------------------------------------------------------


@faulty("misaligned")
def tokens_shifted_again(student_logits, teacher_logits, tokens, mask):
    """The shift of a causal model, though logits and tokens are aligned already."""
    labels, inside = tokens[:, 1:], mask[:, 1:]
    p = student_logits[:, :-1].log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    q = teacher_logits[:, :-1].detach().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return ((p - q).detach() * p * inside).sum() / inside.sum()


@faulty("misaligned")
def tokens_shifted_again_with_later_costs(student_logits, teacher_logits, tokens, mask):
    inside, chosen = mask[:, 1:], tokens[:, 1:, None]
    p = torch.take_along_dim(student_logits[:, :-1].log_softmax(-1), chosen, -1)[..., 0]
    q = torch.take_along_dim(teacher_logits[:, :-1].log_softmax(-1), chosen, -1)[..., 0].detach()
    cost = (p.detach() - q).masked_fill(~inside, 0)
    to_go = cost.flip(1).cumsum(1).flip(1)
    return (to_go * p)[inside].sum() / inside.sum()


@faulty("misaligned")
def teacher_one_late(student_logits, teacher_logits, mask):
    p = student_logits.log_softmax(-1)
    q = teacher_logits.detach().roll(1, dims=1).log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()


@faulty("misaligned")
def teacher_one_early(student_logits, teacher_logits, mask):
    p = student_logits.log_softmax(-1)
    q = torch.roll(teacher_logits.detach(), shifts=-1, dims=1).log_softmax(-1)
    return F.kl_div(p[mask], q[mask], reduction="sum", log_target=True) / mask.sum()


@faulty("misaligned")
def teacher_sliced_only(student_logits, teacher_logits, mask):
    """Drop the teacher's first position, and the last one of everything else."""
    p = student_logits[:, :-1].log_softmax(-1)
    q = teacher_logits[:, 1:].detach().log_softmax(-1)
    inside = mask[:, :-1]
    return (p.exp() * (p - q)).sum(-1)[inside].sum() / inside.sum()


@faulty("misaligned")
def served_scores_one_late(student_logp, teacher_logp, mask):
    """A server's scores of the prompt, where the first entry belongs to no token."""
    scores = torch.cat([torch.zeros_like(teacher_logp[:, :1]), teacher_logp[:, :-1]], 1)
    return ((student_logp.detach() - scores) * student_logp * mask).sum() / mask.sum()


@faulty("misaligned")
def served_topk_one_early(student_logits, teacher_topk, mask):
    ids, logp = (x.roll(-1, 1) for x in teacher_topk)
    p = student_logits.gather(-1, ids).log_softmax(-1)
    return (p.exp() * (p - logp.log_softmax(-1))).sum(-1)[mask].mean()


@faulty("misaligned")
def mask_of_the_labels(student_logits, teacher_logits, mask):
    """Whole distributions, with the mask of the next token."""
    p, q = student_logits[:, :-1].log_softmax(-1), teacher_logits[:, :-1].detach().log_softmax(-1)
    inside = mask[:, 1:]
    return ((p.exp() * (p - q)).sum(-1) * inside).sum() / inside.sum()


@faulty("misaligned")
def mask_one_late(student_logp, teacher_logp, mask):
    """Count a token where the one before it is supervised."""
    inside = mask[:, :-1]
    p, q = student_logp[:, 1:], teacher_logp[:, 1:]
    return ((p - q).detach() * p)[inside].sum() / inside.sum()


# --- non_causal ---------------------------------------------------------------------------------


@faulty("non_causal")
def total_cost_for_every_token(student_logp, teacher_logp, mask):
    total = ((student_logp - teacher_logp).detach() * mask).sum(1, keepdim=True)
    return (total * student_logp * mask).sum() / mask.sum()


@faulty("non_causal")
def cost_so_far(student_logp, teacher_logp, mask):
    """Accumulate from the left."""
    so_far = torch.cumsum((student_logp.detach() - teacher_logp) * mask, dim=1)
    return (so_far * student_logp)[mask].sum() / mask.sum()


@faulty("non_causal")
def square_of_the_response(student_logp, teacher_logp, mask):
    """k2 of whole responses."""
    log_ratio = ((student_logp - teacher_logp) * mask).sum(1)
    return 0.5 * log_ratio.square().sum() / mask.any(1).sum()


@faulty("non_causal")
def penalised_reward_for_every_token(student_logp, teacher_logp, reward, mask, beta=0.1):
    penalty = ((student_logp.detach() - teacher_logp) * mask).sum(1)
    advantage = reward - beta * penalty
    return -(advantage[:, None] * student_logp * mask).sum() / mask.sum()


@faulty("non_causal")
def centred_within_the_response(student_logp, teacher_logp, mask):
    advantage = (teacher_logp - student_logp.detach()) * mask
    centre = advantage.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return -((advantage - centre) * student_logp * mask).sum() / mask.sum()


@faulty("non_causal")
def group_of_total_costs(student_logp, teacher_logp, prompt, mask):
    """Minus the total cost of a response as its reward, less the mean of its group."""
    total = -((student_logp.detach() - teacher_logp) * mask).sum(1)
    same = (prompt[:, None] == prompt[None]).double()
    advantage = total - same @ total / same.sum(1)
    return -(advantage[:, None] * student_logp)[mask].sum() / mask.sum()
