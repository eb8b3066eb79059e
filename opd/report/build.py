"""`opd report`: one self-contained HTML page about one or several runs, made from their record.

The page holds its data as JSON, its code and its charting library (uPlot, opd/page), opens from
disk, and asks no network for anything. With --watch it is served on this machine alone and looks
for news while a run goes on.
"""

import base64
import hashlib
import json
import platform
import re
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diagnostics.alarms.rules import RULES
from diagnostics.records.run_folders import labels
from diagnostics.terminal import visible
from opd.report.rollout_viewer import specimens
from opd.report.run_data import RunRecord, differences, number, read_run, recorded

PAGE = Path(__file__).resolve().parent / "assets"
SCRIPTS = ("dom", "verdicts", "curves", "positions", "rollouts", "tokens", "page")
UNSAFE = re.compile("[<>&\u2028\u2029]")
LIMIT = 10_000_000
"""Bytes beyond which a page is slow to open and to send."""


def contents(folders: list[Path], tokens: int = 20000, models: bool = False) -> dict[str, Any]:
    """Everything that the page shows, as plain data whose strings hide nothing (`visible`).

    Raises:
      FileNotFoundError: a folder is not a run folder.
    """
    runs = [read_run(folder, models) for folder in folders]
    share = max(1, tokens // len(runs))
    found = {
        "made": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "versions": versions(),
        "runs": [
            recorded(run, len(runs)) | {"name": name} | specimens(run, share)
            for name, run in zip(labels(folders), runs, strict=True)
        ],
        "rules": [{"name": rule.name, "metric": rule.metric, "null": rule.null} for rule in RULES],
        "gains": gained(runs),
        "differences": differences(runs),
    }
    return disarmed(found)


def disarmed(data: Any) -> Any:
    """Plain data with every string as `visible` shows it, and no number that JSON lacks."""
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, dict):
        return {visible(str(name)): disarmed(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        plain = set(map(type, data)) <= {int, bool}  # nearly all that there is
        return list(data) if plain else [disarmed(value) for value in data]
    if isinstance(data, float) and data - data != 0:
        return None
    return data


def versions() -> dict[str, str]:
    """Of what made the page, without importing it."""
    made = {"python": platform.python_version()}
    for name in ("opdlab", "torch", "transformers", "numpy"):
        try:
            made[name] = version(name)
        except PackageNotFoundError:
            made[name] = "not installed"
    return made


def gained(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Held-out accuracy before and after by objective, paired; see `diagnostics.records.run_tables.gains`."""
    from diagnostics.records.run_tables import gains, training_table

    begun = [run.folder for run in runs if run.config and len(run.evals) > 1]
    if not begun:
        return []
    found = gains(training_table(begun)).to_dict("records")
    return [{k: x if isinstance(x, str) else number(x) for k, x in row.items()} for row in found]


def page(data: Mapping[str, Any], watch: bool = False) -> str:
    """The page with its data; `watch` lets it ask its own server for news, and nobody else."""
    own = "\n".join(asset(f"{name}.js") for name in SCRIPTS)
    scripts = [asset("uplot.js"), f'"use strict";\n(() => {{\n{own}}})();\n']
    style = asset("uplot.css") + asset("report.css")
    known = " ".join(f"'sha256-{digest(text)}'" for text in scripts)
    policy = (
        f"default-src 'none'; script-src {known}; style-src 'sha256-{digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    if watch:
        policy += "; connect-src 'self'"
    parts = {
        "policy": policy,
        "style": style,
        "data": embedded(data),
        "scripts": "\n".join(f"<script>{text}</script>" for text in scripts),
        "watch": "watch" if watch else "",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("report.html"))


def asset(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that no HTML parser can read as anything else: what could end a script is escaped.

    Lone surrogates stay the escapes that JSON makes of them. NaN and infinities are refused with a
    ValueError: `contents` has none.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def digest(text: str) -> str:
    """SHA-256 as a content security policy spells it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
