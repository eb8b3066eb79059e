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
    num_states, num_actions = student.shape
    visit = torch.nn.functional.one_hot(at.states, num_states) * at.mask[..., None]
    away = torch.nn.functional.one_hot(at.tokens, num_actions) - student.softmax(-1)[at.states]
    return visit[..., None] * away[..., None, :]


def to_go(cost: Tensor, gamma: float) -> Tensor:
    """(N, T) sum_{u >= t} gamma^(u-t) of the costs along each path."""
    steps = range(cost.shape[1])
    return torch.stack([sum(gamma ** (u - t) * cost[:, u] for u in steps[t:]) for t in steps], 1)


def mean_by_state(at: Paths, weight: Tensor, x: Tensor, num_states: int) -> Tensor:
    """(T, S) mean of x (N, T) over the paths in state s at step t; NaN where there are none."""
    visit = torch.nn.functional.one_hot(at.states, num_states) * at.mask[..., None]
    mass = weight[:, None, None] * visit
    return (mass * x[..., None]).sum(0) / mass.sum(0)


def estimates(mdp, at: Paths, student: Tensor, teacher: Tensor, name: str, gamma: float) -> Tensor:
    """(N, S, A) what each named estimator yields on each path, from its definition."""
    weight, mask = probability(at, student), at.mask
    r = logp(at, student) - logp(at, teacher)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    local = (p.exp() * (p - q)).sum(-1)
    mean_cost = local[at.states] * mask
    sampled = to_go(r, gamma)
    # V of the state at each step, by averaging over the paths that come by
    every = mean_by_state(at, weight, sampled, mdp.num_states)
    value = every[torch.arange(mdp.horizon), at.states].where(mask, torch.zeros(()))
    alive = weight[:, None] * mask
    later = to_go(mean_cost, gamma) - mean_cost
    credit = {
        "plain": sampled,
        "position_mean": sampled - (alive * sampled).sum(0) / alive.sum(0),
        "value": sampled - value,
        "rb_immediate": sampled - r,
        "rb_future": r + later,
        "rb_all": later,
        "rb_all_value": later - (value - mean_cost),
    }[name]
    result = torch.einsum("nt,ntsa->nsa", credit, scores(at, student))
    if name in ("rb_immediate", "rb_all", "rb_all_value"):
        visits = (torch.nn.functional.one_hot(at.states, mdp.num_states) * mask[..., None]).sum(1)
        result = result + visits[..., None] * (p.exp() * (p - q - local[:, None]))
    return result


def mean_and_variance(mdp, student, teacher, name: str, gamma: float) -> tuple[Tensor, Tensor]:
    """(S, A) mean and total variance of an estimator over all paths."""
    at = paths(mdp)
    sample = estimates(mdp, at, student, teacher, name, gamma)
    weight = probability(at, student)[:, None, None]
    mean = (weight * sample).sum(0)
    return mean, (weight * (sample - mean).square()).sum()
