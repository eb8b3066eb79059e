"""Train: `train` sets up a run, and `run_step` is one step of it, in order."""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from diagnostics.io.atomic import write_text
from diagnostics.records.headline import RUN_COLUMNS
from diagnostics.records.rows import Row
from opd.config.files import to_flat
from opd.config.prefixes import parse_prefixes
from opd.config.problems import raise_problems
from opd.config.settings import Config, with_settings
from opd.models.fsdp import gather_network, unsharded
from opd.models.loading import resolve_device
from opd.models.lora import merge_lora, save_adapters
from opd.runs import restart, run_folder
from opd.runs.identity import record_identities, record_tokenizer
from opd.runs.model_card import model_card
from opd.runtime import distributed
from opd.runtime.memory import peak_gib, start_peak
from opd.runtime.seeds import PROBE
from opd.runtime.staged_folders import staged_folder
from opd.scoring.chosen_ids import num_chosen_ids
from opd.scoring.score import ScoredBatch, score_batch
from opd.teachers.factory import ModelObjects, make_pairs, with_sharded_student
from opd.teachers.teacher import Capability
from opd.tokens.masking import apply_mask_rules
from opd.training import checkpoint
from opd.training.checks.same_weights import refuse_same_weights
from opd.training.checks.start import check_start
from opd.training.checks.step import check_batch
from opd.training.multitask import task_configs
from opd.training.objects import with_objects
from opd.training.optimizer import make_optimizer
from opd.training.probe.gradient_probe import probe_gradients
from opd.training.record import evaluate_and_record, record_step
from opd.training.result import TrainResult
from opd.training.score_cache import check_caches
from opd.training.setup import make_rollout_engine, make_train_state, objective_from_config
from opd.training.shared_pass import score_and_sum_gradient, uses_shared_pass
from opd.training.state import TaskState, TrainState, is_due
from opd.training.step import count_tokens, make_row, roll_out, save_batch, with_view_effect
from opd.training.trackers import Log, open_trackers
from opd.training.update import (
    PreparedLoss,
    SummedGradient,
    prepare_loss,
    task_shares,
    update_student,
)
from opd.training.validation import validate

BAR_COLUMNS = (
    ("reward", "response/reward", 2),
    ("kl", "divergence/k1", 3),
    ("grad", "grad_norm", 2),
    ("length", "response/length", 0),
)
"""What the progress bar shows of a row that has it: label, column, decimal places."""


def run_step(state: TrainState, step: int, log: Log) -> Row:
    """Take one step of training, with everything that follows it.

    Args:
        state: State of the run.
        step: Step of the run.
        log: Logs a row to the trackers.

    Returns:
        The step's row.
    """
    config, student, prefetcher = state.config, state.student, state.prefetcher
    jobs = state.tasks_of_step(step)  # usually one; each with the number of its previous steps
    tasks, several = [task for task, _ in jobs], len(jobs) > 1
    batches: list[ScoredBatch] = []
    losses: list[PreparedLoss] = []
    checks: list[dict[str, Tensor]] = []
    summed: list[SummedGradient] = []
    probe_row: Row = {}
    is_shared = all(uses_shared_pass(task, task_step) for task, task_step in jobs)
    laps = [time.perf_counter()]
    start_peak(student.device)
    with unsharded(student):
        sampled = prefetcher.get(step)  # now, or while an earlier step trained
        prefetcher.launch(step)
        laps.append(time.perf_counter())
        for number, (task, task_step) in enumerate(jobs):
            prompts, rollouts, _ = sampled[number]
            teacher = task.pair.teacher
            with teacher.on_device(student.device):
                request = task.request_of_step(task_step)
                if is_shared:
                    batch, gradient = score_and_sum_gradient(
                        state,
                        task,
                        prompts,
                        rollouts,
                        request,
                        share=task_shares(tasks)[number],
                        is_first=number == 0,
                    )
                    summed.append(gradient)
                else:
                    batch = score_batch(student, teacher, prompts, rollouts, request)
                if any(lacks_distributions(other) for other in tasks):
                    # rows of a step have the same columns
                    batch = replace(batch, scored=batch.scored.with_fields(prefix=None))
                checks.append(check_batch(state, task, task_step, batch))
                masked = replace(batch, scored=apply_mask_rules(batch.scored, task.masks))
                sampled[number] = with_view_effect(task, sampled[number], masked, task_step)
                loss = prepare_loss(task, masked)
                if is_due(task_step, task.config.record.probe_every):
                    prefetcher.wait()  # tokenizers are not thread-safe
                    row = probe_task(state, task, batch, loss, step, task_step)
                    probe_row |= task.columns(row, several)
            batches.append(masked)
            losses.append(loss)
    laps.append(time.perf_counter())

    numbers = update_student(state, tasks, losses, step, summed)
    prefetcher.wait()
    state.engine.sync(student)
    laps.append(time.perf_counter())

    row = make_row(tasks, sampled, batches, step, numbers, checks) | probe_row
    if is_due(jobs[0][1], config.record.save_batch_every):
        save_batch(tasks, batches, state.folder / "batches" / f"step_{step:06d}.safetensors")
    laps.append(time.perf_counter())
    for name, start, end in zip(
        ("rollout", "score", "update", "record"), laps, laps[1:], strict=False
    ):
        row[f"seconds/{name}"] = end - start
    gradient_seconds = sum(gradient.seconds for gradient in summed)
    row["seconds/score"] -= gradient_seconds
    row["seconds/update"] += gradient_seconds
    num_tokens, costs = count_tokens(tasks, batches)
    row["machine/tokens_per_second"] = num_tokens / (laps[-1] - laps[0])
    row |= costs
    row["machine/peak_gib"] = peak_gib(student.device)
    record_step(state, tasks, step, row, log)

    num_steps_done = step + 1
    is_last = num_steps_done == config.steps
    if is_due(num_steps_done, config.record.eval_every) or is_last:
        for task in state.tasks:
            evaluate_and_record(state, task, num_steps_done, log)
    if is_due(num_steps_done, config.record.save_every) or is_last:
        prefetcher.save(state.folder, num_steps_done)
        checkpoint.save(state.folder, state.tasks[0].pair, state.optimizer, num_steps_done)
    return row


