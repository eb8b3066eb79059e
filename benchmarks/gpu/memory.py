"""Proofs and measurements of memory: checkpointing, an offloaded teacher, long responses."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.networks import (
    gradients,
    largest_relative,
    relative,
    small_model,
)
from benchmarks.gpu.result import Check, Measurement, Omission, Row, fact
from benchmarks.gpu.setting import Setting
from benchmarks.growth import dense_update, network, random_batch, toolkit_update
from benchmarks.timing import extra_memory, milliseconds
from opd.models.contexts import activation_checkpointing
from opd.models.model import CausalLM, split_head
from opd.teachers.teacher import LocalTeacher


def prove_checkpointing(setting: Setting) -> Iterator[Row]:
    """Compare gradients and the memory of activations with and without recomputation."""
    model = small_model(setting, num_hidden_layers=setting.choose(4, 12))
    rows, length = setting.choose((2, 48), (8, 1024))
    ids = torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(setting.device)
    results: dict[bool, dict[str, Tensor]] = {}
    mebibytes: dict[bool, float] = {}
    for enabled in (False, True):
        with (
            extra_memory(setting.device) as peak,
            activation_checkpointing(model.network, enabled),
        ):
            states = model.hidden(ids, torch.ones_like(ids), torch.arange(length).to(ids)[None])
            states.square().mean().backward()
            mebibytes[enabled] = peak()
        results[enabled] = gradients(model.network)
    deviation = largest_relative(results[True], results[False])
    yield Check("gradients with recomputation", deviation, 1e-5)
    saved = mebibytes[True] / mebibytes[False]
    yield Check("peak memory with recomputation, share of without", saved, 0.8)
    yield Measurement("peak memory with recomputation", mebibytes[True], "MiB", ratio=saved,
                      reference="of without")  # fmt: skip


def prove_offload(setting: Setting) -> Iterator[Row]:
    """Check that an offloaded teacher scores as before and leaves the device."""
    model = small_model(setting)
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))
    ids = ids.to(setting.device)
    inputs = (ids, torch.ones_like(ids), torch.arange(20).to(ids).expand(2, 20))
    with torch.no_grad():
        before = model.hidden(*inputs)
    teacher = LocalTeacher("teacher", model, offload=True)
    weight_bytes = sum(p.nbytes for p in model.network.parameters())
    for number in (1, 2):
        with teacher.on_device(ids.device), torch.no_grad():
            on_device = {p.device.type for p in model.network.parameters()}
            states = model.hidden(*inputs)
        yield Check(f"hidden states, use {number}", relative(states, before), 1e-6)
        outside = sum(p.device.type != "cpu" for p in model.network.parameters())
        yield Check(f"weights not in host memory after use {number}", outside, 0)
        yield fact(f"all weights are there during use {number}", on_device == {setting.device})
    if setting.device == "cpu":
        yield Omission("memory of the device", "a CPU's memory is the host's")
        return
    # before, states and inputs stay; the weights must be gone
    allocated = torch.cuda.memory_allocated()
    with teacher.on_device(ids.device):
        gained = torch.cuda.memory_allocated() - allocated
    yield Check("device memory of the weights that offloading frees, share kept",
                1 - gained / weight_bytes, 0.01)  # fmt: skip


def measure_long_response(setting: Setting) -> Iterator[Row]:
    """Measure an update on one response at two lengths: memory must not grow with V per token."""
    vocabulary = setting.choose(1_000, 151_936)
    lengths = setting.choose((32,), (4_096, 16_384))
    for method in ("rows", "chunks", "logits"):
        for length in lengths:
            subject = f"{method}, {length:,} tokens, V = {vocabulary:,}"
            dense = 7 * 4 * vocabulary * length
            if method == "logits" and dense > 0.85 * setting.free_bytes():
                yield Omission(subject, f"dense logits need about {dense / 2**30:.0f} GiB")
                continue
            try:
                value, mebibytes = measure_update(setting, method, length, vocabulary)
            except torch.OutOfMemoryError as error:
                yield Omission(subject, str(error).partition("\n")[0])
                continue
            yield Measurement(subject, value, "ms", mebibytes, note="one layer, width 64")


def measure_update(
    setting: Setting, method: str, length: int, vocabulary: int
) -> tuple[float, float]:
    """Return milliseconds of forward and backward, and MiB beyond weights and gradients."""
    device = setting.device
    student, teacher = (
        split_head(network(vocabulary, length, seed).to(device), vocabulary) for seed in (0, 1)
    )
    ids = torch.randint(
        vocabulary, (1, 16 + length), generator=torch.Generator().manual_seed(0)
    ).to(device)
    batch = random_batch(ids[:, 16:], vocabulary)

    def update() -> None:
        student.network.zero_grad(set_to_none=True)
        run_update(setting, method, student, teacher, ids, batch)

    update()
    student.network.zero_grad(set_to_none=True)
    with extra_memory(device) as peak:
        update()
        weights = sum(p.nbytes for p in student.network.parameters()) / 2**20
        mebibytes = max(0.0, peak() - weights)
    return milliseconds(update, device, 2), mebibytes


def run_update(
    setting: Setting, method: str, student: CausalLM, teacher: CausalLM, ids: Tensor, batch: Any
) -> None:
    """Run an update of `benchmarks.growth`."""
    if method == "logits":
        dense_update(student, teacher, ids)
    else:
        toolkit_update(method, student, teacher, ids, batch, setting.choose(1 << 12, 1 << 28))
