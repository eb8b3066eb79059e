"""Trajectories of a tabular world as `ScoredRollouts`, the batch type of language-model runs.

Shapes: B trajectories, T steps, S states, A actions, K support ids.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.errors import InvalidInput
from opd.objectives.support import JOINT_SUPPORTS
from synthetic.worlds.mdp import TabularMDP


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Sampled tokens scored under both policies, with the state behind each token."""

    batch: ScoredRollouts
    """Tokens and their log-probabilities."""
    states: Tensor
    """(B, T) long; the end state where the mask is False."""


@torch.no_grad()
def sample(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    count: int,
    generator: torch.Generator,
    sampler: Tensor | None = None,
) -> Trajectories:
    """Sample `count` independent trajectories and score them, with exact distribution statistics.

    Trajectories from one start state count as rollouts of one prompt. `ended` is True where the end
    state was reached; without an end state the horizon is the natural length and nothing is
    truncated. Sampling inverts cumulative probabilities at uniform numbers, the same ones for every
    policy: equal generators give common random numbers.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        count: Number of trajectories, at least 1.
        generator: Source of randomness.
        sampler: (S, A) probabilities of the sampling policy; the student's if None.

    Returns:
        The scored trajectories.

    Raises:
        InvalidInput: If count is below 1.
    """
    if count < 1:
        raise InvalidInput(f"count is {count}, expected at least 1 trajectory")
    acting = mdp.behaviour(student_logits, sampler)
    states, tokens, last_states = simulate(mdp, acting[None], count, generator)
    trajectories = score_trajectories(mdp, student_logits, teacher_logits, states, tokens, sampler)
    if mdp.end is None:
        return trajectories
    return replace(trajectories, batch=replace(trajectories.batch, ended=last_states == mdp.end))


def simulate(
    mdp: TabularMDP, acting: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `count` trajectories of each of R policies, policy by policy.

    Args:
        mdp: The world.
        acting: (R, S, A) probabilities of the policies.
        count: Number of trajectories per policy.
        generator: Source of randomness.

    Returns:
        States and tokens (R * count, T), and the state after the last token (R * count,).
    """
    total = len(acting) * count
    policy, transitions = acting.flatten(0, 1).cumsum(-1), mdp.transitions
    moves = transitions.probabilities.cumsum(-1).flatten(0, 1)
    offset = torch.arange(len(acting)).repeat_interleave(count) * mdp.num_states
    uniform = torch.rand(mdp.horizon, 2, total, 1, generator=generator, dtype=torch.float64)
    first = torch.rand(total, 1, generator=generator, dtype=torch.float64)
    state = _inverse_cdf(mdp.start.cumsum(-1).expand(total, -1), first)
    states, tokens = [], []
    for choose_token, choose_state in uniform:
        token = _inverse_cdf(policy.index_select(0, offset + state), choose_token)
        states.append(state)
        tokens.append(token)
        pair = state * mdp.num_actions + token
        successor = _inverse_cdf(moves.index_select(0, pair), choose_state)
        state = transitions.next_states(state, token, successor)
    return torch.stack(states, 1), torch.stack(tokens, 1), state


def _inverse_cdf(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Return (B,) the first index of (B, N) whose cumulative fraction exceeds `uniform` (B, 1)."""
    return (cumulative[:, :-1] <= uniform * cumulative[:, -1:]).sum(-1)


@torch.no_grad()
def score_trajectories(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    states: Tensor,
    tokens: Tensor,
    sampler: Tensor | None = None,
) -> Trajectories:
    """Score given states and tokens under both policies, with statistics of the distributions.

    Tokens at the end state are masked. The student's log-probability replaces the sampler's for a
    token that the sampler never draws.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        states: (B, T) state before each token.
        tokens: (B, T) token ids.
        sampler: (S, A) probabilities of the sampling policy; the student's if None.

    Returns:
        The scored trajectories.
    """
    student = mdp.log_policy(student_logits, "student_logits")
    teacher = mdp.log_policy(teacher_logits, "teacher_logits")
    acting = mdp.behaviour(student_logits, sampler)
    trajectories = score_with_tables(student, teacher, acting, mdp.active, states, tokens)
    return with_statistics(trajectories, student, teacher)


@torch.no_grad()
def score_with_tables(
    student: Tensor, teacher: Tensor, acting: Tensor, active: Tensor, states: Tensor, tokens: Tensor
) -> Trajectories:
    """Score states and tokens under tables of N states, without statistics of distributions.

    Args:
        student: (N, A) log-probabilities.
        teacher: (N, A) log-probabilities.
        acting: (N, A) probabilities of the sampling policy.
        active: (N,) 1 where a token is emitted, 0 at the end state.
        states: (B, T) row of the tables for each token.
        tokens: (B, T) token ids.

    Returns:
        The scored trajectories.
    """
    sampler_logp = torch.where(acting > 0, acting.clamp(min=1e-300).log(), student)
    mask = active[states] > 0
    tokens = tokens * mask
    batch = ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=sampler_logp[states, tokens] * mask,
        prompt=states[:, 0],
        ended=torch.ones(len(states), dtype=torch.bool),
        student_logp=student[states, tokens] * mask,
        teacher_logp=teacher[states, tokens] * mask,
        mask_rule="not_ended",
    )
    return Trajectories(batch, states)


