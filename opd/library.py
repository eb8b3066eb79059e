"""Functions for a training loop of one's own: sample rollouts, score them, compute the loss.

    prompts, rollouts = sample(pair, questions, max_response=256)
    batch = score_batch(pair, prompts, rollouts, objective.requirements)
    policy_loss(pair, objective, batch).backward()

`opd` exports them. A run of `opd.train` does the same on every step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import Rollouts, ScoredRollouts
from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.data.sources import DatasetProblem
from opd.models.forward import micro_batches, response_hidden_states
from opd.objectives.catalogue import Objective
from opd.objectives.reduction import DENOMINATORS
from opd.objectives.requirements import Requirements
from opd.rollouts.hf_engine import GENERATION_BATCH_SIZE
from opd.rollouts.hf_engine import sample as sample_rows
from opd.scoring.loss import loss_from_hidden
from opd.scoring.score import score
from opd.teachers.pair import ModelPair

Messages = Sequence[Mapping[str, str]]
"""A chat: messages with "role" and "content"."""


def sample(
    pair: ModelPair,
    prompts: Sequence[str | Messages],
    *,
    max_response: int,
    max_prompt: int = 4096,
    group_size: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    generation_batch_size: int = GENERATION_BATCH_SIZE,
) -> tuple[Prompts, Rollouts]:
    """Sample responses of the student to prompts, through its chat template where it has one.

    Args:
        pair: Student and teacher.
        prompts: Texts, or chats as lists of messages.
        max_response: Largest number of tokens of a response.
        max_prompt: Largest number of tokens of a prompt.
        group_size: Responses to each prompt, in consecutive rows.
        temperature: Softmax temperature.
        top_p: Probability mass of the nucleus.
        generator: Source of the noise; torch's default generator, which `torch.manual_seed` seeds,
            if None.
        generation_batch_size: Rows that are generated at once.

    Returns:
        The encoded prompts and the responses, len(prompts) * group_size rows each.

    Raises:
        InvalidInput: There is no prompt, one is too long or cannot be encoded, or a setting is out
            of range.
    """
    if not prompts:
        raise InvalidInput("prompts is empty; give at least one prompt")
    if group_size < 1:
        raise InvalidInput(f"group_size is {group_size}, expected at least 1")
    problems = [_to_problem(prompt) for prompt in prompts]
    encoded = encode_prompts(pair.tokenizer, problems, group_size, max_prompt)
    encoded = encoded.to(pair.student.device)
    rollouts = sample_rows(
        pair.student,
        encoded,
        pair.eos,
        max_response=max_response,
        temperature=temperature,
        top_p=top_p,
        generator=torch.default_generator if generator is None else generator,
        generation_batch_size=generation_batch_size,
    )
    return encoded, rollouts


def _to_problem(prompt: str | Messages) -> Problem:
    """Return a problem without answer."""
    if isinstance(prompt, str):
        return Problem(prompt=prompt, answer="")
    chat = tuple((message["role"], message["content"]) for message in prompt)
    if not chat:
        raise InvalidInput("a prompt is a list without messages; give at least one message")
    return DatasetProblem(prompt=chat[-1][1], answer="", chat=chat)


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """Prompts and rollouts, scored by both models."""

    prompts: Prompts
    scored: ScoredRollouts
    """The rollouts with both models' log-probabilities."""
    teacher_hidden: Tensor | None = None
    """(N, D') teacher hidden states at all N sampled tokens, for losses on the full vocabulary."""


def score_batch(
    pair: ModelPair,
    prompts: Prompts,
    rollouts: Rollouts,
    requirements: Requirements,
    *,
    temperature: float = 1.0,
    max_tokens_per_microbatch: int = 1 << 14,
    max_logits_per_chunk: int = 1 << 24,
) -> ScoredBatch:
    """Score rollouts with both models, without storing logits of all tokens.

    Args:
        pair: Student and teacher.
        prompts: B prompts.
        rollouts: B responses.
        requirements: What the loss reads: `objective.requirements`.
        temperature: Temperature of the log-probabilities.
        max_tokens_per_microbatch: Padded tokens of a forward pass.
        max_logits_per_chunk: Logits that exist at once.

    Returns:
        The scored batch.
    """
    support = requirements.support
    scored, teacher_hidden = score(
        pair,
        prompts,
        rollouts,
        k=requirements.support_k,
        source="teacher" if support in ("none", "full") else support,
        temperature=temperature,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        max_logits_per_chunk=max_logits_per_chunk,
        keep_teacher=support == "full",
    )
    return ScoredBatch(prompts, scored, teacher_hidden)


def policy_loss(
    pair: ModelPair,
    objective: Objective,
    batch: ScoredBatch,
    *,
    denominator: str = "token_mean",
    max_tokens_per_microbatch: int = 1 << 14,
    max_logits_per_chunk: int = 1 << 24,
) -> Tensor:
    """Return the loss of a whole optimizer step, with gradient to the student's weights.

    Call `backward` once, before the weights change.

    Args:
        pair: Student and teacher.
        objective: The objective.
        batch: The scored batch.
        denominator: One of DENOMINATORS in `opd.objectives.reduction`.
        max_tokens_per_microbatch: Padded tokens of a forward pass.
        max_logits_per_chunk: Logits that exist at once.

    Returns:
        Scalar loss.

    Raises:
        InvalidInput: The denominator is unknown, or the batch was not scored for the objective.
    """
    if denominator not in DENOMINATORS:
        known_names = ", ".join(DENOMINATORS)
        raise InvalidInput(f"unknown denominator {denominator!r}; known: {known_names}")
    scored, prompts = batch.scored, batch.prompts
    credit = objective.credit(scored)
    weight = objective.ratio(scored) / DENOMINATORS[denominator](scored)[:, None]
    token_index = (scored.sampled.flatten().cumsum(0) - 1).reshape(scored.mask.shape)
    losses = []
    for rows in micro_batches(prompts, scored, max_tokens_per_microbatch):
        part = scored.rows(rows).trim()
        width = part.mask.shape[1]
        teacher_hidden = batch.teacher_hidden
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden[token_index[rows][:, :width][part.mask]]
        losses.append(
            loss_from_hidden(
                pair,
                objective,
                response_hidden_states(pair.student, prompts.rows(rows), part),
                teacher_hidden,
                part,
                credit[rows][:, :width],
                weight[rows][:, :width][part.mask],
                max_logits_per_chunk=max_logits_per_chunk,
            )
        )
    return torch.stack(losses).sum()
