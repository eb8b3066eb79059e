"""The cost of the metrics in a training step, and the whole step beside TRL's trainer."""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from benchmarks.gpu.result import Check, Measurement, Omission, Row
from benchmarks.gpu.setting import Setting
from benchmarks.monitor import make_config, median_seconds, run_rows
from benchmarks.monitor import seconds as seconds_by_part
from benchmarks.step import make_models, run_trainer
from opd.config.settings import with_settings

PANEL_LIMIT = 0.03
"""Largest share of a step; at toy sizes a step is too short for a limit."""


def measure_panel(setting: Setting) -> Iterator[Row]:
    """Train a few steps; the share is that of `seconds/record`, as in `benchmarks.monitor`."""
    sizes = SimpleNamespace(
        vocabulary=setting.choose(268, 151_936),
        width=setting.choose(32, 896),
        layers=setting.choose(1, 8),
        rows=setting.choose(4, 64),
        response=setting.choose(8, 256),
        steps=setting.choose(2, 5),
        device=setting.device,
    )
    with TemporaryDirectory() as place:
        folder = Path(place)
        make_models(folder, sizes)
        config = make_config(folder, "run", sizes)
        if setting.device == "cuda":
            config = with_settings(config, dtype="bfloat16", max_logits_per_chunk=1 << 28)
        rows = run_rows(replace(config, steps=sizes.steps + 1))
    step = statistics.median(sum(seconds_by_part(row).values()) for row in rows[1:])
    panel = median_seconds(rows, "record")
    note = f"{sizes.layers} layers, {sizes.width} wide, V = {sizes.vocabulary:,}, {sizes.rows} rows"
    yield Measurement("step", 1000 * step, "ms", note=f"{note}, {sizes.response} tokens")
    for part in sorted(seconds_by_part(rows[-1])):
        spent = median_seconds(rows, part)
        yield Measurement(f"step: {part}", 1000 * spent, "ms", None, spent / step, "of the step")
    if setting.toy:
        yield Omission("limit of the metrics' share", "a toy step is too short")
    else:
        yield Check("share of the metrics in a step", panel / step, PANEL_LIMIT)


def measure_against_trl(setting: Setting) -> Iterator[Row]:
    """Time whole steps of both trainers, each in a process of its own."""
    sizes = {
        "steps": setting.choose(1, 3),
        "rows": setting.choose(2, 64),
        "response": setting.choose(4, 128),
        "vocabulary": setting.choose(300, 151_936),
        "width": setting.choose(32, 896),
        "layers": setting.choose(1, 8),
    }
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    dtype = "float32" if setting.device == "cpu" else "bfloat16"
    options += ["--device", setting.device, "--dtype", dtype]
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
        make_models(Path(folder), SimpleNamespace(**sizes))
        for kind in kinds:
            try:
                spent, mebibytes = run_trainer(kind, folder, options)
            except RuntimeError as error:
                if kind != "trl":
                    raise
                yield Omission(kind, str(error).strip().rpartition("\n")[2])
                continue
            reference = spent if kind == "trl" else reference
            ratio = None if reference is None else reference / spent
            yield Measurement(
                f"step, {kind}", 1000 * spent, "ms", mebibytes, ratio, "faster than trl", note
            )
