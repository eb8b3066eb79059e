"""Train: set a run up, take its steps, keep its record; straight from top to bottom."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from diagnostics.alarms.alarms import Alarm
from diagnostics.errors import InvalidInput
from diagnostics.records.rows import Row, append
from diagnostics.terminal import visible
from opd.config.settings import Config, refuse, to_json
from opd.data.grading.unread_answers import unread_evaluation, unread_steps
from opd.data.tasks import Task
from opd.evaluation.evaluate import evaluate
from opd.models.fsdp import plain, whole
from opd.models.loading import resolve_device
from opd.models.lora import ordinary
from opd.runs import restart, run_folder
from opd.runs.identity import record_identities, record_tokenizer
from opd.runs.model_card import model_card
from opd.runtime import distributed
from opd.runtime.seeds import EVALUATION, derive
from opd.runtime.staged_folders import whole_folder
from opd.serving.addresses import is_url
from opd.teachers.factory import make_pairs, with_sharded_student
from opd.teachers.remote_scores import check_tellable, keep_probes
from opd.training import checkpoint
from opd.training.checks.same_weights import refuse_same_weights
from opd.training.checks.settings import unused_settings
from opd.training.checks.start import check_start
from opd.training.multitask import settings_of
from opd.training.optimizer import adamw
from opd.training.setup import in_turn, make_objective, make_runs, sampler
from opd.training.state import TaskRun
from opd.training.step import due, one_step
from opd.training.trackers import Log, evaluation, open_loggers


def train(config: Config, anew: bool = False) -> Path:
    """Run (or resume) `config`; returns the run folder. The trained model is in `final/`.

    Args:
      anew: begin at step 0; a record that the run folder holds is moved to earlier/ in it.

    Raises:
      RuntimeError: the device ran out of memory; says which settings to lower.
    """
    # refuse before a server is waited for or a model is loaded
    refuse(list(unused_settings(config)))
    objective = make_objective(config)
    for own in settings_of(config):
        if is_url(own.teacher):
            check_tellable(own, objective)
    where = resolve_device(config.device)
    if config.sharding == "full" and not distributed.several():
        raise InvalidInput(
            "sharding full shares the weights out among several processes, and this is one: start "
            "them with `torchrun --nproc_per_node N --no-python opd train ...`, or set sharding "
            "none; the run goes on from the same checkpoints"
        )
    if config.engine == "vllm" and distributed.several():
        raise InvalidInput(
            "the engine vllm takes weights from one process, and these are several; start one, or "
            "set engine servers or hf"
        )
    with (
        distributed.joined(where, config.teacher_timeout + config.rollout_timeout) as device,
        run_folder.explained(config),
        run_folder.open_run(config, anew) as (folder, start),
    ):
        if start.finished:
            print(f"{folder} is finished after {start.step} steps", file=sys.stderr)
            return folder
        settings = [replace(own, device=device) for own in settings_of(config)]
        pairs = make_pairs(settings)
        refuse_same_weights(settings, pairs)
        if config.start_checks:
            check_start(settings, pairs)
        first, saved = start.step, Path(start.checkpoint) if start.checkpoint else None
        if saved is not None:
            checkpoint.load(saved, pairs[0], config.teacher == "ema")
        if config.sharding == "full":
            pairs = with_sharded_student(pairs)
        student = pairs[0].student
        rounded = config.dtype != "float32"
        optimizer = adamw(student.network.parameters(), config.betas, config.weight_decay, rounded)
        if saved is not None:
            checkpoint.load_optimizer(saved, optimizer)
        restart.begin(folder, start)
        keep_probes(folder / "teachers.json", pairs, first)
        if distributed.rank() == 0:
            record_identities(folder, to_json(config))
            record_tokenizer(folder, pairs[0].tokenizer)
        engine = sampler(config, student)
        runs = make_runs(config, folder, pairs, engine, optimizer)
        runs[0].ahead.load(folder, first, student.device)
        names = config.loggers if distributed.rank() == 0 else ()
        with open_loggers(names, folder, to_json(config)) as log, runs[0].ahead:
            take_steps(config, runs, first, log)
        engine.close()
        if first < config.steps or not (folder / "final").exists():
            network = ordinary(plain(student))
            with whole_folder(folder / "final") as part:
                if distributed.rank() == 0:
                    network.save_pretrained(part)
                    pairs[0].tokenizer.save_pretrained(part)
                    (part / "README.md").write_text(model_card(folder, to_json(config)))
    return folder


def take_steps(config: Config, runs: list[TaskRun], first: int, log: Log) -> None:
    """The steps from `first` on, each with its row, and evaluations and checkpoints when due."""
    folder = runs[0].folder
    if first == 0:
        for run in runs:
            record_evaluation(run, 0, log)
    bar = tqdm(
        range(first, config.steps),
        initial=first,
        total=config.steps,
        desc=f"{folder.name} {config.objective}",
        disable=True if distributed.rank() else None,
    )
    new = {run.name: run.task.name for run in runs if isinstance(run.task, Task)}
    for step in bar:
        chosen = in_turn(config, runs, step)
        row = one_step(chosen, step)
        graders = {run.name: new.pop(run.name) for run, _ in chosen if run.name in new}
        if distributed.rank() == 0:
            tell(folder, config, step, row, chosen[0][0].monitor.raised, log)
            say(step, unread_steps(row, graders).values())
        bar.set_postfix(
            reward=f"{row['response/reward']:.2f}",
            kl=f"{row['divergence/k1']:.3f}",
            grad=f"{row['grad_norm']:.2f}",
            length=f"{row['response/length']:.0f}",
        )
        done = step + 1
        if due(done, config.eval_every) or done == config.steps:
            for run in runs:
                record_evaluation(run, done, log)
        if due(done, config.save_every) or done == config.steps:
            moving = config.teacher == "ema"
            runs[0].ahead.save(folder, done)
            checkpoint.save(folder, runs[0].pair, runs[0].optimizer, done, moving)


def tell(
    folder: Path, config: Config, step: int, row: Row, raised: Sequence[Alarm], log: Log
) -> None:
    """Append a step's row to the record, and say on the terminal what is wrong."""
    append(folder / "rows.jsonl", row)
    log(step, row)
    for alarm in raised:
        tqdm.write(visible(str(alarm)), file=sys.stderr)
    if row["skipped"]:
        skipped = f"{row['skipped']:.0f} of {config.updates_per_batch} updates skipped"
        say(step, [f"{skipped}, their gradient was not finite"])


def say(step: int, texts: Iterable[str]) -> None:
    """Write lines about a step to the terminal, above the bar."""
    for text in texts:
        tqdm.write(visible(f"step {step}: {text}"), file=sys.stderr)


def record_evaluation(run: TaskRun, step: int, log: Log) -> None:
    """Append the held-out accuracy after `step` steps to evals.jsonl.

    Held-out problems without answers are not evaluated.
    """
    config = run.config
    if isinstance(run.task, Task) and not run.task.has_test_answers:
        return
    with whole(run.pair.student):
        found = evaluate(
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
            generator=torch.Generator().manual_seed(derive(config.seed, step, EVALUATION)),
            engine=run.engine,
        )
    if distributed.rank() > 0:
        return
    named = {"task": run.name} if run.name else {}
    row = {"step": step, **named, **found}
    append(run.folder / "evals.jsonl", row)
    log(step, evaluation(row))
    where = f"{run.name} accuracy" if run.name else "accuracy"
    where += f" {found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    say(step, [f"{where} on {found['problems']} held-out problems"])
    if isinstance(run.task, Task):
        say(step, unread_evaluation(found, run.task.name))
