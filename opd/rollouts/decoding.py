"""Decoding one group of prompts.

With a dynamic cache the batch shrinks: rows that have ended are taken out of it and of the
key-value cache, so that a long response does not keep the short ones busy. Rows of the same prompt
share its prefill. `generate` decodes with a static cache, whose shapes are compiled, and models
from whose state no rows can be taken; it goes on until the last row ends.

Shapes: B rows, n rows that are still decoded, P prompt positions, T response positions.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opd.data.prompts import Prompts
from opd.models.model import CausalLM, base_model
from opd.rollouts.sampler import Sampler

# On CUDA each new shape (rows, cache length) is compiled: round both up, so that few occur.
ROW_BUCKET, WIDTH_BUCKET = 16, 64
SHARE_ENDED = 0.125
"""Share of the rows that have ended at which they are taken out of the batch."""


def decode(
    model: CausalLM, prompts: Prompts, eos: list[int], sampler: Sampler
) -> dict[str, Tensor]:
    """Decode a group of prompts with a dynamic cache.

    Args:
        model: The model to sample from.
        prompts: Prompts of the group.
        eos: Ids that end a response.
        sampler: Samples the tokens; new, with the noise of these rows.

    Returns:
        Columns of `Rollouts`.

    Raises:
        InvalidInput: Logits were not finite.
    """
    network, ends = base_model(model.network), torch.tensor(eos, device=model.device)
    num_rows, max_response = sampler.noise.shape
    ids, mask = prompts.tokens.to(model.device), prompts.mask.to(model.device)
    width, positions = ids.shape[1], mask.sum(1)
    real = torch.nn.functional.pad(mask.long(), (0, max_response), value=1)
    logits, cache = prefill(network, ids, mask)
    response = torch.full((num_rows, max_response), eos[0], device=model.device)
    has_ended = torch.zeros(num_rows, dtype=torch.bool, device=model.device)
    for step in range(max_response):
        token = sampler.sample(logits)
        response[sampler.rows, step] = token
        has_ended |= torch.isin(token, ends)
        num_ended = int(has_ended.sum())
        if num_ended == len(has_ended) or step + 1 == max_response:
            break
        if num_ended >= SHARE_ENDED * len(has_ended):
            kept = (~has_ended).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            sampler.select(kept)
            token, real, positions, has_ended = (
                x[kept] for x in (token, real, positions, has_ended)
            )
        logits = network(
            input_ids=token[:, None],
            attention_mask=real[:, : width + step + 1],
            position_ids=(positions + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return response_columns(response[:, : step + 1], eos, sampler)


def prefill(network: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    """Run the prompts, each distinct one once.

    Args:
        network: A model for which `can_select_rows` holds.
        ids: (B, P) prompt ids.
        mask: (B, P) bool, True where a token is real.

    Returns:
        (B, V) logits of the first response token, and the cache of the B rows.
    """
    from transformers import DynamicCache

    rows = torch.cat([ids, mask.long()], 1)
    distinct, index = torch.unique(rows, dim=0, return_inverse=True)
    if len(distinct) == len(rows):  # in their own order
        distinct, index = rows, torch.arange(len(rows), device=ids.device)
    distinct_ids, real = distinct.split(ids.shape[1], 1)
    cache = DynamicCache(config=text_config(network))
    logits = network(
        input_ids=distinct_ids,
        attention_mask=real,
        position_ids=(real.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    if len(distinct) < len(rows):
        cache.batch_select_indices(index)
    return logits[index], cache


def can_select_rows(network: Any) -> bool:
    """Return whether rows can be taken out of a model's key-value cache.

    They cannot from a recurrent state (Mamba, and hybrids of it with attention).

    Args:
        network: A transformers model.

    Returns:
        Whether `decode` can decode it.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if network._is_stateful or not network._supports_default_dynamic_cache():
        return False
    if "logits_to_keep" not in inspect.signature(network.forward).parameters:
        return False
    layers = DynamicCache(config=text_config(network)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def text_config(network: Any) -> Any:
    """Return the configuration of a model's decoder."""
    return network.config.get_text_config(decoder=True)


def decode_with_generate(
    model: CausalLM, prompts: Prompts, eos: list[int], sampler: Sampler, *, static: bool
) -> dict[str, Tensor]:
    """Decode a group of prompts with one `generate` call.

    Args:
        model: The model to sample from.
        prompts: Prompts of the group.
        eos: Ids that end a response.
        sampler: Samples the tokens; new, with the noise of these rows.
        static: Use a static cache, with shapes padded to bucket sizes.

    Returns:
        Columns of `Rollouts`.

    Raises:
        InvalidInput: Logits were not finite.
    """
    from transformers import GenerationConfig

    num_rows, max_response = sampler.noise.shape
    ids, mask = prompts.tokens, prompts.mask
    if static:
        ids, mask = pad_to_bucket(ids, mask)
    settings = GenerationConfig(
        do_sample=False,  # argmax of the sampler's one-hot scores
        max_new_tokens=max_response,
        eos_token_id=eos,
        pad_token_id=eos[0],
        cache_implementation="static" if static else None,
    )
    output_ids = base_model(model.network).generate(
        inputs=ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        generation_config=settings,
        logits_processor=[sampler],
        stopping_criteria=[lambda x, _: torch.arange(len(x), device=x.device) >= num_rows],
        synced_gpus=False,  # every rank has unsharded weights and its own number of calls
    )
    return response_columns(output_ids[:num_rows, ids.shape[1] :], eos, sampler)


def response_columns(response: Tensor, eos: list[int], sampler: Sampler) -> dict[str, Tensor]:
    """Cut responses at their ends.

    Args:
        response: (B, T) sampled ids; anything behind the first EOS.
        eos: Ids that end a response.
        sampler: The sampler, with the log-probabilities of the ids.

    Returns:
        Columns of `Rollouts`.

    Raises:
        InvalidInput: Logits were not finite.
    """
    num_positions = response.shape[1]
    sampler.check(num_positions)
    mask, ended = mask_until_eos(response, eos)
    columns = {"tokens": torch.where(mask, response, 0), "mask": mask, "ended": ended}
    for name in ("sampler_logp", "softmax_logp"):
        columns[name] = torch.where(mask, getattr(sampler, name)[:, :num_positions], 0.0)
    return columns


def pad_to_bucket(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pad prompts to multiples of the bucket sizes.

    Args:
        tokens: (B, P) prompt ids.
        mask: (B, P) bool.

    Returns:
        Both, with copies of the last row appended up to a multiple of ROW_BUCKET rows, and padded
        on the left to a multiple of WIDTH_BUCKET positions.
    """
    count, width = tokens.shape
    rows = list(range(count)) + [count - 1] * (-count % ROW_BUCKET)
    left_padding = (-width % WIDTH_BUCKET, 0)
    pad = torch.nn.functional.pad
    return pad(tokens, left_padding)[rows], pad(mask, left_padding)[rows]


def mask_until_eos(response: Tensor, eos: list[int]) -> tuple[Tensor, Tensor]:
    """Find where responses end.

    Args:
        response: (B, T) sampled ids.
        eos: Ids that end a response.

    Returns:
        A (B, T) mask of the tokens up to and including the first EOS, and (B,) whether there is
        one.
    """
    is_eos = torch.isin(response, torch.tensor(eos, device=response.device))
    num_earlier = is_eos.long().cumsum(1) - is_eos.long()
    return num_earlier == 0, is_eos.any(1)


@contextmanager
def default_generation_config(network: Any) -> Iterator[None]:
    """Use an empty generation config inside the block: `generate` takes unset options from it."""
    from transformers import GenerationConfig

    owner = base_model(network)
    saved = owner.generation_config
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = saved
