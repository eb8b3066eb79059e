"""The loss of an optimizer step by a function of the user's own, from whole logits.

Shapes: B responses of the step, T positions, N supervised tokens, D and D' hidden sizes of student
and teacher, R rows of the head, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.ragged import scatter_to_mask
from opd.models.lm_head import apply_temperature
from opd.models.model import CausalLM
from opd.objectives.user_loss import UserLoss, loss_values
from opd.scoring.chunked_loss import chunked_loss


def user_loss_from_hidden(
    student: CausalLM,
    loss: UserLoss,
    hidden: Tensor,
    batch: ScoredRollouts,
    *,
    teacher: CausalLM | None = None,
    teacher_hidden: Tensor | None = None,
    k: int,
) -> Tensor:
    """Return the loss of all rollouts of a step, with gradient to hidden states and head.

    (B, T, V) logits of the step exist at once, with their gradient; those outside the mask are 0.

    Args:
        student: The student.
        loss: The user's function.
        hidden: (N, D) student states.
        batch: Scored rollouts of the step, with the loss mask.
        teacher: The teacher, for a loss that asks for its logits; else unused.
        teacher_hidden: (N, D') teacher states, for the same.
        k: K, the ids of the student's most probable.

    Returns:
        Scalar loss.

    Raises:
        InvalidInput: The loss asks for the teacher's logits and its states are missing, or the
            function returns something else than a scalar with gradient.
    """
    mask, temperature, head = batch.mask, batch.score_temperature, student.head
    constants: dict[str, Any] = {
        "tokens": batch.tokens,
        "mask": mask,
        "prompt": batch.prompt,
    }
    if "teacher_logp" in loss.asks:
        constants["teacher_logp"] = batch.teacher_logp
    if "sampler_logp" in loss.asks:
        constants["sampler_logp"] = batch.sampler_logp
    if "reward" in loss.asks:
        constants["reward"] = batch.reward
    if "teacher_topk" in loss.asks:
        if batch.support is None or batch.support.source != "teacher":
            raise InvalidInput(
                f"the loss {loss.name} asks for teacher_topk, but the batch has no top-K of the "
                "teacher; score it with the objective's requirements"
            )
        constants["teacher_topk"] = (batch.support.ids, batch.support.teacher_logp)
    if "teacher_logits" in loss.asks:
        if teacher is None or teacher_hidden is None:
            raise InvalidInput(
                f"the loss {loss.name} asks for teacher_logits, but the teacher's hidden states "
                "are missing; pass the teacher and keep its states when the batch is scored"
            )
        with torch.no_grad():
            logits = apply_temperature(teacher.head.logits(teacher_hidden), temperature)
        constants["teacher_logits"] = scatter_to_mask(logits, mask)

    def whole_step(products: Tensor, _: slice) -> Tensor:
        logits = head.shape_products(products[:, : head.vocabulary])
        dense = scatter_to_mask(apply_temperature(logits, temperature), mask)
        return loss(loss_values(loss, dense, constants, k))

    num_products = max(1, len(hidden) * head.num_products(hidden))
    return chunked_loss(hidden, head, lambda _: whole_step, num_products)
