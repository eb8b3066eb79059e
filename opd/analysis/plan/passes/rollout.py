"""Sampling of a batch of responses.

Shapes: B rows of a pass, P prompt and T response positions, L = P + T - 1 positions that a model
reads, N = B T response tokens, n tokens of a chunk, D hidden size, V shared vocabulary, K ids.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from opd.analysis.plan.counts import ATEN, Counts, OperationCounter
from opd.analysis.plan.machines import Machine
from opd.analysis.plan.networks import MetaNetwork
from opd.analysis.plan.passes.model import (
    Rows,
    attention_mask,
    meta_ids,
    over_layers,
    refusal,
    run_network,
)
from opd.rollouts.sampler import Sampler


@dataclass(frozen=True)
class RolloutCounts:
    """Counts of one batch of rollouts."""

    cache: float
    """Bytes of keys and values at the longest response."""
    prefill: Counts
    """Reading the prompts."""
    decode: Counts
    """All decoding steps; the peak is that of the last, with its cache."""

    @property
    def peak(self) -> float:
        """Largest bytes of tensors, the cache included."""
        return max(self.prefill.peak, self.decode.peak)

    def with_rows(self, ratio: float) -> "RolloutCounts":
        """Return the memory of `ratio` times as many rows, in proportion."""
        prefill = replace(self.prefill, peak=ratio * self.prefill.peak)
        decode = replace(self.decode, peak=ratio * self.decode.peak)
        return RolloutCounts(ratio * self.cache, prefill, decode)


@torch.no_grad()
def count_rollout(
    model: MetaNetwork,
    rows: Rows,
    group_size: int,
    vocabulary: int,
    temperature: float,
    machine: Machine,
) -> RolloutCounts:
    """Count the sampling of one batch of responses.

    On a GPU decoding is compiled and its cache static: starting operations takes no time there, and
    the cache is not copied. On a CPU the responses to a prompt share its reading.

    Args:
        model: The network that samples.
        rows: Shape; T is the longest response.
        group_size: Responses to a prompt.
        vocabulary: V.
        temperature: Softmax temperature.
        machine: Machine whose time is counted.

    Returns:
        The counts.
    """
    rows_per_prompt = group_size if machine.kind == "cpu" else 1
    prompts = replace(rows, count=max(1, rows.count // rows_per_prompt))

    def read_prompts() -> Counts:
        with OperationCounter(machine) as counter:
            _forward_with_cache(model, prompts, rows.prompt, None, 0)
        return counter.counts()

    is_compiled = machine.kind == "cuda"
    decoding = replace(machine, seconds_per_operation=0.0) if is_compiled else machine
    skipped = frozenset({ATEN.cat}) if is_compiled else frozenset()

    def decode(length: int) -> Counts:
        noise = torch.zeros(rows.count, 1, dtype=torch.float64, device="meta")
        with OperationCounter(decoding, skipped) as counter:
            cache = _forward_with_cache(model, rows, length, None, 0).past_key_values
            counter.restart()
            counter.mark_kept()
            logits = _forward_with_cache(model, rows, 1, cache, length).logits[:, -1].float()
            Sampler(vocabulary, temperature, 1.0, noise).sample(logits)
        return counter.counts()

    layer_counts = (1, 2)
    prefill = over_layers(model, read_prompts, layer_counts)
    first = over_layers(model, partial(decode, rows.prompt), layer_counts)
    end = max(rows.prompt, rows.prompt + rows.response - 2)
    last = over_layers(model, partial(decode, end), layer_counts)
    steps = max(0, rows.response - 1)
    mean = first.scaled(steps / 2).then(last.scaled(steps / 2))
    mean = replace(mean, seconds=mean.seconds + steps * machine.seconds_per_token)
    return RolloutCounts(last.kept_bytes, prefill, mean)


def _forward_with_cache(
    model: MetaNetwork, rows: Rows, length: int, cache: Any, before: int
) -> Any:
    """Run the network with a cache of keys and values; logits of the last position only."""
    ids, positions = meta_ids(rows.count, length, before)
    out = run_network(
        model.network,
        input_ids=ids,
        attention_mask=attention_mask(model, rows, length, before + length),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    if "past_key_values" not in out:
        raise refusal(model.network, "it has a recurrent state in place of keys and values")
    return out
