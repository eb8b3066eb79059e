"""Run folders with rows and batches whose full distributions are known."""

import json
from pathlib import Path

from diagnostics.catalogue import FULL
from diagnostics.monitor import Monitor
from diagnostics.records import rows
from diagnostics.records.run_folder import RunFolder
from opd.lab.build import make_tokenizer
from tests.helpers.dense_batches import DenseBatch, make_dense_batch

STEPS = (0, 3)
METHODS = {"plain": (0, 1), "other": (2,)}


def dense_batches(seed: int) -> dict[int, DenseBatch]:
    return {step: make_dense_batch(seed=10 * seed + step, gap=1.5, sharpness=3.0) for step in STEPS}


def write_runs(folder: Path) -> list[Path]:
    """Write a run folder for each seed of METHODS."""
    run_folders = []
    monitor = Monitor(FULL)
    for method, seeds in METHODS.items():
        for seed in seeds:
            run = folder / f"{method}-{seed}"
            (run / "batches").mkdir(parents=True)
            settings = {"seed": seed, "student": "pair", "teacher": "pair", "objective": method}
            (run / "config.json").write_text(json.dumps(settings))
            for step, dense_batch in dense_batches(seed).items():
                dense_batch.batch.save(RunFolder(run).batch_path(step))
                rows.append_row(
                    run / "rows.jsonl", {"step": step, **monitor(step, [dense_batch.batch])}
                )
            make_tokenizer().save_pretrained(run / "final")
            run_folders.append(run)
    make_tokenizer().save_pretrained(folder / "pair")
    return run_folders


def expected_tokens(runs: list[Path], step: int) -> list[dict]:
    """Compute every supervised token in a plain loop from the full distributions."""
    expected = []
    for run in runs:
        seed = int(run.name.split("-")[1])
        dense_batch = dense_batches(seed)[step]
        batch = dense_batch.batch
        for i, t in dense_batch.tokens():
            p, q, y = dense_batch.p[i, t].exp(), dense_batch.q[i, t].exp(), int(batch.tokens[i, t])
            supervised_ids = [int(batch.tokens[i, u]) for u in range(t + 1) if batch.mask[i, u]]
            grams = [tuple(supervised_ids[j : j + 8]) for j in range(len(supervised_ids) - 7)]
            cost = float((p[y] / q[y]).log())
            score = -p.clone()
            score[y] += 1
            expected.append(
                {
                    "cluster": (seed, int(batch.prompt[i])),
                    "position": t,
                    "id": y,
                    "ended": bool(batch.ended[i]),
                    "cost": cost,
                    "energy": cost**2 * float(score.square().sum()),
                    "repeated": len(grams) > 0 and grams[-1] in grams[:-1],
                    "impossible": float(p[y]) > 0.9 and float(q[y]) < 1e-4,
                    "entropy": -float((p * p.log()).sum()),
                    "kl": float((p * (p / q).log()).sum()),
                    "surprise": -float(p[y].log()),
                    "surprise_variance": float((p * p.log() ** 2).sum())
                    - float((p * p.log()).sum()) ** 2,
                }
            )
    return expected
