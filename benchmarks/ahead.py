"""Steps with rollouts from a vLLM server, one after the other or sampled ahead of the update.

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model STUDENT [...]
    python -m benchmarks.ahead STUDENT TEACHER http://127.0.0.1:8000/v1 [--steps 12]

How the server is started: docs/servers.md. Medians over steps of wall-clock seconds, the two kinds
of run in turn, and what the age costs: the mean square of log student - log sampler, and the share
of the tokens that ratios leave (effective sample size).
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
from diagnostics.core.totals import read
from diagnostics.metrics.consistency import sampler_weights
from diagnostics.records import rows
from diagnostics.records.batch_files import load
from opd.config.settings import Config
from opd.training.train import train

PARTS = ("rollout", "score", "update", "record")


def measured(given: Any, ahead: int) -> list[dict[str, float]]:
    """The rows of one run, from the third step on, when rollouts have the age they will keep."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            student=given.student,
            teacher=given.teacher,
            out=folder,
            engine="servers",
            rollout_servers=tuple(given.urls),
            ahead=ahead,
            objective="sampled_token",
            ratio="token",
            lr=given.lr,
            steps=given.steps,
            prompts_per_step=given.prompts,
            group_size=4,
            max_prompt=128,
            max_response=given.response,
            full_metrics_every=given.steps,
            eval_every=0,
            eval_problems=1,
            save_every=0,
            save_batch_every=1,
            device="cpu",
        )
        found = rows.read(train(config) / "rows.jsonl")[2:]
        kept = []
        for row in found:
            batch = load(Path(folder) / "batches" / f"step_{row['step']:06d}.safetensors")
            assert isinstance(batch, ScoredRollouts)
            kept.append({**row, "ess": read(sampler_weights(batch))["consistency/sampler_ess"]})
    return kept


def summary(found: list[dict[str, float]]) -> dict[str, float]:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    names = {part: f"seconds/{part}" for part in PARTS}
    made = {part: median([row[name] for row in found]) for part, name in names.items()}
    return {
        "step": median([sum(row[name] for name in names.values()) for row in found]),
        **made,
        "age": median([row["consistency/age"] for row in found]),
        "square": median([row["consistency/sampler_log_ratio_square"] for row in found]),
        "ess": median([row["ess"] for row in found]),
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
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for _ in range(given.repeats):
        for ahead, kept in found.items():
            kept += measured(given, ahead)
    json.dump({f"ahead {n}": summary(kept) for n, kept in found.items()}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