def train(
    config: Config,
    start_over: bool = False,
    *,
    student: Any = None,
    teacher: Any = None,
    tokenizer: Any = None,
    dataset: Iterable[Mapping[str, Any]] | None = None,
    eval_dataset: Iterable[Mapping[str, Any]] | None = None,
) -> TrainResult:
    """Run or resume `config`; the trained model is saved in final/ of the run folder.

    Models and data may be objects, in the place of what the settings name; the run folder then
    records a name of the model, and a hash of the data that a resumed run must have too. A student
    that is an object is trained in place.

    An exception, `KeyboardInterrupt` included, ends the run with its engine, threads, trackers and
    the lock of its folder released; the same call resumes it from the last checkpoint.

    Args:
        config: Settings of the run.
        start_over: Start at step 0; an existing record is moved to earlier/ in the run folder.
        student: Model of transformers, in the place of `config.student`.
        teacher: Model of transformers, in the place of `config.teacher`.
        tokenizer: Tokenizer of these models.
        dataset: Rows of the training data (a `datasets.Dataset` or a list of dictionaries), in the
            place of `config.data.task`.
        eval_dataset: Rows of the evaluation data, in the place of `config.evaluation.eval_task`.

    Returns:
        The run folder with its final numbers, and the trained student.

    Raises:
        InvalidInput: The settings or the objects are invalid.
        OperationFailed: The device ran out of memory (the message names settings to lower), or the
            disk is full.
    """
    objects = ModelObjects(student, teacher, tokenizer)
    config, rows_by_name = with_objects(config, objects, dataset, eval_dataset)
    raise_problems(validate(config))
    device_name = resolve_device(config.hardware.device)
    with (
        distributed.process_group(
            device_name,
            config.remote_teacher.teacher_timeout + config.rollout_servers.rollout_timeout,
        ) as device,
        run_folder.explain_errors(config),
        run_folder.open_run(config, start_over) as (folder, start),
        ExitStack() as stack,
    ):
        if start.finished:
            print(f"{folder} is already finished ({start.step} steps)", file=sys.stderr)
            return TrainResult(folder)
        settings = [
            with_settings(task_config, device=device) for task_config in task_configs(config)
        ]
        num_chosen = num_chosen_ids(
            objective_from_config(config).requirements, config.objective.map_eos
        )
        pairs = make_pairs(settings, objects, num_chosen)
        refuse_same_weights(settings, pairs)
        if config.record.start_checks:
            check_start(settings, pairs)
        checkpoint_folder = Path(start.checkpoint) if start.checkpoint else None
        if checkpoint_folder is not None:
            checkpoint.load(checkpoint_folder, pairs[0])
        if config.hardware.sharding == "full":
            pairs = with_sharded_student(pairs)
        trained, tokenizer = pairs[0].student, pairs[0].tokenizer
        rounded = config.hardware.dtype != "float32"
        optimizer = make_optimizer(
            trained.network.parameters(),
            config.optimizer.betas,
            config.optimizer.weight_decay,
            rounded,
        )
        if checkpoint_folder is not None:
            checkpoint.load_optimizer(checkpoint_folder, optimizer)
        restart.begin_start(folder, start)
        fingerprints = folder / "teachers.json"
        if start.step == 0:
            fingerprints.unlink(missing_ok=True)
        for pair in pairs:
            pair.teacher.verify_fingerprint(fingerprints)
        if distributed.rank() == 0:
            record_identities(folder, to_flat(config))
            record_tokenizer(folder, tokenizer)
        engine = stack.enter_context(closing(make_rollout_engine(config, trained)))
        state = make_train_state(config, folder, start.step, pairs, engine, optimizer, rows_by_name)
        check_caches(state.tasks)
        names = config.record.loggers if distributed.rank() == 0 else ()
        columns = None if config.record.logger_columns == "all" else RUN_COLUMNS
        with open_trackers(names, folder, to_flat(config), columns) as log, state.prefetcher:
            run_steps(state, log)
        if run_folder.saved_step(folder / "final") != config.steps:  # none, or that of fewer steps
            with_adapters = gather_network(trained)
            network = merge_lora(with_adapters)
            with staged_folder(folder / "final") as partial_folder:
                if distributed.rank() == 0:
                    network.save_pretrained(partial_folder)
                    save_adapters(with_adapters, partial_folder / "adapter", config.student)
                    tokenizer.save_pretrained(partial_folder)
                    write_text(partial_folder / "state.json", json.dumps({"step": config.steps}))
                    (partial_folder / "README.md").write_text(model_card(folder, to_flat(config)))
    return TrainResult(folder, trained)


