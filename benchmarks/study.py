"""Speed of the synthetic study, as ratios measured in one run on one thread.

    python -m benchmarks.study

1. Exact moments of a grid of discounts and estimators against Monte Carlo on the same world until
   the least certain has a relative standard error of 1 % (extrapolated from a shorter run: standard
   errors fall as 1/sqrt(n), time grows as n), for the variances alone and for the means, whose
   error is that of the whole vector, sqrt(variance / n) / |mean|.
2. The vectorised sampler with gradients against a loop of one autograd call a trajectory.
3. Peak memory of Monte Carlo as the number of trajectories grows.
"""

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from synthetic.estimators import ESTIMATORS
from synthetic.exact import moments
from synthetic.sampling.monte_carlo import monte_carlo, trajectory_gradients
from synthetic.sampling.trajectories import sample
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair

GAMMAS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 1.0)
NAMES = ("plain", "value", "rb_immediate", "rb_future", "rb_all", "rb_all_value")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(states: int, actions: int, horizon: int) -> tuple[TabularMDP, torch.Tensor, torch.Tensor]:
    mdp = random_chain(states, actions, horizon, seeded(0), mixing=0.1)
    return mdp, *random_pair(mdp, seeded(1), distance=1.0, heterogeneity=0.5)


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return sorted(times)[repeats // 2]


def exact_against_sampling(states: int, actions: int, horizon: int, count: int) -> None:
    mdp, student, teacher = world(states, actions, horizon)

    family = {f"{n} {g}": ESTIMATORS[n].sampled(g) for n in NAMES for g in GAMMAS}
    tables = {
        f"{n} {g}": moments.baseline(mdp, student, teacher, n, g) for n in NAMES for g in GAMMAS
    }
    ours = seconds(lambda: moments.moments(mdp, student, teacher, NAMES, GAMMAS), 5)
    begin = time.perf_counter()
    drawn = monte_carlo(
        mdp, student, teacher, family, count, seeded(2), baselines=tables, chunk=1000
    )
    sampled = time.perf_counter() - begin
    mean, variance = moments.moments(mdp, student, teacher, NAMES, GAMMAS)
    noise = float((drawn.variance_se / drawn.variance).max())
    away = float((variance / mean.square().sum((-1, -2)) / count).sqrt().max())
    print(
        f"S={states} A={actions} T={horizon}, {len(GAMMAS)} discounts x {len(NAMES)} estimators: "
        f"exact {ours:.3f} s; Monte Carlo {sampled:.1f} s for {count} trajectories"
    )
    for what, error in (("variances", noise), ("means", away)):
        theirs = sampled * (error / 0.01) ** 2
        print(
            f"  {what}: largest relative standard error {error:.3f}, {theirs:.0f} s to 1 %: "
            f"ratio {theirs / ours:.0f}"
        )


def vectorised_against_loop(states: int, actions: int, horizon: int) -> None:
    mdp, student, teacher = world(states, actions, horizon)
    objective = ESTIMATORS["plain"].sampled(1.0)
    cost = student.log_softmax(-1) - teacher.log_softmax(-1)
    generator = seeded(3)

    def one() -> torch.Tensor:
        """As one would write it first: step by step, one backward pass a trajectory."""
        live = student.clone().requires_grad_()
        state = int(torch.multinomial(mdp.start, 1, generator=generator))
        logps, costs = [], []
        for _ in range(horizon):
            logp = live[state].log_softmax(-1)
            token = int(torch.multinomial(logp.detach().exp(), 1, generator=generator))
            logps.append(logp[token])
            costs.append(cost[state, token])
            state = int(torch.multinomial(mdp.transition[state, token], 1, generator=generator))
        to_go = torch.stack(costs).flip(0).cumsum(0).flip(0)
        (gradient,) = torch.autograd.grad((torch.stack(logps) * to_go).sum(), live)
        return gradient

    def many() -> None:
        at = sample(mdp, student, teacher, 2048, generator)
        trajectory_gradients(at, student, objective)

    loop, ours = seconds(one, 21), seconds(many, 5) / 2048
    print(
        f"S={states} A={actions} T={horizon}: loop {1 / loop:.0f} trajectories/s, vectorised "
        f"{1 / ours:.0f}: ratio {loop / ours:.0f}"
    )


def long_horizon(states: int, names: tuple[str, ...]) -> None:
    mdp, student, teacher = world(states, 16, 512)
    spent = seconds(lambda: moments.moments(mdp, student, teacher, names, GAMMAS), 1)
    print(f"S={states} A=16 T=512, 8 discounts, {len(names)} estimators: {spent:.1f} s")


def memory(count: int) -> None:
    """Print the peak resident set of a fresh process that samples so many trajectories."""
    mdp, student, teacher = world(8, 4, 64)
    family = {"plain": ESTIMATORS["plain"].sampled(1.0)}
    monte_carlo(mdp, student, teacher, family, count, seeded(4), chunk=1000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        memory(given.memory)
        return
    print(f"python {platform.python_version()}, torch {torch.__version__}, {cpu()}, one thread")
    exact_against_sampling(8, 4, 64, 10_000)
    exact_against_sampling(16, 16, 64, 3_000)
    vectorised_against_loop(8, 4, 64)
    vectorised_against_loop(16, 16, 128)
    long_horizon(16, NAMES)
    long_horizon(64, NAMES[:1])
    for count in (2_000, 20_000, 100_000):
        words = [sys.executable, "-m", "benchmarks.study", "--memory", str(count)]
        peak = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        print(f"Monte Carlo with {count} trajectories: peak {peak} MiB")


def cpu() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except FileNotFoundError:
        names = []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
