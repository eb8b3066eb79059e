"""Gradients of blocks below the LM head, for the gradient probe.

Shapes: B responses, N supervised tokens, D and D' hidden sizes of student and teacher.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.gradients.bias import REFERENCES, response_cost
from diagnostics.gradients.estimators import available_estimators, estimator_weights
from diagnostics.gradients.layers import Block, sequence_gradients
from diagnostics.gradients.probe import GradientSketches, LossGradients, check_on_policy
from diagnostics.ragged import scatter_to_mask
from opd.data.prompts import Prompts
from opd.models.forward import log_probabilities, micro_batches, response_hidden_states
from opd.models.lm_head import apply_temperature
from opd.models.model import CausalLM
from opd.teachers.pair import ModelPair
from opd.training.update import PreparedLoss


def block_loss_gradients(
    student: CausalLM,
    trained_loss: PreparedLoss,
    hidden_gradients: Tensor,
    blocks: Sequence[Block],
    max_tokens_per_microbatch: int,
) -> dict[str, LossGradients]:
    """Compute the training-loss gradient per response for blocks below the LM head.

    Costs one forward and one backward pass.

    Args:
        student: The student.
        trained_loss: Loss of the update.
        hidden_gradients: (N, D) gradients of the loss with respect to the hidden states of
            supervised tokens.
        blocks: Blocks to measure.
        max_tokens_per_microbatch: Limit on tokens of a forward pass.

    Returns:
        Gradient sketches by name of the block.
    """
    prompts, batch = trained_loss.batch.prompts, trained_loss.batch.scored
    padded_gradients = scatter_to_mask(hidden_gradients, batch.mask)
    parts: dict[str, list[tuple[list[int], Tensor, Tensor]]] = {b.name: [] for b in blocks}
    for rows in micro_batches(prompts, batch, max_tokens_per_microbatch):
        micro_batch = batch.rows(rows).trim()
        micro_batch_gradients = padded_gradients[rows][:, : micro_batch.mask.shape[1]][
            micro_batch.mask
        ]

        def forward(rows: list[int] = rows, micro_batch: ScoredRollouts = micro_batch) -> Tensor:
            return response_hidden_states(student, prompts.rows(rows), micro_batch)

        for name, (sketch, squared_norm) in sequence_gradients(
            blocks, forward, [micro_batch_gradients]
        ).items():
            parts[name].append((rows, sketch[:, 0], squared_norm[:, 0]))
    gradients = {}
    for name, block_parts in parts.items():
        order = torch.tensor([i for rows, _, _ in block_parts for i in rows]).argsort()
        order = order.to(hidden_gradients.device)
        gradients[name] = LossGradients(
            sketches=torch.cat([sketch for _, sketch, _ in block_parts])[order],
            squares=torch.cat([squared_norm for _, _, squared_norm in block_parts])[order],
            prompt=batch.prompt,
        )
    return gradients


def hidden_state_gradients(
    pair: ModelPair,
    scored: ScoredRollouts,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Compute gradients of log p(y) and of KL(p || q) with respect to the student's hidden states.

    Args:
        pair: Student p and teacher q.
        scored: Scored rollouts.
        student_hidden: (N, D) hidden states of the student at supervised tokens.
        teacher_hidden: (N, D') hidden states of the teacher at supervised tokens.
        chunk_tokens: Number of tokens per chunk.

    Returns:
        Two (N, D) tensors: gradients of each token's log-probability, and of its KL divergence.
    """
    tokens, temperature, head = (
        scored.tokens[scored.mask],
        scored.score_temperature,
        pair.student.head,
    )
    chunk_gradients = []
    for start in range(0, len(student_hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        teacher_logp = log_probabilities(pair.teacher.model, teacher_hidden[chunk], temperature)
        with torch.enable_grad():
            products = head.products(student_hidden[chunk])[..., : head.vocabulary]
            logits = products.requires_grad_()
            logp = apply_temperature(head.shape_products(logits), temperature).log_softmax(-1)
            log_ratio = torch.where(logp > -torch.inf, logp - teacher_logp, 0.0)
            token_logp = logp.gather(1, tokens[chunk, None]).sum()
            logit_gradients = torch.autograd.grad(token_logp, logits, retain_graph=True)
            logit_gradients += torch.autograd.grad((logp.exp() * log_ratio).sum(), logits)
        chunk_gradients.append(
            [
                head.backproject(logit_gradient, student_hidden.shape[1])
                for logit_gradient in logit_gradients
            ]
        )
    score_gradients, local_gradients = zip(*chunk_gradients, strict=True)
    return torch.cat(score_gradients), torch.cat(local_gradients)


def block_gradient_sketches(
    student: CausalLM,
    prompts: Prompts,
    scored: ScoredRollouts,
    token_gradients: tuple[Tensor, Tensor],
    blocks: Sequence[Block],
    gamma: float,
    max_tokens_per_microbatch: int,
) -> dict[str, GradientSketches]:
    """Compute gradient sketches of estimators for blocks below the LM head.

    Measures the plain estimator and the one of least variance at the discounts 0, `gamma` and 1.
    The LM head is differentiated once for all of them (`hidden_state_gradients`). Further cost: one
    forward pass of the student and 4 backward passes without weight gradients (6 if gamma is
    neither 0 nor 1).

    Args:
        student: The student.
        prompts: Prompts of `scored`.
        scored: On-policy scored rollouts.
        token_gradients: Pair of (N, D) tensors from `hidden_state_gradients`.
        blocks: Blocks to measure.
        gamma: Discount of the objective.
        max_tokens_per_microbatch: Limit on tokens of a forward pass.

    Returns:
        Sketches by name of the block.
    """
    check_on_policy(scored)
    available_names = available_estimators(scored, has_teacher=True)
    names = ("plain", next(name for name in REFERENCES if name in available_names))
    member_weights = estimator_weights(
        scored, tuple(dict.fromkeys(names)), sorted({0.0, gamma, 1.0})
    )
    token_score, token_local = (scatter_to_mask(sketch, scored.mask) for sketch in token_gradients)
    num_members = member_weights.values.shape[-1]
    parts: dict[str, list[tuple[list[int], Tensor, Tensor]]] = {b.name: [] for b in blocks}
    for rows in micro_batches(prompts, scored, max_tokens_per_microbatch):
        micro_batch = scored.rows(rows).trim()
        positions = slice(micro_batch.mask.shape[1])
        coefficients = member_weights.values[rows][:, positions][micro_batch.mask].to(
            token_score.dtype
        )
        score, local = (
            sketch[rows][:, positions][micro_batch.mask] for sketch in (token_score, token_local)
        )

        def forward(rows: list[int] = rows, micro_batch: ScoredRollouts = micro_batch) -> Tensor:
            return response_hidden_states(student, prompts.rows(rows), micro_batch)

        members = (
            coefficients[:, member, None] * score + member_weights.local[member] * local
            for member in range(num_members)
        )
        for name, (sketch, squared_norm) in sequence_gradients(blocks, forward, members).items():
            parts[name].append((rows, sketch, squared_norm))
    sketches = {}
    for name, block_parts in parts.items():
        order = torch.tensor([i for rows, _, _ in block_parts for i in rows]).argsort()
        sketches[name] = GradientSketches(
            sketches=torch.cat([sketch for _, sketch, _ in block_parts])[
                order.to(token_score.device)
            ],
            squares=torch.cat([sketch for _, _, sketch in block_parts])[
                order.to(token_score.device)
            ],
            prompt=scored.prompt,
            cost=response_cost(scored),
            names=member_weights.names,
            gammas=member_weights.gammas,
        )
    return sketches
