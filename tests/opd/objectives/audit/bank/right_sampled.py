"""Right losses: scores of sampled tokens, rewards, groups, ratios, and usual choices that warn."""

import torch
import torch.nn.functional as F

from tests.opd.objectives.audit.bank.entry import right

STALE = ("stale_biased",)

# --- reverse KL from sampled tokens -------------------------------------------------------------


@right("token_reverse_kl", caveats=STALE)
def score_of_the_log_ratio(student_logp, teacher_logp, mask):
    cost = (student_logp - teacher_logp).detach()
    return (cost * student_logp * mask).sum() / mask.sum()


@right("token_reverse_kl", caveats=STALE)
def k2(student_logp, teacher_logp, mask):
    half_square = 0.5 * (student_logp - teacher_logp) ** 2
    return half_square[mask].mean()


@right("token_reverse_kl", caveats=STALE)
def score_by_cross_entropy(student_logits, teacher_logp, tokens, mask):
    nll = F.cross_entropy(student_logits.transpose(1, 2), tokens, reduction="none")
    advantage = teacher_logp.detach() + nll.detach()
    return torch.sum(advantage * nll * mask) / torch.sum(mask)


@right("token_reverse_kl", caveats=STALE)
def score_with_exact_baseline(student_logits, teacher_logits, tokens, mask):
    """Subtract the exact KL of the prefix from the sampled log-ratio."""
    logp = student_logits.log_softmax(-1)
    with torch.no_grad():
        gap = logp - teacher_logits.log_softmax(-1)
        baseline = (logp.exp() * gap).sum(-1)
        cost = gap.gather(-1, tokens[..., None]).squeeze(-1) - baseline
    taken = logp.gather(-1, tokens[..., None]).squeeze(-1)
    return (cost * taken)[mask].mean()


@right("token_reverse_kl", caveats=STALE)
def score_by_one_hot(student_logits, teacher_logits, tokens, mask):
    """Select by one-hot vectors, flat over rows and positions."""
    vocabulary = student_logits.shape[-1]
    flat = mask.reshape(-1)
    chosen = F.one_hot(tokens.reshape(-1)[flat], vocabulary).to(student_logits.dtype)
    p = (student_logits.reshape(-1, vocabulary)[flat].log_softmax(-1) * chosen).sum(-1)
    q = (teacher_logits.detach().reshape(-1, vocabulary)[flat].log_softmax(-1) * chosen).sum(-1)
    return -((q - p.detach()) * p).sum() / flat.sum()


@right("token_reverse_kl")
def clipped_ratio(student_logp, teacher_logp, sampler_logp, mask, low=0.2, high=0.28):
    """PPO's pessimistic clip: on policy it is inactive."""
    advantage = (teacher_logp - student_logp).detach()
    ratio = torch.exp(student_logp - sampler_logp)
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - low, 1 + high) * advantage
    return -(torch.min(unclipped, clipped) * mask).sum() / mask.sum()


@right("token_reverse_kl")
def truncated_weight(student_logp, teacher_logp, sampler_logp, mask, limit=2.0):
    weight = (student_logp.detach() - sampler_logp).exp().clamp(max=limit)
    advantage = teacher_logp.detach() - student_logp.detach()
    return -(weight * advantage * student_logp)[mask].sum() / mask.sum()


@right("sequence_reverse_kl")
def cost_to_go(student_logp, teacher_logp, mask):
    cost = ((student_logp - teacher_logp).detach() * mask).flip(1).cumsum(1).flip(1)
    return (cost * student_logp * mask).sum() / mask.any(1).sum()


@right("discounted_reverse_kl(0.5)")
def discounted_cost_to_go(student_logp, teacher_logp, mask, gamma=0.5):
    cost = torch.where(mask, student_logp.detach() - teacher_logp, 0.0)
    later = torch.zeros_like(cost[:, 0])
    credit = torch.zeros_like(cost)
    for t in range(cost.shape[1] - 1, -1, -1):
        later = cost[:, t] + gamma * later
        credit[:, t] = later
    return (credit * student_logp)[mask].sum() / mask.sum()


@right("sequence_reverse_kl")
def exact_now_sampled_later(student_logits, teacher_logits, tokens, mask):
    """The exact KL of each prefix, and the later exact KLs as a cost of the token."""
    p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1).detach()
    now = torch.where(mask, (p.exp() * (p - q)).sum(-1), 0.0)
    later = now.detach().flip(1).cumsum(1).flip(1) - now.detach()
    taken = p.gather(-1, tokens[..., None])[..., 0]
    return (now + torch.where(mask, later * taken, 0.0)).sum() / mask.sum()


# --- rewards ------------------------------------------------------------------------------------


@right("expected_reward", caveats=STALE)
def reinforce(student_logp, reward, mask):
    total = 0.0
    for row in range(len(reward)):
        total = total - reward[row] * student_logp[row][mask[row]].sum()
    return total / mask.sum()


