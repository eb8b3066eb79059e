"""What only users of the library call: sampling from texts, for a training loop of one's own.

    request = ScoreRequest(requirements=objective.requirements)
    prompts, rollouts = sample(pair, questions, max_response=256)
    batch = score_batch(pair.student, pair.teacher, prompts, rollouts, request)
    policy_loss(pair.student, batch, objective).backward()

A run of `opd.train` does the same on every step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.data.sources import DatasetProblem
from opd.rollouts.hf_engine import GENERATION_BATCH_SIZE
from opd.rollouts.hf_engine import sample as sample_rows
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
    teacher_prompts: Sequence[str | Messages] | None = None,
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
        teacher_prompts: What the teacher reads in the place of each prompt, when the responses are
            scored; None: the same.

    Returns:
        The encoded prompts and the responses, len(prompts) * group_size rows each.

    Raises:
        InvalidInput: There is no prompt, one is too long or cannot be encoded, there are fewer or
            more teacher_prompts than prompts, or a setting is out of range.
    """
    if not prompts:
        raise InvalidInput("prompts is empty; give at least one prompt")
    if group_size < 1:
        raise InvalidInput(f"group_size is {group_size}, expected at least 1")
    problems = [_to_problem(prompt) for prompt in prompts]
    encoded = encode_prompts(pair.tokenizer, problems, group_size, max_prompt)
    if teacher_prompts is not None:
        if len(teacher_prompts) != len(prompts):
            raise InvalidInput(
                f"there are {len(teacher_prompts)} teacher_prompts for {len(prompts)} prompts; "
                "give one for each"
            )
        viewed_problems = [_to_problem(prompt) for prompt in teacher_prompts]
        view = encode_prompts(pair.tokenizer, viewed_problems, group_size, max_prompt)
        encoded = replace(encoded, view=view)
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
