"""What the gradient probe costs beside the scoring pass that it needs anyway.

    python -m benchmarks.probes [--vocabulary 32768 --width 1024 --responses 32 --length 64]

Random states and heads in float32: no network, so that the ratio is the worst case; in a run the
decoder's forward passes come on top of the scoring. `scoring` is both heads' log-probabilities and
the prefix functionals in chunks; `tokens` the probe's pass over the same chunks, log-probabilities
included; `sequences` all members and discounts from it; `readout` the row with its intervals.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Prefix, Scored
from diagnostics.family import available, weights
from diagnostics.prefix import functionals
from diagnostics.probe import Measured, gradient_row
from diagnostics.sketch import random_signs, sequence_sketches, token_energies, token_sketches
from diagnostics.tradeoff import cost_of_response

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
    found = Measured(
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


def scored(tokens: Tensor, logp: Callable[[slice], tuple[Tensor, Tensor]]) -> Scored:
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
    return Scored(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=ours,
        student_logp=ours,
        teacher_logp=theirs,
        prompt=torch.arange(len(tokens)) // 2,
        ended=torch.ones(len(tokens), dtype=torch.bool),
        prefix=Prefix(**column),
    )


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


if __name__ == "__main__":
    main()
