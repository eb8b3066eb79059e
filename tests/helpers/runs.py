"""Settings of a short run on the tiny pair, and its rows without timings."""

import json
from pathlib import Path

from opd.config.settings import Config, with_settings


def settings(pair: tuple[Path, Path], out: Path, **changes: object) -> Config:
    fields: dict[str, object] = {
        "steps": 4,
        "prompts_per_step": 3,
        "group_size": 2,
        "max_prompt": 64,
        "max_response": 8,
        "lr": 1e-3,
        "support_k": 8,
        "eval_every": 2,
        "eval_problems": 4,
        "save_every": 2,
        "save_batch_every": 2,
        "device": "cpu",
    }
    return with_settings(
        Config(student=str(pair[0]), teacher=str(pair[1]), out=str(out)), **(fields | changes)
    )


def rows(folder: Path) -> list[dict[str, float]]:
    """The rows without their timings."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    timings = ("seconds/", "machine/")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(timings)} for x in lines]


def train_in_rank(configs: list[Config]) -> None:
    """Train one configuration after the other, as a rank of `warm_process.start_ranks`."""
    from opd.runtime.distributed import process_group
    from opd.training.train import train

    with process_group("cpu"):
        for config in configs:
            train(config)
