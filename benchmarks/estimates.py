"""What the gradient probe reads off one batch, and what proxies read, against exact values.

    python -m benchmarks.estimates [--batches 200 --sequences 48]

First table: noise of members of the gamma family and squared bias of discounts on a small world
with random lengths. `exact` by recursion, `one batch` with its 95 % interval, `mean` over all
batches with its standard error, `covered` how many of their intervals hold the exact value.
Second table: gradient-noise proxies of other systems over the exact variance that they stand for,
with 95 % intervals over independent shares of the trajectories.
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diagnostics.gradients.bias import squared_bias
from diagnostics.gradients.estimators import EstimatorWeights, weights
from diagnostics.gradients.jackknife import Estimate, quantile, squared
from diagnostics.gradients.proxies import (
    adam_noise,
    scalar_advantage_variance,
    token_advantage_variance,
)
from diagnostics.gradients.signal_noise import Pairs, pairs, signal_and_noise
from diagnostics.gradients.sketch import no_projection, sequence_sketches, token_sketches
from opd.objectives.credit import to_go
from synthetic.exact import moments
from synthetic.sampling.trajectories import sample
from synthetic.worlds.mdp import TabularMDP, ending, random_chain, random_pair, token_chain

GAMMAS = (0.0, 0.5, 1.0)
NAMES = ("plain", "position_mean", "local_kl", "rb_immediate", "rb_future", "rb_all")
EXACT = [name.replace("position_mean", "position_value") for name in NAMES]
"""Their names in the exact study: the mean over other prompts tends to the value at a position."""
SHARES = 20
World = tuple[TabularMDP, Tensor, Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(
    world: World, count: int, seed: int, names: tuple[str, ...]
) -> tuple[Tensor, EstimatorWeights]:
    """(n, F, 1, S A) gradients of `count` trajectories by the probe's own path."""
    mdp, student, teacher = world
    at = sample(mdp, student, teacher, count, seeded(seed))
    batch = replace(at.batch, prompt=torch.arange(count))
    flat, states = at.states[batch.mask], len(student)
    tables = student.log_softmax(-1), teacher.log_softmax(-1)
    tokens = token_sketches(
        batch,
        one_hot(flat, states).double(),
        lambda c: (tables[0][flat[c]], tables[1][flat[c]]),
        no_projection(student.shape[1], states),
    )
    family = weights(batch, names, GAMMAS)
    return sequence_sketches(tokens, batch.mask, family.values, family.local), family


def family_table(batches: int, sequences: int) -> None:
    mdp = ending(token_chain(3, 8), torch.tensor(0.1))
    world = (mdp, *random_pair(mdp, seeded(8), distance=1.0, heterogeneity=0.5))
    means, noise = moments.moments(*world, EXACT, GAMMAS)
    bias = (means[0] - means[0, -1]).square().sum((-1, -2))
    found: list[tuple[Pairs, EstimatorWeights]] = []
    for seed in range(batches):
        x, family = gradients(world, sequences, 5000 + seed, NAMES)
        found.append((pairs(x, torch.arange(sequences)), family))
    print(f"{sequences} sequences a batch, {batches} batches")
    print(f"{'quantity':24} {'exact':>7} {'one batch':>24} {'mean':>16} {'covered':>8}")
    for i, name in enumerate(NAMES):
        for g, gamma in enumerate(GAMMAS):
            nth = i * len(GAMMAS) + g
            all_noise = [p.positive(p.noise[:, nth]) for p, _ in found]
            line(f"noise {name}@{gamma:g}", float(noise[i, g]), all_noise)
    for g, gamma in enumerate(GAMMAS[:-1]):
        all_bias = [squared(p.estimate(squared_bias(p, w)[:, g])) for p, w in found]
        line(f"bias2@{gamma:g}", float(bias[g]), all_bias)


