"""Set up a training run: models, tasks, objectives, engines and optimizer."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from diagnostics.alarms.alarms import Alarms
from diagnostics.batch import ORIGINS, ScoredRollouts
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
from opd.config.prefixes import Prefixes, parse_prefixes
from opd.config.settings import Config, parse_template, with_settings
from opd.data.responses import given_response
from opd.data.row_files import Row
from opd.data.sources import Columns
from opd.data.tasks import Task, load_task, reject_long_prompts, skip_long_prompts
from opd.envs.task import GameTask, is_games, load_games
from opd.models.model import CausalLM
from opd.objectives.factory import make_objective
from opd.objectives.objective import Objective
from opd.objectives.reduction import DENOMINATORS
from opd.objectives.user_loss import try_user_loss
from opd.rollouts.base import Engine
from opd.rollouts.factory import make_engine
from opd.runs.alarm_rules import rules_of
from opd.runs.identity import record_templates
from opd.runtime import distributed
from opd.scoring.request import ScoreRequest
from opd.teachers.pair import ModelPair
from opd.tokens.masking import resolve_mask_rules
from opd.training.checks.update import sample_teacher_weights
from opd.training.checks.user_loss import check_user_loss
from opd.training.multitask import prompts_per_task, task_configs
from opd.training.optimizer import Optimizer
from opd.training.prefetch import RolloutPrefetcher
from opd.training.state import TaskState, TrainState
from opd.training.step import roll_out_step
from opd.training.teacher_view import make_view, reads_response, source_columns, view_files
from opd.training.user_metrics import load_metrics, try_metrics

SAMPLER_TESTS = ("martingales", "sampler_ratio")
"""Metrics of the panel that test whether the student sampled the tokens."""


def make_train_state(
    config: Config,
    folder: Path,
    first_step: int,
    pairs: list[ModelPair],
    engine: Engine,
    optimizer: Optimizer,
    rows_by_name: Mapping[str, list[Row]] | None = None,
) -> TrainState:
    """Build the state of a run.

    Args:
        config: Settings of the run.
        folder: Run folder, rewound to the first step.
        first_step: First step to take.
        pairs: Student and teacher of each task; the student is the same.
        engine: Rollout engine.
        optimizer: Optimizer of the student.
        rows_by_name: Rows of data that are objects, by the name of their task.

    Returns:
        The state, with the rollouts that were prefetched before a checkpoint.

    Raises:
        InvalidInput: A template of the teacher's prompts is not that of the start.
    """
    tasks = make_task_states(config, folder, pairs, rows_by_name)
    if distributed.rank() == 0:
        record_templates(folder, view_files(config), first_step)
    prefetcher = RolloutPrefetcher(
        partial(roll_out_step, config, tasks, engine),
        engine.close,
        lag=config.rollout.rollout_lag,
        steps=config.steps,
        updates=config.optimizer.updates_per_batch,
        replay_age=parse_prefixes(config.rollout.prefixes).replay_age,
    )
    student = pairs[0].student
    prefetcher.load(folder, first_step, student.device)
    return TrainState(
        config=config,
        folder=folder,
        student=student,
        optimizer=optimizer,
        engine=engine,
        prefetcher=prefetcher,
        tasks=tasks,
        first_step=first_step,
        unchecked_graders={
            task.name: task.problems.name for task in tasks if isinstance(task.problems, Task)
        },
    )


def make_task_states(
    config: Config,
    folder: Path,
    pairs: list[ModelPair],
    rows_by_name: Mapping[str, list[Row]] | None = None,
) -> list[TaskState]:
    """Build the state of each task; a run of a single task has one.

    Args:
        config: Settings of the run.
        folder: Run folder; its rows tell which alarms are active.
        pairs: Student and teacher of each task.
        rows_by_name: Rows of data that are objects, by the name of their task.

    Returns:
        One state per task.
    """
    settings, objective = task_configs(config), objective_from_config(config)
    mixed = bool(config.tasks) and config.data.task_order == "mixed"
    if mixed:
        counts = prompts_per_task(config)
        settings = [
            with_settings(task_config, prompts_per_step=count)
            for task_config, count in zip(settings, counts, strict=True)
        ]
    user_metrics = load_metrics(config.record.metrics)
    if objective.user_loss is not None:
        try_user_loss(objective.user_loss, pairs[0].student.vocabulary, config.objective.support_k)
        check_user_loss(objective.user_loss, config.objective)
    history, tasks = rows.read_rows(folder / "rows.jsonl"), list[TaskState]()
    for i, (task_config, pair) in enumerate(zip(settings, pairs, strict=True)):
        name = config.tasks[i].name if config.tasks else ""
        extra_metrics = metrics_by_task(config) if mixed else metrics_by_turn(task_config)
        prefixes = parse_prefixes(config.rollout.prefixes)
        if config.rollout.engine == "servers" or prefixes.replay_age:
            extra_metrics = {**extra_metrics, "staleness": staleness}
        extra_metrics = {**extra_metrics, **metrics_by_origin(prefixes)}
        try_metrics(user_metrics, {**PANEL, **extra_metrics}, config.objective.support_k)
        alarms = Alarms(rules_of(prefixes, config.objective.objective))
        for row in history:
            if mixed or row.get("task", "") == name:
                alarms.update(row)  # an alarm that was active before the resume stays active
        problems = make_task(task_config, pair, rows_by_name)
        loss = objective.user_loss
        if loss is not None and "reward" in loss.asks and isinstance(problems, Task):
            reader = f"objective {loss.name} asks for reward"
            require_answers(problems, task_config, reader, "choose another objective")
        view = make_view(task_config, pair, problems)
        if view is not None and view.reads_attempts and prefixes.samples_teacher:
            raise InvalidInput(
                f"prefixes is {task_config.rollout.prefixes}, but teacher_view "
                f"{task_config.view.teacher_view} uses responses (response, reward, feedback or "
                "peers), and the teacher cannot read a response before it writes it; set prefixes "
                "to student, or use another view"
            )
        task = TaskState(
            config=task_config,
            pair=pair,
            problems=problems,
            objective=objective,
            request=replace(
                score_request(task_config, objective, pair),
                teacher_reads="response" if reads_response(config) else "prompt",
            ),
            masks=resolve_mask_rules(task_config.objective.mask, pair.tokenizer, pair.eos),
            monitor=Monitor(
                {**panel_of(prefixes), **extra_metrics, **user_metrics},
                alarms=alarms,
                combine=distributed.all_reduce_accumulators,
            ),
            name=name,
            index=i,
            weight=config.tasks[i].weight if mixed else 1.0,
            view=view,
            teacher_sample=sample_teacher_weights(pair.teacher),
        )
        tasks.append(task)
    return tasks


def score_request(config: Config, objective: Objective, pair: ModelPair) -> ScoreRequest:
    """Return what a batch is scored for with the settings of a task.

    Args:
        config: Settings of the task.
        objective: Its objective.
        pair: Student and teacher.

    Returns:
        The request, with full statistics.
    """
    return ScoreRequest(
        requirements=objective.requirements,
        temperature=config.rollout.temperature,
        eos_map=pair.eos_map,
        map_eos=config.objective.map_eos,
        max_tokens_per_microbatch=config.hardware.max_tokens_per_microbatch,
        max_logits_per_chunk=config.hardware.max_logits_per_chunk,
    )


def metrics_by_task(config: Config) -> dict[str, Metric]:
    """Build the metrics that a mixed step reports for each of its tasks."""
    names = {float(i): task.name for i, task in enumerate(config.tasks)}
    metrics = (sampled_divergence, sign_shares, signal_concentration, reward, length)
    return {f"{metric.__name__} by task": by(metric, "task", names) for metric in metrics}


def panel_of(prefixes: Prefixes) -> dict[str, Metric]:
    """Return the default panel, without the tests of the sampler where the student samples none."""
    return {
        name: metric
        for name, metric in PANEL.items()
        if prefixes.has_own or name not in SAMPLER_TESTS
    }


def metrics_by_origin(prefixes: Prefixes) -> dict[str, Metric]:
    """Build the metrics that a run of several writers reports for the responses of each."""
    if not prefixes.partner or not prefixes.has_own:
        return {}
    names = {float(ORIGINS.index(name)): name for name in ("student", prefixes.partner)}
    metrics = (sampled_divergence, reward, length)
    return {f"{metric.__name__} by origin": by(metric, "origin", names) for metric in metrics}


def metrics_by_turn(config: Config) -> dict[str, Metric]:
    """Build the sampled divergence at turns 1, 2, 4, 8, ... of games, for layout "turns"."""
    if not is_games(config.data.task) or config.games.layout != "turns":
        return {}
    names = {float(2**i - 1): str(2**i) for i in range(config.games.max_turns.bit_length())}
    return {"cost by turn": by(sampled_cost, "turn", names)}


def sampled_cost(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Compute `divergence/k1` alone, without its profile over positions."""
    return {"divergence/k1": Mean.from_values(batch.log_ratio, batch.mask, batch.prompt)}


