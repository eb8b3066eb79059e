"""Local objectives on independent prefixes, each with free logits of its own.

Shapes: S prefixes, A tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor

from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import Objective, weighted_losses
from synthetic.sampling.monte_carlo import visit_gradients
from synthetic.sampling.trajectories import (
    score_with_tables,
    support_ids,
    with_statistics,
    with_support,
)
from synthetic.worlds.mdp import log_probabilities


def expected_gradients(
    student: Tensor, teacher: Tensor, objective: Objective, k: int | None
) -> Tensor:
    """Compute the expected gradient of a local objective at each prefix.

    The expectation over the sampled token is the sum over all tokens. Without a credit, their
    losses are weighted by their probabilities and differentiated together; with one, each token is
    a response of its own.

    Args:
        student: (S, A) logits.
        teacher: (S, A) logits.
        objective: A local objective.
        k: Size of the support, for top-K objectives.

    Returns:
        (S, A) gradient with respect to the student's logits.
    """
    if objective.has_credit:
        return sampled_gradients(student, teacher, objective, k)
    teacher_logp = log_probabilities(teacher, "teacher")
    with torch.enable_grad():
        live = student.detach().to(torch.float64).requires_grad_()
        student_logp = log_probabilities(live, "student")
        losses = weighted_losses(
            objective, all_tokens(student_logp, teacher_logp, objective.support, k)
        )
    return torch.autograd.grad(losses.sum(), live)[0]


def all_tokens(
    student_logp: Tensor, teacher_logp: Tensor, source: str, k: int | None
) -> TokenInputs:
    """Return every token of every prefix, weighted by its probability under the student.

    Args:
        student_logp: (S, A) log-probabilities, with gradient.
        teacher_logp: (S, A) log-probabilities.
        source: Support of the objective.
        k: Size of a top-K support.

    Returns:
        Inputs of shape (S, A).
    """
    constant = student_logp.detach()
    tokens = torch.arange(constant.shape[1]).expand_as(constant)
    inputs = TokenInputs(
        credit=torch.zeros_like(constant),
        weight=constant.exp(),
        teacher_logp=teacher_logp,
        old_logp=constant,
        tokens=tokens,
        logp=student_logp,
    )
    if source == "none":
        return inputs
    ids, present = support_ids(constant, teacher_logp, source, k)

    def of_each_token(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, constant.shape[1], -1)

    counts = ids[:, None] == tokens[..., None]
    if present is not None:
        counts = counts & present[:, None]
    return replace(
        inputs,
        ids=of_each_token(ids),
        teacher_support_logp=of_each_token(teacher_logp.gather(-1, ids)),
        support_logp=of_each_token(student_logp.gather(-1, ids)),
        present=None if present is None else of_each_token(present),
        inside=counts.any(-1),
    )


def sampled_gradients(
    student: Tensor, teacher: Tensor, objective: Objective, k: int | None
) -> Tensor:
    """Compute `expected_gradients` with each token as a response of its own.

    Args:
        student: (S, A) logits.
        teacher: (S, A) logits.
        objective: A local objective, with or without a credit.
        k: Size of the support, for top-K objectives.

    Returns:
        (S, A) gradient with respect to the student's logits.
    """
    s, a = student.shape
    student_logp = log_probabilities(student, "student")
    teacher_logp = log_probabilities(teacher, "teacher")
    states = torch.arange(s).repeat_interleave(a)[:, None]
    tokens = torch.arange(a).repeat(s)[:, None]
    active = torch.ones(s, dtype=torch.float64)
    trajectories = score_with_tables(
        student_logp, teacher_logp, student_logp.exp(), active, states, tokens
    )
    if objective.requirements.distributions:
        trajectories = with_statistics(trajectories, student_logp, teacher_logp)
    trajectories = with_support(trajectories, student, teacher, objective.support, k)
    token_gradients = visit_gradients(
        trajectories, student, objective, objective.credit(trajectories.batch)
    )
    return (student_logp.exp()[..., None] * token_gradients.view(s, a, a)).sum(1)
