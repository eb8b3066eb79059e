"""What the monitor costs: its share of a training step, and each metric's own time.

    python -m benchmarks.monitor [--steps 4 --device cpu]

Three random pairs: one of the size of the tiny lab pair with few rows, whose step is as cheap as
steps get; the same with the rows and tokens of the lab's own runs; and one with 32k ids. The share
is the trainer's own clock, `seconds/record` over the whole step, the median of the steps after the
first; nothing else is recorded in that time. On every tenth step it costs a tenth. `exact
functionals` is what measuring whole distributions costs.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.step import make_models
from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField
from diagnostics.core.totals import pack
from diagnostics.monitor import PANEL, Metric
from diagnostics.records import rows
from diagnostics.records.batch_files import load
from diagnostics.records.rows import Row
from opd.config.settings import Config
from opd.training import train

PAIRS = {
    "smallest": (268, 32, 2, 8, 64),
    "lab size": (268, 32, 2, 64, 176),
    "V = 32k": (32768, 128, 4, 8, 64),
}
"""Vocabulary, width, layers, rows, response tokens."""


def config(folder: Path, name: str, given: Any) -> Config:
    return Config(
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        out=str(folder / name),
        task=str(folder / "task.jsonl"),
        prompts_per_step=given.rows,
        group_size=1,
        max_response=given.response,
        steps=given.steps + 1,
        lr=1e-6,
        eval_every=0,
        eval_problems=1,
        save_every=0,
        save_batch_every=0,
        device=given.device,
    )


def seconds(row: Row) -> dict[str, float]:
    return {k.split("/")[1]: v for k, v in row.items() if k.startswith("seconds/")}


def median(found: list[Row], part: str) -> float:
    return statistics.median(seconds(row)[part] for row in found[1:])


def run(chosen: Config) -> list[Row]:
    train.train(chosen)
    return rows.read(Path(chosen.out) / "rows.jsonl")


def by_metric(batch: ScoredRollouts, repeats: int = 5) -> dict[str, float]:
    """Metric name to the least seconds of `repeats`, its sums moved to the host; 0 if missing."""

    def once(metric: Metric) -> float:
        start = time.perf_counter()
        try:
            pack(metric(batch)).cpu()
        except MissingField:
            return 0.0
        return time.perf_counter() - start

    with torch.no_grad():
        return {name: min(once(metric) for _ in range(repeats)) for name, metric in PANEL.items()}


def measure(name: str, size: tuple[int, ...], given: Any) -> None:
    names = ("vocabulary", "width", "layers", "rows", "response")
    given = SimpleNamespace(**vars(given), **dict(zip(names, size, strict=True)))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_models(folder, given)
        plain = config(folder, "plain", given)
        found = run(plain)
        sparse = run(replace(plain, out=str(folder / "sparse"), full_metrics_every=10**6))
        saved = run(replace(plain, out=str(folder / "saved"), steps=1, save_batch_every=1))
        batch = load(folder / "saved" / "batches" / "step_000000.safetensors")
    assert len(saved) == 1
    assert isinstance(batch, ScoredRollouts)
    whole = statistics.median(sum(seconds(row).values()) for row in found[1:])
    monitor = median(found, "record")
    exact = median(found, "score") - median(sparse, "score")
    print(
        f"{name}: {batch.mask.sum()} tokens, step {whole:.2f} s; monitor {monitor * 1e3:.1f} ms, "
        f"{monitor / whole:.2%} of the step ({monitor / whole / 10:.2%} on every tenth); exact "
        f"functionals {exact * 1e3:.0f} ms, {exact / whole:.1%}"
    )
    costs = sorted(by_metric(batch.to(given.device)).items(), key=lambda x: -x[1])
    print("  " + ", ".join(f"{metric} {t * 1e3:.1f} ms" for metric, t in costs[:8]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    for name, size in PAIRS.items():
        measure(name, size, given)


if __name__ == "__main__":
    main()
