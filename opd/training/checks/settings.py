"""Refuse settings without effect, or with another effect than stated, before loading a model.

Each check yields one message that names the setting, its value and the remedy; all problems of a
run are reported at once.
"""

from collections.abc import Callable, Iterator

from opd.config.settings import Config, setting_fields, setting_values
from opd.config.view import has_view
from opd.data.benchmarks import is_benchmark
from opd.envs.task import is_games
from opd.objectives.objective import Objective
from opd.serving.addresses import is_url
from opd.training.multitask import prompts_per_task, task_configs

STUDENT_DERIVED = ("base", "ema")
"""Teachers that are derived from the student."""


def objective_problems(config: Config, objective: Objective) -> Iterator[str]:
    """Yield a message for every setting that does not go with the objective."""
    views = any(has_view(task_config) for task_config in task_configs(config))
    imitates = config.rollout.prefixes == "teacher" and objective.local.likelihood
    reads_teacher = objective.requirements.teacher and not config.objective.reward_weight
    if config.teacher in STUDENT_DERIVED and (reads_teacher or imitates) and not views:
        yield (
            f'teacher "{config.teacher}" starts as a copy of the student, so the divergence and '
            "its gradient are zero; set reward_weight to train on rewards, show the teacher more "
            "(teacher_view), or use another teacher"
        )
    yield from _stale_samples(config, objective)
    yield from _empty_groups(config)
    yield from _without_effect(config, objective)


def _stale_samples(config: Config, objective: Objective) -> Iterator[str]:
    """Report off-policy samples that the loss would treat as samples of the current student."""
    if config.objective.allow_unweighted:
        return
    override_hint = "or set allow_unweighted to train with this bias, as the paper did"
    if objective.user_loss is not None:
        yield from _stale_user_loss(config, objective, override_hint)
        return
    if config.optimizer.updates_per_batch > 1 and objective.requirements.on_policy:
        yield (
            f"updates_per_batch is {config.optimizer.updates_per_batch}: from the second update "
            "on, the "
            f"student has changed, but {config.objective.objective} uses the sampled token without "
            "an "
            "importance weight and would be biased (ratio does not correct this: it compares the "
            "student at rollout time with the sampler); use sampled_token_weighted or "
            "sampled_token_clipped, an objective that does not use the sampled token, or "
            f"updates_per_batch 1; {override_hint}"
        )
    if (
        config.rollout.rollout_lag
        and objective.requirements.sampled_logp
        and config.objective.ratio == "none"
    ):
        yield (
            f"rollout_lag is {config.rollout.rollout_lag}: {config.objective.objective} would "
            "treat tokens sampled "
            "from earlier weights as samples of the current student; set ratio to token, or "
            f"rollout_lag to 0; {override_hint}"
        )


def _stale_user_loss(config: Config, objective: Objective, override_hint: str) -> Iterator[str]:
    """Report off-policy samples of a loss of the user's own that does not ask for sampler_logp."""
    stale = {
        "updates_per_batch": (config.optimizer.updates_per_batch, 1),
        "rollout_lag": (config.rollout.rollout_lag, 0),
    }
    for name, (value, on_policy_value) in stale.items():
        if value > on_policy_value and objective.requirements.on_policy:
            yield (
                f"{name} is {value}, so that tokens were sampled before the student changed, but "
                f"{config.objective.objective} reads the sampled tokens without sampler_logp and "
                "would be biased; ask for sampler_logp and weight each token with exp(student_logp "
                f"- sampler_logp), or set {name} to {on_policy_value}; {override_hint}"
            )


