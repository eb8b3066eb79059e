"""Measure the cost of the gradient probe relative to the scoring pass.

    python -m benchmarks.probes [--vocabulary 32768 --width 1024 --responses 32 --length 64]

Random hidden states and heads in float32, without a network, so that the ratio is the worst case;
in a run, scoring also includes the decoder's forward passes. `scoring` is both heads'
log-probabilities and the distribution statistics in chunks; `tokens` is the probe's pass over the
same chunks, including log-probabilities; `sequences` all estimators and discounts from it;
`readout` the row with its intervals.

Then blocks below the head of a random Qwen2 of 6 layers, 256 wide, V = 4,096: `update` is a forward
and a backward pass with gradients of all weights, `slopes` both gradients of every token by its
hidden state, and each block a forward and four backward passes with its sketches and exact lengths.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.gradients.bias import response_cost
from diagnostics.gradients.estimators import available_estimators, estimator_weights
from diagnostics.gradients.layers import make_block
from diagnostics.gradients.probe import GradientSketches, gradient_row
from diagnostics.gradients.sketch import (
    random_projection,
    sequence_sketches,
    token_energies,
    token_sketches,
)
from opd.data.prompts import Prompts
from opd.models.forward import log_probabilities, response_hidden_states
from opd.models.model import CausalLM, split_head
from opd.teachers.pair import ModelPair
from opd.teachers.teacher import LocalTeacher
from opd.training.probe.block_gradients import block_gradient_sketches, hidden_state_gradients

CHUNK = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("vocabulary", 32768), ("width", 1024), ("responses", 32), ("length", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    n, t, v = args.responses, args.length, args.vocabulary

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads = [normal(v, args.width) / args.width**0.5 for _ in range(2)]
    hidden = normal(n * t, args.width)
    tokens = torch.randint(v, (n, t), generator=generator)

    def logp(c: slice) -> tuple[Tensor, Tensor]:
        student_logp, teacher_logp = ((hidden[c] @ head.T).log_softmax(-1) for head in heads)
        return student_logp, teacher_logp

    batch, scoring = timed(lambda: score_batch(tokens, logp))
    signs = random_projection(v, args.width, seed=0)
    sketches, first = timed(lambda: token_sketches(batch, hidden, logp, signs, CHUNK))
    estimators = estimator_weights(batch, available_estimators(batch, True))
    x, second = timed(
        lambda: sequence_sketches(sketches, batch.mask, estimators.values, estimators.local)
    )
    gradient_sketches = GradientSketches(
        sketches=x,
        energies=token_energies(sketches, batch.mask, estimators.values, estimators.local),
        prompt=batch.prompt,
        cost=response_cost(batch),
        names=estimators.names,
        gammas=estimators.gammas,
    )
    row, third = timed(lambda: gradient_row(gradient_sketches))
    print(f"{n} x {t} tokens, V = {v}, D = {args.width}, {x.shape[1]} members, {len(row)} numbers")
    for name, seconds in (
        ("scoring", scoring), ("tokens", first), ("sequences", second), ("readout", third)
    ):  # fmt: skip
        print(f"{name:10} {seconds:8.2f} s  {seconds / scoring:6.2f} of scoring")
    measure_blocks()


def measure_blocks(rows: int = 16, width: int = 128) -> None:
    """Print the time of block probes relative to one update of the same rows."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        networks.append(Qwen2ForCausalLM(config).eval())
    student, teacher = (split_head(network, 4096) for network in networks)
    pair = ModelPair(student, LocalTeacher("", teacher), None, [0])
    generator = torch.Generator().manual_seed(0)
    prompts = Prompts(
        tokens=torch.randint(4096, (rows, 32), generator=generator),
        mask=torch.ones(rows, 32, dtype=torch.bool),
        index=torch.arange(rows) // 2,
        answers=[""] * rows,
    )
    tokens = torch.randint(4096, (rows, width), generator=generator)
    chance = torch.full(tokens.shape, -8.0)
    bare = make_batch(tokens, chance, chance)

    def states(model: CausalLM) -> Tensor:
        return response_hidden_states(model, prompts, bare)

    def logp(c: slice) -> tuple[Tensor, Tensor]:
        return (
            log_probabilities(pair.student, student_states[c], 1.0),
            log_probabilities(teacher, teacher_states[c], 1.0),
        )

    with torch.no_grad():
        student_states, teacher_states = states(student), states(teacher)
        batch = score_batch(tokens, logp)

    def update() -> None:
        hidden = states(pair.student)
        (hidden.square().sum() + hidden.sum()).backward()

    _, unit = timed(update)
    with torch.no_grad():
        slopes, head = timed(
            lambda: hidden_state_gradients(pair, batch, student_states, teacher_states, CHUNK)
        )
    print(f"\n{rows} x {width} tokens, update without head {unit:.2f} s, slopes {head / unit:.2f}")
    for pattern in ("*norm", "model.layers.5.mlp.down_proj", "*.down_proj"):
        probed_blocks = [make_block(pair.student.network, pattern)]
        with torch.no_grad():
            args = (pair.student, prompts, batch, slopes, probed_blocks, 0.0, 16384)
            block_sketches, block_seconds = timed(partial(block_gradient_sketches, *args))
        row = gradient_row(block_sketches[pattern], prefix=pattern)
        print(
            f"{pattern:28} {block_seconds / unit:6.2f} updates, "
            f"excess {row[f'{pattern}/sketch_excess']:.4f}"
        )


def score_batch(tokens: Tensor, logp: Callable[[slice], tuple[Tensor, Tensor]]) -> ScoredRollouts:
    """Return the batch as scored in chunks of tokens, with two rollouts per prompt."""
    flat, parts = tokens.flatten(), []
    for start in range(0, len(flat), CHUNK):
        c = slice(start, start + CHUNK)
        p, q = logp(c)
        y = flat[c, None]
        part = {"student": p.gather(-1, y)[:, 0], "teacher": q.gather(-1, y)[:, 0]}
        parts.append(part | compute_distribution_stats(p, q, flat[c]))
    column = {name: torch.cat([x[name] for x in parts]).view_as(tokens) for name in parts[0]}
    student_logp, teacher_logp = column.pop("student"), column.pop("teacher")
    return replace(
        make_batch(tokens, student_logp, teacher_logp), prefix=DistributionStats(**column)
    )


def make_batch(tokens: Tensor, student_logp: Tensor, teacher_logp: Tensor) -> ScoredRollouts:
    """Return a batch with the given log-probabilities."""
    return ScoredRollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=student_logp,
        student_logp=student_logp,
        teacher_logp=teacher_logp,
        prompt=torch.arange(len(tokens)) // 2,
        ended=torch.ones(len(tokens), dtype=torch.bool),
    )


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call and its CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


if __name__ == "__main__":
    main()
