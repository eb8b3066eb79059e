"""The records of a run: rows of steps and evaluations, and what is printed of them."""

import sys
from collections.abc import Iterable, Sequence

import torch
from tqdm.auto import tqdm

from diagnostics.alarms.alarms import Alarm
from diagnostics.records.rows import Row, append_row
from diagnostics.terminal import escape_control_chars
from opd.data.grading.unread_answers import unread_evaluation_messages, unread_step_messages
from opd.data.tasks import Task
from opd.evaluation.evaluate import evaluate
from opd.models.fsdp import unsharded
from opd.runtime import distributed
from opd.runtime.seeds import EVALUATION, derive_seed
from opd.training.state import TaskState, TrainState
from opd.training.trackers import Log, with_eval_prefix


def record_step(
    state: TrainState, tasks: Sequence[TaskState], step: int, row: Row, log: Log
) -> None:
    """Append a step's row to the record, and print alarms, skipped updates and unread answers.

    Args:
        state: State of the run.
        tasks: Tasks of the step.
        step: Step of the run.
        row: The step's row.
        log: Logs a row to the trackers.
    """
    graders = {
        task.name: state.unchecked_graders.pop(task.name)
        for task in tasks
        if task.name in state.unchecked_graders
    }
    if distributed.rank() > 0:
        return
    append_row(state.folder / "rows.jsonl", row)
    log(step, row)
    alarms: Sequence[Alarm] = tasks[0].monitor.raised
    for alarm in alarms:
        tqdm.write(escape_control_chars(str(alarm)), file=sys.stderr)
    if row["skipped"]:
        skipped = (
            f"{row['skipped']:.0f} of {state.config.optimizer.updates_per_batch} updates skipped"
        )
        print_step_messages(step, [f"{skipped}: the gradient was not finite"])
    print_step_messages(step, unread_step_messages(row, graders).values())


def print_step_messages(step: int, messages: Iterable[str]) -> None:
    """Print messages about a step to the terminal, above the progress bar."""
    for message in messages:
        tqdm.write(escape_control_chars(f"step {step}: {message}"), file=sys.stderr)


def evaluate_and_record(state: TrainState, task: TaskState, step: int, log: Log) -> None:
    """Append the held-out accuracy after `step` steps to evals.jsonl.

    A task whose held-out problems have no answers is not evaluated.

    Args:
        state: State of the run.
        task: The task.
        step: Number of completed steps.
        log: Logs a row to the trackers.
    """
    config, problems = task.config, task.problems
    if isinstance(problems, Task) and not problems.has_test_answers:
        return
    with unsharded(state.student):
        metrics = evaluate(
            state.student,
            task.pair.tokenizer,
            task.pair.eos,
            problems,
            problems=config.evaluation.eval_problems,
            max_prompt=config.data.max_prompt,
            max_response=config.rollout.max_response,
            temperature=config.evaluation.eval_temperature,
            top_p=config.evaluation.eval_top_p,
            samples=config.evaluation.eval_samples,
            generator=torch.Generator().manual_seed(derive_seed(config.seed, step, EVALUATION)),
            engine=state.engine,
        )
    if distributed.rank() > 0:
        return
    task_column = {"task": task.name} if task.name else {}
    row = {"step": step, **task_column, **metrics}
    append_row(state.folder / "evals.jsonl", row)
    log(step, with_eval_prefix(row))
    label = f"{task.name} accuracy" if task.name else "accuracy"
    label += f" {metrics['accuracy']:.3f} [{metrics['low']:.3f}, {metrics['high']:.3f}]"
    print_step_messages(step, [f"{label} on {metrics['problems']} held-out problems"])
    if isinstance(problems, Task):
        print_step_messages(step, unread_evaluation_messages(metrics, problems.name))
