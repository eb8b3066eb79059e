"""What is said where the grader could read no answer: most often it expects another form."""

from collections.abc import Mapping
from typing import Any

READABLE = "grading/readable_share"
"""Of a step: share of the graded responses in which the grader could read an answer."""

EXPECTED = {
    "exact": "the answer and nothing else, after </think> where there are thoughts",
    "numeric": "a number, in \\boxed{...}, on a last line 'Answer: N', or the last of the text",
    "math": "\\boxed{...} or a last line 'Answer: ...', after </think> where there are thoughts",
    "gym": "the answer alone or in \\boxed{...}, after </think> where there are thoughts",
    "lab": "the answer and nothing else, after exactly one </think>",
}


def unread_steps(row: Mapping[str, Any], graders: Mapping[str, str]) -> dict[str, str]:
    """Of a step's row the tasks of whose responses none could be read, and what to say.

    graders: the name of the grader of each task of the step; of a run of one task by "".
    """
    found = {}
    for task, grader in graders.items():
        share = row.get(READABLE, row.get(f"task={task}/{READABLE}"))
        if share == 0:
            found[task] = words(f"responses{f' of {task}' if task else ''}", grader)
    return found


def unread_evaluation(result: Mapping[str, Any], grader: str) -> list[str]:
    """What to say of an evaluation, and of its data sets, where no answer could be read."""
    if result.get("unparsed") == 1:
        return [words("responses to the held-out problems", grader)]
    labels = [name.split("/")[1] for name in result if name.endswith("/unparsed")]
    silent = [label for label in labels if result[f"task/{label}/unparsed"] == 1]
    return [words(f"responses to the held-out problems of {label}", grader) for label in silent]


def words(responses: str, grader: str) -> str:
    form = EXPECTED.get(grader, "a text that is not empty")
    return (
        f"the grader {grader} could read no answer in any of the {responses}: it expects {form}; "
        "ask for that in the prompt or --system, raise max_response, or choose another grader"
    )
