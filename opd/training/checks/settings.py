"""Settings that would do nothing, or other than they say: refused before any model is loaded.

Each check yields one message that names the setting, its value and the remedy; a run reports all of
them at once.
"""

import dataclasses
from collections.abc import Callable, Iterator

from opd.config.settings import Config
from opd.data.benchmarks import is_named
from opd.envs.task import is_games
from opd.objectives.factory import Objective
from opd.serving.addresses import is_url
from opd.training.multitask import settings_of, shares

OF_STUDENT = ("base", "ema")
"""Teachers that are made of the student."""


def objective_problems(config: Config, objective: Objective) -> Iterator[str]:
    """A message for everything in which the settings and the objective do not go together."""
    if config.teacher in OF_STUDENT and not config.reward_weight:
        yield (
            f'teacher "{config.teacher}" starts as the student itself, so the divergence is at its '
            "minimum and nothing moves; set outcome, the weight of the reward, or name a teacher"
        )
    yield from _stale_samples(config, objective)
    yield from _empty_groups(config)
    yield from _without_effect(config, objective)


def _stale_samples(config: Config, objective: Objective) -> Iterator[str]:
    """Losses over tokens of an older student that take them for the present one's."""
    if config.allow_unweighted:
        return
    consent = "or set allow_unweighted to do so all the same, as the paper did"
    if config.updates_per_batch > 1 and objective.only_fresh_samples:
        yield (
            f"updates_per_batch is {config.updates_per_batch}: from the second on, {config.objective} would weigh "
            "tokens as if the student of the first had not moved, since its loss reads the sampled "
            "token without an importance weight (ratio compares the rollouts' student with the "
            "sampler, and does not repair it); use sampled_token_weighted or "
            "sampled_token_clipped, an objective that does not read the sampled token, or updates "
            f"= 1; {consent}"
        )
    if config.rollout_lag and objective.sampled and config.ratio == "none":
        yield (
            f"rollout_lag is {config.rollout_lag}: {config.objective} would weigh tokens of older weights as "
            f"if the present student had drawn them; set ratio token, or ahead = 0; {consent}"
        )


def _empty_groups(config: Config) -> Iterator[str]:
    """Baselines and advantages over other responses where there are none."""
    alone = config.group_size < 2
    if config.baseline == "leave_one_out" and alone:
        yield (
            "baseline leave_one_out is the mean of the prompt's other responses, and group_size is "
            f"{config.group_size}; set group_size to 2 or more, or another baseline"
        )
    if config.reward_weight and alone:
        yield (
            f"reward_weight {config.reward_weight} compares the reward of a response with those of the "
            f"prompt's others, and group_size is {config.group_size}; set group_size to 2 or more"
        )
    mixed = len(config.tasks) > 1 and config.task_order == "mixed"
    fewest = min(shares(config)) if mixed else config.prompts_per_step
    if config.baseline == "position_mean" and fewest < 2:
        yield (
            "baseline position_mean is the mean over the step's other prompts, and a step has "
            f"{fewest} of a task; set prompts_per_step to 2 or more, or another baseline"
        )
    if config.baseline == "given":
        yield (
            "baseline given is a column of the batch, and batches of a run have none; it is for "
            "your own code (opd.objectives.factory.make): choose another baseline"
        )


def _without_effect(config: Config, objective: Objective) -> Iterator[str]:
    """Choices that change nothing of this objective's loss."""
    single = objective.support in ("teacher", "student", "intersection") and config.support_k == 1
    if single and objective.renormalises and not objective.local_reads_sample:
        yield (
            f"support_k is 1: renormalised over one id both models have probability 1, so that the "
            f"divergence of {config.objective} is zero whatever they say; set support_k to 2 or "
            f"more, or use {config.objective}_and_sampled or {config.objective}_bucket"
        )
    if config.ppo_clip is not None and config.updates_per_batch == 1:
        yield (
            f"ppo_clip is {config.ppo_clip} and updates 1: the student has not moved yet when the "
            "only update is made, so that nothing is clipped; set updates to 2 or more, or leave "
            "ppo_clip out"
        )
    if config.ratio != "none" and config.engine == "hf" and config.top_p == 1:
        yield (
            f"ratio is {config.ratio}, which is student over sampler, and with the engine hf and "
            "top_p 1 the sampler is the student, so that it is 1 up to rounding; set ratio none"
        )
    if config.map_eos:
        yield from _own_end(config, objective)


