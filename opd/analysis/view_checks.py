"""Checks of the prompts that only the teacher reads (`opd doctor --config FILE`)."""

from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput
from opd.training.checks.check_result import CheckResult

if TYPE_CHECKING:
    from opd.config.settings import Config
    from opd.data.prompts import Prompts
    from opd.data.tasks import Task
    from opd.data.teacher_view.view import TeacherView
    from opd.envs.task import GameTask
    from opd.teachers.pair import ModelPair

ITEM = "teacher's prompts"
"""Name of the check."""
MAX_SHOWN = 400
"""Characters of the example that the result quotes."""
NUM_LAST_IDS = 4
"""Ids at the end of a prompt in which a response of another kind begins."""


def check_derived_view(config: "Config", count: int) -> CheckResult:
    """Check the prompts of a teacher that is derived from the student.

    Args:
        config: Settings of a task.
        count: Number of prompts.

    Returns:
        The result.
    """
    from opd.teachers.factory import make_pair
    from opd.training.setup import make_task
    from opd.training.teacher_view import make_view

    try:
        pair = make_pair(config)
        task = make_task(config, pair)
        view = make_view(config, pair, task)
        assert view is not None
        prompts = opening_prompts(config, view, pair, task, count)
    except (ValueError, OSError) as error:
        return CheckResult(ITEM, "fail", str(error), "the run would fail in the same way")
    return check_teacher_prompts(view, pair, prompts)


def opening_prompts(
    config: "Config", view: "TeacherView", pair: "ModelPair", task: "Task | GameTask", count: int
) -> "Prompts":
    """Encode the first prompts of a run for both models; where a view uses responses, empty ones.

    Args:
        config: Settings of the task.
        view: The teacher's view.
        pair: Student and teacher.
        task: The task.
        count: Number of prompts.

    Returns:
        The prompts, one row each.
    """
    from dataclasses import replace

    from opd.data.prompts import Prompts, encode_prompts
    from opd.data.teacher_view.values import Attempt
    from opd.data.teacher_view.view import encode_teacher_prompt, teacher_problem
    from opd.envs.task import GameTask
    from opd.envs.teacher_view import opening_view

    if isinstance(task, GameTask):
        viewed, problems = zip(
            *(opening_view(view, task, seed) for seed in task.train(0, count)), strict=True
        )
    else:
        problems = tuple(task.train(0, count))
        attempts = [Attempt("", 0.0, "") if problem.answer else Attempt("") for problem in problems]
        viewed = tuple(
            teacher_problem(
                view,
                problem,
                attempt if view.reads_attempts else None,
                [attempt] * (config.data.group_size - 1),
            )
            for problem, attempt in zip(problems, attempts, strict=True)
        )
    ids = [encode_teacher_prompt(view, pair.tokenizer, problem) for problem in viewed]
    prompts = encode_prompts(pair.tokenizer, list(problems), 1, 1 << 30)
    return replace(prompts, view=Prompts.from_ids(ids, prompts.index, prompts.answers))


def check_teacher_prompts(
    view: "TeacherView", pair: "ModelPair", prompts: "Prompts"
) -> CheckResult:
    """Say how the teacher's prompts differ: lengths, how they end, what ends a turn, an example.

    Args:
        view: The view.
        pair: Student and teacher.
        prompts: Prompts of the student, with those of the teacher.

    Returns:
        The result; a warning if the responses begin in another place, such as inside a tag, or if
        the teacher's chat template ends a turn with an id that ends no response of the student.
    """
    from opd.data.chat_template import chat_format_of
    from opd.tokens.masking import special_ids

    tokenizer, teacher_prompts = pair.tokenizer, prompts.teacher_prompts
    lengths = [int(x.mask.sum(1).max()) for x in (prompts, teacher_prompts)]
    own_ids, shown_ids = (x.tokens[0][x.mask[0]].tolist() for x in (prompts, teacher_prompts))
    numbers: dict[str, Any] = {
        "student": lengths[0],
        "teacher": lengths[1],
        "limit": view.max_tokens,
        "example": tokenizer.decode(shown_ids),
    }
    text = f"up to {lengths[1]} tokens, the student's {lengths[0]}"
    text += "" if view.max_tokens is None else f"; {view.max_tokens} allowed"
    text += f"; the first: {tokenizer.decode(shown_ids)[:MAX_SHOWN]!r}"
    problems, advice = [], []
    special = set(special_ids(tokenizer))
    endings = [ids[-NUM_LAST_IDS:] for ids in (own_ids, shown_ids)]
    if endings[0] != endings[1]:
        problems.append(
            f"the student's prompt ends with {tokenizer.decode(endings[0])!r}, the teacher's with "
            f"{tokenizer.decode(endings[1])!r}"
        )
        advice.append(
            "the responses must continue both: compare teacher_template and teacher_thinking with "
            "the student's"
        )
    turn_end = teacher_turn_end(view.chat_format or chat_format_of(tokenizer), tokenizer, special)
    ending_ids = {*pair.eos, *(pair.teacher.eos or ())}
    if turn_end is not None and turn_end not in ending_ids:
        name = tokenizer.convert_ids_to_tokens(turn_end)
        problems.append(f"the teacher's chat template ends a turn with {name}, no EOS of the pair")
        advice.append("set map_eos, or mask role:eos")
    numbers["turn_end"] = turn_end
    if problems:
        text = "; ".join([text, *problems])
        return CheckResult(ITEM, "warn", text, "; ".join(advice), numbers)
    return CheckResult(ITEM, "ok", text, "", numbers)


def teacher_turn_end(chat_format: Any, tokenizer: Any, special: set[int]) -> int | None:
    """Return the special id that a chat template writes after an assistant's message, if any."""
    from opd.data.chat_template import render_chat

    if chat_format is None:
        return None
    chat = (("user", "Hi."), ("assistant", "ANSWER"), ("user", "Go on."))
    try:
        text = render_chat(tokenizer, chat, **chat_format.arguments())
    except InvalidInput:
        return None
    ids = tokenizer.encode(text.partition("ANSWER")[2], add_special_tokens=False)
    return ids[0] if ids and ids[0] in special else None
