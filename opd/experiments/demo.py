"""The demo (`opd demo`): exact study, toy pair, training with two objectives, figures, report.

It trains one run of each objective; --full trains three seeds of each for more steps, and continues
the runs of an earlier demo. After an interruption the same command goes on where it stopped:
finished cells of the study, the toy pair and finished runs are kept, an unfinished run resumes.
"""

import concurrent.futures
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diagnostics.io.command import parse_options
from opd.experiments.subcommand import run_opd

OBJECTIVES = ("sampled_token", "teacher_topk")
NUM_STAGES = 4


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo trains."""

    recipe: str
    """Recipe of `opd train`."""
    preset: str
    """Preset of the study."""
    steps: int
    seeds: tuple[int, ...]
    minutes: int
    """Duration on two idle CPU cores."""


SIZES = {
    (False, False): DemoSize(recipe="lab", preset="quick", steps=20, seeds=(0,), minutes=5),
    (False, True): DemoSize(recipe="lab", preset="quick", steps=60, seeds=(0, 1, 2), minutes=12),
    (True, False): DemoSize(recipe="smoke", preset="smoke", steps=2, seeds=(0,), minutes=1),
    (True, True): DemoSize(recipe="smoke", preset="smoke", steps=4, seeds=(0, 1), minutes=1),
}
"""Sizes by the options (smoke, full)."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Exact study, toy pair, training with two objectives, figures and report.

    It trains one run of each objective; --full trains three seeds of each for more steps, and
    continues the runs of an earlier demo. After an interruption the same command goes on where it
    stopped.
    """

    out: Path = Path("results/demo")
    """folder of the results"""
    full: bool = False
    """three seeds of each objective"""
    jobs: int = 2
    """training runs in parallel"""
    fresh: bool = False
    """retrain finished runs"""
    smoke: bool = False
    """tiny sizes, to test that everything runs"""


def main(argv: list[str]) -> None:
    """Run `opd demo [--full] [--out DIR]`; a second call continues and keeps what is finished."""
    options = parse_options(DemoOptions, argv, "opd demo")
    size = SIZES[options.smoke, options.full]
    lab = options.out / "lab" if options.smoke else Path("lab")
    start_time = time.perf_counter()
    print(
        f"exact study, toy models, {len(OBJECTIVES) * len(size.seeds)} training runs of "
        f"{size.steps} steps, figures and a report in {options.out}; about {size.minutes} min on "
        "two idle cores. If it is interrupted, the same command continues.",
        file=sys.stderr,
    )
    with timed_stage(1, "exact study", start_time):
        study = options.out / "study"
        run_opd("study", "run", "bias_variance", "--preset", size.preset, "--out", study)
    with timed_stage(2, "toy teacher and student", start_time):
        run_opd("lab", "--out", lab, *(["--tiny"] if options.smoke else []))
    with timed_stage(3, "training", start_time):
        runs = train_all(options.out / "runs", size, lab, options.jobs, options.fresh)
    with timed_stage(4, "figures and report", start_time):
        figures_folder, report = options.out / "figures", options.out / "report.html"
        run_opd("figures", "training", "--out", figures_folder, "--run", *runs)
        table = study / "bias_variance" / size.preset / "summary.csv"
        run_opd("figures", "bias_variance", "--out", figures_folder, "--table", table)
        run_opd("report", *runs, "--models", "--out", report)
    print(format_summary(runs))
    print(f"\npair      {lab}\nruns      {options.out / 'runs'}\nfigures   {figures_folder}")
    print(f"report    {report}\nseconds   {time.perf_counter() - start_time:.0f}")


@contextmanager
def timed_stage(number: int, name: str, demo_start: float) -> Iterator[None]:
    """Print a line when a stage begins and when it ends, with its duration and the demo's."""
    stage_start = time.perf_counter()
    label = f"[{number}/{NUM_STAGES}] {name}"
    print(f"{label} ...", file=sys.stderr, flush=True)
    yield
    now = time.perf_counter()
    print(
        f"{label}: {now - stage_start:.0f} s, {now - demo_start:.0f} s since the start",
        file=sys.stderr,
        flush=True,
    )


def train_all(out: Path, size: DemoSize, lab: Path, jobs: int, fresh: bool) -> list[Path]:
    """Train every objective with every seed, `jobs` at a time with one thread each."""
    cells = list(itertools.product(size.seeds, OBJECTIVES))

    def run(cell: tuple[int, str]) -> Path:
        seed, objective = cell
        folder = out / f"{objective}-{seed}"
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        paths = ["--out", folder, "--student", lab / "student", "--teacher", lab / "teacher"]
        method = ["--objective", objective, "--seed", seed, "--steps", size.steps]
        run_opd("train", size.recipe, *method, *paths, threads=1)
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