@torch.no_grad()
def with_statistics(trajectories: Trajectories, student: Tensor, teacher: Tensor) -> Trajectories:
    """Add the statistics of both policies' distributions, for costs and baselines that read them.

    Args:
        trajectories: Trajectories scored under tables of N states.
        student: (N, A) log-probabilities.
        teacher: (N, A) log-probabilities.

    Returns:
        The same trajectories with the statistics.
    """
    batch, states = trajectories.batch, trajectories.states
    # of the statistics of a state, only the rank depends on the token
    any_tokens = torch.zeros(len(student), dtype=torch.long)
    table_stats = compute_distribution_stats(student, teacher, any_tokens)
    ranks = 1 + (teacher[:, None] > teacher[..., None]).sum(-1)
    table = torch.stack([x[:, None].expand_as(student) for x in table_stats.values()])
    table[list(table_stats).index("teacher_rank")] = ranks
    stats = (table[:, states, batch.tokens] * batch.mask).unbind()
    prefix = DistributionStats(**dict(zip(table_stats, stats, strict=True)))
    return replace(trajectories, batch=replace(batch, prefix=prefix))


@torch.no_grad()
def with_support(
    trajectories: Trajectories,
    student_logits: Tensor,
    teacher_logits: Tensor,
    source: str,
    k: int | None = None,
) -> Trajectories:
    """Add both policies on a support, as named by `Objective.support`.

    Args:
        trajectories: Scored trajectories.
        student_logits: (S, A).
        teacher_logits: (S, A).
        source: "none" (no change), "full" (all A tokens), "teacher" or "student": the k most
            probable tokens of one policy, "union" or "intersection" of the two.
        k: Size of a top-K support.

    Returns:
        The same trajectories with the support.

    Raises:
        InvalidInput: If the source is unknown, or a top-K support has no k in 1 to A.
    """
    if source == "none":
        return trajectories
    ids, present = support_ids(student_logits, teacher_logits, source, k)
    mask = trajectories.batch.mask[..., None]
    student, teacher = (
        x.to(torch.float64).log_softmax(-1) for x in (student_logits, teacher_logits)
    )
    support = Support(
        ids=ids[trajectories.states] * mask,
        student_logp=student.gather(-1, ids)[trajectories.states] * mask,
        teacher_logp=teacher.gather(-1, ids)[trajectories.states] * mask,
        source=source,
        present=None if present is None else present[trajectories.states] & mask,
    )
    return replace(trajectories, batch=replace(trajectories.batch, support=support))


def support_ids(
    student_logits: Tensor, teacher_logits: Tensor, source: str, k: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return the support of every state.

    Args:
        student_logits: (S, A).
        teacher_logits: (S, A).
        source: As in `with_support`, but not "none".
        k: Size of a top-K support.

    Returns:
        (S, K) ids, and (S, K) bool which of them count; None for all.

    Raises:
        InvalidInput: If the source is unknown, or a top-K support has no k in 1 to A.
    """
    tables = {"teacher": teacher_logits, "student": student_logits}
    num_actions = student_logits.shape[1]
    if source == "full":
        return torch.arange(num_actions).expand_as(student_logits), None
    if source not in (*tables, *JOINT_SUPPORTS):
        raise InvalidInput(
            f"unknown support {source!r}; known: none, full, "
            f"{', '.join((*tables, *JOINT_SUPPORTS))}"
        )
    if k is None or not 1 <= k <= num_actions:
        raise InvalidInput(f"k is {k}, expected 1 to {num_actions} (the number of actions)")
    if source in JOINT_SUPPORTS:
        return JOINT_SUPPORTS[source](*(x.topk(k, -1).indices for x in tables.values()))
    return tables[source].topk(k, -1).indices, None


def with_baseline(trajectories: Trajectories, baseline: Tensor) -> Trajectories:
    """Return the trajectories with a baseline (T, S) of step and state looked up for each token."""
    column = (
        baseline[torch.arange(trajectories.states.shape[1]), trajectories.states]
        * trajectories.batch.mask
    )
    return replace(trajectories, batch=replace(trajectories.batch, baseline=column))
