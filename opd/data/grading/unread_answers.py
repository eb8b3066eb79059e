"""Messages for graders that could read no answer: most often another format is expected."""

from collections.abc import Mapping
from typing import Any

READABLE_SHARE = "grading/readable_share"
"""Row key of a step: share of the graded responses in which the grader could read an answer."""

EXPECTED_FORMATS = {
    "exact": "the answer and nothing else, after </think> if there is reasoning",
    "numeric": "a number, in \\boxed{...}, on a last line 'Answer: N', or the last one in the text",
    "math": "\\boxed{...} or a last line 'Answer: ...', after </think> if there is reasoning",
    "gym": "the answer alone or in \\boxed{...}, after </think> if there is reasoning",
    "lab": "the answer and nothing else, after exactly one </think>",
}


def unread_step_messages(row: Mapping[str, Any], graders: Mapping[str, str]) -> dict[str, str]:
    """Find the tasks of a step in which no answer could be read.

    Args:
        row: The row of the step.
        graders: Name of the grader of each task of the step; "" is the task of a single-task run.

    Returns:
        Task name to message.
    """
    messages = {}
    for task, grader in graders.items():
        share = row.get(READABLE_SHARE, row.get(f"task={task}/{READABLE_SHARE}"))
        if share == 0:
            messages[task] = unread_message(f"responses{f' of {task}' if task else ''}", grader)
    return messages


def unread_evaluation_messages(result: Mapping[str, Any], grader: str) -> list[str]:
    """Return messages for an evaluation, or its datasets, in which no answer could be read."""
    if result.get("unparsed") == 1:
        return [unread_message("responses to the held-out problems", grader)]
    labels = [name.split("/")[1] for name in result if name.endswith("/unparsed")]
    unread_labels = [label for label in labels if result[f"task/{label}/unparsed"] == 1]
    return [
        unread_message(f"responses to the held-out problems of {label}", grader)
        for label in unread_labels
    ]


def unread_message(responses: str, grader: str) -> str:
    """Build the message that a grader could read no answer."""
    expected_format = EXPECTED_FORMATS.get(grader, "a text that is not empty")
    return (
        f"the grader {grader} could read no answer in any of the {responses}: it expects "
        f"{expected_format}; ask for that in the prompt or --system, raise max_response, or choose "
        "another grader"
    )
