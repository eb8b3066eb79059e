"""Rollouts with the student's own weights in this process, with reproducible sampling.

Shapes: B responses, T response positions, P prompt positions, V shared vocabulary.

Every token is sampled by inversion from its own uniform random number. A response therefore depends
only on its prompt, the weights and its row of a (B, T) noise table that is generated before the
model runs. Up to the rounding of the model's arithmetic, it does not depend on the other rows of
the batch, their order, `generation_batch_size` or the cache; and global random state is neither
read nor written.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.data.prompts import Prompts
from opd.models.contexts import evaluation_mode
from opd.models.model import CausalLM, base_model
from opd.rollouts.base import BatchSlice
from opd.rollouts.decoding import (
    can_select_rows,
    decode,
    decode_with_generate,
    default_generation_config,
)
from opd.rollouts.sampler import Sampler
from opd.rollouts.static_cache import record_problem, usable_cache

GENERATION_BATCH_SIZE = 256


class HfEngine:
    """`sample` as an `Engine`; it samples from the student's own weights without a copy.

    Args:
        model: The student.
        generation_batch_size: Rows per `generate` call; their key-value cache must fit in memory.
    """

    def __init__(
        self, model: CausalLM, *, generation_batch_size: int = GENERATION_BATCH_SIZE
    ) -> None:
        self.model, self.generation_batch_size = model, generation_batch_size

    def sample(self, prompts: Prompts, eos: list[int], **settings: Any) -> Rollouts:
        """Sample one response to every prompt row; see `sample`."""
        return sample(
            self.model, prompts, eos, generation_batch_size=self.generation_batch_size, **settings
        )

    def sync(self, model: CausalLM) -> None:
        """Sample from this model from now on."""
        self.model = model

    def close(self) -> None:
        """Do nothing: the engine has no resources of its own."""
        pass


@torch.no_grad()
def sample(
    model: CausalLM,
    prompts: Prompts,
    eos: list[int],
    *,
    max_response: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    batch_slice: BatchSlice | None = None,
    generation_batch_size: int = GENERATION_BATCH_SIZE,
    cache: str | None = None,
) -> Rollouts:
    """Sample one response to every row of `prompts`, in order.

    Tokens are sampled from softmax(logits / temperature) restricted to its top-p nucleus. The
    model's own generation settings (top-k, repetition penalty, ...) are ignored. Greedy decoding is
    the limit of a small nucleus: `top_p=1e-9`.

    Args:
        model: The model to sample from.
        prompts: B encoded prompts.
        eos: Ids that end a response; the sampled one is part of the response.
        max_response: Maximum response length T in tokens.
        temperature: Softmax temperature.
        top_p: Probability mass of the nucleus.
        generator: Source of the (B, T) noise; always consumes B x T float64 numbers.
        batch_slice: Which rows of a larger batch `prompts` are; None: the whole batch.
        generation_batch_size: Rows per `generate` call. Rows of similar prompt length are grouped,
            and a call stops when all its rows have ended.
        cache: "static" (compiled on CUDA), "dynamic", or None: static on CUDA, else dynamic. A
            model that cannot use the static cache uses the dynamic one, with a warning.

    Returns:
        The rollouts, on the model's device.

    Raises:
        InvalidInput: Logits are not finite, or a setting is out of range.
        torch.OutOfMemoryError: names the rows and positions that did not fit.
    """
    for name, size in (
        ("max_response", max_response),
        ("generation_batch_size", generation_batch_size),
    ):
        if size < 1:
            raise InvalidInput(f"{name} is {size}, expected at least 1")
    if not (temperature > 0 and 0 < top_p <= 1):
        raise InvalidInput(
            f"temperature is {temperature} and top_p {top_p}; expected temperature > 0 and top_p "
            "in (0, 1]; for greedy decoding set top_p=1e-9"
        )
    wanted_cache = cache or default_cache(model)
    if wanted_cache not in ("static", "dynamic"):
        raise InvalidInput(f"unknown cache {wanted_cache!r}; known: static, dynamic")
    noise = torch.rand(
        len(prompts) if batch_slice is None else batch_slice.total_rows,
        max_response,
        generator=generator,
        device=generator.device,
        dtype=torch.float64,
    )
    noise = noise if batch_slice is None else noise[batch_slice.rows]
    parts, order = [], []
    with default_generation_config(model.network), evaluation_mode(model.network):
        for rows in group_by_length(prompts, generation_batch_size):
            new_sampler = partial(
                Sampler, model.vocabulary, temperature, top_p, noise[rows].to(model.device)
            )
            parts.append(
                decode_with_cache(model, prompts.rows(rows), eos, new_sampler, wanted_cache)
            )
            order += rows
    columns: dict[str, Any] = concatenate_columns(
        parts, torch.tensor(order).argsort().to(model.device)
    )
    return Rollouts(
        **columns, prompt=prompts.index.to(model.device), temperature=temperature, top_p=top_p
    )


def decode_with_cache(
    model: CausalLM,
    prompts: Prompts,
    eos: list[int],
    new_sampler: Callable[[], Sampler],
    wanted_cache: str,
) -> dict[str, Tensor]:
    """Decode prompts at once; if that fails with the static cache, decode with the dynamic one.

    A model may pass the comparison of `usable_cache` and still fail to compile.

    Args:
        model: The model to sample from.
        prompts: Prompts of the group.
        eos: Ids that end a response.
        new_sampler: Returns a new sampler with the noise of these rows.
        wanted_cache: "static" or "dynamic".

    Returns:
        Columns of `Rollouts`.

    Raises:
        InvalidInput: Logits were not finite.
        torch.OutOfMemoryError: names the rows and positions that did not fit.
    """
    if usable_cache(model, wanted_cache) == "static":
        try:
            return decode_group(model, prompts, eos, new_sampler(), "static")
        except (torch.OutOfMemoryError, InvalidInput):  # not for lack of a static cache
            raise
        except Exception as error:
            columns = decode_group(model, prompts, eos, new_sampler(), "dynamic")
            message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            record_problem(model, message)
            return columns
    return decode_group(model, prompts, eos, new_sampler(), "dynamic")


def decode_group(
    model: CausalLM, prompts: Prompts, eos: list[int], sampler: Sampler, cache_kind: str
) -> dict[str, Tensor]:
    """Decode prompts at once.

    Args:
        model: The model to sample from.
        prompts: Prompts of the group.
        eos: Ids that end a response.
        sampler: Samples the tokens; new, with the noise of these rows.
        cache_kind: "static" or "dynamic".

    Returns:
        Columns of `Rollouts`.

    Raises:
        InvalidInput: Logits were not finite.
        torch.OutOfMemoryError: names the rows and positions that did not fit.
    """
    try:
        if cache_kind == "dynamic" and can_select_rows(base_model(model.network)):
            return decode(model, prompts, eos, sampler)
        static = cache_kind == "static"
        return decode_with_generate(model, prompts, eos, sampler, static=static)
    except torch.OutOfMemoryError as error:
        num_rows, max_response = sampler.noise.shape
        raise torch.OutOfMemoryError(
            f"out of memory while sampling {num_rows} rows of {prompts.tokens.shape[1]} prompt and "
            f"{max_response} response tokens; set generation_batch_size below {num_rows}"
        ) from error


def group_by_length(prompts: Prompts, generation_batch_size: int) -> list[list[int]]:
    """Split the rows into groups of similar prompt length and nearly equal size.

    Args:
        prompts: B encoded prompts.
        generation_batch_size: Maximum number of rows of a group.

    Returns:
        Row indices of each group, in order of prompt length.
    """
    lengths = prompts.mask.sum(1).tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = math.ceil(len(order) / math.ceil(len(order) / generation_batch_size))
    return [order[i : i + size] for i in range(0, len(order), size)]


def concatenate_columns(parts: list[dict[str, Tensor]], order: Tensor) -> dict[str, Tensor]:
    """Concatenate the columns of several `generate` calls.

    Args:
        parts: Columns of each call, (rows,) or (rows, T).
        order: Index of each output row among the concatenated rows.

    Returns:
        The columns, padded on the right with zeros to the longest response.
    """
    width = max(part["tokens"].shape[1] for part in parts)

    def pad(x: Tensor) -> Tensor:
        return x if x.dim() == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1]))

    return {name: torch.cat([pad(part[name]) for part in parts])[order] for name in parts[0]}


def default_cache(model: CausalLM) -> str:
    """Return "static" on CUDA, where it is compiled, else "dynamic"."""
    return "static" if model.device.type == "cuda" else "dynamic"
