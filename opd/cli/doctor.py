"""The `opd doctor` command."""

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opd.training.checks.check_result import CheckResult
from opd.analysis.doctor import document, examine, examine_tasks


def main(argv: list[str]) -> None:
    """`opd doctor STUDENT TEACHER [--task FILE | --tasks FILE]`; exit code 1 where one fails."""
    parser = argparse.ArgumentParser(prog="opd doctor", description=__doc__)
    parser.add_argument("student", help="folder or hub name")
    parser.add_argument("teacher", help="folder or hub name; of tasks, for those that name none")
    parser.add_argument("--tasks", type=Path, help="TOML file of several tasks: each examined")
    parser.add_argument(
        "--task", help='"lab", a data file or games, env:NAME; else built-in prompts'
    )
    parser.add_argument("--system", default="", help="a system message before every prompt")
    parser.add_argument("--prompts", type=int, default=8, help="prompts to sample responses to")
    parser.add_argument("--group", type=int, default=2, help="responses to each prompt")
    parser.add_argument("--max-response", type=int, default=64, help="tokens of a sampled response")
    parser.add_argument("--budget", type=int, help="max_response of the run that is planned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = vars(parser.parse_args(argv))
    as_json, tasks = given.pop("json"), given.pop("tasks")
    if tasks is None:
        found = {"": examine(**given)}
        print(document(found[""]) if as_json else table(found[""]))
    else:
        found = examine_tasks(tasks, **given)
        each = {name: json.loads(document(items)) for name, items in found.items()}
        tables = (f"task {name}\n\n{table(items)}" for name, items in found.items())
        print(json.dumps(each, indent=1) if as_json else "\n\n".join(tables))
    if any(finding.verdict == "fail" for items in found.values() for finding in items):
        raise SystemExit(1)


def table(found: "list[CheckResult]", width: int = 100) -> str:
    """One aligned block an item: verdict, name, what was found and, behind an arrow, what to do."""
    names = max(len(f.item) for f in found)
    margin = " " * (6 + names + 2)
    lines = []
    for finding in found:
        head = f"{finding.verdict:6}{finding.item:{names}}  "
        texts = [head + finding.found]
        if finding.advice:
            texts.append(f"{margin}-> {finding.advice}")
        for text in texts:
            lines += textwrap.wrap(text, width, subsequent_indent=margin, break_on_hyphens=False)
    count = {v: sum(f.verdict == v for f in found) for v in ("ok", "warn", "fail")}
    return "\n".join([*lines, "", "  ".join(f"{n} {v}" for v, n in count.items())])
