"""Every trajectory of a small tabular world, one by one, independently of `synthetic.exact.moments`.

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


def supported(student: Tensor, teacher: Tensor, name: str, k: int) -> Tensor:
    """(S, A) bool: the k most probable tokens of the model that the name begins with, or both."""
    theirs, ours = ((x[:, None, :] > x[:, :, None]).sum(-1) < k for x in (teacher, student))
    sets = {
        "teacher": theirs,
        "student": ours,
        "union": theirs | ours,
        "intersection": theirs & ours,
    }
    return sets[name.split("_")[0]]


def local_vectors(name: str, student: Tensor, teacher: Tensor, k: int = 1) -> Tensor:
    """(S, A, A) logit gradient of a local objective by state and sampled token, by hand."""
    a = student.shape[1]
    p, q = student.softmax(-1), teacher.softmax(-1)
    ratio = (p / q).log()
    score = torch.eye(a, dtype=p.dtype) - p[:, None, :]
    every = torch.ones(1, a, 1, dtype=p.dtype)
    if name in ("k1", "k2", "k3"):
        weight = {"k1": torch.ones_like(ratio), "k2": ratio, "k3": 1 - q / p}[name]
        return weight[..., None] * score
    if name == "full_forward_kl":
        return (p - q)[:, None, :] * every
    if name == "full_jsd":
        # at beta = 1/2; the derivative of its integrand by p is log(p/m) / 2
        slope = (2 * p / (p + q)).log() / 2
        return (p * (slope - (p * slope).sum(-1, keepdim=True)))[:, None, :] * every
    if name == "full_reverse_kl":
        return (p * (ratio - (p * ratio).sum(-1, keepdim=True)))[:, None, :] * every
    inside = supported(student, teacher, name, k)
    form = name.split("_topk", 1)[1]
    if form == "_and_sampled":
        rows = []
        for y in range(a):
            own = inside.clone()
            own[:, y] = True
            rows.append(matching(p * own, q * own))
        return torch.stack(rows, 1)
    head, mass = (p * ratio * inside).sum(-1, keepdim=True), (p * inside).sum(-1, keepdim=True)
    if form == "":
        vector = matching(p * inside, q * inside)
    elif form == "_bucket":
        tail = ((1 - mass) / (1 - (q * inside).sum(-1, keepdim=True))).log()
        binned = torch.where(inside, ratio, tail)
        vector = p * (binned - (p * binned).sum(-1, keepdim=True))
    else:
        extra = 0.0 if form in ("_stopped", "_sampled_tail") else 1.0
        vector = p * (inside * (ratio + extra) - head - extra * mass)
    vector = vector[:, None, :] * every
    if form.endswith("tail"):
        vector = vector + (~inside * ratio)[..., None] * score
    return vector


def matching(p: Tensor, q: Tensor) -> Tensor:
    """p' (log p'/q' - KL) of two tables renormalised, 0 where both are 0."""
    p, q = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (p, q))
    ratio = torch.where(p > 0, (p / q).log(), torch.zeros_like(p))
    return p * (ratio - (p * ratio).sum(-1, keepdim=True))


def credits(mdp, at: Paths, student: Tensor, teacher: Tensor, name: str, gamma: float) -> Tensor:
    """(N, T) weight of each token's score in an estimator of the gamma family."""
    weight, mask = probability(at, student), at.mask
    r = logp(at, student) - logp(at, teacher)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    mean_cost = (p.exp() * (p - q)).sum(-1)[at.states] * mask
    sampled = to_go(r, gamma)
    # V of the state at each step, by averaging over the paths that come by
    every = mean_by_state(at, weight, sampled, mdp.num_states)
    value = every[torch.arange(mdp.horizon), at.states].where(mask, torch.zeros(()))
    alive = weight[:, None] * mask
    later = to_go(mean_cost, gamma) - mean_cost
    return {
        "plain": lambda: sampled,
        "position_value": lambda: sampled - (alive * sampled).sum(0) / alive.sum(0),
        "local_kl": lambda: sampled - mean_cost,
        "value": lambda: sampled - value,
        "optimal": lambda: sampled - best_baseline(at, weight, sampled, student),
        "rb_immediate": lambda: sampled - r,
        "rb_future": lambda: r + later,
        "rb_all": lambda: later,
        "rb_all_value": lambda: later - (value - mean_cost),
        "kl_advantage": lambda: to_go(mean_cost, gamma),
    }[name]()


def best_baseline(at: Paths, weight: Tensor, credit: Tensor, student: Tensor) -> Tensor:
    """(N, T) the function of step and state whose subtraction leaves least variance.

    By weighted least squares of the whole estimate on all the columns score_t 1[c_t = c].
    """
    score, (num_states, _) = scores(at, student), student.shape
    target = torch.einsum("nt,ntsa->nsa", credit, score).flatten(1)
    visit = torch.nn.functional.one_hot(at.states, num_states)
    columns = torch.einsum("ntsa,ntc->nsatc", score, visit.to(score.dtype))
    root = weight.sqrt()[:, None]
    design = (root[..., None] * columns.flatten(3).flatten(1, 2)).flatten(0, 1)
    found = torch.linalg.lstsq(design, (root * target).flatten(), driver="gelsd").solution
    return found.view(at.states.shape[1], num_states)[torch.arange(at.states.shape[1]), at.states]


def estimates(
    mdp, at: Paths, student: Tensor, teacher: Tensor, name: str, gamma: float, k: int = 1
) -> Tensor:
    """(N, S, A) what each named estimator yields on each path, from its definition."""
    dense = {"rb_immediate", "rb_all", "rb_all_value"}
    family = {
        "plain",
        "position_value",
        "local_kl",
        "value",
        "optimal",
        "rb_future",
        "kl_advantage",
    }
    visit = torch.nn.functional.one_hot(at.states, mdp.num_states) * at.mask[..., None]
    result = torch.zeros(len(at.states), *student.shape, dtype=student.dtype)
    if name in dense | family:
        credit = credits(mdp, at, student, teacher, name, gamma)
        result = result + torch.einsum("nt,ntsa->nsa", credit, scores(at, student))
    if name not in family:
        local = "full_reverse_kl" if name in dense else name
        vectors = local_vectors(local, student, teacher, k)[at.states, at.tokens]
        result = result + torch.einsum("nta,nts->nsa", vectors, visit.to(vectors.dtype))
    return result


def moments(weight: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """(...) mean and total variance of samples (N, ...) under weights (N,)."""
    shaped = weight.view(-1, *(1,) * (sample.dim() - 1))
    mean = (shaped * sample).sum(0)
    return mean, (shaped * (sample - mean).square()).sum()


def mean_and_variance(
    mdp, student: Tensor, teacher: Tensor, name: str, gamma: float, k: int = 1
) -> tuple[Tensor, Tensor]:
    """(S, A) mean and total variance of an estimator over all paths."""
    at = paths(mdp)
    sample = estimates(mdp, at, student, teacher, name, gamma, k)
    return moments(probability(at, student), sample)
