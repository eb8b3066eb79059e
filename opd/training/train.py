"""Train: set up a run, take its steps, and record them."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from diagnostics.alarms.alarms import Alarm
from diagnostics.errors import InvalidInput
from diagnostics.records.rows import Row, append_row
from diagnostics.terminal import escape_control_chars
from opd.config.settings import Config, raise_problems, to_json
from opd.data.grading.unread_answers import unread_evaluation_messages, unread_step_messages
from opd.data.tasks import Task
from opd.evaluation.evaluate import evaluate
from opd.models.fsdp import gather_network, unsharded
from opd.models.loading import resolve_device
from opd.models.lora import merge_lora
from opd.runs import restart, run_folder
from opd.runs.identity import record_identities, record_tokenizer
from opd.runs.model_card import model_card
from opd.runtime import distributed
from opd.runtime.seeds import EVALUATION, derive_seed
from opd.runtime.staged_folders import staged_folder
from opd.serving.addresses import is_url
from opd.teachers.factory import make_pairs, with_sharded_student
from opd.teachers.remote_scores import check_remote_support, verify_fingerprints
from opd.training import checkpoint
from opd.training.checks.same_weights import refuse_same_weights
from opd.training.checks.settings import unused_settings
from opd.training.checks.start import check_start
from opd.training.multitask import task_configs
from opd.training.optimizer import make_optimizer
from opd.training.setup import (
    make_rollout_engine,
    make_task_runs,
    objective_from_config,
    task_runs_of_step,
)
from opd.training.state import TaskRun
from opd.training.step import is_due, run_step
from opd.training.trackers import Log, open_trackers, with_eval_prefix


def train(config: Config, start_over: bool = False) -> Path:
    """Run or resume `config`; the trained model is saved in final/ of the run folder.

    Args:
        config: Settings of the run.
        start_over: Start at step 0; an existing record is moved to earlier/ in the run folder.

    Returns:
        The run folder.

    Raises:
        InvalidInput: The settings are invalid.
        OperationFailed: The device ran out of memory (the message names settings to lower), or the
            disk is full.
    """
    # validate the configuration before connecting to servers or loading models
    raise_problems(list(unused_settings(config)))
    objective = objective_from_config(config)
    for task_config in task_configs(config):
        if is_url(task_config.teacher):
            check_remote_support(task_config, objective)
    device_name = resolve_device(config.device)
    if config.sharding == "full" and not distributed.is_distributed():
        raise InvalidInput(
            "sharding full (FSDP) needs several processes, but this is the only one; start the run "
            "with `torchrun --nproc_per_node N --no-python opd train ...`, or set sharding none, "
            "which resumes from the same checkpoints"
        )
    if config.engine == "vllm" and distributed.is_distributed():
        raise InvalidInput(
            "engine vllm loads weights from a single process, but there are several; start one "
            "process, or set engine to servers or hf"
        )
    with (
        distributed.process_group(
            device_name, config.teacher_timeout + config.rollout_timeout
        ) as device,
        run_folder.explain_errors(config),
        run_folder.open_run(config, start_over) as (folder, start),
    ):
        if start.finished:
            print(f"{folder} is already finished ({start.step} steps)", file=sys.stderr)
            return folder
        settings = [replace(task_config, device=device) for task_config in task_configs(config)]
        pairs = make_pairs(settings)
        refuse_same_weights(settings, pairs)
        if config.start_checks:
            check_start(settings, pairs)
        first_step, checkpoint_folder = (
            start.step,
            Path(start.checkpoint) if start.checkpoint else None,
        )
        if checkpoint_folder is not None:
            checkpoint.load(checkpoint_folder, pairs[0], config.teacher == "ema")
        if config.sharding == "full":
            pairs = with_sharded_student(pairs)
        student = pairs[0].student
        rounded = config.dtype != "float32"
        optimizer = make_optimizer(
            student.network.parameters(), config.betas, config.weight_decay, rounded
        )
        if checkpoint_folder is not None:
            checkpoint.load_optimizer(checkpoint_folder, optimizer)
        restart.begin_start(folder, start)
        verify_fingerprints(folder / "teachers.json", pairs, first_step)
        if distributed.rank() == 0:
            record_identities(folder, to_json(config))
            record_tokenizer(folder, pairs[0].tokenizer)
        engine = make_rollout_engine(config, student)
        runs = make_task_runs(config, folder, pairs, engine, optimizer)
        runs[0].prefetcher.load(folder, first_step, student.device)
        names = config.loggers if distributed.rank() == 0 else ()
        with open_trackers(names, folder, to_json(config)) as log, runs[0].prefetcher:
            run_steps(config, runs, first_step, log)
        engine.close()
        if first_step < config.steps or not (folder / "final").exists():
            network = merge_lora(gather_network(student))
            with staged_folder(folder / "final") as partial_folder:
                if distributed.rank() == 0:
                    network.save_pretrained(partial_folder)
                    pairs[0].tokenizer.save_pretrained(partial_folder)
                    (partial_folder / "README.md").write_text(model_card(folder, to_json(config)))
    return folder


def run_steps(config: Config, runs: list[TaskRun], first_step: int, log: Log) -> None:
    """Take the steps from `first_step` on, with evaluations and checkpoints where due.

    Args:
        config: Settings of the run.
        runs: State of each task.
        first_step: First step to take.
        log: Logs a row to the trackers.
    """
    folder = runs[0].folder
    if first_step == 0:
        for run in runs:
            evaluate_and_record(run, 0, log)
    bar = tqdm(
        range(first_step, config.steps),
        initial=first_step,
        total=config.steps,
        desc=f"{folder.name} {config.objective}",
        disable=True if distributed.rank() else None,
    )
    unchecked_graders = {run.name: run.task.name for run in runs if isinstance(run.task, Task)}
    for step in bar:
        task_runs = task_runs_of_step(config, runs, step)
        row = run_step(task_runs, step)
        graders = {
            run.name: unchecked_graders.pop(run.name)
            for run, _ in task_runs
            if run.name in unchecked_graders
        }
        if distributed.rank() == 0:
            record_step(folder, config, step, row, task_runs[0][0].monitor.raised, log)
            print_step_messages(step, unread_step_messages(row, graders).values())
        bar.set_postfix(
            reward=f"{row['response/reward']:.2f}",
            kl=f"{row['divergence/k1']:.3f}",
            grad=f"{row['grad_norm']:.2f}",
            length=f"{row['response/length']:.0f}",
        )
        num_steps_done = step + 1
        if is_due(num_steps_done, config.eval_every) or num_steps_done == config.steps:
            for run in runs:
                evaluate_and_record(run, num_steps_done, log)
        if is_due(num_steps_done, config.save_every) or num_steps_done == config.steps:
            has_ema_teacher = config.teacher == "ema"
            runs[0].prefetcher.save(folder, num_steps_done)
            checkpoint.save(
                folder, runs[0].pair, runs[0].optimizer, num_steps_done, has_ema_teacher
            )


def record_step(
    folder: Path, config: Config, step: int, row: Row, alarms: Sequence[Alarm], log: Log
) -> None:
    """Append a step's row to the record, and print alarms and skipped updates.

    Args:
        folder: Run folder.
        config: Settings of the run.
        step: Step of the run.
        row: The step's row.
        alarms: Alarms raised by this row.
        log: Logs a row to the trackers.
    """
    append_row(folder / "rows.jsonl", row)
    log(step, row)
    for alarm in alarms:
        tqdm.write(escape_control_chars(str(alarm)), file=sys.stderr)
    if row["skipped"]:
        skipped = f"{row['skipped']:.0f} of {config.updates_per_batch} updates skipped"
        print_step_messages(step, [f"{skipped}: the gradient was not finite"])


def print_step_messages(step: int, messages: Iterable[str]) -> None:
    """Print messages about a step to the terminal, above the progress bar."""
    for message in messages:
        tqdm.write(escape_control_chars(f"step {step}: {message}"), file=sys.stderr)


def evaluate_and_record(run: TaskRun, step: int, log: Log) -> None:
    """Append the held-out accuracy after `step` steps to evals.jsonl.

    A task whose held-out problems have no answers is not evaluated.

    Args:
        run: The task.
        step: Number of completed steps.
        log: Logs a row to the trackers.
    """
    config = run.config
    if isinstance(run.task, Task) and not run.task.has_test_answers:
        return
    with unsharded(run.pair.student):
        metrics = evaluate(
            run.pair.student,
            run.pair.tokenizer,
            run.pair.eos,
            run.task,
            problems=config.eval_problems,
            max_prompt=config.max_prompt,
            max_response=config.max_response,
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            samples=config.eval_samples,
            generator=torch.Generator().manual_seed(derive_seed(config.seed, step, EVALUATION)),
            engine=run.engine,
        )
    if distributed.rank() > 0:
        return
    task_column = {"task": run.name} if run.name else {}
    row = {"step": step, **task_column, **metrics}
    append_row(run.folder / "evals.jsonl", row)
    log(step, with_eval_prefix(row))
    label = f"{run.name} accuracy" if run.name else "accuracy"
    label += f" {metrics['accuracy']:.3f} [{metrics['low']:.3f}, {metrics['high']:.3f}]"
    print_step_messages(step, [f"{label} on {metrics['problems']} held-out problems"])
    if isinstance(run.task, Task):
        print_step_messages(step, unread_evaluation_messages(metrics, run.task.name))
