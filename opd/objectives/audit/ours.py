"""Our own objectives as losses that the audit can call.

Shapes: B responses, T positions, V vocabulary, K support ids.
"""

from dataclasses import replace

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats
from opd.objectives.objective import Objective, batch_losses
from opd.objectives.reduction import DENOMINATORS
from opd.objectives.support import JOINT_SUPPORTS
from opd.objectives.user_loss import UserLoss


def objective_loss(name: str, objective: Objective, denominator: str = "token_mean") -> UserLoss:
    """Return an objective as a function of logits.

    Args:
        name: Name for messages.
        objective: The objective.
        denominator: One of `opd.objectives.reduction.DENOMINATORS`.

    Returns:
        The loss; it asks for what the objective reads.
    """

    def loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        tokens: Tensor,
        mask: Tensor,
        sampler_logp: Tensor,
        prompt: Tensor,
        reward: Tensor | None = None,
    ) -> Tensor:
        student = student_logits.log_softmax(-1)
        teacher = teacher_logits.detach().log_softmax(-1)
        logp = student.gather(-1, tokens[..., None])[..., 0]
        batch = score(student.detach(), teacher, tokens, mask, sampler_logp, prompt, reward)
        support, support_logp = None, None
        if objective.support != "none":
            k = min(objective.support_k, student.shape[-1])
            support = make_support(student.detach(), teacher, objective.support, k)
            support_logp = student.gather(-1, support.ids)
        batch = replace(batch, support=support)
        return batch_losses(
            objective,
            batch,
            logp,
            support_logp,
            denominator=DENOMINATORS[denominator](batch),
        ).sum()

    asks = ["student_logits", "teacher_logits", "tokens", "mask", "sampler_logp", "prompt"]
    if objective.reward_cost is not None:
        asks.append("reward")
    return UserLoss(name, loss, tuple(asks))


@torch.no_grad()
def score(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    mask: Tensor,
    sampler_logp: Tensor,
    prompt: Tensor,
    reward: Tensor | None,
) -> ScoredRollouts:
    """Return a scored batch, as the trainer scores it.

    Args:
        student: (B, T, V) log-probabilities.
        teacher: (B, T, V) log-probabilities.
        tokens: (B, T) ids.
        mask: (B, T) bool.
        sampler_logp: (B, T) log-probabilities of the sampler.
        prompt: (B,) ids.
        reward: (B,) rewards, or None.

    Returns:
        The batch, without a support.
    """
    statistics = compute_distribution_stats(student, teacher, tokens)

    def inside(x: Tensor) -> Tensor:
        return torch.where(mask, x, torch.zeros_like(x))

    if reward is None:
        reward = torch.full((len(tokens),), torch.nan)
    return ScoredRollouts(
        tokens=torch.where(mask, tokens, 0),
        mask=mask,
        sampler_logp=inside(sampler_logp),
        prompt=prompt,
        ended=torch.ones(len(tokens), dtype=torch.bool),
        student_logp=inside(student.gather(-1, tokens[..., None])[..., 0]),
        teacher_logp=inside(teacher.gather(-1, tokens[..., None])[..., 0]),
        prefix=DistributionStats(**{name: inside(x) for name, x in statistics.items()}),
        reward=reward,
    )


@torch.no_grad()
def make_support(student: Tensor, teacher: Tensor, source: str, k: int) -> Support:
    """Return both models on a support.

    Args:
        student: (B, T, V) log-probabilities.
        teacher: (B, T, V) log-probabilities.
        source: As `Requirements.support`, other than "none".
        k: Ids of each model.

    Returns:
        The support.
    """
    present = None
    tables = {"teacher": teacher, "student": student}
    if source == "full":
        ids = torch.arange(student.shape[-1]).expand_as(student)
    elif source in JOINT_SUPPORTS:
        ids, present = JOINT_SUPPORTS[source](*(x.topk(k, -1).indices for x in tables.values()))
    else:
        ids = tables[source].topk(k, -1).indices
    return Support(
        ids=ids,
        student_logp=student.gather(-1, ids),
        teacher_logp=teacher.gather(-1, ids),
        source=source,
        present=present,
    )
