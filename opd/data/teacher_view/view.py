"""The teacher's prompts: rendered from its view of a problem, encoded, and put beside a batch.

The student's response ids follow the teacher's prompt without a change, so that scores of the
teacher belong to the student's positions. Nothing of a view is in the student's prompts.

Shapes: B rows, P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.chat_template import ChatFormat
from opd.data.prompts import Prompts, encode_prompt
from opd.data.sources import DatasetProblem
from opd.data.teacher_view.controls import ViewControl, control_values
from opd.data.teacher_view.template import ViewTemplate, render_view
from opd.data.teacher_view.values import Attempt, attempt_values, messages_of, problem_values


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherView:
    """How the teacher's prompt differs from the student's."""

    template: ViewTemplate | None = None
    """Template of the user's last message; None: the student's message."""
    system: str = ""
    """System message in the place of the student's; "": the student's."""
    chat_format: ChatFormat | None = None
    """Chat template; None: the student's."""
    thinking: bool | None = None
    """Argument enable_thinking of the chat template; None: as for the student."""
    control: ViewControl = field(default_factory=ViewControl)
    """Control experiment."""
    max_tokens: int | None = None
    """Longest prompt in tokens; None: no limit is known."""

    @property
    def reads_response(self) -> bool:
        """Whether a prompt depends on the response that follows it, or on its grade."""
        return self.template is not None and self.template.reads_response

    @property
    def reads_attempts(self) -> bool:
        """Whether a prompt depends on any response to it."""
        return self.reads_response or (self.template is not None and self.template.reads_peers)


def teacher_problem(
    view: TeacherView,
    problem: Problem,
    attempt: Attempt | None = None,
    peers: Sequence[Attempt] = (),
    state: Sequence[tuple[str, Any]] = (),
) -> DatasetProblem:
    """Return the problem as the teacher reads it.

    Args:
        view: The view.
        problem: The problem that the student reads.
        attempt: The response that the teacher scores; None if the view does not use it.
        peers: Other responses to the same prompt.
        state: Names and values of the state of a game.

    Returns:
        A problem whose chat and template arguments are the teacher's.

    Raises:
        InvalidInput: The template fails or renders to nothing.
    """
    chat = messages_of(problem)
    if view.system:
        chat = (("system", view.system), *(chat[1:] if chat[0][0] == "system" else chat))
    if view.template is not None:
        values = problem_values(problem) | dict(state)
        if attempt is not None:
            values |= attempt_values(attempt, peers)
        text = render_view(view.template, control_values(view.control, values, problem))
        chat = (*chat[:-1], ("user", text))
    arguments = dict(problem.template) if isinstance(problem, DatasetProblem) else {}
    if view.thinking is not None:
        arguments["enable_thinking"] = view.thinking
    return DatasetProblem(
        prompt=chat[-1][1],
        answer=problem.answer,
        chat=chat if len(chat) > 1 else (),
        template=tuple(arguments.items()),
        row=problem.row if isinstance(problem, DatasetProblem) else None,
    )


def encode_teacher_prompt(view: TeacherView, tokenizer: Any, problem: DatasetProblem) -> list[int]:
    """Encode what `teacher_problem` returned.

    Args:
        view: The view.
        tokenizer: The student's tokenizer, whose ids the teacher shares.
        problem: The problem as the teacher reads it.

    Returns:
        The token ids of the prompt.

    Raises:
        InvalidInput: The chat template refuses the messages, or the prompt is too long.
    """
    try:
        ids = encode_prompt(tokenizer, problem, view.chat_format)
    except InvalidInput as error:
        row = "" if problem.row is None else f" of row {problem.row}"
        raise InvalidInput(
            f"the teacher's prompt{row} cannot be encoded: {error}. Settings of its messages are "
            "teacher_view, teacher_system and teacher_template"
        ) from error
    if view.max_tokens is not None and len(ids) > view.max_tokens:
        row = "" if problem.row is None else f" of row {problem.row}"
        raise InvalidInput(
            f"the teacher's prompt{row} has {len(ids)} tokens, but max_teacher_prompt or the "
            f"teacher's context allows {view.max_tokens}; shorten teacher_view, lower "
            "max_response, or use a teacher with a longer context"
        )
    return ids


def with_teacher_prompts(
    view: TeacherView,
    tokenizer: Any,
    prompts: Prompts,
    problems: Sequence[Problem],
    attempts: Sequence[Attempt] | None,
) -> Prompts:
    """Put the teacher's prompts beside those of the student.

    Args:
        view: The view.
        tokenizer: The student's tokenizer.
        prompts: B prompts, on the host.
        problems: Problem of each row; rows of the same prompt have the same problem.
        attempts: Response of each row; None if the view uses none.

    Returns:
        The prompts, whose `view` is what the teacher reads.

    Raises:
        InvalidInput: The view uses responses and there are none, or a prompt cannot be rendered or
            encoded.
    """
    index = prompts.index.tolist()
    ids: list[list[int]] = []
    if attempts is None:
        if view.reads_attempts:
            raise InvalidInput(
                "teacher_view uses responses (response, reward, feedback or peers), but there is "
                "none yet; use another view"
            )
        ids_by_prompt: dict[int, list[int]] = {}
        for key, problem in zip(index, problems, strict=True):
            if key not in ids_by_prompt:
                viewed_problem = teacher_problem(view, problem)
                ids_by_prompt[key] = encode_teacher_prompt(view, tokenizer, viewed_problem)
        ids = [ids_by_prompt[key] for key in index]
    else:
        rows_by_prompt: dict[int, list[int]] = {}
        for row, key in enumerate(index):
            rows_by_prompt.setdefault(key, []).append(row)
        for row, (key, problem) in enumerate(zip(index, problems, strict=True)):
            peers = [attempts[i] for i in rows_by_prompt[key] if i != row]
            viewed_problem = teacher_problem(view, problem, attempts[row], peers)
            ids.append(encode_teacher_prompt(view, tokenizer, viewed_problem))
    return replace(prompts, view=Prompts.from_ids(ids, prompts.index, prompts.answers))
