"""What the final models of a map are like beside their accuracy (`opd map --evaluate`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diagnostics.io.atomic import write_text
from diagnostics.records.run_cost import run_cost
from opd.config.groups import EvalConfig
from opd.experiments.regimes.methods import SHARED_SETTINGS, RunSettings
from opd.experiments.regimes.runs import Cell, MapFolder, logged

NUM_SAMPLES = 4
"""Responses to each problem."""


def evaluate_start(folder: MapFolder, regime: str, seed: int, settings: RunSettings) -> None:
    """Measure the student of a pair before training, unless that is done.

    Args:
        folder: Folder of the map, with the pair.
        regime: One of REGIMES.
        seed: Seed of the pair.
        settings: Settings of the map.
    """
    path = folder.start_evaluation(regime, seed, settings.split)
    if not path.exists():
        with logged(folder.root / "logs" / f"evaluation-{regime}-{seed}.log"):
            pair = folder.pair(regime, seed)
            write_evaluation(path, folder, regime, seed, pair / "student", settings.split)


def evaluate_cell(folder: MapFolder, cell: Cell, settings: RunSettings) -> None:
    """Measure the final model of a run against its start and its teacher, unless that is done.

    A run that has taken more steps since is measured again.

    Args:
        folder: Folder of the map, with the finished run and `evaluate_start` of its pair.
        cell: The cell.
        settings: Settings of the map.
    """
    path = folder.evaluation(cell, settings.split)
    steps = run_cost(folder.run(cell))["cost/steps"]
    if not path.exists() or json.loads(path.read_text())["cost/steps"] != steps:
        start_path = folder.start_evaluation(cell.regime, cell.pair, settings.split)
        with logged(folder.root / "logs" / f"{str(cell).replace('/', '-')}.log"):
            write_evaluation(
                path,
                folder,
                cell.regime,
                cell.pair,
                folder.run(cell) / "final",
                settings.split,
                str(folder.pair(cell.regime, cell.pair) / "teacher"),
                json.loads(start_path.read_text()),
            )


def write_evaluation(
    path: Path,
    folder: MapFolder,
    regime: str,
    seed: int,
    model: Path,
    split: str,
    teacher: str = "",
    against: Mapping[str, Any] | None = None,
) -> None:
    """Write all measures of a model (`opd.evaluation.folder.measure_folder`) to a JSON file.

    Args:
        path: The file.
        folder: Folder of the map.
        regime: One of REGIMES.
        seed: Seed of the pair, and of the sampling.
        model: Folder of the model.
        split: Problems, "test" or "validation".
        teacher: Folder of the teacher; "" for no ceiling.
        against: Results of the student before training; None for no comparison.
    """
    from opd.evaluation.folder import EvaluationSettings, measure_folder
    from opd.evaluation.measures import Measures

    pair, limits = folder.pair(regime, seed), folder.record(regime, seed)["limits"]
    evaluation = EvalConfig(
        eval_task=str(pair / f"{split}.jsonl"),
        eval_problems=SHARED_SETTINGS["eval_problems"],
        eval_samples=NUM_SAMPLES,
    )
    settings = EvaluationSettings(
        evaluation=evaluation,
        max_prompt=limits["max_prompt"],
        max_response=limits["max_response"],
        seed=seed,
        device="cpu",
    )
    measures = Measures(
        calibration=True,
        recovery="digit",
        other_task=str(pair / "other_task.jsonl"),
        teacher=teacher,
    )
    metrics = measure_folder(str(model), settings, measures, against).metrics
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(metrics, indent=1) + "\n")
