"""The `opd doctor` command."""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from diagnostics.errors import InvalidInput
from diagnostics.io.command import parse_options
from opd.analysis.doctor import check_config, check_pair, check_tasks, results_to_json
from opd.config.files import read_config
from opd.config.recorded_code import without_unreviewed_code
from opd.config.settings import with_settings

if TYPE_CHECKING:
    from opd.training.checks.check_result import CheckResult


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check a student and a teacher, or all settings of a run, before training."""

    student: Positional[str] = ""
    """folder or hub name"""
    teacher: Positional[str] = ""
    """folder or hub name; with --tasks, for tasks that name none"""
    config: Path | None = None
    """file of settings, as `opd train RECIPE --show` prints them, or config.json of a run, in the
    place of STUDENT and TEACHER; its settings are checked, and the models and prompts of its
    tasks"""
    tasks: Path | None = None
    """TOML file of several tasks; each is checked"""
    task: str | None = None
    """"lab", a data file or a game, env:NAME; default: built-in prompts"""
    system: str = ""
    """system message before every prompt"""
    prompts: int = 8
    """number of prompts to sample from"""
    group: int = 2
    """responses per prompt"""
    max_response: int = 64
    """longest sampled response, in tokens"""
    budget: int | None = None
    """max_response of the planned run"""
    seed: int = 0
    """seed of problems and sampling"""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda if available"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """data type of the weights"""
    trust_remote_code: bool = False
    """run Python code that comes with a model; review it first"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str]) -> None:
    """Run `opd doctor STUDENT TEACHER [...]` or `opd doctor --config FILE`; exit 1 on a failure."""
    options = parse_options(DoctorOptions, argv, "opd doctor")
    results_by_task = run_checks(options)
    if list(results_by_task) == [""]:
        results = results_by_task[""]
        print(results_to_json(results) if options.json else format_table(results))
    else:
        json_by_task = {
            name: json.loads(results_to_json(task_results))
            for name, task_results in results_by_task.items()
        }
        tables = (
            f"task {name}\n\n{format_table(task_results)}" if name else format_table(task_results)
            for name, task_results in results_by_task.items()
        )
        print(json.dumps(json_by_task, indent=1) if options.json else "\n\n".join(tables))
    if any(
        finding.verdict == "fail"
        for task_results in results_by_task.values()
        for finding in task_results
    ):
        raise SystemExit(1)


def run_checks(options: DoctorOptions) -> "dict[str, list[CheckResult]]":
    """Run the checks that the options ask for.

    Args:
        options: The options.

    Returns:
        Results by name of the task; "" without tasks, and for the settings of a file.

    Raises:
        InvalidInput: Options contradict each other, or the models are missing.
    """
    sampling: dict[str, Any] = {
        "prompts": options.prompts,
        "group": options.group,
        "max_response": options.max_response,
        "seed": options.seed,
        "device": options.device,
    }
    if options.config is not None:
        if options.student or options.teacher or options.task is not None or options.tasks:
            raise InvalidInput(
                "--config names the models and tasks; remove STUDENT, TEACHER, --task and --tasks"
            )
        config = read_config(options.config, check=False)
        if options.config.suffix == ".json":
            config = without_unreviewed_code(config, options.config, options.trust_remote_code)
        elif options.trust_remote_code:
            config = with_settings(config, trust_remote_code=True)
        return check_config(config, **sampling)
    if not options.student or not options.teacher:
        raise InvalidInput("give STUDENT and TEACHER, or --config FILE; see `opd doctor --help`")
    pair = (options.student, options.teacher)
    sampling |= {
        "budget": options.budget,
        "dtype": options.dtype,
        "system": options.system,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.tasks is None:
        return {"": check_pair(*pair, task=options.task, **sampling)}
    if options.task is not None:
        raise InvalidInput("give either --task or --tasks, not both")
    return check_tasks(options.tasks, *pair, **sampling)


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
