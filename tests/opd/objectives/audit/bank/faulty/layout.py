"""Losses that depend on masked entries, on padding, or on what else is in the batch."""

import torch
import torch.nn.functional as F

from tests.opd.objectives.audit.bank.entry import faulty

# --- mask_leak ----------------------------------------------------------------------------------


@faulty("mask_leak")
def mask_forgotten(student_logits, teacher_logits):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@faulty("mask_leak")
def mask_in_the_denominator_only(student_logp, teacher_logp, mask):
    return ((student_logp - teacher_logp).detach() * student_logp).sum() / mask.sum()


@faulty("mask_leak")
def returns_of_the_padding(student_logp, teacher_logp, mask):
    """Accumulate costs from the right end of the batch, garbage included."""
    cost = (student_logp - teacher_logp).detach()
    to_go = cost.flip(1).cumsum(1).flip(1)
    return (to_go * student_logp * mask).sum() / mask.sum()


@faulty("mask_leak")
def baseline_of_the_padding(student_logp, teacher_logp, mask):
    advantage = (teacher_logp - student_logp).detach()
    advantage = advantage - advantage.mean(1, keepdim=True)
    return -(advantage * student_logp * mask).sum() / mask.sum()


@faulty("mask_leak")
def padding_by_token_id(student_logits, teacher_logits, tokens, mask, pad_token_id=0):
    """Guess the mask from the ids."""
    inside = tokens != pad_token_id
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * inside).sum() / inside.sum()


@faulty("mask_leak")
def one_column_too_many(student_logits, teacher_logits, mask):
    """Supervise the position behind the end, too."""
    wide = mask.clone()
    wide[:, 1:] |= mask[:, :-1]
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return F.kl_div(q[wide], p[wide], log_target=True, reduction="sum") / mask.sum()


@faulty("mask_leak")
def mask_inverted(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).masked_fill(mask, 0).sum() / mask.sum()


# --- padding_dependent --------------------------------------------------------------------------


@faulty("padding_dependent")
def mask_in_the_numerator_only(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * mask).mean()


@faulty("padding_dependent")
def divided_by_the_width(student_logp, teacher_logp, mask):
    score = (student_logp - teacher_logp).detach() * student_logp * mask
    return score.sum() / mask.shape[1]


@faulty("padding_dependent")
def divided_by_all_rows(student_logp, reward, mask):
    return -(reward * (student_logp * mask).sum(1)).mean()


@faulty("padding_dependent")
def row_means_over_all_rows(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1) * mask
    return (kl.sum(1) / mask.sum(1).clamp(min=1)).mean()


@faulty("padding_dependent")
def batchmean(student_logits, teacher_logits, mask):
    """The reduction of kl_div that divides by the first dimension."""
    inside = mask[..., None]
    p = student_logits.log_softmax(-1) * inside
    q = teacher_logits.detach().softmax(-1) * inside
    return F.kl_div(p, q, reduction="batchmean")


@faulty("padding_dependent")
def last_column_dropped(student_logits, teacher_logits, mask):
    """Cut the last column, in the hope that it is padding."""
    p, q = student_logits[:, :-1].log_softmax(-1), teacher_logits[:, :-1].detach().log_softmax(-1)
    inside = mask[:, :-1]
    return (p.exp() * (p - q)).sum(-1)[inside].sum() / inside.sum()


@faulty("padding_dependent")
def prompts_without_tokens_count(student_logp, teacher_logp, prompt, mask):
    """Sum over the rows of each prompt, and average over all prompts, empty ones included."""
    score = ((student_logp.detach() - teacher_logp) * student_logp * mask).sum(1)
    return torch.stack([score[prompt == x].sum() for x in prompt.unique()]).mean()


@faulty("padding_dependent")
def mean_of_an_empty_row(student_logits, teacher_logits, mask):
    """The mean of an empty row is NaN, but its gradient reaches nothing: the rest is divided."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return torch.stack([kl[i][mask[i]].mean() for i in range(len(kl))]).mean()


# --- batch_dependent ----------------------------------------------------------------------------


@faulty("batch_dependent")
def divided_by_the_longest(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[mask].sum() / mask.sum(1).max()


@faulty("batch_dependent")
def divided_by_its_own_value(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    loss = ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()
    return loss / loss.detach()


@faulty("batch_dependent")
def softmax_over_the_rows(student_logits, teacher_logits, mask):
    """Weigh rows by a softmax of their KL over the batch."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    rows = ((p.exp() * (p - q)).sum(-1) * mask).sum(1)
    rows = rows[mask.any(1)]
    return (rows.detach().softmax(0) * rows).sum()


@faulty("batch_dependent")
def square_of_the_batch_mean(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[mask].mean().square()


@faulty("batch_dependent")
def worst_half_of_the_tokens(student_logits, teacher_logits, mask):
    """Train on the tokens of the batch whose KL is above the median."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[mask]
    return kl[kl.detach() >= kl.detach().median()].mean()


@faulty("batch_dependent")
def divided_by_the_root_of_the_count(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum().sqrt()


@faulty("batch_dependent")
def divided_by_the_largest(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1) * mask
    return (kl / kl.detach().max().clamp(min=1e-6)).sum() / mask.sum()
