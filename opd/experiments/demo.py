"""The demo (`opd demo`): exact study, toy pair, training with two objectives, figures, report."""

import argparse
import concurrent.futures
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.experiments.subcommand import run_opd

OBJECTIVES = ("sampled_token", "teacher_topk")
SEEDS = (0, 1, 2)


def main(argv: list[str]) -> None:
    """Run `opd demo [--out DIR]`; a second call resumes unfinished runs and keeps finished ones."""
    parser = argparse.ArgumentParser(prog="opd demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--jobs", type=int, default=2, help="training runs in parallel")
    parser.add_argument("--fresh", action="store_true", help="retrain finished runs")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, to test that everything runs"
    )
    args = parser.parse_args(argv)
    lab = args.out / "lab" if args.smoke else Path("lab")
    preset = "smoke" if args.smoke else "quick"
    start_time = time.perf_counter()
    with timed_stage("exact study"):
        study = args.out / "study"
        run_opd("study", "run", "bias_variance", "--preset", preset, "--out", study)
    with timed_stage("lab pair"):
        run_opd("lab", "--out", lab, *(["--tiny"] if args.smoke else []))
    with timed_stage("training"):
        recipe = "smoke" if args.smoke else "lab"
        seeds = SEEDS[:2] if args.smoke else SEEDS
        runs = train_all(args.out / "runs", recipe, lab, seeds, args.jobs, args.fresh)
    with timed_stage("figures"):
        figures_folder, report = args.out / "figures", args.out / "report.html"
        run_opd("figures", "training", "--out", figures_folder, "--run", *runs)
        table = study / "bias_variance" / preset / "summary.csv"
        run_opd("figures", "bias_variance", "--out", figures_folder, "--table", table)
        run_opd("report", *runs, "--models", "--out", report)
    print(format_summary(runs))
    print(f"\npair      {lab}\nruns      {args.out / 'runs'}\nfigures   {figures_folder}")
    print(f"report    {report}\nseconds   {time.perf_counter() - start_time:.0f}")


@contextmanager
def timed_stage(name: str) -> Iterator[None]:
    """Print the name of a stage and its duration."""
    start_time = time.perf_counter()
    print(f"-- {name}", file=sys.stderr, flush=True)
    yield
    print(f"-- {name}: {time.perf_counter() - start_time:.0f} s", file=sys.stderr, flush=True)


def train_all(
    out: Path, recipe: str, lab: Path, seeds: tuple[int, ...], jobs: int, fresh: bool
) -> list[Path]:
    """Train every objective with every seed, `jobs` at a time with one thread each."""
    cells = list(itertools.product(seeds, OBJECTIVES))

    def run(cell: tuple[int, str]) -> Path:
        seed, objective = cell
        folder = out / f"{objective}-{seed}"
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        paths = ["--out", folder, "--student", lab / "student", "--teacher", lab / "teacher"]
        run_opd("train", recipe, "--objective", objective, "--seed", seed, *paths, threads=1)
        return folder

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, cells))


def format_summary(runs: list[Path]) -> str:
    """Format accuracy before and after by objective, with the paired gain."""
    from diagnostics.records.run_tables import accuracy_gains, training_table

    lines = [f"{'objective':16}{'seeds':>6}{'before':>9}{'after':>9}   gain [95 % interval]"]
    for row in accuracy_gains(training_table(runs)).to_dict("records"):
        accuracy = "{objective:16}{seeds:6}{before:9.3f}{after:9.3f}".format(**row)
        lines.append(accuracy + "   {gain:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row))
    return "\n".join(lines)
