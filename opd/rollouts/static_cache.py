"""Whether a model can decode with a static key-value cache, found out before it is first used.

Decoding that is compiled on CUDA needs such a cache. Some models say that they support it and then
fail or compute something else: Falcon with ALiBi fails in transformers 5.23. So a few tokens are
decoded with both caches, without compilation, and the logits compared.
"""

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from opd.models.contexts import evaluation_mode
from opd.models.model import CausalLM, base_model, context_length

NUM_TOKENS = 6
"""Tokens that are decoded after the prompts."""
PROMPT_LENGTH, LONGEST_WINDOW = 24, 8192
"""Prompt length; where layers attend to a window of at most LONGEST_WINDOW tokens, decoding crosses
its end."""
LARGEST_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Root mean square of the difference relative to that of the logits; for half precision 0.1, about
five times what rounding does in 24 layers."""

_problems: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def usable_cache(model: CausalLM, cache: str) -> str:
    """Return the cache to sample with: "dynamic" instead of "static" if the model cannot use that.

    The first call for a network compares both; if static is not usable it warns, once.

    Args:
        model: The model.
        cache: "static" or "dynamic".

    Returns:
        "static" or "dynamic".
    """
    if cache == "dynamic":
        return cache
    network = base_model(model.network)
    if network not in _problems:
        record_problem(model, static_cache_problem(model))
    return "static" if _problems[network] is None else "dynamic"


def record_problem(model: CausalLM, problem: str | None) -> None:
    """Remember whether a model can use the static cache, and warn if it cannot.

    Args:
        model: The model.
        problem: Why it cannot; None if it can.
    """
    network = base_model(model.network)
    _problems[network] = problem
    if problem is not None:
        warnings.warn(
            f"{type(network).__name__} cannot sample with a static cache: {problem}. It samples "
            "with the dynamic cache, which on a GPU is several times slower; engine vllm is not "
            "affected",
            stacklevel=2,
        )


def static_cache_problem(model: CausalLM) -> str | None:
    """Decode fixed tokens with both caches and compare the logits.

    Args:
        model: The model.

    Returns:
        Why the static cache is not usable; None if it is.

    Raises:
        torch.OutOfMemoryError: Even two short rows do not fit.
    """
    network = base_model(model.network)
    if not getattr(network, "_can_compile_fullgraph", False):
        return "transformers does not compile this model"
    try:
        difference = relative_difference(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    limit = LARGEST_DIFFERENCE.get(network.dtype, 0.1)
    if difference <= limit:
        return None
    return f"its logits differ from those with the dynamic cache by {difference:.1g} of their size"


@torch.no_grad()
def relative_difference(model: CausalLM) -> float:
    """Return the root mean square of the logits' difference, relative to their deviation.

    Both decode the same tokens after two prompts of different length.

    Args:
        model: The model.

    Returns:
        The difference; NaN if logits are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    length = probe_length(base_model(model.network))
    ids = torch.randint(model.vocabulary, (2, length + NUM_TOKENS), generator=generator)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : min(length // 2, length - 1)] = 0
    with evaluation_mode(model.network):
        dynamic, static = (
            forced_logits(model, ids.to(model.device), mask.to(model.device), static=static)
            for static in (False, True)
        )
    centred = dynamic - dynamic.mean(-1, keepdim=True)
    return float((static - dynamic).square().mean().sqrt() / centred.square().mean().sqrt())


def probe_length(network: Any) -> int:
    """Return the length of the prompts: just below the window of attention, if there is one."""
    window = getattr(network.config.get_text_config(), "sliding_window", None) or 0
    length = max(PROMPT_LENGTH, window - NUM_TOKENS // 2) if window <= LONGEST_WINDOW else 0
    longest = context_length(network) or LONGEST_WINDOW
    return max(1, min(max(length, PROMPT_LENGTH), longest - NUM_TOKENS))


def forced_logits(model: CausalLM, ids: Tensor, mask: Tensor, *, static: bool) -> Tensor:
    """Decode given tokens.

    Args:
        model: The model.
        ids: (B, P + T) ids of prompts and of the tokens after them.
        mask: (B, P) mask of the prompts.
        static: Use a static cache, without compiling.

    Returns:
        (B, T, V) float32 logits.
    """
    from transformers import GenerationConfig

    length, logits = mask.shape[1], []

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        logits.append(scores[:, : model.vocabulary].float())
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, ids[:, length + len(logits) - 1, None], 0.0)

    base_model(model.network).generate(
        inputs=ids[:, :length],
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=ids.shape[1] - length,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static" if static else None,
            disable_compile=True,
        ),
        logits_processor=[force],
        synced_gpus=False,
    )
    return torch.stack(logits, 1)
