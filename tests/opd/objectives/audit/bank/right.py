"""Right losses: divergences over the whole vocabulary or a support, and the sampled reverse KL."""

import math

import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from tests.opd.objectives.audit.bank.entry import right

# --- reverse KL over the vocabulary -------------------------------------------------------------


@right("token_reverse_kl")
def reverse_kl_token_mean(student_logits, teacher_logits, mask):
    p = student_logits.log_softmax(-1)
    q = teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return (kl * mask).sum() / mask.sum()


@right("token_reverse_kl")
def reverse_kl_by_kl_div(student_logits, teacher_logits, mask):
    """Swap the arguments of kl_div: its first is the distribution in the denominator."""
    with torch.no_grad():
        teacher = F.log_softmax(teacher_logits[mask], dim=-1)
    student = F.log_softmax(student_logits[mask], dim=-1)
    return F.kl_div(teacher, student, reduction="batchmean", log_target=True)


@right("token_reverse_kl")
def reverse_kl_in_float32(student_logits, teacher_logits, mask, eps=1e-8):
    p = F.log_softmax(student_logits.float(), dim=-1)
    q = F.log_softmax(teacher_logits.float().detach(), dim=-1)
    per_token = torch.where(mask, torch.einsum("btv,btv->bt", p.exp(), p - q), 0.0)
    return per_token.sum() / (mask.float().sum() + eps)


@right("token_reverse_kl")
def reverse_kl_row_by_row(student_logits, teacher_logits, mask):
    """Slice each response up to its length: padding is on the right."""
    total, count = 0.0, 0
    for i, length in enumerate(mask.sum(1).tolist()):
        p = student_logits[i, :length].log_softmax(-1)
        q = teacher_logits[i, :length].detach().log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum()
        count += length
    return total / count


@right("token_reverse_kl")
def reverse_kl_of_categoricals(student_logits, teacher_logits, mask):
    student = Categorical(logits=student_logits[mask])
    teacher = Categorical(logits=teacher_logits[mask].detach())
    return kl_divergence(student, teacher).mean()


@right("token_reverse_kl")
def reverse_kl_over_tokens_and_vocabulary(student_logits, teacher_logits, mask):
    """Average over the vocabulary, too: a constant factor."""
    q = teacher_logits.detach().log_softmax(-1)
    terms = F.kl_div(q, student_logits.log_softmax(-1), reduction="none", log_target=True)
    return terms[mask].mean()


@right("token_reverse_kl")
def reverse_kl_with_eps_in_logs(student_logits, teacher_logits, mask, eps=1e-8):
    """Take logs of probabilities plus an eps far below any probability that matters."""
    p = student_logits.softmax(-1)
    q = teacher_logits.softmax(-1).detach()
    kl = (p * (torch.log(p + eps) - torch.log(q + eps))).sum(dim=-1)
    return kl.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


@right("token_reverse_kl")
def reverse_kl_row_mean(student_logits, teacher_logits, mask):
    """Mean of each response, then over the responses that have tokens."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).masked_fill(~mask, 0.0)
    lengths = mask.sum(1)
    present = lengths > 0
    return (kl.sum(1)[present] / lengths[present]).mean()


@right("token_reverse_kl")
def reverse_kl_prompt_mean(student_logits, teacher_logits, mask, prompt):
    """Token mean of each prompt, then over prompts that have tokens."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    means = []
    for index in prompt.unique():
        inside = mask & (prompt == index)[:, None]
        if inside.any():
            means.append(kl[inside].mean())
    return torch.stack(means).mean()


@right("token_reverse_kl")
def reverse_kl_sum_over_rows(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return kl[mask].sum() / mask.any(dim=1).sum()


@right("token_reverse_kl")
def reverse_kl_as_expected_score(student_logits, teacher_logits, mask):
    """Sum over all tokens of probability times advantage times score, without sampling."""
    logp = student_logits.log_softmax(-1)
    with torch.no_grad():
        weight = logp.exp() * (teacher_logits.log_softmax(-1) - logp)
    return -(weight * logp).sum(-1)[mask].sum() / mask.sum()


@right("token_reverse_kl", caveats=("random",))
def reverse_kl_on_random_tokens(student_logits, teacher_logits, mask, keep=0.8):
    """Keep a random part of the tokens, and divide by the rate."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    kept = mask & (torch.rand(mask.shape) < keep)
    return (kl * kept).sum() / (keep * mask.sum())


# --- forward KL and Jensen-Shannon --------------------------------------------------------------


@right("token_forward_kl")
def forward_kl_by_kl_div(student_logits, teacher_logits, mask):
    target = teacher_logits.log_softmax(-1).detach()
    loss = F.kl_div(student_logits.log_softmax(-1), target, reduction="none", log_target=True)
    return loss.sum(-1).mul(mask).sum().div(mask.sum())


@right("token_forward_kl")
def soft_cross_entropy(student_logits, teacher_logits, mask):
    return F.cross_entropy(student_logits[mask], teacher_logits[mask].softmax(-1).detach())


@right("token_forward_kl")
def k3_direct(student_logp, teacher_logp, mask):
    """Back-propagate through k3: the gradient of the forward KL, on policy."""
    log_ratio = teacher_logp - student_logp
    return ((log_ratio.exp() - 1 - log_ratio) * mask).sum() / mask.sum()


@right("token_forward_kl")
def forward_kl_to_a_mixture_with_itself(student_logits, teacher_logits, mask, alpha=0.3):
    """Skew the goal towards the student without gradient: a factor alpha."""
    p = student_logits.log_softmax(-1)
    goal = alpha * teacher_logits.detach().softmax(-1) + (1 - alpha) * p.detach().exp()
    return -((goal * p).sum(-1) * mask).sum() / mask.sum()


@right("token_jsd(0.5)")
def jsd_of_logs(student_logits, teacher_logits, mask, beta=0.5):
    p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1).detach()
    parts = torch.stack([p + math.log(1 - beta), q + math.log(beta)])
    m = torch.logsumexp(parts, dim=0)
    to_teacher = F.kl_div(m, q, reduction="none", log_target=True)
    to_student = F.kl_div(m, p, reduction="none", log_target=True)
    jsd = beta * to_teacher + (1 - beta) * to_student
    return jsd[mask].sum() / mask.sum()


@right("token_jsd(0.1)")
def jsd_near_the_student(student_logits, teacher_logits, mask, beta=0.1):
    p, q = student_logits.softmax(-1), teacher_logits.detach().softmax(-1)
    m = beta * q + (1 - beta) * p
    from_teacher = (torch.xlogy(q, q) - q * m.log()).sum(-1)
    from_student = (p * (p.log() - m.log())).sum(-1)
    loss = beta * from_teacher + (1 - beta) * from_student
    return (loss * mask).sum() / mask.sum()


@right("token_jsd(0.5)")
def jsd_with_a_constant_mixture(student_logits, teacher_logits, mask):
    """Cut the gradient of the mixture: its parts cancel, so that nothing is lost."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    m = torch.logaddexp(p.detach(), q) - math.log(2)
    return 0.5 * ((p.exp() * (p - m)).sum(-1) * mask).sum() / mask.sum()


@right("mixture", "token_reverse_kl", "token_forward_kl")
def both_directions(student_logits, teacher_logits, mask, alpha=0.5):
    p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1).detach()
    reverse = (p.exp() * (p - q)).sum(-1)
    forward = (q.exp() * (q - p)).sum(-1)
    return (alpha * reverse + (1 - alpha) * forward)[mask].mean()


