"""Checks of a pair before training, for what makes distillation fail silently (`opd doctor`)."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput

if TYPE_CHECKING:
    from opd.config.settings import Config
    from opd.training.checks.check_result import CheckResult


def check_tasks(
    path: Path, student: str, teacher: str, **options: Any
) -> "dict[str, list[CheckResult]]":
    """Check the student with the teacher and prompts of each task of a file.

    Args:
        path: A TOML file of tasks (opd.training.multitask).
        student: Folder or hub name.
        teacher: Folder or hub name, for tasks that name none.
        **options: Arguments of `check_pair`, without `task`.

    Returns:
        Task name -> results.
    """
    from opd.config.files import read_tasks
    from opd.config.settings import parse_template
    from opd.data.sources import Columns

    length, system = options.pop("max_response"), options.pop("system", "")
    return {
        task_settings.name: check_pair(
            student,
            task_settings.teacher or teacher,
            task=task_settings.task,
            max_response=min(length, task_settings.max_response or length),
            columns=Columns(
                prompt=task_settings.prompt_column or "prompt",
                answer=task_settings.answer_column or "answer",
            ),
            grader=task_settings.grader or "",
            system=task_settings.system or system,
            template=parse_template(task_settings.template or "{}"),
            **options,
        )
        for task_settings in read_tasks(path)
    }


def check_config(
    config: "Config", max_response: int, **options: Any
) -> "dict[str, list[CheckResult]]":
    """Check the settings of a run, then the student with the teacher and prompts of each task.

    A teacher without weights of its own in this process is left to the run; of one that is derived
    from the student, the prompts that only it reads are checked.

    Args:
        config: Settings of the run.
        max_response: Largest number of tokens of a sampled response.
        **options: Arguments of `check_pair`: prompts, group, seed, device.

    Returns:
        Task name -> results; "" -> the settings, and the models of a run without tasks.
    """
    from opd.analysis.view_checks import check_derived_view
    from opd.config.problems import separate_invalid
    from opd.config.settings import parse_template, with_settings
    from opd.config.view import has_view
    from opd.teachers.teacher import teacher_type
    from opd.training.checks.check_result import CheckResult
    from opd.training.multitask import task_configs
    from opd.training.teacher_view import source_columns
    from opd.training.validation import validate

    problems = validate(config)
    settings_results = [
        CheckResult("settings", "fail", problem, "change the setting") for problem in problems
    ] or [CheckResult("settings", "ok", "valid, and all of them have an effect")]
    results: dict[str, list[CheckResult]] = {"": settings_results}
    _, config = separate_invalid(config)
    names = [task.name for task in config.tasks] or [""]
    for name, task_config in zip(names, task_configs(config), strict=True):
        if not teacher_type(task_config.teacher).is_separate:
            if task_config.teacher in ("base", "ema") and has_view(task_config) and not problems:
                result = check_derived_view(
                    with_settings(task_config, device=options.get("device", "auto")),
                    options.get("prompts", 8),
                )
                results[name] = [*results.get(name, []), result]
            continue
        results[name] = results.get(name, []) + check_pair(
            task_config.student,
            task_config.teacher,
            task=task_config.data.task,
            max_response=min(max_response, task_config.rollout.max_response),
            budget=task_config.rollout.max_response,
            dtype=task_config.hardware.dtype,
            columns=source_columns(task_config),
            grader=task_config.data.grader,
            system=task_config.data.system,
            template=parse_template(task_config.data.template),
            chat_template=task_config.data.chat_template,
            trust_remote_code=task_config.hardware.trust_remote_code,
            view_config=task_config if has_view(task_config) and not problems else None,
            **options,
        )
    return results


def check_pair(
    student: str,
    teacher: str,
    *,
    task: str | None = None,
    prompts: int = 8,
    group: int = 2,
    max_response: int = 64,
    budget: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    chat_template: str = "",
    trust_remote_code: bool = False,
    view_config: "Config | None" = None,
    **settings: Any,
) -> "list[CheckResult]":
    """Run all checks of a pair; checks of the files on disk come first.

    Checks that need sampled responses are skipped where nothing can be sampled; one result then
    says why.

    Args:
        student: Folder or hub name.
        teacher: Folder or hub name.
        task: A task for `opd.data.tasks.load_task` or a game; None uses built-in prompts.
        prompts: Number of prompts.
        group: Responses per prompt.
        max_response: Largest number of tokens of a sampled response.
        budget: max_response of the planned run; defaults to `max_response`.
        seed: Seed of problems and sampling.
        device: Device of the models.
        dtype: Data type of the weights.
        chat_template: Jinja file of a chat template in the place of the student's own; "" for that.
        trust_remote_code: Run Python code that comes with a model.
        view_config: Settings of a task whose teacher reads prompts of its own; None: the student's.
        **settings: Arguments of `opd.data.tasks.load_task`: columns, grader, system, template.

    Returns:
        The results of the checks.

    Raises:
        InvalidInput: A number is less than 1.
    """
    from opd.analysis import pair_checks, sample_checks
    from opd.analysis.pair_checks import load_side
    from opd.analysis.view_checks import check_teacher_prompts, opening_prompts
    from opd.config.settings import Config, with_settings
    from opd.data.chain_task import Problem
    from opd.data.chat_template import set_chat_template
    from opd.data.prompts import encode_prompts
    from opd.data.sources import DEFAULT_COLUMNS, parse_row
    from opd.data.tasks import Task, load_task
    from opd.envs.task import is_games, load_games
    from opd.teachers.pair import join_models
    from opd.training.checks.check_result import CheckResult
    from opd.training.checks.start import check_models
    from opd.training.setup import make_task
    from opd.training.teacher_view import make_view

    for name, value in (("prompts", prompts), ("group", group), ("max_response", max_response)):
        if value < 1:
            raise InvalidInput(f"{name} is {value}; it must be at least 1")
    sides = (
        load_side(student, device, dtype, trust_remote_code),
        load_side(teacher, device, dtype, trust_remote_code),
    )
    set_chat_template(sides[0].tokenizer, chat_template)
    results = [check(*sides) for check in pair_checks.CHECKS]
    system, template = settings.get("system", ""), tuple(settings.get("template", {}).items())
    problems: list[Problem] = [
        parse_row({"prompt": text}, DEFAULT_COLUMNS, system, template, answers="none")
        for text in sample_checks.PROMPTS[:prompts]
    ]
    loaded_task: Task | None = None
    if task is not None and is_games(task):
        games = load_games(task, seed, system=system, template=template)
        problems = games.openings(games.train(0, prompts))
    elif task is not None:
        loaded_task = load_task(task, seed, **settings)
        problems = loaded_task.train(0, prompts)
    try:
        encoded = encode_prompts(sides[0].tokenizer, problems, 1, 1 << 30)
    except InvalidInput as error:
        return [
            *results,
            CheckResult("prompts", "fail", str(error), "the run would fail in the same way"),
        ]
    results.append(sample_checks.positions(*sides, encoded, budget or max_response))
    room = results[-1].numbers["room"]
    length = max_response if room is None else min(max_response, room)
    try:
        if length < 1:
            raise InvalidInput("the prompts leave no positions for a response")
        config = with_settings(Config(student=student, teacher=teacher, out="doctor"), dtype=dtype)
        pair = join_models(sides[0].loaded, teacher, sides[1].loaded)
        results += check_models([config], [pair], sides[1].tokenizer)
        view = None
        if view_config is not None:
            view_task = loaded_task or make_task(view_config, pair)
            view = make_view(view_config, pair, view_task)
            assert view is not None
            viewed_prompts = opening_prompts(view_config, view, pair, view_task, prompts)
            results.append(check_teacher_prompts(view, pair, viewed_prompts))
        evidence = sample_checks.gather_evidence(
            *sides,
            pair,
            problems,
            group=group,
            max_response=length,
            seed=seed,
            view=None if loaded_task is None else view,
            grade=None if loaded_task is None else loaded_task.grade,
        )
    except ValueError as error:
        advice = "fix the items above first"
        return [
            *results,
            CheckResult("sample", "fail", f"nothing could be sampled: {error}", advice),
        ]
    return results + [check(evidence) for check in sample_checks.CHECKS]


def results_to_json(results: "list[CheckResult]") -> str:
    """Return the results as JSON, with the worst verdict first."""
    worst = max((f.verdict for f in results), key=["ok", "warn", "fail"].index)
    return json.dumps({"verdict": worst, "items": [asdict(f) for f in results]}, indent=1)
