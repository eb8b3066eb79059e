"""`opd diagnose`: run the panel on saved batches, of our runs or anybody's, without a model."""

import argparse
import json
import math
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """`opd diagnose PATH [PATH ...] [--json]`: batch files, or run folders (their last batch)."""
    parser = argparse.ArgumentParser(prog="opd diagnose", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="batch file or run folder")
    parser.add_argument("--json", action="store_true", help="one JSON object a batch")
    parser.add_argument("--all", action="store_true", help="every saved batch of a run folder")
    given = parser.parse_args(argv)
    for path in given.paths:
        for file in batch_files(path, given.all):
            row, missing = diagnose(file)
            if given.json:
                clean = {k: v if math.isfinite(v) else None for k, v in row.items()}
                print(json.dumps({"batch": str(file), **clean}))
            else:
                print(f"\n{file}\n{table(row)}")
            for name, lack in missing.items():
                print(f"not computed: {name} ({lack})", file=sys.stderr)


def batch_files(path: Path, every: bool) -> list[Path]:
    """The file itself, or the batches that a run folder saved."""
    if path.is_file():
        return [path]
    found = sorted((path / "batches").glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{path} is neither a batch file nor a run folder with batches/")
    return found if every else found[-1:]


def diagnose(file: Path) -> tuple[dict[str, float], dict[str, str]]:
    """The panel's row of one batch file, and what could not be computed."""
    from diagnostics.batch import Scored, load
    from diagnostics.monitor import Monitor

    batch = load(file)
    if not isinstance(batch, Scored):
        raise ValueError(f"{file} holds rollouts without teacher log-probabilities")
    monitor = Monitor()
    return monitor(0, [batch]), monitor.missing


def table(row: dict[str, float]) -> str:
    """Aligned lines `name value +- standard error`; metrics by position on one line."""
    lines: list[str] = []
    positions: dict[str, list[str]] = {}
    for name, value in row.items():
        if name.endswith("_se") or (name + "_se" not in row and "@" not in name and value != value):
            continue
        if "@" in name:
            base, where = name.split("@", 1)
            positions.setdefault(base, []).append(f"{where}: {value:.3g}")
            continue
        error = row.get(name + "_se")
        lines.append(f"  {name:36} {value:10.4g}" + (f"  ± {error:.2g}" if error else ""))
    for base, parts in positions.items():
        lines.append(f"  {base} by position   " + "  ".join(parts))
    return "\n".join(lines)
