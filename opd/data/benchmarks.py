"""Data sets by name: where they are, which columns they have, how their answers are written.

NAME is read from the hub, NAME:PATH from a file or folder with the same columns (`opd.data.sources`),
gym:TASK[:SIZE[:SEED]] is made by reasoning-gym (extra gym). Problems of mathematics end with a
request for thoughts between tags and a boxed answer, and name the grader "math".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short
from diagnostics.io.packages import load_package
from opd.data.row_files import Row, read_rows
from opd.data.sources import is_missing, messages

GYM = "gym:"
SIZE = 2000
BOXED = (
    "\n\nThink it through between <think> and </think>. Then give the final answer in \\boxed{}."
)


@dataclass(frozen=True)
class Benchmark:
    """source: on the hub; prompt, answer: columns; count: rows, 0 if it is not always the same."""

    source: str
    prompt: str
    answer: str
    count: int


NAMED = {
    "math-500": Benchmark("hf:HuggingFaceH4/MATH-500:test", "problem", "answer", 500),
    "aime24": Benchmark("hf:HuggingFaceH4/aime_2024:train", "problem", "answer", 30),
    "aime25": Benchmark("hf:math-ai/aime25:test", "problem", "answer", 30),
    "amc23": Benchmark("hf:math-ai/amc23:test", "question", "answer", 40),
    "minerva": Benchmark("hf:math-ai/minervamath:test", "question", "answer", 272),
    "olympiad": Benchmark(
        "hf:Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", "question", "final_answer", 674
    ),
    "gsm8k": Benchmark("hf:openai/gsm8k:main:test", "question", "answer", 1319),
    "gsm8k-train": Benchmark("hf:openai/gsm8k:main:train", "question", "answer", 7473),
    "dapo-math": Benchmark("hf:open-r1/DAPO-Math-17k-Processed:en:train", "prompt", "solution", 0),
}


def is_named(source: str) -> bool:
    return source.startswith(GYM) or source.partition(":")[0] in NAMED


def named_rows(source: str) -> list[Row]:
    """The rows of a named data set with the columns prompt, answer, task and grader.

    Raises:
      ValueError: the columns are others than they should be, or the number of rows of a whole set
        is; an answer that cannot be read. ImportError: reasoning-gym is not installed.
    """
    if source.startswith(GYM):
        return gym_rows(source)
    name, _, place = source.partition(":")
    about = NAMED[name]
    rows = read_rows(place or about.source)
    wanted = {about.prompt, about.answer}
    for number, row in enumerate(rows):
        if lacking := sorted(wanted - row.keys()):
            raise InvalidInput(
                f"{source}: row {number} lacks {lacking}, it has {sorted(row)}; is this {name}? "
                "For columns of other names give the file itself, with --prompt-column and "
                "--answer-column"
            )
    if not place and about.count and len(rows) != about.count:
        raise InvalidInput(
            f"{about.source} has {len(rows)} rows, {name} had {about.count} when this was written; "
            f"it is another set now. Give the rows you mean as {name}:PATH"
        )
    return [
        {
            "prompt": asked(row[about.prompt], f"{source}: row {number}", about.prompt),
            "answer": final(row[about.answer], f"{source}: row {number}"),
            "task": name,
            "grader": "math",
        }
        for number, row in enumerate(rows)
    ]


def asked(prompt: Any, where: str, column: str) -> list[dict[str, str]]:
    """A prompt, text or messages, whose last words ask for thoughts and a box.

    Raises:
      ValueError: nothing, or neither text nor messages that end with the user's.
    """
    try:
        chat = messages(prompt, column)
    except ValueError as error:
        raise InvalidInput(f"{where} {error}") from error
    texts = [content for _, content in chat[:-1]] + [f"{chat[-1][1]}{BOXED}"]
    return [{"role": role, "content": text} for (role, _), text in zip(chat, texts, strict=True)]


def final(answer: Any, where: str) -> Any:
    """The final answer: the only one of a list, or what follows the last ####.

    Raises:
      ValueError: a list of none or several, also as text; no answer.
    """
    if isinstance(answer, str) and re.match(r"\s*\[\s*['\"]", answer):
        raise InvalidInput(f"{where} has the text of a list as answer: {short(answer)}")
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        if len(answer) != 1:
            raise InvalidInput(f"{where} has {len(answer)} answers, expected one: {list(answer)}")
        answer = answer[0]
    if is_missing(answer) or not str(answer).strip():
        raise InvalidInput(f"{where} has an empty answer")
    return answer.rsplit("####", 1)[-1].strip() if isinstance(answer, str) else answer


def gym_rows(source: str) -> list[Row]:
    """SIZE problems of a task of reasoning-gym; the grader is the task's own.

    Raises:
      ValueError: not gym:TASK[:SIZE[:SEED]], an unknown task, or one without answers.
    """
    task, size, seed = gym_words(source)
    made = gym_task(task, size, seed)
    found = []
    for number in range(size):
        entry = made[number]
        if entry["answer"] is None:
            raise InvalidInput(f"{source} has no answers to compare with; choose another task")
        found.append(
            {
                "prompt": entry["question"],
                "answer": f"{entry['answer']} [{task}:{size}:{seed}#{number}]",
                "task": task,
                "grader": "gym",
            }
        )
    return found


def gym_words(source: str) -> tuple[str, int, int]:
    task, *numbers = source.removeprefix(GYM).split(":")
    try:
        size, seed = map(int, [*numbers, *[str(SIZE), "0"][len(numbers) :]])
    except ValueError as error:
        raise InvalidInput(
            f"cannot read {source!r}; write gym:TASK, gym:TASK:SIZE or gym:TASK:SIZE:SEED"
        ) from error
    return task, size, seed


def gym_task(task: str, size: int, seed: int) -> Any:
    """The task's data set, the same for the same words.

    Raises:
      ValueError: an unknown task. ImportError: reasoning-gym is not installed.
    """
    factory = load_package("reasoning_gym.factory", f"{GYM}{task}", "gym")
    if task not in factory.DATASETS:
        known = ", ".join(sorted(factory.DATASETS))
        raise InvalidInput(f"reasoning-gym has no task {task!r}; it has {known}")
    return factory.create_dataset(task, size=size, seed=seed)
