"""Trajectories of a tabular world as the same `ScoredRollouts` batch that a language model's run yields.

Shapes: B trajectories, T steps, S states, A actions, K support ids.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import functionals
from diagnostics.errors import InvalidInput
from opd.objectives.support import JOINED
from synthetic.worlds.mdp import TabularMDP


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What was sampled and both policies scored, with the state behind each token.

    states (B, T) long; where the mask is False the end state.
    """

    batch: ScoredRollouts
    states: Tensor


@torch.no_grad()
def sample(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    count: int,
    generator: torch.Generator,
    sampler: Tensor | None = None,
) -> Trajectories:
    """`count` independent trajectories, scored, with exact prefix functionals.

    Trajectories from one start state count as rollouts of one prompt. `ended` is True where the end
    state was reached; without an end state the horizon is the natural length and nothing is cut.
    Draws invert cumulative probabilities at uniform numbers, the same ones for every policy: equal
    generators give common random numbers.

    Args:
      sampler: (S, A) probabilities of the policy that acts; the student's if None.
    """
    if count < 1:
        raise InvalidInput(f"count is {count}, expected at least 1 trajectory")
    acting = mdp.behaviour(student_logits, sampler)
    states, tokens, last = walk(mdp, acting[None], count, generator)
    at = scored(mdp, student_logits, teacher_logits, states, tokens, sampler)
    if mdp.end is None:
        return at
    return replace(at, batch=replace(at.batch, ended=last == mdp.end))


def walk(
    mdp: TabularMDP, acting: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`count` trajectories of each of R policies (R, S, A), policy by policy.

    Returns:
      states and tokens (R * count, T), and the state after the last token (R * count,).
    """
    total = len(acting) * count
    policy, moves = acting.flatten(0, 1).cumsum(-1), mdp.transition.cumsum(-1)
    offset = torch.arange(len(acting)).repeat_interleave(count) * mdp.num_states
    uniform = torch.rand(mdp.horizon, 2, total, generator=generator, dtype=torch.float64)
    first = torch.rand(total, generator=generator, dtype=torch.float64)
    state = _invert(mdp.start.cumsum(-1).expand(total, -1), first)
    states, tokens = [], []
    for step in uniform:
        token = _invert(policy[offset + state], step[0])
        states.append(state)
        tokens.append(token)
        state = _invert(moves[state, token], step[1])
    return torch.stack(states, 1), torch.stack(tokens, 1), state


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """(B, N), (B,) -> (B,) the first index whose cumulative share of the total exceeds uniform."""
    target = uniform[:, None] * cumulative[:, -1:]
    return (cumulative <= target).sum(-1).clamp(max=cumulative.shape[1] - 1)


@torch.no_grad()
def scored(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    states: Tensor,
    tokens: Tensor,
    sampler: Tensor | None = None,
) -> Trajectories:
    """Given states and tokens (B, T) as a batch; tokens at the end state are masked.

    The sampler's log-probability of a token that it never draws is stood in for by the student's.
    """
    student = mdp.log_policy(student_logits, "student_logits")
    teacher = mdp.log_policy(teacher_logits, "teacher_logits")
    acting = mdp.behaviour(student_logits, sampler)
    return looked_up(student, teacher, acting, mdp.active, states, tokens)


@torch.no_grad()
def looked_up(
    student: Tensor, teacher: Tensor, acting: Tensor, active: Tensor, states: Tensor, tokens: Tensor
) -> Trajectories:
    """The batch of states and tokens (B, T) under tables of N states.

    student, teacher (N, A) log-probabilities; acting (N, A) probabilities; active (N,).
    """
    sampler_logp = torch.where(acting > 0, acting.clamp(min=1e-300).log(), student)
    mask = active[states] > 0
    tokens = tokens * mask
    num_actions = student.shape[1]
    table = functionals(
        student[:, None].expand(-1, num_actions, -1),
        teacher[:, None].expand(-1, num_actions, -1),
        torch.arange(num_actions).expand_as(student),
    )
    batch = ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=sampler_logp[states, tokens] * mask,
        prompt=states[:, 0],
        ended=torch.ones(len(states), dtype=torch.bool),
        student_logp=student[states, tokens] * mask,
        teacher_logp=teacher[states, tokens] * mask,
        prefix=DistributionStats(**{name: x[states, tokens] * mask for name, x in table.items()}),
        mask_rule="not_ended",
    )
    return Trajectories(batch, states)


@torch.no_grad()
def with_support(
    at: Trajectories,
    student_logits: Tensor,
    teacher_logits: Tensor,
    source: str,
    k: int | None = None,
) -> Trajectories:
    """The same trajectories with both policies on a support, as `Objective.support` names it.

    Args:
      source: "none" (nothing changes), "full" (all A tokens), "teacher" or "student": the k most
        probable tokens of one of them, "union" or "intersection" of the two.

    Raises:
      ValueError: an unknown source, or a top-k support without a k in 1 to A.
    """
    if source == "none":
        return at
    tables, present = {"teacher": teacher_logits, "student": student_logits}, None
    num_actions = student_logits.shape[1]
    if source == "full":
        ids = torch.arange(num_actions).expand_as(student_logits)
    elif source not in (*tables, *JOINED):
        raise InvalidInput(
            f"unknown support {source!r}; known: none, full, {', '.join((*tables, *JOINED))}"
        )
    elif k is None or not 1 <= k <= num_actions:
        raise InvalidInput(f"k is {k}, expected 1 to {num_actions} (the actions)")
    elif source in JOINED:
        ids, present = JOINED[source](*(x.topk(k, -1).indices for x in tables.values()))
    else:
        ids = tables[source].topk(k, -1).indices
    mask = at.batch.mask[..., None]
    student, teacher = (
        x.to(torch.float64).log_softmax(-1) for x in (student_logits, teacher_logits)
    )
    support = Support(
        ids=ids[at.states] * mask,
        student_logp=student.gather(-1, ids)[at.states] * mask,
        teacher_logp=teacher.gather(-1, ids)[at.states] * mask,
        source=source,
        present=None if present is None else present[at.states] & mask,
    )
    return replace(at, batch=replace(at.batch, support=support))


def with_baseline(at: Trajectories, baseline: Tensor) -> Trajectories:
    """The same trajectories with a baseline (T, S) of step and state looked up for each token."""
    column = baseline[torch.arange(at.states.shape[1]), at.states] * at.batch.mask
    return replace(at, batch=replace(at.batch, baseline=column))
