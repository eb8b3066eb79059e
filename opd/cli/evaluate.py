"""The `opd eval` command."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.command import parse_options
from diagnostics.io.files import read_object
from diagnostics.records.renamed import (
    EVALUATION_SETTINGS,
    present_evaluation_settings,
    refuse_renamed_options,
)
from opd.config.field_checks import annotations, value_problem
from opd.config.groups import EvalConfig, GamesConfig
from opd.config.problems import raise_problems
from opd.config.settings import parse_template, setting_fields
from opd.evaluation.measures import NO_MEASURES, Measures, format_table, without_long_results

UNCOMPARED = {
    "model",
    "export",
    "export_folder",
    "out",
    "responses",
    "against",
    "device",
    "calibration",
    "teacher",
}
"""Options that may differ between two evaluations without a note."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Accuracy of a saved model, and what else tells whether it is better."""

    model: Positional[str]
    """folder, such as RUN/final, or hub name"""
    task: str = "lab"
    """"lab", a .jsonl, .json or .parquet file, a folder, hf:NAME[:CONFIG][:SPLIT], a benchmark
    (math-500, aime24, aime25, amc23, minerva, olympiad, gsm8k; NAME:PATH from a file), gym:TASK, or
    a game, env:NAME; a held-out tenth of a file is evaluated, and all of --eval-task"""
    prompt_column: str = "prompt"
    """column of a data file with the prompt, or a text with columns in braces"""
    answer_column: str = "answer"
    """column of a data file with the reference answer; where none has it, the assistant's reply at
    the end of a chat"""
    task_column: str = "task"
    """column of a data file with the label of the task"""
    grader: str = ""
    """exact, numeric, math (extra math), gym, lab, or your own function of (response, answer):
    MODULE:FUNCTION or FILE.py:FUNCTION; empty: the task's, or exact"""
    system: str = ""
    """system message before every prompt"""
    chat_template: str = ""
    """Jinja file of a chat template, in the place of the model's own"""
    template: Annotated[str, tyro.conf.arg(metavar="JSON")] = "{}"
    """arguments of the chat template, such as {"enable_thinking": false}"""
    max_prompt: int = 512
    """longest prompt, in tokens"""
    skip_long_prompts: bool = False
    """skip longer prompts instead of raising an error"""
    max_response: int = 512
    """longest response, in tokens; for games, of each turn"""
    evaluation: EvalConfig = field(default=EvalConfig())
    games: GamesConfig = field(default=GamesConfig())
    measures: Measures = field(default=NO_MEASURES)
    seed: int = 0
    """seed of the sampling"""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda if available"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """data type of the weights"""
    trust_remote_code: bool = False
    """run Python code stored with the weights"""
    out: Path | None = None
    """JSON file for the results, outcomes and settings"""
    responses: Path | None = None
    """JSONL file for the responses, one line per problem"""
    export: Literal["none", "lm-eval", "inspect"] = "none"
    """harness for which --export-folder repeats this evaluation"""
    export_folder: Path = Path("export")
    """folder of --export: a task file, the problems and, where needed, a tokenizer"""
    against: Path | None = None
    """earlier --out file on the same problems, for a paired comparison"""


def main(argv: list[str]) -> None:
    """Run `opd eval MODEL [--task lab] [--eval-samples K] ...`; print one JSON line.

    The same numbers follow on the standard error stream, one a line with its interval.

    Args:
        argv: The arguments.
    """
    options = parse_arguments(argv)
    # fail on an unreadable --against file or output folder before the evaluation starts
    required_fields = {"outcomes": str, "accuracy": float, "problem_set": str, "problems": int}
    baseline = None if options.against is None else read_object(options.against, required_fields)
    template = parse_template(options.template, "--template")
    for path in filter(None, (options.out, options.responses)):
        path.parent.mkdir(parents=True, exist_ok=True)
    from opd.data.sources import Columns
    from opd.envs.task import is_games
    from opd.evaluation.evaluate import response_records
    from opd.evaluation.folder import EvaluationSettings, export_evaluation, measure_folder

    if options.export != "none" and is_games(options.evaluation.eval_task or options.task):
        raise InvalidInput("games cannot be exported to lm-eval or Inspect; leave out --export")
    evaluation_settings = EvaluationSettings(
        task=options.task,
        evaluation=options.evaluation,
        games=options.games,
        max_prompt=options.max_prompt,
        max_response=options.max_response,
        skip_long=options.skip_long_prompts,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        columns=Columns(
            prompt=options.prompt_column, answer=options.answer_column, task=options.task_column
        ),
        grader=options.grader,
        system=options.system,
        template=template,
        chat_template=options.chat_template,
    )
    evaluation = measure_folder(options.model, evaluation_settings, options.measures, baseline)
    summary, settings = evaluation.metrics, option_values(options)
    if baseline is not None:
        different_settings = differing_settings(
            present_evaluation_settings(baseline.get("settings", {})),
            json.loads(json.dumps(settings, default=str)),
        )
        summary |= {"against/settings": different_settings} if different_settings else {}
    if options.export != "none":
        export_evaluation(options.export, options.export_folder, evaluation, evaluation_settings)
    print(json.dumps(without_long_results(summary)))
    print(format_table(summary), file=sys.stderr)
    if options.out is not None:
        text = json.dumps({**summary, "settings": settings}, indent=1, default=str)
        write_text(options.out, text + "\n")
    if options.responses is not None:
        rows = response_records(evaluation.graded, evaluation.recovery)
        write_text(options.responses, "".join(json.dumps(row) + "\n" for row in rows))


def parse_arguments(argv: list[str]) -> EvaluationOptions:
    """Parse the options of `opd eval`.

    Args:
        argv: The arguments; --help prints the help and exits.

    Returns:
        The options.

    Raises:
        InvalidInput: An option has a former name, or a setting is out of range.
    """
    if "--whole" in argv:
        raise InvalidInput(
            "--whole is now part of --eval-task: `--eval-task FILE` evaluates on all of FILE, and "
            "`--task FILE` on a held-out tenth"
        )
    refuse_renamed_options(argv, EVALUATION_SETTINGS, "opd eval")
    options = parse_options(EvaluationOptions, argv, "opd eval")
    settings = asdict(options.evaluation) | asdict(options.games)
    raise_problems([problem for name, x in settings.items() if (problem := check_setting(name, x))])
    return options


def check_setting(name: str, value: Any) -> str:
    """Return why the value of a setting is invalid, or ""."""
    setting = setting_fields()[name]
    return value_problem(name, value, annotations(setting.owner)[name], setting.rules.within)


def option_values(options: EvaluationOptions) -> dict[str, Any]:
    """Return the options by name, without groups, as they are recorded with the results."""
    values = asdict(options) | {"template": parse_template(options.template, "--template")}
    for group in ("evaluation", "games", "measures"):
        values |= values.pop(group)
    return values


def differing_settings(
    old_settings: dict[str, Any], new_settings: dict[str, Any]
) -> dict[str, list[Any]]:
    """Return the settings that differ between two evaluations, except paths and device."""
    names = sorted((old_settings.keys() & new_settings.keys()) - UNCOMPARED)
    return {
        name: [old_settings[name], new_settings[name]]
        for name in names
        if old_settings[name] != new_settings[name]
    }
