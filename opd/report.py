"""`opd report`: one self-contained HTML page about one or several runs, made from their record."""

import argparse
import io
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from diagnostics import rows
from diagnostics.alarm_rules import RULES
from diagnostics.alarms import replay
from diagnostics.rows import Row
from opd.diagnose import table as panel

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid #e5e5e5 }
pre { background: #f7f7f7; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem }
.alarm { color: #a33 } svg { width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Run:
    """The record of a run: its name, settings, code state, rows and evaluations."""

    name: str
    config: dict[str, Any]
    code: str
    rows: list[Row]
    evals: list[Row]

    @property
    def finished(self) -> bool:
        return len(self.rows) >= self.config["steps"]


def main(argv: list[str]) -> None:
    """`opd report RUN [RUN ...] [--out FILE]`."""
    parser = argparse.ArgumentParser(prog="opd report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    given = parser.parse_args(argv)
    page = report(given.runs)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(page)
    print(given.out)


def report(folders: list[Path]) -> str:
    """The page.

    Raises:
      FileNotFoundError: a folder is not a run folder.
      ValueError: no run has a row yet.
    """
    from figures.collect import gains, training_table

    runs = [read_run(folder) for folder in folders]
    data = training_table(folders)
    parts = [
        f"<h1>On-policy distillation: {len(runs)} run{'s' if len(runs) > 1 else ''}</h1>",
        html_table([overview(run) for run in runs]),
        "<h2>What to look at</h2>",
        alarm_list(runs),
        "<h2>Accuracy on held-out problems, before and after</h2>",
        html_table([accuracy(row) for row in gains(data).to_dict("records")]),
        "<p>Gains are paired by problem; intervals (95 %) resample problems and runs.</p>",
        "<h2>Dynamics</h2>",
        picture(data),
        "<h2>Settings that differ</h2>",
        html_table(differences(runs)) or "<p>None.</p>",
        "<h2>Last row of each run</h2>",
        *(details(run) for run in runs),
        "<h2>Where this comes from</h2>",
        html_table([{"run": run.name, "code": run.code} for run in runs]),
        f"<details><summary>all settings of {escape(runs[0].name)}</summary>"
        f"<pre>{escape(json.dumps(runs[0].config, indent=1))}</pre></details>",
    ]
    head = "<meta charset='utf-8'><title>On-policy distillation</title>"
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def read_run(folder: Path) -> Run:
    """The record of a run folder, finished or not."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json")
    code = folder / "code.txt"
    return Run(
        name=folder.name,
        config=json.loads((folder / "config.json").read_text()),
        code=code.read_text().splitlines()[0] if code.exists() else "unknown",
        rows=rows.read(folder / "rows.jsonl"),
        evals=rows.read(folder / "evals.jsonl"),
    )


def overview(run: Run) -> dict[str, str]:
    seconds = sum(v or 0 for row in run.rows for k, v in row.items() if k.startswith("seconds/"))
    last = run.evals[-1] if run.evals else None
    return {
        "run": run.name,
        "objective": run.config["objective"],
        "seed": str(run.config["seed"]),
        "steps": f"{len(run.rows)} of {run.config['steps']}"
        + ("" if run.finished else ", unfinished"),
        "accuracy": "" if last is None else "{accuracy:.3f} [{low:.3f}, {high:.3f}]".format(**last),
        "minutes": f"{seconds / 60:.1f}",
    }


def accuracy(row: dict[str, Any]) -> dict[str, str]:
    return {
        "objective": row["objective"],
        "runs": str(row["seeds"]),
        "problems": str(row["problems"]),
        "before": f"{row['before']:.3f}",
        "after": f"{row['after']:.3f}",
        "gain": f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
    }


def alarms(run: Run) -> list[str]:
    """What the record itself says is wrong, by the rules of `diagnostics.alarm_rules`."""
    whole = run.config.get("top_p", 1) == 1  # a declared nucleus is a mismatch that is wanted
    rules = [r for r in RULES if whole or r.name not in ("sampler_mismatch", "teacher_mismatch")]
    return [str(alarm) for alarm in replay(run.rows, rules)]


def alarm_list(runs: list[Run]) -> str:
    items = [(run.name, text) for run in runs for text in alarms(run)]
    if not items:
        return f"<p>No alarm from {len(RULES)} rules.</p>"
    lines = [f"<li class='alarm'>{escape(name)}: {escape(text)}</li>" for name, text in items]
    return f"<ul>{''.join(lines)}</ul>"


def picture(data: Any) -> str:
    """The training figure as inline SVG."""
    from figures import style, training

    buffer = io.StringIO()
    with style.look():
        training.draw(data).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def differences(runs: list[Run]) -> list[dict[str, str]]:
    """One line a setting that is not the same in all runs; where a run is kept does not count."""
    names = sorted({name for run in runs for name in run.config} - {"out"})
    changed = [n for n in names if len({json.dumps(run.config.get(n)) for run in runs}) > 1]
    return [{"setting": n} | {run.name: str(run.config.get(n)) for run in runs} for n in changed]


def details(run: Run) -> str:
    if not run.rows:
        return f"<p>{escape(run.name)}: no row yet.</p>"
    last = {k: float("nan") if v is None else v for k, v in run.rows[-1].items()}
    title = f"{run.name}, step {run.rows[-1]['step']}"
    return f"<details><summary>{escape(title)}</summary><pre>{escape(panel(last))}</pre></details>"


def html_table(lines: list[dict[str, str]]) -> str:
    """Rows of text as a table, escaped; "" for no rows."""
    if not lines:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in lines[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(value)}</td>" for value in line.values()) + "</tr>"
        for line in lines
    )
    return f"<table><tr>{head}</tr>{body}</table>"