def make_task(
    config: Config, pair: ModelPair, rows_by_name: Mapping[str, list[Row]] | None = None
) -> Task | GameTask:
    """Build the configured task, of problems or games; see `load_problem_task`."""
    if is_games(config.data.task):
        return load_game_task(config)
    return load_problem_task(config, pair, rows_by_name)


def load_problem_task(
    config: Config, pair: ModelPair, rows_by_name: Mapping[str, list[Row]] | None = None
) -> Task:
    """Load the configured problems.

    Args:
        config: Settings of the task.
        pair: Student and teacher, for the tokenizer.
        rows_by_name: Rows of data that are objects, by the name of their task.

    Returns:
        The task.

    Raises:
        InvalidInput: The task is a game, it has no answers although reward_weight is set, or no
            responses although they are trained on.
    """
    if is_games(config.data.task):
        raise InvalidInput(
            f"task {config.data.task} is a game; a task of problems is required here"
        )
    reads_data = parse_prefixes(config.rollout.prefixes).reads_data
    task = load_task(
        config.data.task,
        config.seed,
        test=config.evaluation.eval_task,
        grader=config.data.grader,
        system=config.data.system,
        template=parse_template(config.data.template),
        columns=replace(
            source_columns(config), response=config.data.response_column if reads_data else ""
        ),
        test_columns=Columns(
            prompt=config.evaluation.eval_prompt_column, answer=config.evaluation.eval_answer_column
        ),
        handle_long_prompts=partial(
            skip_long_prompts if config.data.skip_long_prompts else reject_long_prompts,
            pair.tokenizer,
            config.data.max_prompt,
        ),
        rows=rows_by_name,
    )
    if weight := config.objective.reward_weight:
        require_answers(task, config, f"reward_weight is {weight}", "reward_weight to 0")
    if reads_data and not given_response(task.train(0, 1)[0]):
        raise InvalidInput(
            f"prefixes is {config.rollout.prefixes}, but {config.data.task} gives no responses; "
            "name a file or data set with a response column, or set prefixes to student"
        )
    return task


