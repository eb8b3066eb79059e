"""The `opd doctor` command."""

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opd.training.checks.check_result import CheckResult
from opd.analysis.doctor import check_pair, check_tasks, results_to_json


def main(argv: list[str]) -> None:
    """Run `opd doctor STUDENT TEACHER [--task FILE | --tasks FILE]`; exit 1 on a failure."""
    parser = argparse.ArgumentParser(prog="opd doctor", description=__doc__)
    parser.add_argument("student", help="folder or hub name")
    parser.add_argument(
        "teacher", help="folder or hub name; with --tasks, for tasks that name none"
    )
    parser.add_argument("--tasks", type=Path, help="TOML file of several tasks; each is checked")
    parser.add_argument(
        "--task", help='"lab", a data file or a game, env:NAME; default: built-in prompts'
    )
    parser.add_argument("--system", default="", help="system message before every prompt")
    parser.add_argument("--prompts", type=int, default=8, help="number of prompts to sample from")
    parser.add_argument("--group", type=int, default=2, help="responses per prompt")
    parser.add_argument(
        "--max-response", type=int, default=64, help="longest sampled response, in tokens"
    )
    parser.add_argument("--budget", type=int, help="max_response of the planned run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = vars(parser.parse_args(argv))
    as_json, tasks = args.pop("json"), args.pop("tasks")
    if tasks is None:
        results_by_task = {"": check_pair(**args)}
        print(
            results_to_json(results_by_task[""]) if as_json else format_table(results_by_task[""])
        )
    else:
        results_by_task = check_tasks(tasks, **args)
        json_by_task = {
            name: json.loads(results_to_json(task_results))
            for name, task_results in results_by_task.items()
        }
        tables = (
            f"task {name}\n\n{format_table(task_results)}"
            for name, task_results in results_by_task.items()
        )
        print(json.dumps(json_by_task, indent=1) if as_json else "\n\n".join(tables))
    if any(
        finding.verdict == "fail"
        for task_results in results_by_task.values()
        for finding in task_results
    ):
        raise SystemExit(1)


def format_table(results: "list[CheckResult]", width: int = 100) -> str:
    """Format one aligned block per check: verdict, name, message and the advice after an arrow."""
    name_width = max(len(f.item) for f in results)
    margin = " " * (6 + name_width + 2)
    lines = []
    for finding in results:
        head = f"{finding.verdict:6}{finding.item:{name_width}}  "
        texts = [head + finding.found]
        if finding.advice:
            texts.append(f"{margin}-> {finding.advice}")
        for text in texts:
            lines += textwrap.wrap(text, width, subsequent_indent=margin, break_on_hyphens=False)
    count = {v: sum(f.verdict == v for f in results) for v in ("ok", "warn", "fail")}
    return "\n".join([*lines, "", "  ".join(f"{n} {v}" for v, n in count.items())])
