"""Measurement: tokens per second of sampling, with the static and the dynamic cache."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.result import Measurement, Row, fact
from benchmarks.gpu.setting import Setting
from benchmarks.rollout import (
    ON_GPU,
    TEMPERATURE,
    TOP_P,
    Shape,
    generate_runner,
    make_model,
    make_prompts,
    tokens_per_second,
)
from opd.data.prompts import Prompts
from opd.models.model import CausalLM
from opd.rollouts.hf_engine import sample
from opd.rollouts.static_cache import usable_cache

TOY: Shape = (1, 64, 300, 16, 8, 6)
REFERENCE = "generate, dynamic cache"


def measure(setting: Setting) -> Iterator[Row]:
    """Measure plain `generate` and the engine; the first call of each compiles."""
    # half of the response: the dynamic cache takes half a minute for all of it
    shape = setting.choose(TOY, (*next(iter(ON_GPU.values()))[:-1], 128))
    model, prompts, response = make_model(shape, setting.device), make_prompts(shape), shape[5]
    model = replace(model, vocabulary=model.vocabulary - 1)  # for an end that is never sampled
    runs: dict[str, Callable[[int], int]] = {
        REFERENCE: generate_runner(model, prompts, response, [model.vocabulary])
    }
    for cache in ("dynamic", "static"):
        runs[f"engine hf, {cache} cache"] = cache_runner(model, prompts, response, cache)
    note = f"{shape[0]} layers, {shape[1]} wide, V = {shape[2]:,}, {shape[3]} rows, "
    note += f"{shape[4]} + {response} tokens"
    rates = {}
    for name, run in runs.items():
        # plain generate takes long and compiles nothing: its first call only warms up
        calls = 3 if "static" in name else 2
        seeds = [tokens_per_second(run, seed, setting.device) for seed in range(calls)]
        rates[name] = sorted(seeds[1:])[len(seeds[1:]) // 2]
        ratio = rates[name] / rates[REFERENCE]
        yield Measurement(name, rates[name], "tokens/s", None, ratio, f"of {REFERENCE}", note)
    yield fact("the static cache was used", usable_cache(model, "static") == "static")


def cache_runner(
    model: CausalLM, prompts: Prompts, response: int, cache: str
) -> Callable[[int], int]:
    """Return a function that samples with the engine and returns the number of tokens."""

    def run(seed: int) -> int:
        batch = sample(
            model,
            prompts,
            [model.vocabulary],
            max_response=response,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            generator=torch.Generator().manual_seed(seed),
            cache=cache,
        )
        return int(batch.mask.sum())

    return run