# --- supports -----------------------------------------------------------------------------------


@right("topk_reverse_kl(renormalised, teacher)")
def teacher_topk_renormalised(student_logits, teacher_topk, mask):
    ids, logp = teacher_topk
    q = logp - logp.logsumexp(-1, keepdim=True)
    chosen = student_logits.gather(-1, ids)
    p = chosen - chosen.logsumexp(-1, keepdim=True)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()


@right("topk_reverse_kl(renormalised, student)")
def student_topk_renormalised(student_topk, teacher_logits, mask):
    ids, logp = student_topk
    q = teacher_logits.detach().gather(-1, ids).log_softmax(-1)
    p = logp.log_softmax(-1)
    return F.kl_div(q[mask], p[mask], reduction="sum", log_target=True) / mask.sum()


@right("topk_reverse_kl(bucket, teacher)")
def teacher_topk_with_the_rest(student_logits, teacher_logits, mask, k=2):
    q_all = teacher_logits.detach().log_softmax(-1)
    p_all = student_logits.log_softmax(-1)
    q, ids = q_all.topk(k, -1)
    p = p_all.gather(-1, ids)
    kl = (p.exp() * (p - q)).sum(-1)
    outside = torch.ones_like(q_all, dtype=torch.bool).scatter(-1, ids, False)
    p_rest = p_all.masked_fill(~outside, -math.inf).logsumexp(-1)
    q_rest = q_all.masked_fill(~outside, -math.inf).logsumexp(-1)
    return (kl + p_rest.exp() * (p_rest - q_rest))[mask].mean()


@right("topk_reverse_kl(bucket, teacher)")
def all_but_one_and_the_rest(student_logits, teacher_logits, mask):
    """A support of all tokens but the teacher's least probable, which is the rest."""
    ids = teacher_logits.detach().argsort(-1, descending=True)[..., :3]
    p, q = (x.log_softmax(-1) for x in (student_logits, teacher_logits.detach()))
    inside = torch.zeros_like(q, dtype=torch.bool).scatter(-1, ids, True)

    def parts(logp):
        rest = logp.masked_fill(inside, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logp.gather(-1, ids), rest], -1)

    return F.kl_div(parts(q), parts(p), reduction="none", log_target=True).sum(-1)[mask].mean()


@right("topk_reverse_kl(renormalised, teacher)")
def teacher_top_8(student_logits, teacher_logits, mask):
    top = teacher_logits.detach().topk(8, dim=-1)
    p = student_logits.gather(-1, top.indices).log_softmax(-1)
    q = top.values.log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()


@right("topk_reverse_kl(renormalised, student)")
def student_top_20(student_logits, teacher_logits, mask, top_k=20):
    ids = student_logits.detach().topk(top_k, dim=-1).indices
    p = torch.log_softmax(torch.take_along_dim(student_logits, ids, -1), -1)
    q = torch.log_softmax(torch.take_along_dim(teacher_logits, ids, -1), -1).detach()
    return (p.exp() * (p - q)).sum(-1)[mask].mean()


@right("token_reverse_kl", caveats=("stale_biased",))
def constant_head_and_sampled_tail(student_logits, teacher_logits, tokens, mask, k=2):
    """Exact on the support, with the log-ratio held constant; a sampled score outside it."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    ids = q.topk(k, -1).indices
    log_ratio = (p - q).detach()
    head = (p.exp() * log_ratio).gather(-1, ids).sum(-1)
    outside = (ids != tokens[..., None]).all(-1)
    chosen = tokens[..., None]
    tail = (log_ratio.gather(-1, chosen) * p.gather(-1, chosen))[..., 0] * outside
    return ((head + tail) * mask).sum() / mask.sum()
