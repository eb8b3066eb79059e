"""The teacher's view of a task: made from its settings, and tried on all problems before training.

Shapes: none.
"""

from collections.abc import Sequence
from dataclasses import replace

from diagnostics.errors import InvalidInput
from diagnostics.io.files import read_text
from opd.config.settings import Config
from opd.config.view import has_view
from opd.data.chain_task import Problem
from opd.data.chat_template import ChatFormat, chat_format_of, read_chat_template
from opd.data.prompts import encode_prompt
from opd.data.sources import Columns, prompt_columns, row_number
from opd.data.tasks import Task
from opd.data.teacher_view.controls import STATEMENT_NAMES, ViewControl, pair_problems
from opd.data.teacher_view.template import (
    GAME_NAMES,
    PROBLEM_NAMES,
    RESERVED_NAMES,
    RESPONSE_NAMES,
    ViewTemplate,
    load_view_template,
)
from opd.data.teacher_view.values import Attempt
from opd.data.teacher_view.view import TeacherView, encode_teacher_prompt, teacher_problem
from opd.envs.task import GameTask
from opd.envs.teacher_view import opening_view
from opd.teachers.pair import ModelPair
from opd.training.checks.settings import STUDENT_DERIVED
from opd.training.multitask import task_configs

NUM_COMPARED = 64
"""Number of problems whose prompts of student and teacher are compared."""


def make_view(config: Config, pair: ModelPair, problems: Task | GameTask) -> TeacherView | None:
    """Make the view of a task, and try it on its problems.

    Args:
        config: Settings of the task.
        pair: Student and teacher.
        problems: The task.

    Returns:
        The view; None if the teacher reads the student's prompts.

    Raises:
        InvalidInput: A file cannot be used, the view uses what the task does not have, a setting
            has no effect on the chat template, or `check_view` refuses a prompt.
    """
    if not has_view(config):
        return None
    settings = config.view
    template = load_view_template(settings.teacher_view) if settings.teacher_view else None
    chat_format = teacher_chat_format(config, pair)
    used_format = chat_format or chat_format_of(pair.tokenizer)
    thinking = None if settings.teacher_thinking == "same" else settings.teacher_thinking == "on"
    if used_format is None and (settings.teacher_system or thinking is not None):
        name = "teacher_system" if settings.teacher_system else "teacher_thinking"
        raise InvalidInput(
            f"{name} needs a chat template, which the student's tokenizer does not have; set "
            "teacher_template to a file"
        )
    if thinking is not None and used_format and "enable_thinking" not in used_format.template:
        raise InvalidInput(
            f"teacher_thinking is {settings.teacher_thinking}, but the chat template of the "
            "teacher's prompts does not read enable_thinking; leave teacher_thinking at same"
        )
    control = ViewControl()
    if template is not None:
        check_names(template, config, problems)
        control = make_control(template, config, problems)
    view = TeacherView(
        template=template,
        system=settings.teacher_system,
        chat_format=chat_format,
        thinking=thinking,
        control=control,
        max_tokens=max_prompt_tokens(config, pair),
    )
    check_view(view, config, pair, problems)
    return view


def source_columns(config: Config) -> Columns:
    """Return the columns of a task's data, with those that the teacher's view shows."""
    columns = Columns(prompt=config.data.prompt_column, answer=config.data.answer_column)
    if not config.view.teacher_view:
        return columns
    template = load_view_template(config.view.teacher_view)
    optional = ("solution", *sorted(template.function_names))
    return replace(columns, kept=template.columns, kept_where_present=optional)


def view_files(config: Config) -> dict[str, str]:
    """Return the text of every template of the teacher's prompts, by its path in the settings."""
    files = {}
    for task_config in task_configs(config):
        settings = task_config.view
        if settings.teacher_view:
            files[settings.teacher_view] = read_text(settings.teacher_view)
        if settings.teacher_template not in ("student", "own"):
            files[settings.teacher_template] = read_text(settings.teacher_template)
    return files


def reads_response(config: Config) -> bool:
    """Return whether the view of some task uses the response that the teacher scores."""
    paths = {task_config.view.teacher_view for task_config in task_configs(config)}
    return any(load_view_template(path).reads_response for path in paths if path)


def teacher_chat_format(config: Config, pair: ModelPair) -> ChatFormat | None:
    """Return the chat template of the teacher's prompts; None for the student's.

    Args:
        config: Settings of the task.
        pair: Student and teacher.

    Returns:
        The format.

    Raises:
        InvalidInput: The teacher has no chat template of its own.
    """
    name = config.view.teacher_template
    if name == "student":
        return None
    if name == "own":
        own_format = pair.teacher.chat_format
        if own_format is None:
            raise InvalidInput(
                f"teacher_template is own, but the teacher {pair.teacher.name} has no chat "
                "template of its own in this process; give a Jinja file"
            )
        return own_format
    own_tokens = chat_format_of(pair.tokenizer)
    return ChatFormat(
        read_chat_template(name, "teacher_template"),
        () if own_tokens is None else own_tokens.special_tokens,
    )


