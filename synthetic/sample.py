"""Trajectories of a tabular world as the same `Scored` batch that a language model's run yields.

Shapes: B trajectories, T steps, S states, A actions, K support ids.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.batch import Prefix, Scored, Support
from diagnostics.prefix import functionals
from synthetic.mdp import TabularMDP


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What the student sampled and both policies scored, with the state behind each token.

    states (B, T) long; where the mask is False the end state.
    """

    batch: Scored
    states: Tensor


@torch.no_grad()
def sample(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    count: int,
    generator: torch.Generator,
) -> Trajectories:
    """`count` independent trajectories under the student, scored, with exact prefix functionals.

    Trajectories from one start state count as rollouts of one prompt. `ended` is True where the end
    state was reached; without an end state the horizon is the natural length and nothing is cut.
    """
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1 trajectory")
    student = mdp.log_policy(student_logits, "student_logits")
    teacher = mdp.log_policy(teacher_logits, "teacher_logits")
    p = student.exp()
    state = torch.multinomial(mdp.start, count, replacement=True, generator=generator)
    states, tokens = [], []
    for _ in range(mdp.horizon):
        token = torch.multinomial(p[state], 1, generator=generator)[:, 0]
        states.append(state)
        tokens.append(token)
        state = torch.multinomial(mdp.transition[state, token], 1, generator=generator)[:, 0]
    visited, chosen = torch.stack(states, 1), torch.stack(tokens, 1)
    mask = mdp.active[visited] > 0
    chosen = chosen * mask
    student_logp = student[visited, chosen] * mask
    every = torch.arange(mdp.num_actions).expand_as(student)
    table = functionals(
        student[:, None].expand(-1, mdp.num_actions, -1),
        teacher[:, None].expand(-1, mdp.num_actions, -1),
        every,
    )
    ended = torch.ones_like(state, dtype=torch.bool) if mdp.end is None else state == mdp.end
    batch = Scored(
        tokens=chosen,
        mask=mask,
        sampler_logp=student_logp,
        prompt=visited[:, 0],
        ended=ended,
        student_logp=student_logp,
        teacher_logp=teacher[visited, chosen] * mask,
        prefix=Prefix(**{name: x[visited, chosen] * mask for name, x in table.items()}),
        mask_rule="not_ended",
    )
    return Trajectories(batch, visited)


def with_full_support(
    mdp: TabularMDP, at: Trajectories, student_logits: Tensor, teacher_logits: Tensor
) -> Trajectories:
    """The same trajectories with both policies on all A tokens, (B, T, A)."""
    ids = torch.arange(mdp.num_actions).expand(mdp.num_states, -1)
    return _with_support(mdp, at, student_logits, teacher_logits, ids, "full")


def with_teacher_support(
    mdp: TabularMDP, at: Trajectories, student_logits: Tensor, teacher_logits: Tensor, k: int
) -> Trajectories:
    """The same trajectories with both policies on the teacher's k most probable tokens."""
    if not 1 <= k <= mdp.num_actions:
        raise ValueError(f"k is {k}, expected 1 to {mdp.num_actions} (the actions)")
    ids = teacher_logits.topk(k, -1).indices
    return _with_support(mdp, at, student_logits, teacher_logits, ids, "teacher")


@torch.no_grad()
def _with_support(
    mdp: TabularMDP,
    at: Trajectories,
    student_logits: Tensor,
    teacher_logits: Tensor,
    ids: Tensor,
    source: str,
) -> Trajectories:
    mask = at.batch.mask[..., None]
    student, teacher = mdp.log_policy(student_logits), mdp.log_policy(teacher_logits)
    support = Support(
        ids=ids[at.states] * mask,
        student_logp=student.gather(-1, ids)[at.states] * mask,
        teacher_logp=teacher.gather(-1, ids)[at.states] * mask,
        source=source,
    )
    return replace(at, batch=replace(at.batch, support=support))
