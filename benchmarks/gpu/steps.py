"""The cost of the metrics in a training step, and the whole step beside TRL's trainer."""

import statistics
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.floor.processes import start_process
from benchmarks.floor.trainers import Size
from benchmarks.gpu.result import Check, Measurement, Omission, Row
from benchmarks.gpu.setting import Setting
from benchmarks.monitor import median_seconds, run_rows
from benchmarks.monitor import seconds as seconds_by_part
from benchmarks.random_pair import save_pair, training_config
from opd.config.settings import with_settings

PANEL_LIMIT = 0.03
"""Largest share of a step; at toy sizes a step is too short for a limit."""


def measure_panel(setting: Setting) -> Iterator[Row]:
    """Train a few steps; the share is that of `seconds/record`, as in `benchmarks.monitor`."""
    vocabulary, width, layers = setting.choose((268, 32, 1), (151_936, 896, 8))
    num_rows, response, steps = setting.choose((4, 8, 2), (64, 256, 5))
    with TemporaryDirectory() as place:
        folder = Path(place)
        save_pair(
            folder,
            vocabulary=vocabulary,
            width=width,
            layers=layers,
            rows=num_rows,
            response=response,
        )
        config = training_config(
            folder,
            folder / "run",
            rows=num_rows,
            response=response,
            steps=steps + 1,
            device=setting.device,
        )
        if setting.device == "cuda":
            config = with_settings(config, dtype="bfloat16", max_logits_per_chunk=1 << 28)
        rows = run_rows(config)
    step = statistics.median(sum(seconds_by_part(row).values()) for row in rows[1:])
    panel = median_seconds(rows, "record")
    note = f"{layers} layers, {width} wide, V = {vocabulary:,}, {num_rows} rows"
    yield Measurement("step", 1000 * step, "ms", note=f"{note}, {response} tokens")
    for part in sorted(seconds_by_part(rows[-1])):
        spent = median_seconds(rows, part)
        yield Measurement(f"step: {part}", 1000 * spent, "ms", None, spent / step, "of the step")
    if setting.toy:
        yield Omission("limit of the metrics' share", "a toy step is too short")
    else:
        yield Check("share of the metrics in a step", panel / step, PANEL_LIMIT)


def measure_against_trl(setting: Setting) -> Iterator[Row]:
    """Time whole steps of both trainers, each in a process of its own."""
    sizes: dict[str, Any] = {
        "rows": setting.choose(2, 64),
        "response": setting.choose(4, 128),
        "vocabulary": setting.choose(300, 151_936),
        "width": setting.choose(32, 896),
        "layers": setting.choose(1, 8),
    }
    dtype = "float32" if setting.device == "cpu" else "bfloat16"
    kinds = ["trl", "full_reverse_kl", "teacher_topk"]
    if setting.toy:
        yield Omission("trl, full_reverse_kl", "a process of its own takes seconds to start")
        kinds = ["teacher_topk"]
    elif find_spec("trl") is None:
        yield Omission("trl", "trl is not installed")
        kinds = kinds[1:]
    note = ", ".join(f"{name} {value}" for name, value in sizes.items()) + f", {dtype}"
    reference = None
    with TemporaryDirectory() as folder:
        save_pair(Path(folder), **sizes)
        size = Size(
            folder=Path(folder),
            rows=sizes["rows"],
            response=sizes["response"],
            k=32,
            dtype=dtype,
            device=setting.device,
            steps=setting.choose(1, 3),
        )
        for kind in kinds:
            try:
                result = start_process(kind, size, threads=1)
            except RuntimeError as error:
                if kind != "trl":
                    raise
                yield Omission(kind, str(error).strip().rpartition("\n")[2])
                continue
            spent = statistics.median(step["step"] for step in result["steps"])
            reference = spent if kind == "trl" else reference
            ratio = None if reference is None else reference / spent
            yield Measurement(
                f"step, {kind}",
                1000 * spent,
                "ms",
                result["mebibytes"],
                ratio,
                "faster than trl",
                note,
            )
