"""Runs an experiment: cells in parallel, resumable after a kill, then its summary table.

A cell is one setting of a preset. Its rows depend on nothing but the experiment's name, the setting
and the code, so a finished cell is kept and reused until one of these changes.
"""

import argparse
import hashlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import torch

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "figures" / "data"
SOURCES = ("synthetic/*.py", "opd/objectives.py", "diagnostics/batch.py", "diagnostics/prefix.py")


def list_experiments() -> list[str]:
    """Names of the modules in `synthetic.experiments`."""
    from synthetic import experiments

    return sorted(module.name for module in pkgutil.iter_modules(experiments.__path__))


def load(name: str) -> ModuleType:
    """The experiment: CLAIM, SETTINGS, measure, summarize."""
    if name not in list_experiments():
        raise ValueError(f"unknown experiment {name!r}; known: {', '.join(list_experiments())}")
    return import_module(f"synthetic.experiments.{name}")


def derive(name: str, setting: dict[str, Any]) -> "torch.Generator":
    """A generator that depends on the experiment and the setting alone, on every machine."""
    import torch

    digest = hashlib.sha256(f"{name} {_canonical(setting)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def run(
    name: str,
    preset: str = "quick",
    jobs: int = 1,
    out: str | Path = "results",
    refresh: bool = False,
) -> "pd.DataFrame":
    """Measure every missing cell of a preset, then write rows.csv, summary.csv and summary.json.

    Files go to out/NAME: cells/KEY.json, shared by presets, and one folder a preset. `refresh`
    measures finished cells again.

    Returns:
      the summary table.
    """
    import joblib
    import pandas as pd
    from tqdm import tqdm

    experiment = load(name)
    if preset not in experiment.SETTINGS:
        known = ", ".join(experiment.SETTINGS)
        raise ValueError(f"{name} has no preset {preset!r}; known: {known}")
    settings = experiment.SETTINGS[preset]
    folder = Path(out) / name
    files = [folder / "cells" / f"{_key(name, setting)}.json" for setting in settings]
    todo = [
        (setting, file)
        for setting, file in zip(settings, files, strict=True)
        if refresh or read_cell(file) is None
    ]
    work = (joblib.delayed(measure_cell)(name, setting, file) for setting, file in todo)
    done = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(work)
    for _ in tqdm(done, total=len(todo), desc=f"{name} {preset}", disable=not todo):
        pass
    cells = [json.loads(file.read_text()) for file in files]
    rows = pd.DataFrame([row for cell in cells for row in cell["rows"]])
    summary = experiment.summarize(rows)
    seconds = sum(cell["seconds"] for cell in cells)
    where = folder / preset
    _write(where / "rows.csv", rows.to_csv(index=False))
    _write(where / "summary.csv", summary.to_csv(index=False, float_format="%.6g"))
    _write(where / "summary.json", json.dumps(provenance(name, preset, seconds), indent=1) + "\n")
    return summary


def measure_cell(name: str, setting: dict[str, Any], file: Path) -> None:
    """Measure one setting on one thread and write its file, whole or not at all."""
    import torch

    threads = torch.get_num_threads()
    # the same sums in the same order whatever the number of jobs
    torch.set_num_threads(1)
    try:
        begin = time.perf_counter()
        rows = load(name).measure(setting, derive(name, setting))
        seconds = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    _write(file, json.dumps({"setting": setting, "seconds": seconds, "rows": rows}))


def read_cell(file: Path) -> dict[str, Any] | None:
    """A finished cell, or None where there is none or it is not readable to its end."""
    try:
        cell = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return cell if isinstance(cell, dict) and "rows" in cell else None


def provenance(name: str, preset: str, seconds: float) -> dict[str, Any]:
    """How a table came about: command, code, versions, time on one core."""
    packages = ("torch", "numpy", "pandas", "scipy")
    return {
        "command": f"opd study run {name} --preset {preset}",
        "preset": preset,
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "changed_files": (_git("status", "--porcelain", "--untracked-files=no") or "").split()[
            1::2
        ],
        "source": fingerprint(name),
        "seconds": round(seconds, 2),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def fingerprint(name: str) -> str:
    """Hash of every file that a cell's numbers depend on."""
    files = [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))]
    files = [path for path in files if path != Path(__file__).resolve()]
    digest = hashlib.sha256()
    for path in [*files, ROOT / "synthetic" / "experiments" / f"{name}.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def update_figures(name: str, preset: str, out: str | Path) -> None:
    """Copy the summary and its provenance to figures/data, where they are committed."""
    for suffix in ("csv", "json"):
        text = (Path(out) / name / preset / f"summary.{suffix}").read_text()
        _write(FIGURES / f"{name}.{suffix}", text)


def main(argv: list[str] | None = None) -> None:
    """Command line: list the experiments, or run one or all of them."""
    parser = argparse.ArgumentParser(prog="opd study", description="the exact synthetic study")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="experiments and what they claim")
    running = commands.add_parser("run", help="measure, summarise, write tables")
    running.add_argument("name", help="an experiment, or all")
    running.add_argument("--preset", default="quick", help="a key of SETTINGS: quick, paper, ...")
    running.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    running.add_argument("--out", default="results", help="folder of the tables")
    running.add_argument("--refresh", action="store_true", help="measure finished cells again")
    running.add_argument(
        "--update-figures", action="store_true", help="copy the summaries to figures/data"
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        for name in list_experiments():
            print(f"{name}\n  {load(name).CLAIM}")
        return
    names = list_experiments() if arguments.name == "all" else [arguments.name]
    for name in names:
        run(name, arguments.preset, arguments.jobs, arguments.out, arguments.refresh)
        print(f"{name}: {Path(arguments.out) / name / arguments.preset / 'summary.csv'}")
        if arguments.update_figures:
            update_figures(name, arguments.preset, arguments.out)


def _canonical(setting: dict[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)


def _key(name: str, setting: dict[str, Any]) -> str:
    text = f"{name} {_canonical(setting)} {fingerprint(name)}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def _git(*arguments: str) -> str | None:
    asked = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() if asked.returncode == 0 else None


if __name__ == "__main__":
    main(sys.argv[1:])
