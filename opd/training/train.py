"""Train: set a run up, take its steps, keep its record; straight from top to bottom."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from diagnostics.alarms.alarms import Alarm, Alarms
from diagnostics.batch import Scored
from diagnostics.catalogue import PANEL, Metric
from diagnostics.core.totals import Mean, Total
from diagnostics.errors import InvalidInput
from diagnostics.metrics.consistency import staleness
from diagnostics.metrics.divergence import sampled_divergence
from diagnostics.metrics.groupby import by
from diagnostics.metrics.length import length, reward
from diagnostics.metrics.signal import sign_shares, signal_concentration
from diagnostics.monitor import Monitor
from diagnostics.records import rows
from diagnostics.records.rows import Row, append
from diagnostics.terminal import visible
from opd.config.settings import Config, refuse, to_json
from opd.data.grading.unread_answers import unread_evaluation, unread_steps
from opd.data.sources import Columns
from opd.data.tasks import Task, drop_long, load_task, refuse_long
from opd.envs.task import Games, is_games, load_games
from opd.evaluation.evaluate import evaluate
from opd.models.fsdp import plain, whole
from opd.models.model import Model, Pair, resolve_device
from opd.objectives.factory import DENOMINATORS, Objective, make
from opd.rollouts.factory import Engine, make_engine
from opd.runs import restart, run_folder
from opd.runs.identity import record_identities, record_tokenizer
from opd.runs.model_card import model_card
from opd.runtime import distributed
from opd.runtime.seeds import EVALUATION, derive
from opd.runtime.staged_folders import whole_folder
from opd.serving.addresses import is_url
from opd.teachers.factory import make_pairs, ordinary, with_sharded_student
from opd.teachers.remote_scores import check_tellable, keep_probes
from opd.tokens.masking import resolve
from opd.training import checkpoint
from opd.training.checks.same_weights import refuse_same_weights
from opd.training.checks.settings import objective_problems, unused_settings
from opd.training.checks.start import check_start
from opd.training.checks.update import frozen_teacher
from opd.training.multitask import settings_of, shares, turns
from opd.training.optimizer import Optimizer, adamw
from opd.training.prefetch import Ahead
from opd.training.state import Run
from opd.training.step import draw, due, one_step
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
        distributed.joined(where, config.teacher_patience + config.rollout_patience) as device,
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


def make_runs(
    config: Config, folder: Path, pairs: list[Pair], engine: Engine, optimizer: Optimizer
) -> list[Run]:
    """What the steps of each task share; a run of one task has one."""
    settings, objective = settings_of(config), make_objective(config)
    mixed = bool(config.tasks) and config.task_order == "mixed"
    if mixed:
        counts = shares(config)
        settings = [
            replace(own, prompts_per_step=n) for own, n in zip(settings, counts, strict=True)
        ]
    history, runs = rows.read(folder / "rows.jsonl"), list[Run]()
    ahead = Ahead(
        lambda step: draw(in_turn(config, runs, step), step),
        engine.close,
        depth=config.ahead,
        steps=config.steps,
        updates=config.updates,
    )
    for i, (own, pair) in enumerate(zip(settings, pairs, strict=True)):
        name = config.tasks[i].name if config.tasks else ""
        more = by_task(config) if mixed else by_turn(own)
        if config.engine == "servers":
            more = {**more, "staleness": staleness}
        alarms = Alarms()
        for row in history:
            if mixed or row.get("task", "") == name:
                alarms.update(row)  # one that was on stays on
        run = Run(
            config=own,
            folder=folder,
            pair=pair,
            task=task_of(own, pair),
            engine=engine,
            ahead=ahead,
            objective=objective,
            masks=resolve(own.mask, pair.tokenizer, pair.eos),
            optimizer=optimizer,
            monitor=Monitor({**PANEL, **more}, alarms=alarms, combine=distributed.added),
            name=name,
            place=i,
            weight=config.tasks[i].weight if mixed else 1.0,
            frozen=frozen_teacher(own, pair),
        )
        runs.append(run)
    return runs


def in_turn(config: Config, runs: list[Run], step: int) -> list[tuple[Run, int]]:
    """The tasks that share a step, each with the number of its steps so far."""
    return [(runs[i], nth) for i, nth in turns(config, step)]


def by_task(config: Config) -> dict[str, Metric]:
    """What a step that several tasks share shows of each of them."""
    names = {float(i): task.name for i, task in enumerate(config.tasks)}
    split = (sampled_divergence, sign_shares, signal_concentration, reward, length)
    return {f"{metric.__name__} by task": by(metric, "task", names) for metric in split}


def by_turn(config: Config) -> dict[str, Metric]:
    """How far from the teacher the student is at turns 1, 2, 4, 8, ... of games, a row a turn."""
    if not is_games(config.task) or config.layout != "turns":
        return {}
    names = {float(2**i - 1): str(2**i) for i in range(config.max_turns.bit_length())}
    return {"cost by turn": by(cost, "turn", names)}


def cost(batch: Scored) -> dict[str, Total]:
    """`drift/k1` alone, without its positions."""
    return {"drift/k1": Mean.of(batch.log_ratio, batch.mask, batch.prompt)}


def task_of(config: Config, pair: Pair) -> Task | Games:
    """The configured task, problems or games."""
    return games_of(config) if is_games(config.task) else load(config, pair)


def load(config: Config, pair: Pair) -> Task:
    """The configured problems.

    Raises:
      ValueError: the task is games, or has no answers and the reward is to count.
    """
    if is_games(config.task):
        raise InvalidInput(f"{config.task} is games; problems with answers are needed here")
    task = load_task(
        config.task,
        config.seed,
        test=config.eval_task,
        grader=config.grader,
        system=config.system,
        columns=Columns(prompt=config.prompt_column, answer=config.answer_column),
        test_columns=Columns(prompt=config.eval_prompt_column, answer=config.eval_answer_column),
        fit=partial(
            drop_long if config.drop_long else refuse_long, pair.tokenizer, config.max_prompt
        ),
    )
    if config.outcome and not all(problem.answer for problem in task.train(0, 1)):
        raise InvalidInput(
            f"outcome is {config.outcome}, and {config.task} has no answers, so that nothing is "
            "graded; name the column that holds them with answer_column, or set outcome 0"
        )
    return task


def games_of(config: Config) -> Games:
    """The configured games.

    Raises:
      ValueError: a setting that only problems with answers have; or a baseline over the other
        responses to a prompt, which with a row a turn would be taken over an episode's own turns.
    """
    for name in ("grader", "eval_task"):
        if getattr(config, name):
            raise InvalidInput(
                f"{config.task} says itself who won and holds out games of its own; leave out "
                f"{name}={getattr(config, name)!r}"
            )
    if config.layout == "turns" and (config.outcome or config.baseline == "leave_one_out"):
        what = f"outcome {config.outcome}" if config.outcome else "baseline leave_one_out"
        raise InvalidInput(
            f"{what} compares a response with the others to its prompt; with layout turns those "
            "are turns of the same episode too: set layout to trajectory"
        )
    return load_games(
        config.task,
        config.seed,
        layout=config.layout,
        max_turns=config.max_turns,
        history=config.history,
        system=config.system,
    )


def make_objective(config: Config) -> Objective:
    """The configured objective; refuses what `opd.objectives.factory.make` refuses, and more.

    Raises:
      ValueError: an unknown denominator, or what `opd.training.checks.settings.objective_problems` finds.
    """
    if config.denominator not in DENOMINATORS:
        known = ", ".join(DENOMINATORS)
        raise InvalidInput(f"unknown denominator {config.denominator!r}; known: {known}")
    objective = make(
        config.objective,
        config.gamma,
        config.baseline,
        config.ratio,
        beta=config.beta,
        clip=config.ppo_clip,
        ratio_clip=math.inf if config.ratio_clip is None else config.ratio_clip,
        outcome=config.outcome,
        advantage=config.advantage,
        mask_scope=config.mask_scope,
        collapse_accepted=config.collapse_accepted,
    )
    refuse(list(objective_problems(config, objective)))
    return objective


def sampler(config: Config, student: Model) -> Engine:
    """The configured engine with the student's weights."""
    settings: dict[str, object] = {"rows_at_once": config.rows_at_once}
    if config.engine == "vllm":
        settings = {"max_length": longest(config)}
    if config.engine == "servers":
        settings = {
            "urls": config.rollout_servers,
            "folder": Path(config.weights_folder or Path(config.out) / "weights"),
            "max_length": longest(config),
            "patience": config.rollout_patience,
            "in_flight": config.rollout_requests,
        }
    return make_engine(config.engine, student, **settings)


def longest(config: Config) -> int:
    """Most ids of a prompt with its response."""
    return max(own.max_prompt + own.max_response for own in settings_of(config))


def take_steps(config: Config, runs: list[Run], first: int, log: Log) -> None:
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
            reward=f"{row['collapse/reward']:.2f}",
            kl=f"{row['drift/k1']:.3f}",
            grad=f"{row['grad_norm']:.2f}",
            length=f"{row['collapse/length']:.0f}",
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
        skipped = f"{row['skipped']:.0f} of {config.updates} updates skipped"
        say(step, [f"{skipped}, their gradient was not finite"])


def say(step: int, texts: Iterable[str]) -> None:
    """Write lines about a step to the terminal, above the bar."""
    for text in texts:
        tqdm.write(visible(f"step {step}: {text}"), file=sys.stderr)


def record_evaluation(run: Run, step: int, log: Log) -> None:
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