def _empty_groups(config: Config) -> Iterator[str]:
    """Report baselines and advantages over other responses if there are none."""
    is_single = config.data.group_size < 2
    if config.objective.baseline == "leave_one_out" and is_single:
        yield (
            "baseline leave_one_out is the mean over the other responses to the prompt, but "
            f"group_size is {config.data.group_size}; set group_size to 2 or more, or use another "
            "baseline"
        )
    if config.objective.reward_weight and is_single:
        yield (
            f"reward_weight {config.objective.reward_weight} compares the reward of a response "
            "with those of "
            f"the other responses to the prompt, but group_size is {config.data.group_size}; set "
            "group_size to 2 or more"
        )
    mixed = len(config.tasks) > 1 and config.data.task_order == "mixed"
    min_prompts = min(prompts_per_task(config)) if mixed else config.data.prompts_per_step
    if config.objective.baseline == "position_mean" and min_prompts < 2:
        yield (
            "baseline position_mean is the mean over the other prompts of the step, but a step has "
            f"{min_prompts} per task; set prompts_per_step to 2 or more, or use another baseline"
        )
    if config.objective.baseline == "given":
        yield (
            "baseline given is a column of the batch that batches of a run do not have; it is for "
            "your own code (opd.objectives.factory.make_objective): choose another baseline"
        )


def _without_effect(config: Config, objective: Objective) -> Iterator[str]:
    """Report settings that do not change this objective's loss."""
    single = (
        objective.support in ("teacher", "student", "intersection")
        and config.objective.support_k == 1
    )
    if single and objective.local.renormalises and not objective.local.reads_sample:
        yield (
            f"support_k is 1: renormalised over one id, both models have probability 1, so the "
            f"divergence of {config.objective.objective} is always zero; set support_k to 2 or "
            f"more, or use {config.objective.objective}_and_sampled or "
            f"{config.objective.objective}_bucket"
        )
    if config.objective.ppo_clip is not None and config.optimizer.updates_per_batch == 1:
        yield (
            f"ppo_clip is {config.objective.ppo_clip} and updates_per_batch is 1: the importance "
            "ratio of a "
            "single update is 1, so nothing is clipped; set updates_per_batch to 2 or more, or "
            "remove ppo_clip"
        )
    if (
        config.objective.ratio != "none"
        and config.rollout.engine == "hf"
        and config.rollout.top_p == 1
        and config.rollout.prefixes == "student"
    ):
        yield (
            f"ratio is {config.objective.ratio}, which compares student and sampler, but with "
            "engine hf and "
            "top_p 1 the sampler is the student and the ratio is 1 up to rounding; set ratio to "
            "none"
        )
    if config.objective.map_eos:
        yield from _eos_mapping(config, objective)


def _eos_mapping(config: Config, objective: Objective) -> Iterator[str]:
    """Report map_eos where it does not change the loss."""
    name = config.objective.objective
    if all(task_config.teacher in STUDENT_DERIVED for task_config in task_configs(config)):
        yield f"map_eos: teacher {config.teacher} has the student's EOS; remove map_eos"
    elif objective.support in ("student", "union", "intersection"):
        yield (
            f"map_eos maps EOS ids in the teacher's top-K only, not in the support of {name}; "
            "remove map_eos, or use teacher_topk or one of its variants"
        )
    elif objective.support == "full" and not objective.requirements.teacher_sampled_logp:
        yield (
            f"map_eos would not change the loss of {name}, which compares full distributions and "
            "does not use the teacher's log-probability of the sampled token; remove map_eos, or "
            "use teacher_topk or sampled_token"
        )


# --- settings that depend on another setting ----------------------------------------------------


def _plain_source(config: Config) -> bool:
    """Return whether the task is a file or dataset with configurable columns."""
    return not (
        config.data.task == "lab" or is_games(config.data.task) or is_benchmark(config.data.task)
    )


def _eval_source(config: Config) -> bool:
    """Return whether the evaluation task is a file or dataset with configurable columns."""
    return bool(config.evaluation.eval_task) and not is_benchmark(config.evaluation.eval_task)