def run_steps(state: TrainState, log: Log) -> None:
    """Take the steps that are left, under a progress bar, after an evaluation before the first.

    Args:
        state: State of the run.
        log: Logs a row to the trackers.
    """
    config, first_step = state.config, state.first_step
    if first_step == 0:
        for task in state.tasks:
            evaluate_and_record(state, task, 0, log)
    with tqdm(
        range(first_step, config.steps),
        initial=first_step,
        total=config.steps,
        desc=f"{state.folder.name} {config.objective.objective}",
        disable=True if distributed.rank() else None,
    ) as bar:
        for step in bar:
            row = run_step(state, step, log)
            bar.set_postfix(
                {
                    label: f"{row[name]:.{digits}f}"
                    for label, name, digits in BAR_COLUMNS
                    if name in row
                }
            )


def lacks_distributions(task: TaskState) -> bool:
    """Return whether a task's teacher has no distributions."""
    return Capability.DISTRIBUTIONS not in task.pair.teacher.capabilities


def probe_task(
    state: TrainState,
    task: TaskState,
    batch: ScoredBatch,
    loss: PreparedLoss,
    step: int,
    task_step: int,
) -> Row:
    """Run the gradient probe at the weights before the update.

    The training loss is measured on the step's own rollouts. The gamma family needs tokens sampled
    from the student itself: it uses the rollouts before any mask, or fresh rollouts with top_p = 1
    if they are off-policy, sampled with a nucleus or written by somebody else.

    Args:
        state: State of the run.
        task: The task.
        batch: Scored batch before any mask.
        loss: Loss of the update.
        step: Step of the run.
        task_step: Number of the task's previous steps.

    Returns:
        Columns of the row.
    """
    config = task.config
    is_own = parse_prefixes(config.rollout.prefixes).is_on_policy
    if config.rollout.top_p < 1 or not is_own or bool((batch.scored.age > 0).any()):
        prompts, rollouts, _ = roll_out(
            task, state.engine, step, task_step, top_p=1.0, purpose=PROBE
        )
        batch = score_batch(state.student, task.pair.teacher, prompts, rollouts, task.request)
    return probe_gradients(
        task.pair,
        batch,
        loss,
        gamma=config.objective.gamma,
        max_tokens_per_microbatch=config.hardware.max_tokens_per_microbatch,
        max_logits_per_chunk=config.hardware.max_logits_per_chunk,
        blocks=config.record.probe_blocks,
    )
