"""`opd demo`: everything in one command: study, lab pair, two objectives, figures, a table."""

import argparse
import concurrent.futures
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.experiments.subcommand import command

OBJECTIVES = ("sampled_token", "teacher_topk")
SEEDS = (0, 1, 2)


def main(argv: list[str]) -> None:
    """`opd demo [--out DIR]`; run again, it continues what is unfinished and keeps what is done."""
    parser = argparse.ArgumentParser(prog="opd demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--jobs", type=int, default=2, help="training runs side by side")
    parser.add_argument("--fresh", action="store_true", help="train again what is finished")
    parser.add_argument("--smoke", action="store_true", help="tiny everything: does it run?")
    given = parser.parse_args(argv)
    lab = given.out / "lab" if given.smoke else Path("lab")
    preset = "smoke" if given.smoke else "quick"
    begin = time.perf_counter()
    with stage("exact study"):
        study = given.out / "study"
        command("study", "run", "bias_variance", "--preset", preset, "--out", study)
    with stage("lab pair"):
        command("lab", "--out", lab, *(["--tiny"] if given.smoke else []))
    with stage("training"):
        recipe = "smoke" if given.smoke else "lab"
        runs = train_all(given.out / "runs", recipe, lab, given.jobs, given.fresh)
    with stage("figures"):
        pictures, report = given.out / "figures", given.out / "report.html"
        command("figures", "training", "--out", pictures, "--run", *runs)
        table = study / "bias_variance" / preset / "summary.csv"
        command("figures", "bias_variance", "--out", pictures, "--table", table)
        command("report", *runs, "--models", "--out", report)
    print(summary(runs))
    print(f"\npair      {lab}\nruns      {given.out / 'runs'}\nfigures   {pictures}")
    print(f"report    {report}\nseconds   {time.perf_counter() - begin:.0f}")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say what is going on and how long it took."""
    begin = time.perf_counter()
    print(f"-- {name}", file=sys.stderr, flush=True)
    yield
    print(f"-- {name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


def train_all(out: Path, recipe: str, lab: Path, jobs: int, fresh: bool) -> list[Path]:
    """Every objective with every seed, `jobs` at a time with one thread each."""
    cells = list(itertools.product(SEEDS, OBJECTIVES))

    def run(cell: tuple[int, str]) -> Path:
        seed, objective = cell
        folder = out / f"{objective}-{seed}"
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        where = ["--out", folder, "--student", lab / "student", "--teacher", lab / "teacher"]
        command("train", recipe, "--objective", objective, "--seed", seed, *where, threads=1)
        return folder

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, cells))


def summary(runs: list[Path]) -> str:
    """Accuracy before and after by objective, with the paired gain over problems and seeds."""
    from diagnostics.records.run_tables import gains, training_table

    lines = [f"{'objective':16}{'seeds':>6}{'before':>9}{'after':>9}   gain [95 % interval]"]
    for row in gains(training_table(runs)).to_dict("records"):
        accuracy = "{objective:16}{seeds:6}{before:9.3f}{after:9.3f}".format(**row)
        lines.append(accuracy + "   {gain:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row))
    return "\n".join(lines)
