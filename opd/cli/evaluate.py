"""The `opd eval` command."""

import argparse
import json
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.files import parse_json, read_object
from diagnostics.records.renamed import present_settings


def main(argv: list[str]) -> None:
    """Run `opd eval MODEL [--task lab] [--samples K] ... [--out FILE]`; print one JSON line."""
    options = evaluation_options(argv)
    settings = dict(options)
    out, responses, baseline_path = (options.pop(name) for name in ("out", "responses", "against"))
    names = [options.pop(f"{name}_column") for name in ("prompt", "answer", "task")]
    # fail on an unreadable --against file or output folder before the evaluation starts
    required_fields = {"outcomes": str, "accuracy": float}
    baseline = None if baseline_path is None else read_object(baseline_path, required_fields)
    for path in filter(None, (out, responses)):
        path.parent.mkdir(parents=True, exist_ok=True)
    from opd.data.sources import Columns
    from opd.evaluation.evaluate import evaluation_result, respond_folder, response_records

    graded = respond_folder(
        options.pop("model"), options.pop("task"), columns=Columns(*names), **options
    )
    summary = evaluation_result(graded)
    if baseline is not None:
        from opd.evaluation.statistics import compare

        summary |= {f"against/{name}": value for name, value in compare(baseline, summary).items()}
        different_settings = differing_settings(
            present_settings(baseline.get("settings", {})),
            json.loads(json.dumps(settings, default=str)),
        )
        summary |= {"against/settings": different_settings} if different_settings else {}
    print(json.dumps({k: v for k, v in summary.items() if k != "outcomes"}))
    if out is not None:
        write_text(out, json.dumps({**summary, "settings": settings}, indent=1, default=str) + "\n")
    if responses is not None:
        write_text(responses, "".join(json.dumps(row) + "\n" for row in response_records(graded)))


def differing_settings(
    old_settings: dict[str, Any], new_settings: dict[str, Any]
) -> dict[str, list[Any]]:
    """Return the settings that differ between two evaluations, except paths and device."""
    names = sorted(
        (old_settings.keys() & new_settings.keys()) - {"out", "responses", "against", "device"}
    )
    return {
        name: [old_settings[name], new_settings[name]]
        for name in names
        if old_settings[name] != new_settings[name]
    }


def evaluation_options(argv: list[str]) -> dict[str, Any]:
    """Parse the options of `opd eval`: arguments of `respond_folder` and output files."""
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
        help='"lab", a .jsonl, .json or .parquet file, a folder, hf:NAME[:CONFIG][:SPLIT], a '
        "benchmark (math-500, aime24, aime25, amc23, minerva, olympiad, gsm8k; NAME:PATH from a "
        "file), gym:TASK, or a game, env:NAME",
    )
    add("--problems", type=int, default=256, help="largest number of problems")
    add(
        "--whole",
        action="store_true",
        help="all problems of the file instead of the held-out tenth",
    )
    add("--samples", type=int, default=1, help="responses to each problem")
    add("--temperature", type=float, default=1.0, help="0: greedy decoding")
    add("--top-p", type=float, default=1.0, help="nucleus sampling; 1: full softmax")
    add("--max-prompt", type=int, default=512, help="longest prompt, in tokens")
    add("--drop", action="store_true", help="skip longer prompts instead of raising an error")
    add("--max-response", type=int, default=512, help="longest response, in tokens")
    add(
        "--grader",
        default="",
        help="exact, numeric, math (extra math), gym, lab, or your own function of (response, "
        "answer): MODULE:FUNCTION or FILE.py:FUNCTION; empty: the task's, or exact",
    )
    add("--layout", default="turns", choices=("turns", "trajectory"), help="layout of game prompts")
    add("--max-turns", type=int, default=30, help="games: largest number of actions per episode")
    add(
        "--history-turns",
        type=int,
        default=2,
        help="games: previous turns in the prompt (layout turns)",
    )
    add("--system", default="", help="system message before every prompt")
    add(
        "--template",
        type=parse_template,
        default={},
        help='JSON, such as {"enable_thinking": false}',
    )
    for name in ("prompt", "answer", "task"):
        add(f"--{name}-column", default=name, help="column of a data file")
    add("--seed", type=int, default=0, help="seed of the sampling")
    add("--device", default="auto", help='"cpu", "cuda", or "auto": cuda if available')
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="data type of the weights",
    )
    add("--trust-remote-code", action="store_true", help="run Python code stored with the weights")
    add("--out", type=Path, help="JSON file for the results, outcomes and settings")
    add("--responses", type=Path, help="JSONL file for the responses, one line per problem")
    add(
        "--against",
        type=Path,
        help="earlier --out file on the same problems, for a paired comparison",
    )
    return vars(parser.parse_args(argv))


def parse_template(text: str) -> dict[str, Any]:
    """Parse --template: JSON with the arguments of a chat template."""
    try:
        values = parse_json(text, "--template")
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return values
