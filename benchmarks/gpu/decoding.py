"""Proof: the static cache, compiled on CUDA, samples what the dynamic one samples."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.networks import random_prompts, small_model
from benchmarks.gpu.result import Check, Omission, Row, fact
from benchmarks.gpu.setting import Setting
from diagnostics.batch import Rollouts
from opd.models.model import CausalLM
from opd.rollouts.hf_engine import sample
from opd.rollouts.static_cache import relative_difference, static_cache_problem, usable_cache

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2", {}),
    "Mistral, sliding window": ("Mistral", {"sliding_window": 16}),
    "Gemma2, sliding window and soft-cap": ("Gemma2", {"head_dim": 32, "sliding_window": 16}),
    "GPT-2": ("GPT2", {"n_layer": 2, "n_head": 2, "n_embd": 64}),
    "Falcon": ("Falcon", {}),
    "Falcon, ALiBi": ("Falcon", {"alibi": True, "new_decoder_architecture": False}),
    "Mamba": ("Mamba", {"state_size": 8}),
    "MPT": ("Mpt", {"d_model": 64, "n_heads": 2, "n_layers": 2}),
}
"""Name -> architecture and its settings."""


def prove(setting: Setting) -> Iterator[Row]:
    """Sample with both caches from the same noise, greedily and not."""
    compiled = setting.device == "cuda"
    if not compiled:
        yield Omission("compiled decoding", "compiled on CUDA only; the static cache is checked")
    model = small_model(setting)
    difference = relative_difference(model)
    yield Check("logits of both caches, not compiled", difference, 1e-4)
    assert usable_cache(model, "static") == "static"
    label = "static, compiled" if compiled else "static"
    for decoding, top_p in (("greedy", 1e-9), ("sampled", 0.9)):
        yield from compare(model, setting, f"{label}, {decoding}", top_p)
    cache = usable_cache(model, "static")
    yield fact("the static cache was used, without falling back", cache == "static")


def prove_fallback(setting: Setting) -> Iterator[Row]:
    """Find the models that cannot use a static cache, and sample from them all the same."""
    for label, (name, changes) in FAMILIES.items():
        model = small_model(replace(setting, toy=True), name, vocab_size=97, **changes)
        problem = static_cache_problem(model)
        if problem is None:
            yield Check(f"{label}: logits of both caches", relative_difference(model), 1e-4)
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            static = rollouts(model, 0.9, "static", rows=4)
        warned = any("cannot sample with a static cache" in str(w.message) for w in caught)
        yield fact(f"{label}: falls back with a warning", warned, problem)
        dynamic = rollouts(model, 0.9, "dynamic", rows=4)
        wrong = int((static.tokens != dynamic.tokens).sum())
        yield Check(f"{label}: tokens that differ after the fallback", wrong, 0)


def compare(model: CausalLM, setting: Setting, label: str, top_p: float) -> Iterator[Row]:
    """Compare tokens and both log-probabilities."""
    rows = setting.choose(4, 16)
    static, dynamic = (rollouts(model, top_p, cache, rows) for cache in ("static", "dynamic"))
    wrong = int((static.tokens != dynamic.tokens).sum())
    tokens = int(dynamic.mask.sum())
    yield Check(f"{label}: tokens of {tokens} that differ from dynamic", wrong, 0)
    for name in ("sampler_logp", "softmax_logp"):
        a, b = getattr(static, name), getattr(dynamic, name)
        yield Check(f"{label}: {name}", float((a - b).abs().max()), 1e-3)


def rollouts(model: CausalLM, top_p: float, cache: str, rows: int) -> Rollouts:
    """Sample 24 tokens from every prompt; the end token is one that is never sampled."""
    end = model.vocabulary - 1  # rows that only fill a bucket continue with it: an id of the model
    return sample(
        replace(model, vocabulary=end),
        random_prompts(rows, 30, end),
        [end],
        max_response=24,
        temperature=1.0,
        top_p=top_p,
        generator=torch.Generator().manual_seed(0),
        cache=cache,
    )
