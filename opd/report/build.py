"""The HTML report (`opd report`): one self-contained page about one or several runs.

The page contains its data as JSON, its code and its charting library (uPlot), opens from disk and
makes no network requests. With --watch it is served on this machine only and updated while runs go
on.
"""

import base64
import hashlib
import json
import platform
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from diagnostics.alarms.rules import RULES
from diagnostics.io.provenance import package_version
from diagnostics.records.run_groups import folder_labels
from diagnostics.terminal import escape_control_chars
from opd.report.rollout_viewer import viewer_data
from opd.report.run_data import (
    RunRecord,
    differing_settings,
    finite_or_none,
    read_run,
    run_page_data,
)

ASSETS = Path(__file__).resolve().parent / "assets"
SCRIPTS = ("dom", "verdicts", "panels", "curves", "positions", "rollouts", "tokens", "page")
UNSAFE = re.compile("[<>&\u2028\u2029]")
LARGE_PAGE_BYTES = 10_000_000
"""Size in bytes above which a page is slow to open and to send."""


def report_data(folders: list[Path], tokens: int = 20000, models: bool = False) -> dict[str, Any]:
    """Collect everything that the page shows, as plain data with safe strings (`visible`).

    Args:
        folders: Run folders.
        tokens: Largest number of tokens in the rollout viewer, over all runs.
        models: Whether files outside the run folders may be read; see `RunRecord.models`.

    Returns:
        The data of the page.

    Raises:
        MissingFile: A folder is not a run folder.
    """
    runs = [read_run(folder, models) for folder in folders]
    tokens_per_run = max(1, tokens // len(runs))
    data = {
        "made": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "versions": versions(),
        "runs": [
            run_page_data(run, len(runs)) | {"name": name} | viewer_data(run, tokens_per_run)
            for name, run in zip(folder_labels(folders), runs, strict=True)
        ],
        "rules": [{"name": rule.name, "metric": rule.metric, "null": rule.null} for rule in RULES],
        "gains": gain_rows(runs),
        "differences": differing_settings(runs),
    }
    return sanitize(data)


def sanitize(data: Any) -> Any:
    """Convert data to plain JSON data: strings through `visible`, non-finite numbers to None."""
    if isinstance(data, str):
        return escape_control_chars(data)
    if isinstance(data, dict):
        return {escape_control_chars(str(name)): sanitize(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        is_plain = set(map(type, data)) <= {int, bool}  # the most frequent case
        return list(data) if is_plain else [sanitize(value) for value in data]
    if isinstance(data, float) and data - data != 0:
        return None
    return data


def versions() -> dict[str, str]:
    """Return the versions of the packages that made the page, without importing them."""
    version_by_package = {"python": platform.python_version()}
    names = ("opdlab", "torch", "transformers", "numpy")
    return version_by_package | {name: package_version(name) for name in names}


def gain_rows(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Return held-out accuracy before and after by objective, with the paired gain.

    See `diagnostics.records.run_tables.accuracy_gains`.

    Args:
        runs: The runs.

    Returns:
        One row per objective.
    """
    from diagnostics.records.run_tables import accuracy_gains, training_table

    evaluated_folders = [
        run.folder.path for run in runs if "objective" in run.config and len(run.evals) > 1
    ]
    if not evaluated_folders:
        return []
    rows = accuracy_gains(training_table(evaluated_folders)).to_dict("records")
    return [
        {k: x if isinstance(x, str) else finite_or_none(x) for k, x in row.items()} for row in rows
    ]


def render_page(data: Mapping[str, Any], watch: bool = False) -> str:
    """Render the page with its data.

    Args:
        data: The data of the page.
        watch: Allow the page to request updates from its own server.

    Returns:
        The HTML text.
    """
    code = "\n".join(read_asset(f"{name}.js") for name in SCRIPTS)
    scripts = [read_asset("uplot.js"), f'"use strict";\n(() => {{\n{code}}})();\n']
    style = read_asset("uplot.css") + read_asset("report.css")
    script_hashes = " ".join(f"'sha256-{csp_digest(text)}'" for text in scripts)
    policy = (
        f"default-src 'none'; script-src {script_hashes}; style-src 'sha256-{csp_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    if watch:
        policy += "; connect-src 'self'"
    parts = {
        "policy": policy,
        "style": style,
        "data": embed_json(data),
        "scripts": "\n".join(f"<script>{text}</script>" for text in scripts),
        "watch": "watch" if watch else "",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read_asset("report.html"))


def read_asset(name: str) -> str:
    """Read a file of the folder assets."""
    return (ASSETS / name).read_text(encoding="utf-8")


def embed_json(data: Mapping[str, Any]) -> str:
    """Encode data as JSON that an HTML parser cannot misread.

    Characters that could end a script are escaped. Lone surrogates stay JSON escapes.

    Args:
        data: The data; `report_data` contains no NaN or infinity.

    Returns:
        The JSON text.

    Raises:
        ValueError: The data contains NaN or infinity.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def csp_digest(text: str) -> str:
    """Return the SHA-256 of a text in the format of a content security policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