def line(name: str, true: float, found: list[Estimate]) -> None:
    values = torch.tensor([e.value for e in found], dtype=torch.float64)
    error = float(values.std()) / len(values) ** 0.5
    covered = sum(e.low <= true <= e.high for e in found) / len(found)
    one = f"{found[0].value:.3f} [{found[0].low:.3f}, {found[0].high:.3f}]"
    mean = f"{float(values.mean()):.3f} ± {error:.3f}"
    print(f"{name:24} {true:7.3f} {one:>24} {mean:>16} {covered:8.1%}")


def proxy_table(count: int) -> None:
    print(f"\n{count} trajectories; proxy / exact variance of one trajectory")
    for title, mixing in (("mixes", 0.3), ("persists", 0.0)):
        for horizon in (8, 96):
            mdp = random_chain(3, 3, horizon, seeded(0), mixing=mixing)
            world = (mdp, *random_pair(mdp, seeded(2), distance=1.0, heterogeneity=0.5))
            _, true = moments.moments(*world, "plain", (0.0, 1.0))
            print(f"{title}, T = {horizon}: exact {true[0]:.3g} at 0, {true[1]:.3g} at 1")
            for name, values, unit in proxies(world, count, true):
                ratio = torch.tensor(values, dtype=torch.float64) / unit
                reach = quantile(len(ratio) - 1) * float(ratio.std()) / len(ratio) ** 0.5
                print(f"  {name:44} {float(ratio.mean()):6.3f} ± {reach:.3f}")


def proxies(world: World, count: int, true: Tensor) -> list[tuple[str, list[float], float]]:
    """Name, its value on each share of the trajectories, and what it is read as."""
    mdp, student, teacher = world
    size = count // SHARES
    columns: dict[str, list[float]] = {}
    for seed in range(SHARES):
        batch = sample(mdp, student, teacher, size, seeded(100 + seed)).batch
        assert batch.prefix is not None
        w = 1 - 2 * batch.student_logp.exp() + batch.prefix.collision
        credits = {0: batch.log_ratio, 1: to_go(batch.log_ratio, batch.mask)}
        for gamma, credit in credits.items():
            for name, f in (
                ("mean advantage squared (verl)", scalar_advantage_variance),
                ("advantages squared by token", token_advantage_variance),
            ):
                columns.setdefault(f"{name}@{gamma}", []).append(float(f(-credit, w, batch.mask)))
        x, _ = gradients(world, size, 300 + seed, ("plain",))
        for g, gamma in ((0, 0.0), (2, 1.0)):
            own = signal_and_noise(x[:, g, 0], torch.arange(size))["variance"].value
            columns.setdefault(f"sample variance (ours)@{gamma:g}", []).append(own)
            micro = x[: size // 8 * 8, g, 0].view(-1, 8, x.shape[-1]).mean(1)
            micro = micro[: len(micro) // 8 * 8].view(-1, 8, x.shape[-1])
            away = (micro - micro.mean(1, keepdim=True)).square().sum(-1).mean()
            columns.setdefault(f"8 micro-batches of 8 (toy)@{gamma:g}", []).append(float(away))
            columns.setdefault(f"Adam's v - m^2 times 8@{gamma:g}", []).append(8 * adam(x[:, g, 0]))
    return [(name, v, float(true[int(name.endswith("@1"))])) for name, v in columns.items()]


def adam(x: Tensor) -> float:
    """`adam_noise` after updates on batches of 8 of these trajectories, at one policy."""
    betas, m, v = (0.9, 0.999), torch.zeros_like(x[0]), torch.zeros_like(x[0])
    batches = x[: len(x) // 8 * 8].view(-1, 8, x.shape[1]).mean(1)
    for g in batches:
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g.square()
    return float(adam_noise([(m, v)], len(batches), betas))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--trajectories", type=int, default=20_000)
    given = parser.parse_args()
    family_table(given.batches, given.sequences)
    proxy_table(given.trajectories)


if __name__ == "__main__":
    main()
