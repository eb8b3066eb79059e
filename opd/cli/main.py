"""The `opd` command: looks up the sub-command and imports only what that one needs."""

import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.command import run_command
from diagnostics.io.files import parse_json, read_object
from diagnostics.terminal import protect_terminal

COMMANDS = {
    "demo": (
        "opd.experiments.demo",
        "everything in one command: study, lab pair, two objectives, figures",
    ),
    "study": ("synthetic.runner.run", "exact synthetic studies: list, run NAME|all"),
    "lab": ("opd.lab.build", "build the lab pair, a teacher and a weaker student, from nothing"),
    "paper": (
        "opd.experiments.paper",
        "train every method of the paper's comparisons, several seeds each",
    ),
    "doctor": (
        "opd.analysis.doctor",
        "pre-flight: what about a student and a teacher would go wrong",
    ),
    "train": ("opd.cli.main:train", "distil a teacher into a student: RECIPE [--field value]"),
    "eval": ("opd.cli.main:evaluate", "accuracy of a model on held-out problems, with an interval"),
    "control": (
        "opd.analysis.own_prefix",
        "after a run: the teacher on its own and on the student's text",
    ),
    "continue": (
        "opd.analysis.continuation",
        "the teacher goes on where a run's student has got to",
    ),
    "diagnose": (
        "opd.analysis.diagnose",
        "run the diagnostics on saved batches, records or a run folder",
    ),
    "report": ("opd.report.build", "one self-contained HTML page about one or several runs"),
    "figures": ("figures.__main__", "draw figures from recorded tables, without torch"),
}


def usage() -> str:
    lines = [f"  {name:9} {what}" for name, (_, what) in COMMANDS.items()]
    return "usage: opd COMMAND [...]\n\n" + "\n".join(lines) + "\n\n`opd COMMAND --help` says more."


def main() -> None:
    """Entry point: run a sub-command, or print what there is."""
    protect_terminal()
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        run_command("opd", lambda: print(usage()))
        return
    if argv[0] not in COMMANDS:
        raise SystemExit(f"opd: unknown command {argv[0]!r}\n\n{usage()}")

    def command() -> None:
        module, _, name = COMMANDS[argv[0]][0].partition(":")
        getattr(import_module(module), name or "main")(argv[1:])

    run_command(f"opd {argv[0]}", command)


def train(argv: list[str]) -> None:
    """`opd train RECIPE [--anew] [--field value ...]`."""
    from opd.config.recipes import parse

    anew = "--anew" in argv
    config = parse([word for word in argv if word != "--anew"])
    from opd.training.train import train as run

    folder = run(config, anew)
    if os.environ.get("RANK", "0") == "0":  # of several processes one tells
        from diagnostics.records.rows import read
        from opd.runs.result import verdict

        judged = verdict(read(folder / "rows.jsonl"), read(folder / "evals.jsonl"))
        for change in judged["changes"]:
            print(change["sentence"])
        print(f"{judged['text']}\nrun folder: {folder}\ntrained model: {folder / 'final'}")


def evaluate(argv: list[str]) -> None:
    """`opd eval MODEL [--task lab] [--samples K] ... [--out FILE]`: one JSON line."""
    options = evaluation_options(argv)
    settings = dict(options)
    out, responses, against = (options.pop(name) for name in ("out", "responses", "against"))
    names = [options.pop(f"{name}_column") for name in ("prompt", "answer", "task")]
    # a file of other problems, or a folder that does not exist, is refused before the work
    needed = {"outcomes": str, "accuracy": float}
    other = None if against is None else read_object(against, needed)
    for path in filter(None, (out, responses)):
        path.parent.mkdir(parents=True, exist_ok=True)
    from opd.data.sources import Columns
    from opd.evaluation.evaluate import records, respond_folder, result

    graded = respond_folder(
        options.pop("model"), options.pop("task"), columns=Columns(*names), **options
    )
    found = result(graded)
    if other is not None:
        from opd.evaluation.statistics import compare

        found |= {f"against/{name}": value for name, value in compare(other, found).items()}
        away = differing(other.get("settings", {}), json.loads(json.dumps(settings, default=str)))
        found |= {"against/settings": away} if away else {}
    print(json.dumps({k: v for k, v in found.items() if k != "outcomes"}))
    if out is not None:
        out.write_text(json.dumps({**found, "settings": settings}, indent=1, default=str) + "\n")
    if responses is not None:
        responses.write_text("".join(json.dumps(row) + "\n" for row in records(graded)))


def differing(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Settings of two evaluations that are not the same, but for where they are written."""
    names = sorted((before.keys() & now.keys()) - {"out", "responses", "against", "device"})
    return {name: [before[name], now[name]] for name in names if before[name] != now[name]}


def evaluation_options(argv: list[str]) -> dict[str, Any]:
    """The words of `opd eval` as settings of `opd.evaluation.evaluate.respond_folder`, and where to write."""
    parser = argparse.ArgumentParser(
        prog="opd eval",
        description="accuracy of a saved model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="folder, such as RUN/final, or hub name")
    add(
        "--task",
        default="lab",
        help='"lab", a .jsonl, .json or .parquet file, a folder, hf:NAME[:CONFIG][:SPLIT], a set '
        "by name (math-500, aime24, aime25, amc23, minerva, olympiad, gsm8k; NAME:PATH from a "
        "file), gym:TASK, or games, env:NAME",
    )
    add("--problems", type=int, default=256, help="at most so many of the task")
    add("--whole", action="store_true", help="all problems of the file, not the held-out tenth")
    add("--samples", type=int, default=1, help="responses to each problem")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0, help="1 samples from the whole distribution")
    add("--max-prompt", type=int, default=512, help="longest prompt, in tokens")
    add("--drop", action="store_true", help="leave out longer prompts instead of refusing them")
    add("--max-response", type=int, default=512, help="longest response, in tokens")
    add(
        "--grader",
        default="",
        help="exact, numeric, math (extra math), gym, lab, or a function of (response, answer) of "
        "your own: MODULE:FUNCTION or FILE.py:FUNCTION; empty: the task's, or exact",
    )
    add("--layout", default="turns", choices=("turns", "trajectory"), help="of games")
    add("--max-turns", type=int, default=30, help="of games: actions of an episode")
    add("--history", type=int, default=2, help="of games: turns told again in layout turns")
    add("--system", default="", help="a system message before every prompt")
    add("--template", type=template, default={}, help='JSON, such as {"enable_thinking": false}')
    for name in ("prompt", "answer", "task"):
        add(f"--{name}-column", default=name, help="of a data file")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", default="auto", help='"cpu", "cuda", or "auto": cuda where there is one')
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    add("--trust-remote-code", action="store_true", help="run the code beside the weights")
    add("--out", type=Path, help="JSON file: the numbers, the outcomes and these settings")
    add("--responses", type=Path, help="JSONL file: a line a problem, with what was said")
    add("--against", type=Path, help="an earlier --out of the same problems, to compare in pairs")
    return vars(parser.parse_args(argv))


def template(text: str) -> dict[str, Any]:
    """The words of --template as arguments of a chat template."""
    try:
        values = parse_json(text, "--template")
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return values


if __name__ == "__main__":
    main()