@right("expected_reward", caveats=STALE)
def leave_one_out(student_logp, reward, prompt, mask):
    same = (prompt[:, None] == prompt[None]).to(reward.dtype)
    others = same - torch.eye(len(reward), dtype=reward.dtype)
    baseline = (others @ reward) / others.sum(1).clamp(min=1)
    advantage = (reward - baseline).unsqueeze(1)
    return -(advantage * student_logp * mask).sum() / mask.sum()


@right("expected_reward", caveats=STALE)
def group_centred(student_logp, reward, prompt, mask):
    """GRPO without division by the standard deviation."""
    _, index, count = prompt.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(count), dtype=reward.dtype).index_add_(0, index, reward) / count
    advantage = (reward - mean[index])[:, None].expand_as(student_logp)
    return -(advantage * student_logp)[mask].sum() / mask.any(1).sum()


@right(warnings=("group_standardised",))
def group_standardised(student_logp, sampler_logp, reward, prompt, mask, epsilon=0.2, eps=1e-4):
    """GRPO as published, without its KL."""
    advantage = torch.zeros_like(reward)
    for index in prompt.unique():
        rows = prompt == index
        group = reward[rows]
        advantage[rows] = (group - group.mean()) / (group.std(unbiased=False) + eps)
    ratio = (student_logp - sampler_logp).exp()
    first = ratio * advantage[:, None]
    second = ratio.clamp(1 - epsilon, 1 + epsilon) * advantage[:, None]
    return -(torch.minimum(first, second) * mask).sum() / mask.sum()


@right(warnings=("group_standardised",))
def group_standardised_with_k3(student_logp, teacher_logp, reward, prompt, mask, beta=0.1):
    """GRPO as published, with k3 against the teacher as reference."""
    same = prompt[:, None] == prompt[None, :]
    size = same.sum(1)
    mean = (same * reward).sum(1) / size
    spread = ((same * (reward - mean[:, None]) ** 2).sum(1) / size).sqrt()
    advantage = (reward - mean) / (spread + 1e-6)
    log_ratio = teacher_logp - student_logp
    k3 = log_ratio.exp() - log_ratio - 1
    score = (student_logp - student_logp.detach()).exp() * advantage[:, None]
    return ((beta * k3 - score) * mask).sum() / mask.sum()


@right("mixture", "expected_reward", "token_reverse_kl", caveats=STALE)
def reward_and_exact_kl(student_logits, teacher_logits, student_logp, reward, mask, beta=0.5):
    p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1).detach()
    kl = (p.exp() * (p - q)).sum(-1)
    return ((beta * kl - reward[:, None] * student_logp) * mask).sum() / mask.sum()


@right("mixture", "expected_reward", "token_reverse_kl", caveats=STALE)
def leave_one_out_and_log_ratio(student_logp, teacher_logp, reward, prompt, mask, beta=0.2):
    """Advantage of the reward within the group, plus the teacher's log-ratio of each token."""
    same = (prompt[:, None] == prompt).to(reward).fill_diagonal_(0)
    advantage = reward - same @ reward / same.sum(1).clamp(min=1)
    per_token = advantage[:, None] + beta * (teacher_logp - student_logp.detach())
    return -(per_token * student_logp)[mask].sum() / mask.sum()


@right("mixture", "expected_reward", "sequence_reverse_kl")
def reward_minus_cost_to_go(student_logp, teacher_logp, reward, mask, beta=0.3):
    """The KL-penalised reward of a response, credited to its tokens without their past."""
    penalty = beta * (student_logp.detach() - teacher_logp) * mask
    to_come = penalty.flip(1).cumsum(1).flip(1)
    return -(((reward[:, None] - to_come) * student_logp)[mask]).sum()


# --- usual choices that warn --------------------------------------------------------------------


@right("token_reverse_kl", warnings=("sequence_mean",), caveats=STALE)
def row_mean_of_scores(student_logp, teacher_logp, mask):
    lengths = mask.sum(1)
    score = ((student_logp - teacher_logp).detach() * student_logp * mask).sum(1)
    return (score / lengths.clamp(min=1)).sum() / (lengths > 0).sum()


@right("expected_reward", warnings=("sequence_mean",), caveats=STALE)
def row_mean_of_rewards(student_logp, reward, mask):
    """The mean of the scores of a response, times its reward."""
    filled = mask.any(1)
    logp = (student_logp * mask).sum(1)[filled] / mask.sum(1)[filled]
    return -(reward[filled] * logp).mean()


@right(warnings=("batch_whitening",))
def whitened_log_ratio(student_logp, teacher_logp, mask, eps=1e-8):
    advantage = (teacher_logp - student_logp).detach()
    inside = advantage[mask]
    advantage = (advantage - inside.mean()) / (inside.std(unbiased=False) + eps)
    return -(advantage * student_logp * mask).sum() / mask.sum()


@right("none", warnings=("clipped",))
def clipped_advantage(student_logp, teacher_logp, mask, limit=1.0):
    advantage = (teacher_logp - student_logp.detach()).clamp(-limit, limit)
    return -(advantage * student_logp * mask).sum() / mask.sum()
