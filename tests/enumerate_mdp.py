"""Every trajectory of a small tabular world, one by one, independently of `synthetic.exact`.

Shapes: N paths, T steps, S states, A actions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paths:
    """states, tokens, mask (N, T); world (N,): probability of start and moves, given the tokens."""

    states: Tensor
    tokens: Tensor
    mask: Tensor
    world: Tensor


def paths(mdp) -> Paths:
    """All start, token and next-state sequences of positive probability under the world."""
    found = []

    def walk(state, step, states, tokens, probability):
        if probability == 0:
            return
        if step == mdp.horizon or state == mdp.end:
            found.append((states, tokens, probability))
            return
        for token in range(mdp.num_actions):
            # the state after the last token does not matter, so it is summed over
            moves = mdp.transition[state, token].tolist() if step + 1 < mdp.horizon else [1.0]
            for after, chance in enumerate(moves):
                walk(after, step + 1, [*states, state], [*tokens, token], probability * chance)

    for state, chance in enumerate(mdp.start.tolist()):
        walk(state, 0, [], [], chance)
    t, filler = mdp.horizon, mdp.end or 0
    return Paths(
        states=torch.tensor([s + [filler] * (t - len(s)) for s, _, _ in found]),
        tokens=torch.tensor([y + [0] * (t - len(y)) for _, y, _ in found]),
        mask=torch.tensor([[i < len(y) for i in range(t)] for _, y, _ in found]),
        world=torch.tensor([w for _, _, w in found], dtype=torch.float64),
    )


def logp(at: Paths, logits: Tensor) -> Tensor:
    """(N, T) log-probability of each token, 0 where there is none; gradients flow through."""
    chosen = logits.log_softmax(-1)[at.states].gather(-1, at.tokens[..., None])[..., 0]
    return torch.where(at.mask, chosen, torch.zeros_like(chosen))


def probability(at: Paths, student: Tensor) -> Tensor:
    """(N,) probability of each path under the student; gradients flow through."""
    return at.world * logp(at, student).sum(1).exp()


def sequence_kl(at: Paths, student: Tensor, teacher: Tensor) -> Tensor:
    """E[log student(sequence) - log teacher(sequence)], the sum over paths written out."""
    return (probability(at, student) * (logp(at, student) - logp(at, teacher)).sum(1)).sum()


def frozen_kl(at: Paths, student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of the local KLs along each path, paths weighted by a detached probability."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    local = (p.exp() * (p - q)).sum(-1)[at.states] * at.mask
    return (probability(at, student).detach() * local.sum(1)).sum()


def scores(at: Paths, student: Tensor) -> Tensor:
    """(N, T, S, A) gradient of each token's log-probability, by hand."""
    n, t = at.states.shape
    score = torch.zeros(n, t, *student.shape, dtype=torch.float64)
    p = student.softmax(-1)
    for i in range(n):
        for j in range(t):
            if at.mask[i, j]:
                state, token = at.states[i, j], at.tokens[i, j]
                score[i, j, state] = -p[state]
                score[i, j, state, token] += 1
    return score


def discounted_value(mdp, student: Tensor, teacher: Tensor, gamma: float, steps: int) -> Tensor:
    """(S,) expected discounted cost of `steps` more steps, by recursion over tokens and moves."""
    p = student.softmax(-1)
    r = student.log_softmax(-1) - teacher.log_softmax(-1)
    if steps == 0:
        return torch.zeros(mdp.num_states, dtype=torch.float64)
    later = discounted_value(mdp, student, teacher, gamma, steps - 1)
    value = torch.zeros(mdp.num_states, dtype=torch.float64)
    for state in range(mdp.num_states):
        for token in range(mdp.num_actions):
            if state != mdp.end:
                after = (mdp.transition[state, token] * later).sum()
                value[state] += p[state, token] * (r[state, token] + gamma * after)
    return value


def estimates(mdp, student: Tensor, teacher: Tensor, name: str, gamma: float) -> Tensor:
    """(N, S, A) what each named estimator yields on each path, from its definition."""
    at = paths(mdp)
    score, mask = scores(at, student), at.mask.to(torch.float64)
    r = logp(at, student) - logp(at, teacher)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    local = (p.exp() * (p - q)).sum(-1)
    mean_cost = local[at.states] * mask
    value = [
        discounted_value(mdp, student, teacher, gamma, mdp.horizon - t)
        for t in range(mdp.horizon + 1)
    ]
    weight = probability(at, student)
    result = torch.zeros(len(weight), *student.shape, dtype=torch.float64)
    for t in range(mdp.horizon):
        later = mean_cost if name in ("rb_future", "rb_all", "rb_all_value") else r
        togo = sum(
            (gamma ** (u - t) * later[:, u] for u in range(t + 1, mdp.horizon)),
            start=torch.zeros_like(weight),
        )
        here = value[t][at.states[:, t]] * mask[:, t]
        credit = togo if name.startswith("rb_") and name != "rb_future" else togo + r[:, t]
        if name == "value":
            credit = credit - here
        if name == "position_mean":
            alive = weight * mask[:, t]
            credit = credit - (alive * here).sum() / alive.sum().clamp(min=1e-300)
        if name == "rb_all_value":
            credit = credit - (here - mean_cost[:, t])
        result += credit[:, None, None] * score[:, t]
        if name in ("rb_immediate", "rb_all", "rb_all_value"):
            gradient = p.exp() * (p - q - local[:, None])
            visit = torch.nn.functional.one_hot(at.states[:, t], mdp.num_states) * mask[:, t, None]
            result += visit[..., None] * gradient
    return result


def mean_and_variance(mdp, student, teacher, name: str, gamma: float) -> tuple[Tensor, Tensor]:
    """(S, A) mean and total variance of an estimator over all paths."""
    sample = estimates(mdp, student, teacher, name, gamma)
    weight = probability(paths(mdp), student)[:, None, None]
    mean = (weight * sample).sum(0)
    return mean, (weight * (sample - mean).square()).sum()
