"""Time steps with rollouts from a vLLM server, synchronous or one step ahead of the update.

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model STUDENT [...]
    python -m benchmarks.ahead STUDENT TEACHER http://127.0.0.1:8000/v1 [--steps 12]

docs/servers.md says how to start the server. Prints medians over steps of wall-clock seconds, with
the two kinds of run alternating, and the effect of the policy lag: the mean square of
log student - log sampler, and the effective sample size of the importance ratios as a fraction of
the tokens.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import compute
from diagnostics.metrics.consistency import sampler_weights
from diagnostics.records import rows
from diagnostics.records.batch_files import load_batch
from opd.config.settings import Config, with_settings
from opd.training.train import train

PARTS = ("rollout", "score", "update", "record")


def measure_run(args: Any, lag: int) -> list[dict[str, float]]:
    """Return the rows of one run from the third step on, when the policy lag is constant."""
    with tempfile.TemporaryDirectory() as folder:
        config = with_settings(
            Config(student=args.student, teacher=args.teacher, out=folder, steps=args.steps),
            engine="servers",
            rollout_servers=tuple(args.urls),
            rollout_lag=lag,
            objective="sampled_token",
            ratio="token",
            lr=args.lr,
            prompts_per_step=args.prompts,
            group_size=4,
            max_prompt=128,
            max_response=args.response,
            full_metrics_every=args.steps,
            eval_every=0,
            eval_problems=1,
            save_every=0,
            save_batch_every=1,
            device="cpu",
        )
        rows_after_start = rows.read_rows(train(config).folder / "rows.jsonl")[2:]
        row_metrics = []
        for row in rows_after_start:
            batch = load_batch(Path(folder) / "batches" / f"step_{row['step']:06d}.safetensors")
            assert isinstance(batch, ScoredRollouts)
            row_metrics.append(
                {**row, "ess": compute(sampler_weights(batch))["consistency/sampler_ess"]}
            )
    return row_metrics


def summarize(row_metrics: list[dict[str, float]]) -> dict[str, float]:
    """Return the medians over steps."""

    def median(values: list[float]) -> float:
        return statistics.median(values)

    names = {part: f"seconds/{part}" for part in PARTS}
    part_seconds = {
        part: median([row[name] for row in row_metrics]) for part, name in names.items()
    }
    return {
        "step": median([sum(row[name] for name in names.values()) for row in row_metrics]),
        **part_seconds,
        "age": median([row["consistency/age"] for row in row_metrics]),
        "square": median([row["consistency/sampler_log_ratio_square"] for row in row_metrics]),
        "ess": median([row["ess"] for row in row_metrics]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    metrics_by_lag: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for _ in range(args.repeats):
        for lag, row_metrics in metrics_by_lag.items():
            row_metrics += measure_run(args, lag)
    json.dump(
        {f"rollout_lag {n}": summarize(row_metrics) for n, row_metrics in metrics_by_lag.items()},
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
