"""Compare the gradient probe's estimates from one batch, and proxies, with exact values.

    python -m benchmarks.estimates [--batches 200 --sequences 48]

First table: noise of estimators of the gamma family and squared bias of discounts on a small world
with random lengths. `exact` is computed by recursion, `one batch` is an estimate with its 95 %
interval, `mean` the average over all batches with its standard error, `covered` the fraction of
intervals that contain the exact value. Second table: gradient-noise proxies of other systems over
the exact variance that they approximate, with 95 % intervals over independent parts of the
trajectories.
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diagnostics.gradients.bias import squared_bias
from diagnostics.gradients.estimators import EstimatorWeights, estimator_weights
from diagnostics.gradients.jackknife import Estimate, squared_length_estimate, student_t_quantile
from diagnostics.gradients.proxies import (
    adam_noise,
    scalar_advantage_variance,
    token_advantage_variance,
)
from diagnostics.gradients.signal_noise import PairProducts, pair_products, signal_and_noise
from diagnostics.gradients.sketch import identity_projection, sequence_sketches, token_sketches
from opd.objectives.credit import to_go
from synthetic.exact import moments
from synthetic.sampling.trajectories import sample
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair, token_chain, with_end_state

GAMMAS = (0.0, 0.5, 1.0)
NAMES = ("plain", "position_mean", "local_kl", "rb_immediate", "rb_future", "rb_all")
EXACT = [name.replace("position_mean", "position_value") for name in NAMES]
"""Names in the exact study: the mean over other prompts converges to the value at a position."""
SHARES = 20
World = tuple[TabularMDP, Tensor, Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(
    world: World, count: int, seed: int, names: tuple[str, ...]
) -> tuple[Tensor, EstimatorWeights]:
    """Return (n, F, 1, S A) gradients of `count` trajectories, computed as in the probe."""
    mdp, student, teacher = world
    trajectories = sample(mdp, student, teacher, count, seeded(seed))
    batch = replace(trajectories.batch, prompt=torch.arange(count))
    flat, states = trajectories.states[batch.mask], len(student)
    tables = student.log_softmax(-1), teacher.log_softmax(-1)
    tokens = token_sketches(
        batch,
        one_hot(flat, states).double(),
        lambda c: (tables[0][flat[c]], tables[1][flat[c]]),
        identity_projection(student.shape[1], states),
    )
    family = estimator_weights(batch, names, GAMMAS)
    return sequence_sketches(tokens, batch.mask, family.values, family.local), family


def family_table(batches: int, sequences: int) -> None:
    """Print the table of noise and squared bias."""
    mdp = with_end_state(token_chain(3, 8), torch.tensor(0.1))
    world = (mdp, *random_pair(mdp, seeded(8), distance=1.0, heterogeneity=0.5))
    means, noise = moments.moments(*world, EXACT, GAMMAS)
    bias = (means[0] - means[0, -1]).square().sum((-1, -2))
    probes: list[tuple[PairProducts, EstimatorWeights]] = []
    for seed in range(batches):
        x, family = gradients(world, sequences, 5000 + seed, NAMES)
        probes.append((pair_products(x, torch.arange(sequences)), family))
    print(f"{sequences} sequences a batch, {batches} batches")
    print(f"{'quantity':24} {'exact':>7} {'one batch':>24} {'mean':>16} {'covered':>8}")
    for i, name in enumerate(NAMES):
        for g, gamma in enumerate(GAMMAS):
            nth = i * len(GAMMAS) + g
            all_noise = [p.positive_estimate(p.noise[:, nth]) for p, _ in probes]
            print_row(f"noise {name}@{gamma:g}", float(noise[i, g]), all_noise)
    for g, gamma in enumerate(GAMMAS[:-1]):
        all_bias = [
            squared_length_estimate(p.mean_estimate(squared_bias(p, w)[:, g])) for p, w in probes
        ]
        print_row(f"bias2@{gamma:g}", float(bias[g]), all_bias)


def print_row(name: str, true: float, estimates: list[Estimate]) -> None:
    """Print one quantity: exact value, first estimate, mean and coverage."""
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    error = float(values.std()) / len(values) ** 0.5
    covered = sum(e.low <= true <= e.high for e in estimates) / len(estimates)
    first_estimate = f"{estimates[0].value:.3f} [{estimates[0].low:.3f}, {estimates[0].high:.3f}]"
    mean = f"{float(values.mean()):.3f} ± {error:.3f}"
    print(f"{name:24} {true:7.3f} {first_estimate:>24} {mean:>16} {covered:8.1%}")


def proxy_table(count: int) -> None:
    """Print the table of proxies."""
    print(f"\n{count} trajectories; proxy / exact variance of one trajectory")
    for title, mixing in (("mixes", 0.3), ("persists", 0.0)):
        for horizon in (8, 96):
            mdp = random_chain(3, 3, horizon, seeded(0), mixing=mixing)
            world = (mdp, *random_pair(mdp, seeded(2), distance=1.0, heterogeneity=0.5))
            _, true = moments.moments(*world, "plain", (0.0, 1.0))
            print(f"{title}, T = {horizon}: exact {true[0]:.3g} at 0, {true[1]:.3g} at 1")
            for name, values, unit in proxies(world, count, true):
                ratio = torch.tensor(values, dtype=torch.float64) / unit
                reach = student_t_quantile(len(ratio) - 1) * float(ratio.std()) / len(ratio) ** 0.5
                print(f"  {name:44} {float(ratio.mean()):6.3f} ± {reach:.3f}")


def proxies(world: World, count: int, true: Tensor) -> list[tuple[str, list[float], float]]:
    """Return each proxy's name, its value on each part of the trajectories, and its exact value."""
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
        for g, discount in ((0, 0.0), (2, 1.0)):
            sample_variance = signal_and_noise(x[:, g, 0], torch.arange(size))["variance"].value
            columns.setdefault(f"sample variance (ours)@{discount:g}", []).append(sample_variance)
            micro = x[: size // 8 * 8, g, 0].view(-1, 8, x.shape[-1]).mean(1)
            micro = micro[: len(micro) // 8 * 8].view(-1, 8, x.shape[-1])
            micro_variance = (micro - micro.mean(1, keepdim=True)).square().sum(-1).mean()
            columns.setdefault(f"8 micro-batches of 8 (toy)@{discount:g}", []).append(
                float(micro_variance)
            )
            columns.setdefault(f"Adam's v - m^2 times 8@{discount:g}", []).append(
                8 * adam(x[:, g, 0])
            )
    return [(name, v, float(true[int(name.endswith("@1"))])) for name, v in columns.items()]


def adam(x: Tensor) -> float:
    """Return `adam_noise` after updates on batches of 8 of these trajectories, at one policy."""
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
    args = parser.parse_args()
    family_table(args.batches, args.sequences)
    proxy_table(args.trajectories)


if __name__ == "__main__":
    main()
