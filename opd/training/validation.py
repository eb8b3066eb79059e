"""The one validation of a configuration: every problem that shows before anything is loaded.

Nothing is read, loaded or connected. `opd train`, `train` and `opd doctor` report all problems at
once. A rule yields one message that names the setting, its value and the remedy.
"""

import math
from collections.abc import Iterator

from diagnostics.errors import InvalidInput
from opd.config.problems import conflicts, invalid_names, separate_invalid
from opd.config.settings import Config, with_settings
from opd.envs.task import is_games
from opd.objectives.factory import DENOMINATORS, Objective, build_objective
from opd.runtime import distributed
from opd.serving.addresses import is_url
from opd.training.checks.settings import STUDENT_DERIVED, objective_problems, unused_settings
from opd.training.multitask import prompts_per_task, task_configs


def validate(config: Config) -> list[str]:
    """List every problem of a configuration.

    Invalid values are reported first. The other rules see valid values in their place, and do not
    report these.

    Args:
        config: The configuration; its values may have any type.

    Returns:
        One message per problem, without secrets.
    """
    problems, valid_config = separate_invalid(config)
    invalid = invalid_names(problems)
    further = [
        *conflicts(valid_config, invalid),
        *unused_settings(valid_config),
        *process_problems(valid_config),
    ]
    if split := list(split_problems(valid_config)):
        further += split
        valid_config = with_settings(valid_config, task_order="alternate")
    try:
        objective = configured_objective(valid_config)
    except InvalidInput as error:
        further.append(str(error))
    else:
        further += objective_problems(valid_config, objective)
        further += teacher_problems(valid_config, objective)
    further += [
        message
        for task_config in task_configs(valid_config)
        for message in game_problems(task_config)
    ]
    problems += [message for message in further if not invalid & invalid_names([message])]
    return list(dict.fromkeys(problems))


def configured_objective(config: Config) -> Objective:
    """Build the configured objective.

    Args:
        config: Settings of the run.

    Returns:
        The objective.

    Raises:
        InvalidInput: The denominator is unknown, or `build_objective` refuses the settings.
    """
    loss = config.objective
    if loss.denominator not in DENOMINATORS:
        raise InvalidInput(
            f"unknown denominator {loss.denominator!r}; known: {', '.join(DENOMINATORS)}"
        )
    return build_objective(
        loss.objective,
        loss.gamma,
        loss.baseline,
        loss.ratio,
        beta=loss.beta,
        clip=loss.ppo_clip,
        ratio_clip=math.inf if loss.ratio_clip is None else loss.ratio_clip,
        reward_weight=loss.reward_weight,
        reward_baseline=loss.reward_baseline,
        mask_scope=loss.mask_scope,
        allow_collapse=loss.allow_collapse,
    )


def process_problems(config: Config) -> Iterator[str]:
    """Report settings that need several processes, or one."""
    if config.hardware.sharding == "full" and not distributed.is_distributed():
        yield (
            "sharding full (FSDP) needs several processes, but this is the only one; start the run "
            "with `torchrun --nproc_per_node N --no-python opd train ...`, or set sharding none, "
            "which resumes from the same checkpoints"
        )
    if config.rollout.engine == "vllm" and distributed.is_distributed():
        yield (
            "engine vllm loads weights from a single process, but there are several; start one "
            "process, or set engine to servers or hf"
        )


def split_problems(config: Config) -> Iterator[str]:
    """Report a split of the prompts among mixed tasks that is impossible."""
    if len(config.tasks) > 1 and config.data.task_order == "mixed":
        try:
            prompts_per_task(config)
        except InvalidInput as error:
            yield str(error)


def teacher_problems(config: Config, objective: Objective) -> Iterator[str]:
    """Report teachers that do not go with other settings, for all tasks."""
    configs = task_configs(config)
    teachers = list(dict.fromkeys(task_config.teacher for task_config in configs))
    if config.hardware.teacher_weights != "saved" and all(map(is_url, teachers)):
        yield (
            f"teacher_weights is {config.hardware.teacher_weights}, but no teacher runs in this "
            "process; set it to saved: quantisation of a server's model is configured in the server"
        )
    derived = [teacher for teacher in teachers if teacher in STUDENT_DERIVED]
    if derived and len(configs) > 1:
        yield (
            f"teacher {derived[0]!r} is derived from the student and cannot be used with several "
            "tasks; give each task a model"
        )
    if "base" in teachers and not config.optimizer.lora_rank:
        yield (
            'teacher "base" is the student without its LoRA adapters, but lora_rank is 0; set '
            "lora_rank, or choose another teacher"
        )
    for task_config in configs:
        if is_url(task_config.teacher):
            yield from remote_problems(task_config, objective)


def remote_problems(config: Config, objective: Objective) -> Iterator[str]:
    """Report settings that need more than a teacher on a server provides.

    Args:
        config: Settings of a run or task whose teacher is a server.
        objective: Its objective.

    Yields:
        The messages.
    """
    loss = config.objective
    alternatives = "teacher_topk, sampled_token or one of their variants"
    for unsupported, feature, remedy in (
        (
            objective.support in ("student", "union"),
            f"objective {loss.objective}, which needs its log-probabilities of the student's ids",
            alternatives,
        ),
        (
            objective.support == "full" or objective.distributions,
            f"objective {loss.objective} with baseline {loss.baseline}, which needs its full "
            "distribution",
            alternatives,
        ),
        (
            config.rollout.temperature != 1,
            f"temperature {config.rollout.temperature}, because servers return log-probabilities "
            "at 1",
            "temperature 1",
        ),
        (loss.map_eos, "map_eos, which needs scores of unsampled ids", "map_eos off"),
        (
            loss.entropy_top_fraction < 1,
            "entropy_top_fraction, which needs full distributions",
            "entropy_top_fraction 1",
        ),
        (
            bool(config.record.probe_every),
            "probe_every, which needs its hidden states",
            "probe_every 0",
        ),
    ):
        if unsupported:
            yield (
                f"the teacher {config.teacher} is a server and does not support {feature}; use "
                f"{remedy}, or a teacher in this process"
            )


def game_problems(config: Config) -> Iterator[str]:
    """Report settings of a run or task of games that apply to problems, or mix up episodes.

    With layout "turns" the responses to a prompt include turns of the same episode, which a
    comparison of responses would treat as independent.

    Args:
        config: Settings of the run or task.

    Yields:
        The messages.
    """
    task = config.data.task
    if not is_games(task):
        return
    for name, value in (("grader", config.data.grader), ("eval_task", config.evaluation.eval_task)):
        if value:
            yield (
                f"{task} grades its own episodes and has its own held-out games; remove "
                f"{name}={value!r}"
            )
    if config.games.layout == "turns":
        reward, baseline = config.objective.reward_weight, config.objective.baseline
        for compares, setting in (
            (reward > 0, f"reward_weight {reward}"),
            (baseline == "leave_one_out", "baseline leave_one_out"),
        ):
            if not compares:
                continue
            yield (
                f"{setting} compares a response with the other responses to its prompt, which with "
                "layout turns include turns of the same episode; set layout to trajectory"
            )
