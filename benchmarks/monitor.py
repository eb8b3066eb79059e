"""Measure the cost of the metrics: their fraction of a training step, and each metric's time.

    python -m benchmarks.monitor [--steps 4]

Three random pairs: one of the size of the tiny toy pair with few rows, which has the cheapest
steps; the same with the rows and tokens of the toy pair's own runs; and one with 32k ids. The
fraction is `seconds/record` over the step by the trainer's own clock, as the median of the steps
after the first; nothing else is recorded in that time. Measured on every tenth step, it costs a
tenth. `exact functionals` is the cost of full-vocabulary metrics.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_pair import save_pair, training_config
from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField
from diagnostics.core.totals import pack
from diagnostics.monitor import PANEL, Metric
from diagnostics.records import rows
from diagnostics.records.batch_files import load_batch
from diagnostics.records.rows import Row
from opd.config.settings import Config, with_settings
from opd.training import train

PAIRS = {
    "smallest": (268, 32, 2, 8, 64),
    "lab size": (268, 32, 2, 64, 176),
    "V = 32k": (32768, 128, 4, 8, 64),
}
"""Vocabulary, width, layers, rows, response tokens."""


def seconds(row: Row) -> dict[str, float]:
    """Return the seconds of each part of a step."""
    return {k.split("/")[1]: v for k, v in row.items() if k.startswith("seconds/")}


def median_seconds(row_list: list[Row], part: str) -> float:
    """Return the median seconds of a part, without the first step."""
    return statistics.median(seconds(row)[part] for row in row_list[1:])


def run_rows(settings: Config) -> list[Row]:
    """Train and return the rows."""
    train.train(settings)
    return rows.read_rows(Path(settings.out) / "rows.jsonl")


def metric_seconds(batch: ScoredRollouts, repeats: int = 5) -> dict[str, float]:
    """Return the least seconds of `repeats` by metric, with the transfer to the host.

    Zero for a metric whose fields are missing.
    """

    def once(metric: Metric) -> float:
        start = time.perf_counter()
        try:
            pack(metric(batch)).cpu()
        except MissingField:
            return 0.0
        return time.perf_counter() - start

    with torch.no_grad():
        return {name: min(once(metric) for _ in range(repeats)) for name, metric in PANEL.items()}


def measure(name: str, size: tuple[int, ...], args: Any) -> None:
    """Print the cost of the metrics for one pair."""
    vocabulary, width, layers, num_rows, response = size
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_pair(
            folder,
            vocabulary=vocabulary,
            width=width,
            layers=layers,
            rows=num_rows,
            response=response,
        )
        plain = training_config(
            folder, folder / "plain", rows=num_rows, response=response, steps=args.steps + 1
        )
        plain_rows = run_rows(plain)
        few_statistics: dict[str, Any] = {"full_metrics_every": 10**6}
        sparse = run_rows(with_settings(plain, out=str(folder / "sparse"), **few_statistics))
        saving: dict[str, Any] = {"steps": 1, "save_batch_every": 1}
        saved = run_rows(with_settings(plain, out=str(folder / "saved"), **saving))
        batch = load_batch(folder / "saved" / "batches" / "step_000000.safetensors")
    assert len(saved) == 1
    assert isinstance(batch, ScoredRollouts)
    step_seconds = statistics.median(sum(seconds(row).values()) for row in plain_rows[1:])
    monitor = median_seconds(plain_rows, "record")
    exact = median_seconds(plain_rows, "score") - median_seconds(sparse, "score")
    print(
        f"{name}: {batch.mask.sum()} tokens, step {step_seconds:.2f} s; "
        f"monitor {monitor * 1e3:.1f} ms, {monitor / step_seconds:.2%} of the step "
        f"({monitor / step_seconds / 10:.2%} on every tenth); exact functionals "
        f"{exact * 1e3:.0f} ms, {exact / step_seconds:.1%}"
    )
    costs = sorted(metric_seconds(batch).items(), key=lambda x: -x[1])
    print("  " + ", ".join(f"{metric} {t * 1e3:.1f} ms" for metric, t in costs[:8]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    for name, size in PAIRS.items():
        measure(name, size, args)


if __name__ == "__main__":
    main()
