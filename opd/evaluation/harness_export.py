"""Export of held-out problems as a task of lm-eval or of Inspect, graded by the same grader.

The exported folder needs opdlab where it is run, for the grader; it needs neither harness here.
"""

import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.user_functions import is_function_name
from opd.data.chain_task import Problem
from opd.data.prompts import encode_prompt
from opd.data.sources import DatasetProblem, final_answer
from opd.data.tasks import Task, grade_final_answer
from opd.tokens.masking import special_ids

Harness = Literal["lm-eval", "inspect"]
TAG = re.compile(r"</?\w{2,}>")
PROBLEMS_FILE, TOKENIZER_FOLDER, TASK_NAME = "problems.jsonl", "tokenizer", "opdlab_task"

GRADING = '''"""Grade responses as `opd eval` does; needs opdlab."""

import json
from pathlib import Path

from opd.data.grading.graders import make_grader

GRADER = {grader!r}


def is_correct(response: str, answer: str) -> float:
    """Return 1 for a correct response, else 0."""
    return float(make_grader(GRADER)(response, answer).reward >= 1)
'''
LM_EVAL_GRADING = '''

def load_problems(**_):
    """Return the problems as lm-eval reads them."""
    from datasets import Dataset

    lines = (Path(__file__).parent / {problems!r}).read_text("utf-8").split("\\n")
    return {{"test": Dataset.from_list([json.loads(line) for line in lines if line])}}


def process_results(doc, results):
    """Grade the response to a problem."""
    return {{"accuracy": is_correct(results[0], doc["answer"])}}
'''
LM_EVAL_TASK = """task: {name}
custom_dataset: !function grading.load_problems
test_split: test
output_type: generate_until
doc_to_text: "{{{{rendered}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function grading.process_results
num_fewshot: 0
generation_kwargs: {generation}
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
INSPECT_TASK = '''
from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, accuracy, scorer, stderr
from inspect_ai.solver import generate


@scorer(metrics=[accuracy(), stderr()])
def opdlab_grader():
    """Grade as `opd eval` does."""

    async def score(state, target):
        response = state.output.completion
        return Score(value=is_correct(response, target.text), answer=response)

    return score


@task
def {name}():
    """Held-out problems of `opd eval`."""
    fields = FieldSpec(input="messages", target="answer", id="id")
    return Task(
        dataset=json_dataset(str(Path(__file__).parent / {problems!r}), fields),
        solver=generate(),
        scorer=opdlab_grader(),
        epochs={samples},
        config=GenerateConfig(**{generation}),
    )
'''


def export_task(
    harness: Harness,
    folder: Path,
    tokenizer: Any,
    eos: list[int],
    task: Task,
    *,
    problems: int,
    max_response: int,
    temperature: float,
    top_p: float = 1.0,
    samples: int = 1,
) -> None:
    """Write a folder with which a harness repeats an evaluation.

    `problems.jsonl` has each problem as messages, as the text that this model reads, and its
    answer. Harnesses drop special tokens from responses, and with them tags such as </think> where
    a tokenizer flags them as special; `tokenizer/` is then a copy that does not.

    Args:
        harness: "lm-eval" or "inspect".
        folder: The folder; files of these names in it are replaced.
        tokenizer: The model's tokenizer.
        eos: Ids that end a response.
        task: The task.
        problems: Number of held-out problems.
        max_response: Maximum response tokens.
        temperature: Sampling temperature; 0 for greedy decoding.
        top_p: Nucleus of sampling.
        samples: Responses per problem, in Inspect; lm-eval asks once.

    Raises:
        InvalidInput: The prompts are not what their text encodes to, or Inspect needs a chat
            template that the tokenizer lacks.
    """
    if harness == "inspect" and tokenizer.chat_template is None:
        raise InvalidInput(
            "Inspect sends messages, for which the tokenizer has no chat template; export for "
            "lm-eval, or set tokenizer.chat_template"
        )
    rows = [
        problem_row(tokenizer, number, problem, task)
        for number, problem in enumerate(task.test(problems))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / PROBLEMS_FILE, lines)
    copy_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
    grading = GRADING.format(grader=portable_grader(task.name))
    names = {"name": TASK_NAME, "problems": PROBLEMS_FILE, "samples": samples}
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if harness == "lm-eval":
        generation = {
            "until": [tokenizer.decode([token]) for token in eos],
            "max_gen_toks": max_response,
            "do_sample": temperature > 0,
            "repetition_penalty": 1.0,
            **(sampling if temperature > 0 else {}),
        }
        write_text(folder / "grading.py", grading + LM_EVAL_GRADING.format(**names))
        text = LM_EVAL_TASK.format(generation=json.dumps(generation), **names)
        write_text(folder / f"{TASK_NAME}.yaml", text)
    else:
        config = {"max_tokens": max_response, **(sampling if temperature > 0 else {})}
        write_text(
            folder / f"{TASK_NAME}.py", grading + INSPECT_TASK.format(generation=config, **names)
        )


def problem_row(tokenizer: Any, number: int, problem: Problem, task: Task) -> dict[str, Any]:
    """Return a problem as harnesses read it.

    Args:
        tokenizer: The model's tokenizer.
        number: Number of the problem.
        problem: The problem.
        task: Its task.

    Returns:
        Its number, messages, rendered prompt and answer.

    Raises:
        InvalidInput: The rendered prompt encodes to other ids than the prompt.
    """
    ids = encode_prompt(tokenizer, problem)
    rendered = tokenizer.decode(ids, skip_special_tokens=False)
    if tokenizer.encode(rendered, add_special_tokens=False) != ids:
        raise InvalidInput(
            f"the prompt of problem {number} is not what its text encodes to, so a harness would "
            f"ask another one: {rendered[:80]!r}; leave out --export"
        )
    chat = problem.chat if isinstance(problem, DatasetProblem) else ()
    is_worked = isinstance(task.grade, partial) and task.grade.func is grade_final_answer
    return {
        "id": number,
        "messages": [
            {"role": role, "content": content}
            for role, content in chat or (("user", problem.prompt),)
        ],
        "rendered": rendered,
        "answer": final_answer(problem.answer) if is_worked else problem.answer,
    }


def portable_grader(name: str) -> str:
    """Return the name of a grader, with the complete path of a file of the user's."""
    path, _, function = name.rpartition(":")
    is_file = is_function_name(name) and path.endswith(".py")
    return f"{Path(path).resolve()}:{function}" if is_file else name


def copy_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer without the special flag of tags, if it has any; else nothing.

    Args:
        tokenizer: The model's tokenizer.
        folder: Where the copy is saved.
    """
    named_ids = {
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    }
    tags = {
        token
        for token in tokenizer.convert_ids_to_tokens(sorted({*special_ids(tokenizer)} - named_ids))
        if TAG.fullmatch(token)
    }
    shutil.rmtree(folder, ignore_errors=True)
    if not tags:
        return
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.json"):
        content = without_special_flag(json.loads(path.read_text("utf-8")), tags)
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1))


def without_special_flag(value: Any, tags: set[str]) -> Any:
    """Return a tokenizer's file in which tags are ordinary added tokens."""
    if isinstance(value, Mapping):
        flags = {"special": False} if value.get("content") in tags and "special" in value else {}
        return {
            name: [x for x in item if x not in tags]
            if name in ("additional_special_tokens", "extra_special_tokens")
            and isinstance(item, list)
            else without_special_flag(item, tags)
            for name, item in value.items()
        } | flags
    if isinstance(value, list):
        return [without_special_flag(item, tags) for item in value]
    return value
