"""The `opd eval` command."""

import argparse
import json
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import parse_json, read_object


def main(argv: list[str]) -> None:
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
    add("--history-turns", type=int, default=2, help="of games: turns told again in layout turns")
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