def _own_end(config: Config, objective: Objective) -> Iterator[str]:
    name = config.objective
    if all(own.teacher in OF_STUDENT for own in settings_of(config)):
        yield f"map_eos: the teacher {config.teacher} ends as the student does; set map_eos off"
    elif objective.support in ("student", "union", "intersection"):
        yield (
            f"map_eos exchanges ends in the teacher's top-K only, not in the support of {name}; "
            "set map_eos off, or use teacher_topk or one of its forms"
        )
    elif objective.support == "full" and not objective.reads_teacher_sample:
        yield (
            f"map_eos would not change the loss of {name}, which compares whole distributions id "
            "with id and reads no teacher log-probability of a sampled token; set map_eos off, or "
            "use teacher_topk or sampled_token"
        )


# --- settings that belong to a choice that was not made -------------------------------------------


def _plain_source(config: Config) -> bool:
    return not (config.task == "lab" or is_games(config.task) or is_named(config.task))


def _eval_source(config: Config) -> bool:
    return bool(config.eval_task) and not is_named(config.eval_task)


NEEDS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "prompt_column": (_plain_source, "task is a file or data set of your own"),
    "answer_column": (_plain_source, "task is a file or data set of your own"),
    "skip_long_prompts": (
        lambda config: not (config.task == "lab" or is_games(config.task)),
        "task is a file or a data set",
    ),
    "eval_prompt_column": (_eval_source, "eval_task is a file or data set of your own"),
    "eval_answer_column": (_eval_source, "eval_task is a file or data set of your own"),
    "layout": (lambda config: is_games(config.task), "task is games, env:NAME"),
    "max_turns": (lambda config: is_games(config.task), "task is games, env:NAME"),
    "history_turns": (
        lambda config: is_games(config.task) and config.layout == "turns",
        "task is games, env:NAME, with layout turns",
    ),
    "task_order": (lambda config: len(config.tasks) > 1, "there are several tasks"),
    "weights_folder": (lambda config: config.engine == "servers", "engine is servers"),
    "rollout_timeout": (lambda config: config.engine == "servers", "engine is servers"),
    "rollout_concurrency": (lambda config: config.engine == "servers", "engine is servers"),
    "generation_batch_size": (lambda config: config.engine == "hf", "engine is hf"),
    "teacher_timeout": (lambda config: is_url(config.teacher), "the teacher is on a server"),
    "teacher_concurrency": (lambda config: is_url(config.teacher), "the teacher is on a server"),
    "offload_teacher": (
        lambda config: not is_url(config.teacher) and config.teacher != "base",
        "the teacher has weights of its own in this process",
    ),
    "ema_decay": (lambda config: config.teacher == "ema", 'the teacher is "ema"'),
    "lora_alpha": (lambda config: config.lora_rank > 0, "lora_rank is 1 or more"),
    "schedule": (
        lambda config: config.warmup < config.steps or config.steps == 0,
        "the warm-up ends before the last step",
    ),
    "eval_top_p": (lambda config: config.eval_temperature > 0, "eval_temperature is positive"),
    "eval_samples": (lambda config: config.eval_temperature > 0, "eval_temperature is positive"),
}
"""Settings that have an effect only where something else is chosen, and that in words."""


def unused_settings(config: Config) -> Iterator[str]:
    """A message for every setting that was changed and has no effect beside the others.

    Of several tasks, one that the run sets must have an effect in one of them, and one that a task
    sets in that task.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for name, (has_effect, condition) in NEEDS.items():
        value = getattr(config, name)
        used = has_effect(config) or any(has_effect(own) for own in settings_of(config))
        if value != defaults[name] and not used:
            yield _unused(name, value, defaults[name], condition)
        for task, own in zip(config.tasks, settings_of(config), strict=False):
            chosen = getattr(task, name, None)
            if chosen is not None and chosen != defaults[name] and not has_effect(own):
                words = _unused(name, chosen, defaults[name], condition)
                yield f"task {task.name!r}: {words}"
    weighed = [task for task in config.tasks if task.weight != 1]
    if config.task_order == "alternate" and weighed:
        yield (
            f"task {weighed[0].name!r}: weight is {weighed[0].weight}, and with task_order "
            "alternate every task has a step in turn; set task_order to weighted or mixed, or "
            "leave weight out"
        )


def _unused(name: str, value: object, default: object, condition: str) -> str:
    return (
        f"{name} is {value!r}, which has an effect only where {condition}; leave it at {default!r}"
    )