CONDITIONS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "prompt_column": (_plain_source, "task is a file or dataset with columns"),
    "answer_column": (_plain_source, "task is a file or dataset with columns"),
    "response_column": (
        lambda config: _plain_source(config) and "dataset" in config.rollout.prefixes,
        "prefixes is dataset and task is a file or dataset with columns",
    ),
    "skip_long_prompts": (
        lambda config: not (config.data.task == "lab" or is_games(config.data.task)),
        "task is a file or a dataset",
    ),
    "eval_prompt_column": (_eval_source, "eval_task is a file or dataset with columns"),
    "eval_answer_column": (_eval_source, "eval_task is a file or dataset with columns"),
    "layout": (lambda config: is_games(config.data.task), "task is a game, env:NAME"),
    "max_turns": (lambda config: is_games(config.data.task), "task is a game, env:NAME"),
    "history_turns": (
        lambda config: is_games(config.data.task) and config.games.layout == "turns",
        "task is a game, env:NAME, with layout turns",
    ),
    "task_order": (lambda config: len(config.tasks) > 1, "there are several tasks"),
    "weights_folder": (lambda config: config.rollout.engine == "servers", "engine is servers"),
    "rollout_timeout": (lambda config: config.rollout.engine == "servers", "engine is servers"),
    "rollout_concurrency": (lambda config: config.rollout.engine == "servers", "engine is servers"),
    "generation_batch_size": (lambda config: config.rollout.engine == "hf", "engine is hf"),
    "teacher_timeout": (lambda config: is_url(config.teacher), "the teacher is on a server"),
    "teacher_concurrency": (lambda config: is_url(config.teacher), "the teacher is on a server"),
    "teacher_eos": (
        lambda config: is_url(config.teacher) and config.objective.map_eos,
        "the teacher is on a server and map_eos is set",
    ),
    "offload_teacher": (
        lambda config: (
            not is_url(config.teacher)
            and config.teacher not in ("base", "none")
            and not config.teacher.startswith("cache:")
        ),
        "the teacher has its own weights in this process",
    ),
    "ema_decay": (lambda config: config.teacher == "ema", 'the teacher is "ema"'),
    "ema_resync_every": (lambda config: config.teacher == "ema", 'the teacher is "ema"'),
    "view_control": (lambda config: bool(config.view.teacher_view), "teacher_view is set"),
    "view_metrics_every": (has_view, "the teacher has prompts of its own (teacher_view)"),
    "max_teacher_prompt": (has_view, "the teacher has prompts of its own (teacher_view)"),
    "lora_alpha": (lambda config: config.optimizer.lora_rank > 0, "lora_rank is 1 or more"),
    "schedule": (
        lambda config: config.optimizer.warmup < config.steps or config.steps == 0,
        "the warm-up ends before the last step",
    ),
    "logger_columns": (lambda config: bool(config.record.loggers), "loggers are named"),
    "eval_top_p": (
        lambda config: config.evaluation.eval_temperature > 0,
        "eval_temperature is positive",
    ),
    "eval_samples": (
        lambda config: config.evaluation.eval_temperature > 0,
        "eval_temperature is positive",
    ),
}
"""Settings that have an effect only under a condition, given as a function and as text."""


def unused_settings(config: Config) -> Iterator[str]:
    """Yield a message for every setting that was changed and has no effect.

    With several tasks, a setting of the run must have an effect in at least one task, and a setting
    of a task in that task.

    Args:
        config: Settings of the run.

    Yields:
        The messages.
    """
    values = setting_values(config)
    defaults = {name: setting.field.default for name, setting in setting_fields().items()}
    for name, (has_effect, condition) in CONDITIONS.items():
        value = values[name]
        used = has_effect(config) or any(
            has_effect(task_config) for task_config in task_configs(config)
        )
        if value != defaults[name] and not used:
            yield _unused(name, value, defaults[name], condition)
        for task, task_config in zip(config.tasks, task_configs(config), strict=False):
            task_value = getattr(task, name, None)
            if (
                task_value is not None
                and task_value != defaults[name]
                and not has_effect(task_config)
            ):
                message = _unused(name, task_value, defaults[name], condition)
                yield f"task {task.name!r}: {message}"
    weighted_tasks = [task for task in config.tasks if task.weight != 1]
    if config.data.task_order == "alternate" and weighted_tasks:
        yield (
            f"task {weighted_tasks[0].name!r}: weight is {weighted_tasks[0].weight}, but with "
            "task_order alternate all tasks have equally many steps; set task_order to weighted or "
            "mixed, or remove weight"
        )


def _unused(name: str, value: object, default: object, condition: str) -> str:
    """Format the message about a setting without effect."""
    return f"{name} is {value!r}, which has an effect only if {condition}; leave it at {default!r}"
