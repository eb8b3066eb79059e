"""The values that a view may show: what is known of a problem, of a response and of its peers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opd.data.chain_task import Problem
from opd.data.grading.graders import Grade
from opd.data.messages import Chat
from opd.data.prompts import decode_responses
from opd.data.sources import DatasetProblem, final_answer


@dataclass(frozen=True)
class Attempt:
    """A response to a problem, and what its grader says."""

    response: str
    """Text of the response."""
    reward: float = math.nan
    """Its grade; NaN if nothing graded it."""
    feedback: str = ""
    """What the grader says, in words; "" if nothing graded it."""

    def values(self) -> dict[str, Any]:
        """Return what a view may show of it; a grade only where there is one."""
        if math.isnan(self.reward):
            return {"response": self.response}
        return {"response": self.response, "reward": self.reward, "feedback": self.feedback}


def graded_attempts(
    tokenizer: Any, tokens: Tensor, mask: Tensor, grades: Sequence[Grade], eos: Sequence[int]
) -> list[Attempt]:
    """Return responses as a view may show them.

    Args:
        tokenizer: A Hugging Face tokenizer.
        tokens: (B, T) token ids.
        mask: (B, T), True where a token is real.
        grades: Grade of each response.
        eos: Ids that end a response.

    Returns:
        B attempts.
    """
    texts = decode_responses(tokenizer, tokens, mask, eos)
    return [
        Attempt(text, grade.reward, grade.feedback_text())
        for text, grade in zip(texts, grades, strict=True)
    ]


def messages_of(problem: Problem) -> Chat:
    """Return the messages before the response, the last of them by the user."""
    chat = problem.chat if isinstance(problem, DatasetProblem) else ()
    return chat or (("user", problem.prompt),)


def problem_values(problem: Problem) -> dict[str, Any]:
    """Return what a view may show of a problem.

    Args:
        problem: The problem.

    Returns:
        The columns that were kept of its row, and under the reserved names: prompt, the user's last
        message; messages; answer, without the steps of a worked solution, if there is one; and
        solution, if there is one.
    """
    chat = messages_of(problem)
    columns: Mapping[str, Any] = {}
    if isinstance(problem, DatasetProblem):
        columns = dict(problem.columns)
    values: dict[str, Any] = {
        **columns,
        "prompt": chat[-1][1],
        "messages": [{"role": role, "content": content} for role, content in chat],
    }
    answer = final_answer(problem.answer)
    if answer:
        values["answer"] = answer
    is_worked = answer != problem.answer
    solution = problem.solution or (problem.answer if is_worked else "")
    if solution and "solution" not in values:
        values["solution"] = solution
    return values


def attempt_values(attempt: Attempt, peers: Sequence[Attempt]) -> dict[str, Any]:
    """Return what a view may show of a response, and of the other responses to its prompt."""
    return {**attempt.values(), "peers": [peer.values() for peer in peers]}
