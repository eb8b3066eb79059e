"""What the gradient probe costs beside the scoring pass that it needs anyway.

    python -m benchmarks.probes [--vocabulary 32768 --width 1024 --responses 32 --length 64]

Random states and heads in float32: no network, so that the ratio is the worst case; in a run the
decoder's forward passes come on top of the scoring. `scoring` is both heads' log-probabilities and
the prefix functionals in chunks; `tokens` the probe's pass over the same chunks, log-probabilities
included; `sequences` all members and discounts from it; `readout` the row with its intervals.

Then blocks below the head of a random Qwen2 of 6 layers, 256 wide, V = 4,096: `update` is a forward
and a backward pass with gradients of all weights, `slopes` both gradients of every token by its
hidden state, and each block a forward and four backward passes with its sketches and exact lengths.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts
from diagnostics.core.distribution_stats import functionals
from diagnostics.gradients.bias import cost_of_response
from diagnostics.gradients.estimators import available, weights
from diagnostics.gradients.layers import block
from diagnostics.gradients.probe import GradientSketches, gradient_row
from diagnostics.gradients.sketch import (
    random_signs,
    sequence_sketches,
    token_energies,
    token_sketches,
)
from opd.data.prompts import Prompts
from opd.models.forward import log_probabilities, response_hidden
from opd.models.model import CausalLM, split
from opd.teachers.pair import ModelPair
from opd.training.gradient_probe import below_head, hidden_slopes

CHUNK = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("vocabulary", 32768), ("width", 1024), ("responses", 32), ("length", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    n, t, v = given.responses, given.length, given.vocabulary

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads = [normal(v, given.width) / given.width**0.5 for _ in range(2)]
    hidden = normal(n * t, given.width)
    tokens = torch.randint(v, (n, t), generator=generator)

    def logp(c: slice) -> tuple[Tensor, Tensor]:
        ours, theirs = ((hidden[c] @ head.T).log_softmax(-1) for head in heads)
        return ours, theirs

    batch, scoring = timed(lambda: scored(tokens, logp))
    signs = random_signs(v, given.width, seed=0)
    kept, first = timed(lambda: token_sketches(batch, hidden, logp, signs, CHUNK))
    at = weights(batch, available(batch, True))
    x, second = timed(lambda: sequence_sketches(kept, batch.mask, at.values, at.local))
    found = GradientSketches(
        sketches=x,
        energies=token_energies(kept, batch.mask, at.values, at.local),
        prompt=batch.prompt,
        cost=cost_of_response(batch),
        names=at.names,
        gammas=at.gammas,
    )
    row, third = timed(lambda: gradient_row(found))
    print(f"{n} x {t} tokens, V = {v}, D = {given.width}, {x.shape[1]} members, {len(row)} numbers")
    for name, seconds in (
        ("scoring", scoring), ("tokens", first), ("sequences", second), ("readout", third)
    ):  # fmt: skip
        print(f"{name:10} {seconds:8.2f} s  {seconds / scoring:6.2f} of scoring")
    blocks()


def blocks(rows: int = 16, width: int = 128) -> None:
    """Probes of blocks in units of one update of the same rows."""
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
    pair = ModelPair(*(split(network, 4096) for network in networks), None, [0])
    generator = torch.Generator().manual_seed(0)
    prompts = Prompts(
        tokens=torch.randint(4096, (rows, 32), generator=generator),
        mask=torch.ones(rows, 32, dtype=torch.bool),
        index=torch.arange(rows) // 2,
        answers=[""] * rows,
    )
    tokens = torch.randint(4096, (rows, width), generator=generator)
    chance = torch.full(tokens.shape, -8.0)
    bare = rolled(tokens, chance, chance)

    def states(model: CausalLM) -> Tensor:
        return response_hidden(model, prompts, bare)

    def logp(c: slice) -> tuple[Tensor, Tensor]:
        return (
            log_probabilities(pair.student, ours[c], 1.0),
            log_probabilities(pair.teacher, theirs[c], 1.0),
        )

    with torch.no_grad():
        ours, theirs = states(pair.student), states(pair.teacher)
        batch = scored(tokens, logp)

    def update() -> None:
        at = states(pair.student)
        (at.square().sum() + at.sum()).backward()

    _, unit = timed(update)
    with torch.no_grad():
        slopes, head = timed(lambda: hidden_slopes(pair, batch, ours, theirs, CHUNK))
    print(f"\n{rows} x {width} tokens, update without head {unit:.2f} s, slopes {head / unit:.2f}")
    for pattern in ("*norm", "model.layers.5.mlp.down_proj", "*.down_proj"):
        chosen = [block(pair.student.network, pattern)]
        with torch.no_grad():
            args = (pair.student, prompts, batch, slopes, chosen, 0.0, 16384)
            found, took = timed(lambda args=args: below_head(*args))
        row = gradient_row(found[pattern], prefix=pattern)
        print(
            f"{pattern:28} {took / unit:6.2f} updates, excess {row[f'{pattern}/sketch_excess']:.4f}"
        )


def scored(tokens: Tensor, logp: Callable[[slice], tuple[Tensor, Tensor]]) -> ScoredRollouts:
    """The batch, as a scoring pass over chunks of tokens makes it; two rollouts a prompt."""
    flat, parts = tokens.flatten(), []
    for start in range(0, len(flat), CHUNK):
        c = slice(start, start + CHUNK)
        p, q = logp(c)
        y = flat[c, None]
        part = {"student": p.gather(-1, y)[:, 0], "teacher": q.gather(-1, y)[:, 0]}
        parts.append(part | functionals(p, q, flat[c]))
    column = {name: torch.cat([x[name] for x in parts]).view_as(tokens) for name in parts[0]}
    ours, theirs = column.pop("student"), column.pop("teacher")
    return replace(rolled(tokens, ours, theirs), prefix=DistributionStats(**column))


def rolled(tokens: Tensor, ours: Tensor, theirs: Tensor) -> ScoredRollouts:
    return ScoredRollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=ours,
        student_logp=ours,
        teacher_logp=theirs,
        prompt=torch.arange(len(tokens)) // 2,
        ended=torch.ones(len(tokens), dtype=torch.bool),
    )


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


if __name__ == "__main__":
    main()
