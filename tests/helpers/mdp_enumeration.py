"""Enumerate every trajectory of a small tabular world, independently of the exact engine.

Shapes: N paths, T steps, S states, A actions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paths:
    """All paths of a world."""

    states: Tensor
    """(N, T) state before each token."""
    tokens: Tensor
    """(N, T) token ids."""
    mask: Tensor
    """(N, T) False after the end of a path."""
    world: Tensor
    """(N,) probability of start and transitions, given the tokens."""


def enumerate_paths(mdp) -> Paths:
    """Return all start, token and next-state sequences of positive probability in the world."""
    sequences = []

    def walk(state, step, states, tokens, probability):
        if probability == 0:
            return
        if step == mdp.horizon or state == mdp.end:
            sequences.append((states, tokens, probability))
            return
        for token in range(mdp.num_actions):
            # the state after the last token does not matter, so it is summed over
            moves = mdp.transition[state, token].tolist() if step + 1 < mdp.horizon else [1.0]
            for next_state, probability_of_move in enumerate(moves):
                walk(
                    next_state,
                    step + 1,
                    [*states, state],
                    [*tokens, token],
                    probability * probability_of_move,
                )

    for state, probability_of_move in enumerate(mdp.start.tolist()):
        walk(state, 0, [], [], probability_of_move)
    t, filler = mdp.horizon, mdp.end or 0
    return Paths(
        states=torch.tensor([s + [filler] * (t - len(s)) for s, _, _ in sequences]),
        tokens=torch.tensor([y + [0] * (t - len(y)) for _, y, _ in sequences]),
        mask=torch.tensor([[i < len(y) for i in range(t)] for _, y, _ in sequences]),
        world=torch.tensor([w for _, _, w in sequences], dtype=torch.float64),
    )


def logp(paths: Paths, logits: Tensor) -> Tensor:
    """Return (N, T) log-probabilities of the tokens, 0 where there is none, with gradients."""
    token_logp = logits.log_softmax(-1)[paths.states].gather(-1, paths.tokens[..., None])[..., 0]
    return torch.where(paths.mask, token_logp, torch.zeros_like(token_logp))


def probability(paths: Paths, student: Tensor) -> Tensor:
    """Return (N,) the probability of each path under the student; gradients flow through."""
    return paths.world * logp(paths, student).sum(1).exp()


def sequence_kl(paths: Paths, student: Tensor, teacher: Tensor) -> Tensor:
    """Return E[log student(sequence) - log teacher(sequence)] as a sum over paths."""
    return (
        probability(paths, student) * (logp(paths, student) - logp(paths, teacher)).sum(1)
    ).sum()


def frozen_kl(paths: Paths, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum of local KLs along each path, weighted by detached path probabilities."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    local = (p.exp() * (p - q)).sum(-1)[paths.states] * paths.mask
    return (probability(paths, student).detach() * local.sum(1)).sum()


def scores(paths: Paths, student: Tensor) -> Tensor:
    """Return (N, T, S, A) gradients of each token's log-probability, from the formula."""
    num_states, num_actions = student.shape
    visit = torch.nn.functional.one_hot(paths.states, num_states) * paths.mask[..., None]
    score = (
        torch.nn.functional.one_hot(paths.tokens, num_actions) - student.softmax(-1)[paths.states]
    )
    return visit[..., None] * score[..., None, :]


def costs_to_go(cost: Tensor, gamma: float) -> Tensor:
    """Return (N, T) sum_{u >= t} gamma^(u-t) of the costs along each path."""
    steps = range(cost.shape[1])
    return torch.stack([sum(gamma ** (u - t) * cost[:, u] for u in steps[t:]) for t in steps], 1)


def mean_by_state(paths: Paths, weight: Tensor, x: Tensor, num_states: int) -> Tensor:
    """Return (T, S) the mean of x (N, T) over paths in state s at step t; NaN where none is."""
    visit = torch.nn.functional.one_hot(paths.states, num_states) * paths.mask[..., None]
    mass = weight[:, None, None] * visit
    return (mass * x[..., None]).sum(0) / mass.sum(0)


def support_mask(student: Tensor, teacher: Tensor, name: str, k: int) -> Tensor:
    """Return (S, A) bool: the k most probable tokens of the model(s) that the name starts with."""
    teacher_mask, student_mask = (
        (x[:, None, :] > x[:, :, None]).sum(-1) < k for x in (teacher, student)
    )
    sets = {
        "teacher": teacher_mask,
        "student": student_mask,
        "union": teacher_mask | student_mask,
        "intersection": teacher_mask & student_mask,
    }
    return sets[name.split("_")[0]]


