"""`opd doctor`: before training, everything about a pair that makes distillation fail silently."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput

if TYPE_CHECKING:
    from opd.training.checks.check_result import CheckResult


def examine_tasks(
    path: Path, student: str, teacher: str, **given: Any
) -> "dict[str, list[CheckResult]]":
    """Findings by task of a file (opd.training.multitask): the student with each task's teacher and prompts.

    Raises:
      ValueError: `task` is given too.
    """
    from opd.data.sources import Columns
    from opd.training.multitask import read_tasks

    if given.pop("task", None) is not None:
        raise InvalidInput("give either --task or --tasks")
    length, system = given.pop("max_response"), given.pop("system", "")
    return {
        own.name: examine(
            student,
            own.teacher or teacher,
            task=own.task,
            max_response=min(length, own.max_response or length),
            columns=Columns(own.prompt_column or "prompt", own.answer_column or "answer"),
            grader=own.grader or "",
            system=own.system or system,
            **given,
        )
        for own in read_tasks(path)
    }


def examine(
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
    **settings: Any,
) -> "list[CheckResult]":
    """Every item's finding, in the order of a reader: what is wrong on disk comes first.

    settings: of `opd.data.tasks.load_task`: columns, grader, system.
    Items that need a sample are left out, and one finding says why, where none can be drawn.
    """
    from opd.analysis import pair_checks, sample_checks
    from opd.analysis.pair_checks import read_side
    from opd.config.settings import Config
    from opd.data.chain_task import Problem
    from opd.data.prompts import encode
    from opd.data.sources import DEFAULT_COLUMNS, question
    from opd.data.tasks import load_task
    from opd.envs.task import is_games, load_games
    from opd.training.checks.check_result import CheckResult
    from opd.training.checks.start import examined

    for name, value in (("prompts", prompts), ("group", group), ("max_response", max_response)):
        if value < 1:
            raise InvalidInput(f"{name} is {value}; it must be at least 1")
    sides = read_side(student, device, dtype), read_side(teacher, device, dtype)
    found = [check(*sides) for check in pair_checks.CHECKS]
    system = settings.get("system", "")
    problems: list[Problem] = [
        question({"prompt": text}, DEFAULT_COLUMNS, system, (), unanswered=True)
        for text in sample_checks.PROMPTS[:prompts]
    ]
    if task is not None and is_games(task):
        games = load_games(task, seed, system=system)
        problems = games.openings(games.train(0, prompts))
    elif task is not None:
        problems = load_task(task, seed, **settings).train(0, prompts)
    try:
        encoded = encode(sides[0].tokenizer, problems, 1, 1 << 30)
    except InvalidInput as error:
        return [*found, CheckResult("prompts", "fail", str(error), "no prompt can be written so")]
    found.append(sample_checks.positions(*sides, encoded, budget or max_response))
    room = found[-1].numbers["room"]
    length = max_response if room is None else min(max_response, room)
    try:
        if length < 1:
            raise InvalidInput("the prompts leave no position for a response")
        config = Config(student=student, teacher=teacher, out="doctor", dtype=dtype)  # type: ignore[arg-type]
        found += examined([config], [sample_checks.make_pair(*sides)], sides[1].tokenizer)
        evidence = sample_checks.gather(
            *sides, problems, group=group, max_response=length, seed=seed
        )
    except ValueError as error:
        advice = "mend the items above first"
        return [*found, CheckResult("sample", "fail", f"nothing could be sampled: {error}", advice)]
    return found + [check(evidence) for check in sample_checks.CHECKS]


def document(found: "list[CheckResult]") -> str:
    """The findings as JSON, with the worst verdict first."""
    worst = max((f.verdict for f in found), key=["ok", "warn", "fail"].index)
    return json.dumps({"verdict": worst, "items": [asdict(f) for f in found]}, indent=1)