def require_answers(task: Task, config: Config, reader: str, remedy: str) -> None:
    """Refuse a task without answers for a loss that reads the grades of responses.

    Args:
        task: The task.
        config: Its settings.
        reader: What reads the grades; the beginning of the message.
        remedy: What to do if there are no answers; the end of it.

    Raises:
        InvalidInput: The task has no answers.
    """
    if all(problem.answer for problem in task.train(0, 1)):
        return
    raise InvalidInput(
        f"{reader}, but {config.data.task} has no answers to grade responses with; set "
        f"answer_column to the column with the answers, or {remedy}"
    )


def load_game_task(config: Config) -> GameTask:
    """Load the configured games.

    Args:
        config: Settings of the task.

    Returns:
        The task.
    """
    return load_games(
        config.data.task,
        config.seed,
        layout=config.games.layout,
        max_turns=config.games.max_turns,
        history=config.games.history_turns,
        system=config.data.system,
        template=tuple(parse_template(config.data.template).items()),
    )


def objective_from_config(config: Config) -> Objective:
    """Build the configured objective.

    Args:
        config: Settings of the run.

    Returns:
        The objective.

    Raises:
        InvalidInput: The denominator is unknown, or `opd.objectives.factory.make_objective`
            refuses the settings.
    """
    if config.objective.denominator not in DENOMINATORS:
        known_names = ", ".join(DENOMINATORS)
        raise InvalidInput(
            f"unknown denominator {config.objective.denominator!r}; known: {known_names}"
        )
    return make_objective(
        config.objective.objective,
        gamma=config.objective.gamma,
        baseline=config.objective.baseline,
        ratio=config.objective.ratio,
        support_k=config.objective.support_k,
        beta=config.objective.beta,
        clip=config.objective.ppo_clip,
        ratio_clip=math.inf if config.objective.ratio_clip is None else config.objective.ratio_clip,
        reward_weight=config.objective.reward_weight,
        reward_baseline=config.objective.reward_baseline,
        mask_scope=config.objective.mask_scope,
        allow_collapse=config.objective.allow_collapse,
    )


def make_rollout_engine(config: Config, student: CausalLM) -> Engine:
    """Build the configured rollout engine with the student's weights."""
    settings: dict[str, object] = {"generation_batch_size": config.rollout.generation_batch_size}
    if config.rollout.engine == "vllm":
        settings = {"max_length": max_sequence_length(config)}
    if config.rollout.engine == "servers":
        settings = {
            "urls": config.rollout_servers.rollout_servers,
            "folder": Path(config.rollout_servers.weights_folder or Path(config.out) / "weights"),
            "max_length": max_sequence_length(config),
            "timeout": config.rollout_servers.rollout_timeout,
            "concurrency": config.rollout_servers.rollout_concurrency,
        }
    return make_engine(config.rollout.engine, student, **settings)


def max_sequence_length(config: Config) -> int:
    """Return the largest number of tokens of a prompt with its response, over all tasks."""
    return max(
        task_config.data.max_prompt + task_config.rollout.max_response
        for task_config in task_configs(config)
    )
