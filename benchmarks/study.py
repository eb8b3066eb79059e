"""Measure the speed of the synthetic study as ratios, on one thread.

    python -m benchmarks.study

1. Exact moments of a grid of discounts and estimators, compared with Monte Carlo on the same world
   until the least certain one has a relative standard error of 1 % (extrapolated from a shorter
   run: standard errors fall as 1/sqrt(n), time grows as n), for the variances alone and for the
   means, whose error is that of the whole vector, sqrt(variance / n) / |mean|.
2. The vectorised sampler with gradients, compared with a loop of one autograd call per trajectory.
3. Peak memory of Monte Carlo as the number of trajectories grows.
4. Exact moments of large sparse worlds: CPU seconds and memory as the number of states grows.
5. One pass for all estimators and discounts of a cell, compared with a pass for each.
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


def make_world(
    states: int, actions: int, horizon: int
) -> tuple[TabularMDP, torch.Tensor, torch.Tensor]:
    """Return a random world with student and teacher."""
    mdp = random_chain(states, actions, horizon, seeded(0), mixing=0.1)
    return mdp, *random_pair(mdp, seeded(1), distance=1.0, heterogeneity=0.5)


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the median wall time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return sorted(times)[repeats // 2]


def exact_against_sampling(states: int, actions: int, horizon: int, count: int) -> None:
    """Print the time of exact moments and of Monte Carlo."""
    mdp, student, teacher = make_world(states, actions, horizon)

    family = {f"{n} {g}": ESTIMATORS[n].sampled_objective(g) for n in NAMES for g in GAMMAS}
    tables = {
        f"{n} {g}": moments.baseline(mdp, student, teacher, n, g) for n in NAMES for g in GAMMAS
    }
    exact_seconds = seconds(lambda: moments.moments(mdp, student, teacher, NAMES, GAMMAS), 5)
    begin = time.perf_counter()
    estimate = monte_carlo(
        mdp, student, teacher, family, count, seeded(2), baselines=tables, chunk=1000
    )
    sampled = time.perf_counter() - begin
    mean, variance = moments.moments(mdp, student, teacher, NAMES, GAMMAS)
    noise = float((estimate.variance_se / estimate.variance).max())
    mean_error = float((variance / mean.square().sum((-1, -2)) / count).sqrt().max())
    print(
        f"S={states} A={actions} T={horizon}, {len(GAMMAS)} discounts x {len(NAMES)} estimators: "
        f"exact {exact_seconds:.3f} s; Monte Carlo {sampled:.1f} s for {count} trajectories"
    )
    for quantity, error in (("variances", noise), ("means", mean_error)):
        sampling_seconds = sampled * (error / 0.01) ** 2
        print(
            f"  {quantity}: largest relative standard error {error:.3f}, "
            f"{sampling_seconds:.0f} s to 1 %: ratio {sampling_seconds / exact_seconds:.0f}"
        )


def vectorised_against_loop(states: int, actions: int, horizon: int) -> None:
    """Print the rate of the vectorised sampler and of a loop."""
    mdp, student, teacher = make_world(states, actions, horizon)
    objective = ESTIMATORS["plain"].sampled_objective(1.0)
    cost = student.log_softmax(-1) - teacher.log_softmax(-1)
    transition = mdp.transition
    assert isinstance(transition, torch.Tensor)
    generator = seeded(3)

    def single_gradient() -> torch.Tensor:
        """Compute one gradient step by step with one backward pass, as in a simple version."""
        live = student.clone().requires_grad_()
        state = int(torch.multinomial(mdp.start, 1, generator=generator))
        logps, costs = [], []
        for _ in range(horizon):
            logp = live[state].log_softmax(-1)
            token = int(torch.multinomial(logp.detach().exp(), 1, generator=generator))
            logps.append(logp[token])
            costs.append(cost[state, token])
            state = int(torch.multinomial(transition[state, token], 1, generator=generator))
        to_go = torch.stack(costs).flip(0).cumsum(0).flip(0)
        (gradient,) = torch.autograd.grad((torch.stack(logps) * to_go).sum(), live)
        return gradient

    def batch_gradients() -> None:
        trajectories = sample(mdp, student, teacher, 2048, generator)
        trajectory_gradients(trajectories, student, objective)

    loop, batch_seconds = seconds(single_gradient, 21), seconds(batch_gradients, 5) / 2048
    print(
        f"S={states} A={actions} T={horizon}: loop {1 / loop:.0f} trajectories/s, vectorised "
        f"{1 / batch_seconds:.0f}: ratio {loop / batch_seconds:.0f}"
    )


def long_horizon(states: int, names: tuple[str, ...]) -> None:
    """Print the time of exact moments at a long horizon."""
    mdp, student, teacher = make_world(states, 16, 512)
    spent = seconds(lambda: moments.moments(mdp, student, teacher, names, GAMMAS), 1)
    print(f"S={states} A=16 T=512, 8 discounts, {len(names)} estimators: {spent:.1f} s")


def memory(count: int) -> None:
    """Print the peak memory of a new process that samples so many trajectories."""
    mdp, student, teacher = make_world(8, 4, 64)
    family = {"plain": ESTIMATORS["plain"].sampled_objective(1.0)}
    monte_carlo(mdp, student, teacher, family, count, seeded(4), chunk=1000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def large(states: int, horizon: int, gammas: tuple[float, ...]) -> None:
    """Print the CPU seconds and the memory of exact moments in a sparse world, in a new process."""
    mdp = random_chain(states, 4, horizon, seeded(0), mixing=0.1, successors=4)
    student, teacher = random_pair(mdp, seeded(1), distance=1.0, heterogeneity=0.5)
    small = random_chain(8, 4, 8, seeded(0), successors=4)
    moments.moments(small, *random_pair(small, seeded(1)), "plain", gammas)
    start_size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    moments.moments(mdp, student, teacher, "plain", gammas)
    spent = time.process_time() - begin
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_size) // 1024
    print(
        f"S={states} A=4 T={horizon}, 4 successors, {len(gammas)} discounts: {spent:.1f} CPU s, "
        f"{extra} MiB more; a dense world's transitions alone: {states**2 * 32 // 2**20} MiB"
    )


def one_pass_against_many(states: int, actions: int, horizon: int) -> None:
    """Print the CPU seconds of a cell's moments in one pass and in a pass for each."""
    mdp, student, teacher = make_world(states, actions, horizon)
    times = []
    for names, gammas in (
        ([NAMES], [GAMMAS]),
        ([(name,) for name in NAMES], [(gamma,) for gamma in GAMMAS]),
    ):
        begin = time.process_time()
        for group in names:
            for grid in gammas:
                moments.moments(mdp, student, teacher, group, grid)
        times.append(time.process_time() - begin)
    print(
        f"S={states} A={actions} T={horizon}, {len(NAMES)} estimators x {len(GAMMAS)} discounts: "
        f"one pass {times[0]:.3f} CPU s, a pass for each {times[1]:.2f}: "
        f"ratio {times[1] / times[0]:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--large", type=int, help="only the exact moments of a sparse world of so many states"
    )
    parser.add_argument("--horizon", type=int, default=512, help="steps of that world")
    parser.add_argument("--discounts", type=int, default=1, help="discounts of it, from 1 down")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        memory(args.memory)
        return
    if args.large:
        large(args.large, args.horizon, GAMMAS[-args.discounts :])
        return
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {cpu_name()}, one thread"
    )
    exact_against_sampling(8, 4, 64, 10_000)
    exact_against_sampling(16, 16, 64, 3_000)
    vectorised_against_loop(8, 4, 64)
    vectorised_against_loop(16, 16, 128)
    long_horizon(16, NAMES)
    long_horizon(64, NAMES[:1])
    one_pass_against_many(8, 4, 64)
    for states, horizon in ((256, 64), (1024, 64), (4096, 64), (1024, 512)):
        options = ["--large", str(states), "--horizon", str(horizon)]
        command = [sys.executable, "-m", "benchmarks.study", *options]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    for count in (2_000, 20_000, 100_000):
        command = [sys.executable, "-m", "benchmarks.study", "--memory", str(count)]
        peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(f"Monte Carlo with {count} trajectories: peak {peak} MiB")


def cpu_name() -> str:
    """Return the processor's name, if the system provides it."""
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
