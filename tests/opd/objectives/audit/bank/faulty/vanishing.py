"""Losses that teach nothing: the mean vanishes, or no gradient reaches the student."""

import torch

from tests.opd.objectives.audit.bank.entry import faulty

# --- zero_gradient ------------------------------------------------------------------------------


@faulty("zero_gradient")
def k1_direct(student_logp, teacher_logp, mask):
    """Minimise the mean log-ratio itself: the teacher drops out."""
    return ((student_logp - teacher_logp) * mask).sum() / mask.sum()


@faulty("zero_gradient")
def k1_direct_in_float32_by_rows(student_logp, teacher_logp, mask):
    gap = (student_logp.float() - teacher_logp.float()) * mask
    filled = mask.any(1)
    return (gap.sum(1)[filled] / mask.sum(1)[filled]).mean()


@faulty("zero_gradient")
def mean_kl_as_advantage(student_logits, teacher_logits, tokens, mask):
    """The exact KL of a prefix is the same for all of its tokens."""
    p = student_logits.log_softmax(-1)
    with torch.no_grad():
        kl = (p.exp() * (p - teacher_logits.log_softmax(-1))).sum(-1)
    taken = p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return (kl * taken)[mask].mean()


@faulty("zero_gradient")
def topk_kl_as_advantage(student_logits, teacher_topk, student_logp, mask):
    ids, q = teacher_topk
    with torch.no_grad():
        p = student_logits.log_softmax(-1).gather(-1, ids)
        advantage = -(p.exp() * (p - q)).sum(-1).clamp(min=-10, max=10)
    return -(advantage * student_logp * mask).sum() / mask.sum()


@faulty("zero_gradient")
def reward_of_the_others(student_logp, reward, prompt, mask):
    """Credit each row with the mean reward of the other rows of its group: the baseline alone."""
    same = (prompt[:, None] == prompt) & ~torch.eye(len(prompt), dtype=torch.bool)
    others = (same * reward).sum(1) / same.sum(1).clamp(min=1)
    return -(others[:, None] * student_logp * mask).sum() / mask.sum()


@faulty("zero_gradient")
def constant_advantage(student_logp, mask, advantage=-1.0):
    return -(advantage * student_logp)[mask].sum() / mask.any(1).sum()


@faulty("zero_gradient")
def entropy_as_advantage(student_logits, student_logp, mask, beta=0.1):
    entropy = torch.distributions.Categorical(logits=student_logits.detach()).entropy()
    return -(beta * entropy * student_logp * mask).sum() / mask.sum()


# --- no_student_gradient ------------------------------------------------------------------------


@faulty("no_student_gradient")
def detached_student(student_logp, teacher_logp, mask):
    cost = student_logp.detach() - teacher_logp
    return (cost * student_logp.detach() * mask).sum() / mask.sum()


@faulty("no_student_gradient")
def divergence_without_graph(student_logits, teacher_logits, mask):
    with torch.no_grad():
        p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)[mask].mean()


@faulty("no_student_gradient")
def ratio_to_itself(student_logp, teacher_logp, mask):
    """The ratio of a policy to itself, both with gradient: it is 1 and stays 1."""
    ratio = (student_logp - student_logp).exp()
    advantage = (teacher_logp - student_logp).detach()
    return -(ratio * advantage * mask).sum() / mask.sum()


@faulty("no_student_gradient")
def clamped_away(student_logits, teacher_logits, mask):
    """Clamp minus the KL at 0 from below."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    negative = (p.exp() * (q - p)).sum(-1)
    return negative.clamp(min=0)[mask].mean()


@faulty("no_student_gradient")
def sum_of_probabilities(student_logits, mask):
    """Probabilities add up to 1; what reaches the logits is rounding."""
    total = student_logits.softmax(-1).sum(-1)
    return -(total.log() * mask).sum() / mask.sum()


@faulty("no_student_gradient")
def teacher_on_the_students_choice(student_logits, teacher_logits, mask):
    """Score the student's most probable token by the teacher: the choice has no gradient."""
    best = student_logits.argmax(-1, keepdim=True)
    score = teacher_logits.detach().log_softmax(-1).gather(-1, best)[..., 0]
    return -(score * mask).sum() / mask.sum()


@faulty("no_student_gradient")
def scores_of_the_sampler(sampler_logp, teacher_logp, mask):
    """The log-probabilities of the rollout engine in place of the trainer's."""
    return ((sampler_logp - teacher_logp) * sampler_logp * mask).sum() / mask.sum()
