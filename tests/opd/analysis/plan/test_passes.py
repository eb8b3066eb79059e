"""Counted passes against the same passes of real networks: memory, FLOPs, caches.

Memory is compared with what torch's profiler sees real code allocate.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from opd.analysis.plan.networks import MetaNetwork, make_network
from opd.analysis.plan.passes.model import Rows, over_layers
from opd.analysis.plan.passes.rollout import count_rollout
from opd.analysis.plan.passes.scoring import count_forward, count_score_chunk
from opd.analysis.plan.passes.update import _count_update, count_optimizer, count_update
from opd.config.settings import Config
from opd.models.contexts import activation_checkpointing
from opd.models.forward import response_hidden_states
from opd.models.model import split_head
from opd.objectives.inputs import TokenInputs
from opd.scoring.loss import loss_from_hidden
from opd.scoring.request import ScoreRequest
from opd.scoring.score import score_batch
from opd.teachers.teacher import LocalTeacher
from opd.training.optimizer import make_optimizer
from opd.training.setup import objective_from_config
from tests.helpers.allocated_memory import allocated_peak
from tests.opd.analysis.plan.pairs import MACHINE, padded_rows, real_network, saved, settings

V, ROWS = 1000, Rows(count=4, prompt=12, response=40)


def meta_network(folder: Path, name: str, **changes: Any) -> tuple[MetaNetwork, Config]:
    """A trainable network without numbers, and the settings that it was made with."""
    config = settings(saved(folder, name), "", **changes)
    dtype = getattr(torch, config.hardware.dtype)
    return make_network(config.student, dtype, config=config), config


def real_update(name: str, config: Config, teacher_name: str | None) -> Callable[[], None]:
    """A function that takes the gradient of a micro-batch with a real network."""
    dtype = getattr(torch, config.hardware.dtype)
    network = real_network(name).to(dtype)
    student, objective = split_head(network, V), objective_from_config(config)
    prompts, rollouts = padded_rows(ROWS.count, ROWS.prompt, ROWS.response)
    optimizer = make_optimizer(network.parameters(), (0.9, 0.999), 0.0)
    teacher = None if teacher_name is None else split_head(real_network(teacher_name), V)

    def update() -> None:
        count = ROWS.tokens
        k = config.objective.support_k
        inputs = TokenInputs(
            credit=torch.zeros(count),
            weight=torch.ones(count),
            teacher_logp=torch.zeros(count),
            old_logp=torch.zeros(count),
            tokens=torch.full((count,), 5),
            ids=None if teacher else torch.arange(k).repeat(count, 1),
            teacher_support_logp=None if teacher else torch.full((count, k), -2.0),
            inside=None if teacher else torch.ones(count, dtype=torch.bool),
        )
        states = None if teacher is None else torch.zeros(count, 64)
        with activation_checkpointing(network, config.hardware.gradient_checkpointing):
            hidden = response_hidden_states(student, prompts, rollouts)
            loss_from_hidden(
                student,
                objective,
                hidden,
                inputs,
                teacher=teacher,
                teacher_hidden=states,
                temperature=1.0,
                max_logits_per_chunk=config.hardware.max_logits_per_chunk,
            ).backward()

    update()
    optimizer.zero_grad()
    return update


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2", {"objective": "teacher_topk"}),
        ("qwen2", {"objective": "full_reverse_kl", "max_logits_per_chunk": 20 * V}),
        ("qwen2", {"objective": "sampled_token", "gradient_checkpointing": True}),
        ("gpt2", {"objective": "full_forward_kl", "max_logits_per_chunk": 1 << 24}),
        ("llama", {"objective": "teacher_topk_and_sampled", "dtype": "bfloat16"}),
        ("gemma2", {"objective": "sampled_token"}),
    ],
)
def test_memory_and_flops_of_an_update(name: str, changes: Any, tmp_path: Path) -> None:
    meta, config = meta_network(tmp_path, name, **changes)
    objective = objective_from_config(config)
    is_full = objective.support == "full"
    teacher = make_network(meta.name, torch.float32) if is_full else None
    counts = count_update(meta, teacher, objective, ROWS, V, config, MACHINE, has_gradients=False)
    update = real_update(name, config, name if is_full else None)
    assert counts.peak == pytest.approx(allocated_peak(update), rel=0.1)
    assert 0 <= counts.gradients <= 4 * meta.num_trainable
    later = count_update(meta, teacher, objective, ROWS, V, config, MACHINE, has_gradients=True)
    assert later.gradients >= 4 * meta.num_trainable
    later_peak = allocated_peak(update) + 4 * meta.num_trainable
    assert later.peak == pytest.approx(later_peak, rel=0.1), (
        "the real gradients of the first call are there in the second"
    )


def test_activations_are_the_tensors_that_autograd_keeps(tmp_path: Path) -> None:
    meta, config = meta_network(tmp_path, "qwen2", objective="sampled_token")
    network = real_network("qwen2")
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    saved_bytes: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return x

    prompts, rollouts = padded_rows(ROWS.count, ROWS.prompt, ROWS.response)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        states = response_hidden_states(split_head(network, V), prompts, rollouts)
    objective = objective_from_config(config)
    counts = count_update(meta, None, objective, ROWS, V, config, MACHINE, has_gradients=False)
    assert counts.kept_bytes == pytest.approx(sum(saved_bytes.values()) + states.nbytes, rel=0.1)


def test_flops_of_an_update_are_those_of_a_real_one(tmp_path: Path) -> None:
    meta, config = meta_network(tmp_path, "qwen2", objective="teacher_topk")
    objective = objective_from_config(config)
    counts = count_update(meta, None, objective, ROWS, V, config, MACHINE, has_gradients=False)
    update = real_update("qwen2", config, None)
    with FlopCounterMode(display=False) as counter:
        update()
    length = ROWS.prompt + ROWS.response - 1
    attention = 3 * (4 + 10) * ROWS.count * 64 * length**2  # layers x products x rows x width
    assert counts.flops == counter.get_total_flops() + attention


def test_few_layers_stand_for_many(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen2", num_hidden_layers=7)
    config = settings(folder, "", objective="sampled_token")
    meta = make_network(folder, torch.float32, config=config)
    objective = objective_from_config(config)
    counts = count_update(meta, None, objective, ROWS, V, config, MACHINE, has_gradients=True)
    extrapolated, direct = (
        over_layers(meta, lambda: _update_once(meta, objective, config), layer_counts)
        for layer_counts in ((2, 3), (7, 8))
    )
    for name, value in vars(direct).items():
        assert getattr(extrapolated, name) == pytest.approx(value, rel=1e-3), name
        assert getattr(counts, name) == pytest.approx(value, rel=1e-3), name


def _update_once(meta: MetaNetwork, objective: Any, config: Config) -> Any:
    return _count_update(meta, None, objective, ROWS, V, config, MACHINE, has_gradients=True)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "deepseek"])
def test_keys_and_values_are_those_of_a_real_cache(name: str, tmp_path: Path) -> None:
    meta = make_network(saved(tmp_path, name), torch.float32)
    counts = count_rollout(meta, ROWS, 1, V, 1.0, MACHINE)
    network = real_network(name, "eager")
    ids = torch.zeros(ROWS.count, ROWS.prompt + ROWS.response - 2, dtype=torch.long)
    with torch.no_grad():
        cache = network(input_ids=ids, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert counts.cache == pytest.approx(real, rel=0.01)
    assert counts.peak > counts.cache
    shared_counts = count_rollout(meta, ROWS, 4, V, 1.0, MACHINE)
    assert shared_counts.prefill.flops == counts.prefill.flops / 4, "one row for a prompt"
    assert shared_counts.decode == counts.decode
    double = counts.with_rows(2.0)
    assert (double.cache, double.peak) == (2 * counts.cache, 2 * counts.peak)


def test_a_step_of_decoding_reads_weights_and_cache(tmp_path: Path) -> None:
    meta = make_network(saved(tmp_path, "qwen2"), torch.float32)
    rows = Rows(count=2, prompt=100, response=900)
    counts = count_rollout(meta, rows, 1, V, 1.0, MACHINE)
    steps = rows.response - 1
    layer_weights = meta.num_weights - 2 * V * 64
    read_bytes = 4 * (layer_weights + V * 64) + counts.cache / 2 * 1.1
    assert counts.decode.moved_bytes / steps > read_bytes
    attention = 2 * 2 * rows.count * 64 * 3 * (100 + 998) / 2
    flops = 2 * rows.count * (layer_weights + V * 64) + attention
    assert counts.decode.flops / steps == pytest.approx(flops, rel=0.02)


def test_memory_and_flops_of_scoring(tmp_path: Path) -> None:
    vocabulary, rows = 8192, Rows(count=4, prompt=12, response=200)
    folder = saved(tmp_path, "qwen2", vocab_size=vocabulary)
    config = settings(folder, "", max_logits_per_chunk=600 * vocabulary)
    meta = make_network(config.student, torch.float32)
    network = real_network("qwen2", vocab_size=vocabulary)
    model = split_head(network, vocabulary)
    prompts, rollouts = padded_rows(rows.count, rows.prompt, rows.response)
    request = ScoreRequest(max_logits_per_chunk=600 * vocabulary)
    every_token = torch.ones_like(rollouts.mask)

    @torch.no_grad()
    def forward() -> None:
        response_hidden_states(model, prompts, rollouts, every_token)

    def score() -> None:
        score_batch(model, LocalTeacher("teacher", model), prompts, rollouts, request)

    counts = count_forward(meta, rows, vocabulary, MACHINE)
    assert counts.peak == pytest.approx(allocated_peak(forward), rel=0.1)
    assert counts.kept_bytes == rows.tokens * 64 * 4
    common = (vocabulary, rows.tokens, config, request.requirements, MACHINE)
    chunks = count_score_chunk(meta, meta, *common)
    assert 2 * 512 * vocabulary < chunks.peak / 4 < 3 * 512 * vocabulary, (
        "products of 512 tokens, everything else for 64"
    )
    assert 2 * counts.kept_bytes + chunks.peak == pytest.approx(allocated_peak(score), rel=0.05)
    assert chunks.flops == 2 * 2 * rows.tokens * 64 * vocabulary, "two heads"
    alone = count_score_chunk(meta, None, *common)
    assert alone.flops == chunks.flops / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_the_optimizer(dtype: str, tmp_path: Path) -> None:
    meta, _ = meta_network(tmp_path, "qwen2", dtype=dtype)
    network = real_network("qwen2").to(getattr(torch, dtype))
    optimizer = make_optimizer(network.parameters(), (0.9, 0.999), 0.01)
    for master in optimizer.master_weights:
        master.grad = torch.ones_like(master)
    counts = count_optimizer(meta, MACHINE)
    peak = allocated_peak(lambda: optimizer.step(1e-3, 1.0))
    assert counts.peak == pytest.approx(peak, rel=0.1, abs=1000), "no copy of the weights"
    assert counts.moved_bytes > 7 * 4 * meta.num_weights, "reads four tensors and writes three"