def local_vectors(name: str, student: Tensor, teacher: Tensor, k: int = 1) -> Tensor:
    """Return (S, A, A) logit gradients of a local objective by state and sampled token."""
    a = student.shape[1]
    p, q = student.softmax(-1), teacher.softmax(-1)
    ratio = (p / q).log()
    score = torch.eye(a, dtype=p.dtype) - p[:, None, :]
    all_tokens = torch.ones(1, a, 1, dtype=p.dtype)
    if name in ("k1", "k2", "k3", "negative_log_likelihood"):
        one = torch.ones_like(ratio)
        weight = {"k1": one, "k2": ratio, "k3": 1 - q / p, "negative_log_likelihood": -one}[name]
        return weight[..., None] * score
    if name == "full_forward_kl":
        return (p - q)[:, None, :] * all_tokens
    if name == "full_jsd":
        # at beta = 1/2; the derivative of its integrand by p is log(p/m) / 2
        slope = (2 * p / (p + q)).log() / 2
        return (p * (slope - (p * slope).sum(-1, keepdim=True)))[:, None, :] * all_tokens
    if name == "full_reverse_kl":
        return (p * (ratio - (p * ratio).sum(-1, keepdim=True)))[:, None, :] * all_tokens
    inside = support_mask(student, teacher, name, k)
    form = name.split("_topk", 1)[1]
    if form == "_and_sampled":
        rows = []
        for y in range(a):
            extended = inside.clone()
            extended[:, y] = True
            rows.append(renormalised_kl_gradient(p * extended, q * extended))
        return torch.stack(rows, 1)
    head, mass = (p * ratio * inside).sum(-1, keepdim=True), (p * inside).sum(-1, keepdim=True)
    if form == "":
        vector = renormalised_kl_gradient(p * inside, q * inside)
    elif form == "_bucket":
        tail = ((1 - mass) / (1 - (q * inside).sum(-1, keepdim=True))).log()
        binned = torch.where(inside, ratio, tail)
        vector = p * (binned - (p * binned).sum(-1, keepdim=True))
    else:
        extra = 0.0 if form in ("_stopped", "_sampled_tail") else 1.0
        vector = p * (inside * (ratio + extra) - head - extra * mass)
    vector = vector[:, None, :] * all_tokens
    if form.endswith("tail"):
        vector = vector + (~inside * ratio)[..., None] * score
    return vector


def renormalised_kl_gradient(p: Tensor, q: Tensor) -> Tensor:
    """Return p' (log p'/q' - KL) of two renormalised tables, 0 where both are 0."""
    p, q = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (p, q))
    ratio = torch.where(p > 0, (p / q).log(), torch.zeros_like(p))
    return p * (ratio - (p * ratio).sum(-1, keepdim=True))


def token_credits(
    mdp, paths: Paths, student: Tensor, teacher: Tensor, name: str, gamma: float
) -> Tensor:
    """Return (N, T) the weight of each token's score in an estimator of the gamma family."""
    weight, mask = probability(paths, student), paths.mask
    r = logp(paths, student) - logp(paths, teacher)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    mean_cost = (p.exp() * (p - q)).sum(-1)[paths.states] * mask
    sampled = costs_to_go(r, gamma)
    # V of the state at each step, by averaging over the paths through it
    state_means = mean_by_state(paths, weight, sampled, mdp.num_states)
    value = state_means[torch.arange(mdp.horizon), paths.states].where(mask, torch.zeros(()))
    alive = weight[:, None] * mask
    later = costs_to_go(mean_cost, gamma) - mean_cost
    return {
        "plain": lambda: sampled,
        "position_value": lambda: sampled - (alive * sampled).sum(0) / alive.sum(0),
        "local_kl": lambda: sampled - mean_cost,
        "value": lambda: sampled - value,
        "optimal": lambda: sampled - best_baseline(paths, weight, sampled, student),
        "rb_immediate": lambda: sampled - r,
        "rb_future": lambda: r + later,
        "rb_all": lambda: later,
        "rb_all_value": lambda: later - (value - mean_cost),
        "kl_advantage": lambda: costs_to_go(mean_cost, gamma),
    }[name]()


def best_baseline(paths: Paths, weight: Tensor, credit: Tensor, student: Tensor) -> Tensor:
    """Return (N, T) the function of step and state whose subtraction leaves least variance.

    Solved by weighted least squares of the estimate on all the columns score_t 1[c_t = c].
    """
    score, (num_states, _) = scores(paths, student), student.shape
    target = torch.einsum("nt,ntsa->nsa", credit, score).flatten(1)
    visit = torch.nn.functional.one_hot(paths.states, num_states)
    columns = torch.einsum("ntsa,ntc->nsatc", score, visit.to(score.dtype))
    root = weight.sqrt()[:, None]
    design = (root[..., None] * columns.flatten(3).flatten(1, 2)).flatten(0, 1)
    solution = torch.linalg.lstsq(design, (root * target).flatten(), driver="gelsd").solution
    return solution.view(paths.states.shape[1], num_states)[
        torch.arange(paths.states.shape[1]), paths.states
    ]


def path_estimates(
    mdp, paths: Paths, student: Tensor, teacher: Tensor, name: str, gamma: float, k: int = 1
) -> Tensor:
    """Return (N, S, A) the value of an estimator on each path, from its definition."""
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
    visit = torch.nn.functional.one_hot(paths.states, mdp.num_states) * paths.mask[..., None]
    result = torch.zeros(len(paths.states), *student.shape, dtype=student.dtype)
    if name in dense | family:
        credit = token_credits(mdp, paths, student, teacher, name, gamma)
        result = result + torch.einsum("nt,ntsa->nsa", credit, scores(paths, student))
    if name not in family:
        local = "full_reverse_kl" if name in dense else name
        vectors = local_vectors(local, student, teacher, k)[paths.states, paths.tokens]
        result = result + torch.einsum("nta,nts->nsa", vectors, visit.to(vectors.dtype))
    return result


def moments(weight: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (...) and total variance of samples (N, ...) under weights (N,)."""
    shaped = weight.view(-1, *(1,) * (sample.dim() - 1))
    mean = (shaped * sample).sum(0)
    return mean, (shaped * (sample - mean).square()).sum()


def mean_and_variance(
    mdp, student: Tensor, teacher: Tensor, name: str, gamma: float, k: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (S, A) mean and total variance of an estimator over all paths."""
    paths = enumerate_paths(mdp)
    sample = path_estimates(mdp, paths, student, teacher, name, gamma, k)
    return moments(probability(paths, student), sample)
