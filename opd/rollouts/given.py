"""Rollouts whose responses nobody sampled here, and rollouts put together from several writers.

Shapes: B responses, T response positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.batch import DATASET, Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.missing import Missing, missing_fields
from diagnostics.ragged import right_pad
from opd.data.prompts import Prompts

UNKNOWN_SAMPLER = Missing("responses from a dataset have")


def given_rollouts(
    prompts: Prompts,
    responses: Sequence[list[int]],
    *,
    vocabulary: int,
    max_response: int,
    temperature: float,
) -> Rollouts:
    """Return given responses as rollouts without the log-probabilities of a sampler.

    Args:
        prompts: B prompts.
        responses: B lists of ids, each with an EOS at its end.
        vocabulary: Number of ids that both models know.
        max_response: Tokens after which a response is cut; what is cut has not ended.
        temperature: Temperature of the scores.

    Returns:
        The rollouts.

    Raises:
        InvalidInput: An id is not in the vocabulary.
    """
    largest = max(max(ids) for ids in responses)
    if largest >= vocabulary:
        raise InvalidInput(
            f"a given response has the id {largest}, but the models share {vocabulary} ids; encode "
            "it with the student's tokenizer, or remove the row"
        )
    rows = [ids[:max_response] for ids in responses]
    return Rollouts(
        tokens=right_pad(rows, torch.long),
        mask=right_pad([[True] * len(ids) for ids in rows], torch.bool),
        sampler_logp=UNKNOWN_SAMPLER,  # type: ignore[arg-type]
        prompt=prompts.index.cpu(),
        ended=torch.tensor([len(ids) <= max_response for ids in responses]),
        temperature=temperature,
        origin=torch.full((len(rows),), DATASET),
    )


def join_rollouts(
    parts: Sequence[tuple[int, list[int], Rollouts]], *, top_p: float, with_softmax: bool
) -> Rollouts:
    """Put the responses of several writers in the order of their rows.

    Args:
        parts: The writer (an index of `diagnostics.batch.ORIGINS`), the row numbers, which are
            together 0 to B - 1, and the rollouts of these rows.
        top_p: Nucleus mass of student and teacher, also where this process has rows of a dataset
            only.
        with_softmax: Whether every sampler gives `softmax_logp`; without, there is none.

    Returns:
        B rollouts with their `origin`, whoever has rows in this process with the same fields:
        `sampler_logp` and `softmax_logp` are 0 in rows of a dataset.
    """
    width = max(rollouts.tokens.shape[1] for _, _, rollouts in parts)
    device = parts[0][2].tokens.device
    order = torch.tensor([row for _, rows, _ in parts for row in rows]).argsort().to(device)

    def join(tensors: list[Tensor]) -> Tensor:
        padded = [
            x if x.dim() == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1]))
            for x in tensors
        ]
        return torch.cat([x.to(device) for x in padded])[order]

    def is_sampled(rollouts: Rollouts) -> bool:
        return "sampler_logp" not in missing_fields(rollouts)

    def sampler_logp(rollouts: Rollouts) -> Tensor:
        return rollouts.sampler_logp if is_sampled(rollouts) else torch.zeros(rollouts.tokens.shape)

    def softmax_logp(rollouts: Rollouts) -> Tensor:
        if not is_sampled(rollouts):
            return torch.zeros(rollouts.tokens.shape)
        assert rollouts.softmax_logp is not None
        return rollouts.softmax_logp

    first = parts[0][2]
    batches = [rollouts for _, _, rollouts in parts]
    return Rollouts(
        tokens=join([x.tokens for x in batches]),
        mask=join([x.mask for x in batches]),
        sampler_logp=join([sampler_logp(x) for x in batches]),
        softmax_logp=join([softmax_logp(x) for x in batches]) if with_softmax else None,
        prompt=join([x.prompt for x in batches]),
        ended=join([x.ended for x in batches]),
        temperature=first.temperature,
        top_p=top_p,
        origin=join([torch.full((len(rows),), writer) for writer, rows, _ in parts]),
    )
