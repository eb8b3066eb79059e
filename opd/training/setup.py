"""Set a training run up: models, tasks, objectives, engines and optimizer."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from diagnostics.alarms.alarms import Alarms
from diagnostics.batch import ScoredRollouts
from diagnostics.catalogue import PANEL, Metric
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.errors import InvalidInput
from diagnostics.metrics.consistency import staleness
from diagnostics.metrics.divergence import sampled_divergence
from diagnostics.metrics.groupby import by
from diagnostics.metrics.response import length, reward
from diagnostics.metrics.signal import sign_shares, signal_concentration
from diagnostics.monitor import Monitor
from diagnostics.records import rows
from opd.config.settings import Config, refuse
from opd.data.sources import Columns
from opd.data.tasks import Task, load_task, refuse_long, skip_long_prompts
from opd.envs.task import GameTask, is_games, load_games
from opd.models.model import CausalLM
from opd.objectives.factory import DENOMINATORS, Objective, make
from opd.rollouts.base import Engine
from opd.rollouts.factory import make_engine
from opd.runtime import distributed
from opd.teachers.pair import ModelPair
from opd.tokens.masking import resolve
from opd.training.checks.settings import objective_problems
from opd.training.checks.update import frozen_teacher
from opd.training.multitask import settings_of, shares, turns
from opd.training.optimizer import Optimizer
from opd.training.prefetch import RolloutPrefetcher
from opd.training.state import TaskRun
from opd.training.step import draw


def make_runs(
    config: Config, folder: Path, pairs: list[ModelPair], engine: Engine, optimizer: Optimizer
) -> list[TaskRun]:
    """What the steps of each task share; a run of one task has one."""
    settings, objective = settings_of(config), make_objective(config)
    mixed = bool(config.tasks) and config.task_order == "mixed"
    if mixed:
        counts = shares(config)
        settings = [
            replace(own, prompts_per_step=n) for own, n in zip(settings, counts, strict=True)
        ]
    history, runs = rows.read(folder / "rows.jsonl"), list[TaskRun]()
    ahead = RolloutPrefetcher(
        lambda step: draw(in_turn(config, runs, step), step),
        engine.close,
        depth=config.rollout_lag,
        steps=config.steps,
        updates=config.updates_per_batch,
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
        run = TaskRun(
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


def in_turn(config: Config, runs: list[TaskRun], step: int) -> list[tuple[TaskRun, int]]:
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


def cost(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """`divergence/k1` alone, without its positions."""
    return {"divergence/k1": Mean.of(batch.log_ratio, batch.mask, batch.prompt)}


def task_of(config: Config, pair: ModelPair) -> Task | GameTask:
    """The configured task, problems or games."""
    return games_of(config) if is_games(config.task) else load(config, pair)


def load(config: Config, pair: ModelPair) -> Task:
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
            skip_long_prompts if config.skip_long_prompts else refuse_long,
            pair.tokenizer,
            config.max_prompt,
        ),
    )
    if config.reward_weight and not all(problem.answer for problem in task.train(0, 1)):
        raise InvalidInput(
            f"reward_weight is {config.reward_weight}, and {config.task} has no answers, so that nothing is "
            "graded; name the column that holds them with answer_column, or set outcome 0"
        )
    return task


def games_of(config: Config) -> GameTask:
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
    if config.layout == "turns" and (config.reward_weight or config.baseline == "leave_one_out"):
        what = (
            f"reward_weight {config.reward_weight}"
            if config.reward_weight
            else "baseline leave_one_out"
        )
        raise InvalidInput(
            f"{what} compares a response with the others to its prompt; with layout turns those "
            "are turns of the same episode too: set layout to trajectory"
        )
    return load_games(
        config.task,
        config.seed,
        layout=config.layout,
        max_turns=config.max_turns,
        history=config.history_turns,
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
        reward_weight=config.reward_weight,
        reward_baseline=config.reward_baseline,
        mask_scope=config.mask_scope,
        allow_collapse=config.allow_collapse,
    )
    refuse(list(objective_problems(config, objective)))
    return objective


def sampler(config: Config, student: CausalLM) -> Engine:
    """The configured engine with the student's weights."""
    settings: dict[str, object] = {"generation_batch_size": config.generation_batch_size}
    if config.engine == "vllm":
        settings = {"max_length": longest(config)}
    if config.engine == "servers":
        settings = {
            "urls": config.rollout_servers,
            "folder": Path(config.weights_folder or Path(config.out) / "weights"),
            "max_length": longest(config),
            "patience": config.rollout_timeout,
            "in_flight": config.rollout_concurrency,
        }
    return make_engine(config.engine, student, **settings)


def longest(config: Config) -> int:
    """Most ids of a prompt with its response."""
    return max(own.max_prompt + own.max_response for own in settings_of(config))
