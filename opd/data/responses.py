"""Responses that the data give, as token ids."""

from collections.abc import Sequence
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr
from opd.data.chain_task import Problem
from opd.data.sources import DatasetProblem


def given_response(problem: Problem) -> str:
    """Return the response that the data give to a problem, "" if there is none.

    Args:
        problem: A row of a dataset, or a generated problem with a worked solution.

    Returns:
        The text.
    """
    response = problem.response if isinstance(problem, DatasetProblem) else ""
    return response or problem.solution


def encode_response(tokenizer: Any, problem: Problem, eos: Sequence[int]) -> list[int]:
    """Encode the response that the data give, up to and including its end.

    Args:
        tokenizer: The student's tokenizer.
        problem: The problem.
        eos: Ids that end a response of the student.

    Returns:
        The ids. The text is cut after the first EOS that it contains; without one, the tokenizer's
        own EOS is appended.

    Raises:
        InvalidInput: The problem has no response.
    """
    text = given_response(problem)
    if not text:
        raise InvalidInput(
            f"the problem {short_repr(problem.prompt)} has no response; prefixes dataset needs one "
            "in every row (--response-column)"
        )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    end = next((i for i, token in enumerate(ids) if token in eos), None)
    if end is not None:
        return ids[: end + 1]
    own_id = tokenizer.eos_token_id
    return [*ids, own_id if own_id in eos else eos[0]]