def check_names(template: ViewTemplate, config: Config, problems: Task | GameTask) -> None:
    """Refuse a template that uses what a task of this kind never has.

    Args:
        template: The template.
        config: Settings of the task.
        problems: The task.

    Raises:
        InvalidInput: Names what it uses, and why that does not exist.
    """
    path = f"teacher_view {template.path}"
    if template.reads_response and config.record.probe_every:
        raise InvalidInput(
            f"probe_every is {config.record.probe_every}, but {path} uses the response itself "
            f"({', '.join(RESPONSE_NAMES)}), so that the teacher's distribution depends on the "
            "sampled token and the probe's expectations do not hold; set probe_every to 0"
        )
    if template.reads_peers and config.data.group_size < 2:
        raise InvalidInput(
            f"{path} uses peers, the other responses to a prompt, but group_size is "
            f"{config.data.group_size}; set group_size to 2 or more"
        )
    if isinstance(problems, GameTask):
        known_names = RESERVED_NAMES - {"answer", "solution"}
        if unknown := sorted(template.names - known_names):
            raise InvalidInput(
                f"{path} uses {', '.join(unknown)}, which a game does not have; it may use "
                f"{', '.join(sorted(known_names))}"
            )
        return
    if games_only := sorted(template.names.intersection(GAME_NAMES)):
        raise InvalidInput(
            f"{path} uses {', '.join(games_only)}, which only games have; use "
            f"{', '.join(PROBLEM_NAMES)}, or columns of the data"
        )
    if config.data.task == "lab" and template.columns:
        raise InvalidInput(
            f"{path} uses {', '.join(template.columns)}, but the task lab has no such columns; it "
            f"has {', '.join(sorted(RESERVED_NAMES - set(GAME_NAMES)))}"
        )
    graded_names = sorted(template.names.intersection(("reward", "feedback")))
    if graded_names and not all(problem.answer for problem in problems.training()):
        raise InvalidInput(
            f"{path} uses {', '.join(graded_names)}, but some problems have no answer, so that "
            "nothing grades their responses; set answer_column, or use another view"
        )


def make_control(template: ViewTemplate, config: Config, problems: Task | GameTask) -> ViewControl:
    """Make the control experiment of a view.

    Args:
        template: The template.
        config: Settings of the task.
        problems: The task.

    Returns:
        The control.

    Raises:
        InvalidInput: Another problem has no values for what the view uses.
    """
    kind = config.view.view_control
    statement = STATEMENT_NAMES | set(prompt_columns(config.data.prompt_column))
    if kind != "other_problem":
        return ViewControl(kind=kind, seed=config.seed, statement=statement)
    if isinstance(problems, GameTask):
        raise InvalidInput(
            "view_control is other_problem, but games have no answers or solutions that could be "
            "exchanged; use empty or shuffled"
        )
    of_responses = {"response", "reward", "feedback", "peers"}
    if names := sorted(template.names & of_responses):
        raise InvalidInput(
            f"view_control is other_problem, but teacher_view {template.path} uses "
            f"{', '.join(names)}, which belong to a response; use empty or shuffled"
        )
    if not template.names - statement:
        raise InvalidInput(
            f"view_control is other_problem, but teacher_view {template.path} shows only what the "
            "student reads; use answer, solution or a column of the data in it"
        )
    successors = pair_problems(problems.training(), config.seed)
    return ViewControl(kind=kind, seed=config.seed, statement=statement, successors=successors)


def max_prompt_tokens(config: Config, pair: ModelPair) -> int | None:
    """Return the longest prompt that the teacher may read, in tokens; None if nothing limits it."""
    context = pair.teacher.max_length()
    limits = [] if context is None else [context - config.rollout.max_response]
    if config.view.max_teacher_prompt:
        limits.append(config.view.max_teacher_prompt)
    return min(limits, default=None)


def check_view(
    view: TeacherView, config: Config, pair: ModelPair, problems: Task | GameTask
) -> None:
    """Render and encode the teacher's prompt of every problem, or of the first turn of a game.

    Where the view uses responses, empty ones stand in their place.

    Args:
        view: The view.
        config: Settings of the task.
        pair: Student and teacher.
        problems: The task.

    Raises:
        InvalidInput: A prompt cannot be rendered or encoded, or is too long; names its row. Or the
            teacher is derived from the student, and reads what the student reads.
    """
    if isinstance(problems, GameTask):
        viewed_problem, opening = opening_view(view, problems, problems.train(0, 1)[0])
        ids = encode_teacher_prompt(view, pair.tokenizer, viewed_problem)
        differs = ids != encode_prompt(pair.tokenizer, opening) or view.reads_attempts
    else:
        differs = check_problem_views(view, config, pair, problems.training())
    is_copy = config.teacher in STUDENT_DERIVED and not config.objective.reward_weight
    if is_copy and not differs:
        raise InvalidInput(
            f"the teacher {pair.teacher.name} starts with the student's weights and reads the same "
            "prompts, so the divergence is zero; show it more in teacher_view"
        )


def check_problem_views(
    view: TeacherView, config: Config, pair: ModelPair, problems: Sequence[Problem]
) -> bool:
    """Render and encode the teacher's prompt of every problem; see `check_view`.

    Args:
        view: The view.
        config: Settings of the task.
        pair: Student and teacher.
        problems: The training problems.

    Returns:
        Whether the prompt of one of the first NUM_COMPARED problems is not the student's, or there
        are no problems.

    Raises:
        InvalidInput: A prompt cannot be rendered or encoded, or is too long.
    """
    has_answers = all(problem.answer for problem in problems)
    attempt = Attempt("", 0.0, "") if has_answers else Attempt("")
    peers = [attempt] * (config.data.group_size - 1)
    differs = not problems
    for position, problem in enumerate(problems):
        try:
            viewed_problem = teacher_problem(
                view, problem, attempt if view.reads_attempts else None, peers
            )
        except InvalidInput as error:
            raise InvalidInput(f"row {row_number(problem, position)}: {error}") from error
        ids = encode_teacher_prompt(view, pair.tokenizer, viewed_problem)
        if position < NUM_COMPARED and not differs:
            differs = ids != encode_prompt(pair.tokenizer, problem)
    return differs
