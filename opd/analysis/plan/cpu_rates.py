"""Rates of the CPU at hand, measured in half a second, and its time to start operations."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from opd.analysis.plan.counts import OperationCounter
from opd.analysis.plan.machines import GB, Machine
from opd.analysis.plan.operation_times import OperationTimes

CACHE_BYTES = float(1 << 24)
"""Bytes that are taken to be in the cache since they were last used."""


def measure_cpu(seconds: float = 0.5) -> Machine:
    """Measure the rates of this process's CPU with its number of threads.

    Process time divided by the number of threads is used, so that other processes count less.

    Args:
        seconds: Time for all measurements.

    Returns:
        The machine; its shares are 1, since attained rates are measured.
    """
    part = seconds / 5
    with torch.no_grad():
        a, b = torch.rand(256, 1024), torch.rand(1024, 1024)
        half_a, half_b = a.bfloat16(), b.bfloat16()
        large = torch.rand(1 << 24)
        target = torch.empty_like(large)
        logits = torch.rand(64, 32768)
        product = 2.0 * 256 * 1024 * 1024
        flops = product / _seconds_of(lambda: a @ b, part)
        half_flops = product / _seconds_of(lambda: half_a @ half_b, part)
        bandwidth = 2 * large.nbytes / _seconds_of(lambda: target.copy_(large), part)
        softmax = 2 * logits.nbytes / _seconds_of(lambda: logits.log_softmax(-1), part)
    machine = Machine(
        name=f"this CPU, {torch.get_num_threads()} threads",
        kind="cpu",
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        half_flops=half_flops,
        float32_flops=flops,
        bandwidth=bandwidth,
        elementwise_bandwidth=softmax,
        flops_share=1.0,
        bandwidth_share=1.0,
        seconds_per_operation=0.0,
        seconds_per_backward_operation=0.0,
        seconds_per_token=0.0,
        fixed_reserve=0.095 * GB,
        fragmentation=0.06,
        operation_times=OperationTimes(),
        cache_bytes=CACHE_BYTES,
    )
    forward, backward = start_seconds(machine, part)
    return replace(machine, seconds_per_operation=forward, seconds_per_backward_operation=backward)


def start_seconds(machine: Machine, seconds: float) -> tuple[float, float]:
    """Return the seconds to start an operation of a model, Python and autograd included.

    They are what a model takes beyond the measured times of its operations. It is so small that it
    computes nothing to speak of.

    Args:
        machine: The machine, whose starts take no time.
        seconds: Time for each of two measurements.

    Returns:
        The seconds of a forward and of a backward pass.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        network = Qwen2ForCausalLM(config).eval()
    ids = torch.zeros(1, 2, dtype=torch.long)

    def forward() -> Tensor:
        logits: Tensor = network(ids, use_cache=False).logits
        return logits

    def both() -> None:
        forward().sum().backward()

    def beyond_operations(step: Callable[[], object]) -> tuple[float, float]:
        step()
        with OperationCounter(machine) as counter:
            step()
        counts = counter.counts()
        return _seconds_of(step, seconds) - counts.seconds, counts.operations

    with torch.no_grad():
        forward_seconds, forward_operations = beyond_operations(forward)
    all_seconds, all_operations = beyond_operations(both)
    return (
        max(0.0, forward_seconds / forward_operations),
        max(0.0, (all_seconds - forward_seconds) / (all_operations - forward_operations)),
    )


def _seconds_of(operation: Callable[[], object], seconds: float) -> float:
    """Return the median CPU seconds of an operation and thread, repeated for some CPU time."""
    operation()
    samples, end = list[float](), time.process_time() + seconds
    while time.process_time() < end or not samples:
        begin = time.process_time()
        operation()
        samples.append(time.process_time() - begin)
    return median(samples) / torch.get_num_threads()
