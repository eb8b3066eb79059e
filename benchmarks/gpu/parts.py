"""The parts of the command, by priority: proofs of what is used everywhere come first."""

from functools import partial

from benchmarks.gpu import (
    adapters,
    decoding,
    gathered,
    heads,
    losses,
    memory,
    precision,
    rollouts,
    selection,
    sharding,
    steps,
)
from benchmarks.gpu.result import Part

PARTS = (
    Part("gathered head rows", "proof", 25, gathered.prove),
    Part("losses in chunks", "proof", 10, losses.prove),
    Part("exact top-K", "proof", 5, selection.prove_topk),
    Part("ids that the student chose", "proof", 5, selection.prove_chosen_ids),
    Part("bfloat16 with float32 masters", "proof", 12, precision.prove),
    Part("models without a static cache", "proof", 10, decoding.prove_fallback),
    Part("static cache, compiled", "proof", 35, decoding.prove),
    Part("head and loss, d = 896", "measurement", 25, partial(heads.measure_heads, 896)),
    Part("LoRA", "proof", 5, adapters.prove_lora),
    Part("quantised teacher", "proof", 10, adapters.prove_quantised),
    Part("activation checkpointing", "proof", 5, memory.prove_checkpointing),
    Part("offloaded teacher", "proof", 5, memory.prove_offload),
    Part("FSDP2 on one process", "proof", 10, sharding.prove),
    Part("teacher's top-K", "measurement", 5, heads.measure_topk),
    Part("long responses", "measurement", 15, memory.measure_long_response),
    Part("rollouts", "measurement", 110, rollouts.measure),
    Part("share of the metrics", "proof", 45, steps.measure_panel),
    Part("head and loss, d = 2048", "measurement", 12, partial(heads.measure_heads, 2048)),
    Part("head and loss, d = 3584", "measurement", 15, partial(heads.measure_heads, 3584)),
    Part("whole step beside TRL", "measurement", 110, steps.measure_against_trl),
)
"""What comes late is left out first; expected seconds are estimates until a GPU has run them."""
