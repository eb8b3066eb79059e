"""The one validation of a configuration: every problem that shows before anything is loaded.

Nothing is read, loaded or connected. `opd train`, `train` and `opd doctor` report all problems at
once. A rule yields one message that names the setting, its value and the remedy.
"""

from collections.abc import Iterator

from diagnostics.errors import InvalidInput
from opd.config.problems import conflicts, invalid_names, separate_invalid
from opd.config.settings import Config, setting_fields, with_settings
from opd.config.view import has_view
from opd.envs.task import is_games
from opd.objectives.objective import Objective
from opd.runtime import distributed
from opd.teachers.teacher import (
    NO_TEACHER,
    CachedTeacher,
    Capability,
    NoTeacher,
    ServerTeacher,
    teacher_type,
)
from opd.training.checks.prefixes import prefix_problems
from opd.training.checks.settings import STUDENT_DERIVED, objective_problems, unused_settings
from opd.training.multitask import prompts_per_task, task_configs
from opd.training.setup import objective_from_config


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
        objective = objective_from_config(valid_config)
    except InvalidInput as error:
        further.append(str(error))
    else:
        further += objective_problems(valid_config, objective)
        further += teacher_problems(valid_config, objective)
        further += user_loss_problems(valid_config, objective)
        further += prefix_problems(valid_config, objective)
    further += [
        message
        for task_config in task_configs(valid_config)
        for message in (*game_problems(task_config), *view_problems(task_config))
    ]
    problems += [message for message in further if not invalid & invalid_names([message])]
    return list(dict.fromkeys(problems))


def user_loss_problems(config: Config, objective: Objective) -> Iterator[str]:
    """Report settings that a loss of the user's own rules out, or that only it reads."""
    divisor = config.objective.loss_divisor
    if objective.user_loss is None:
        if divisor != "update":
            yield (
                f"loss_divisor is {divisor}, but the objective is {config.objective.objective}, "
                "one of ours, whose denominator is known; leave it at update"
            )
        return
    name = objective.user_loss.name
    if distributed.is_distributed() and divisor == "update":
        yield (
            f"objective {name} is a loss of your own, which has to see all rollouts of an update, "
            "but they are spread over several processes; start one process, or set loss_divisor to "
            "what the loss divides by"
        )
    default = setting_fields()["denominator"].field.default
    if config.objective.denominator != default:
        yield (
            f"denominator is {config.objective.denominator}, but {name} is a loss of your own, "
            f"which divides by what it likes itself; leave it at {default}"
        )
    if config.record.probe_every:
        yield (
            f"probe_every is {config.record.probe_every}, but the gradient probe splits the loss "
            f"by tokens, and {name} is a loss of a whole update; set probe_every to 0"
        )
    if objective.user_loss.support == "none" or not config.objective.map_eos:
        return
    if objective.user_loss.support == "full":
        yield (
            f"map_eos would not change teacher_logits, which {name} asks for; remove map_eos, or "
            "ask for teacher_logp or teacher_topk"
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
    if NO_TEACHER in teachers and len(teachers) > 1:
        yield (
            f"teacher is {NO_TEACHER} in one task and {max(teachers, key=len)} in another, but the "
            "rows of a run have the same columns; give every task a teacher, or none"
        )
    if config.hardware.teacher_weights != "saved" and all(
        teacher_type(teacher) in (ServerTeacher, NoTeacher, CachedTeacher) for teacher in teachers
    ):
        yield (
            f"teacher_weights is {config.hardware.teacher_weights}, but no teacher runs in this "
            "process; set it to saved: quantisation of a server's model is configured in the server"
        )
    addresses = {address.rstrip("/") for address in config.rollout_servers.rollout_servers}
    for teacher in teachers:
        if teacher.rstrip("/") in addresses:
            yield (
                f"teacher {teacher} is also one of rollout_servers, which load the student's "
                "weights after every step; use another server for the teacher"
            )
    derived = [teacher for teacher in teachers if teacher in STUDENT_DERIVED]
    if derived and len(teachers) > 1:
        yield (
            f"teacher {derived[0]!r} is derived from the student and cannot be used beside another "
            "teacher; give all tasks the same, or each task a model"
        )
    if "base" in teachers and not config.optimizer.lora_rank:
        yield (
            'teacher "base" is the student without its LoRA adapters, but lora_rank is 0; set '
            "lora_rank, or choose another teacher"
        )
    for task_config in configs:
        yield from capability_problems(task_config, objective)


def capability_problems(config: Config, objective: Objective) -> Iterator[str]:
    """Report settings that need more than a teacher of this kind can provide.

    Whether a server scores chosen ids is known only when it is connected
    (`opd.teachers.connection`).

    Args:
        config: Settings of a run or task.
        objective: Its objective.

    Yields:
        The messages; each names an alternative.
    """
    loss, needs = config.objective, objective.requirements
    capabilities = teacher_type(config.teacher).possible_capabilities
    if not capabilities:
        yield from without_teacher_problems(config, objective)
        return
    alternatives = "teacher_topk, sampled_token or one of their variants"
    for needed, capability, feature, remedy in (
        (
            needs.support == "full" or needs.distributions,
            Capability.DISTRIBUTIONS,
            f"objective {loss.objective} with baseline {loss.baseline}, which needs its full "
            "distribution",
            alternatives,
        ),
        (
            config.rollout.temperature != 1 and teacher_type(config.teacher) is ServerTeacher,
            Capability.DISTRIBUTIONS,
            f"temperature {config.rollout.temperature}, because servers return log-probabilities "
            "at 1",
            "temperature 1",
        ),
        (
            loss.entropy_top_fraction < 1,
            Capability.DISTRIBUTIONS,
            "entropy_top_fraction, which needs full distributions",
            "entropy_top_fraction 1",
        ),
        (
            config.record.probe_every > 0,
            Capability.HIDDEN_STATES,
            "probe_every, which needs its hidden states",
            "probe_every 0",
        ),
    ):
        if needed and capability not in capabilities:
            yield (
                f"the teacher {config.teacher} is {teacher_type(config.teacher).place} and does "
                f"not support {feature}; use {remedy}, or a teacher in this process"
            )
    if teacher_type(config.teacher) is CachedTeacher:
        yield from cache_problems(config, objective)
    if (
        loss.map_eos
        and teacher_type(config.teacher) is ServerTeacher
        and not config.remote_teacher.teacher_eos
    ):
        yield (
            f"map_eos needs the EOS ids of the teacher {config.teacher}, which a server does not "
            "say; set teacher_eos to them, or map_eos off"
        )


def cache_problems(config: Config, objective: Objective) -> Iterator[str]:
    """Report settings that need scores which no cache can hold.

    Args:
        config: Settings of a run or task whose teacher is a cache.
        objective: Its objective.

    Yields:
        The messages.
    """
    if config.rollout.prefixes != "dataset":
        yield (
            f"teacher is {config.teacher}, which holds scores of responses that are known before "
            f"the run, but prefixes is {config.rollout.prefixes}; set prefixes to dataset"
        )
    if objective.requirements.support in ("student", "union"):
        yield (
            f"teacher is {config.teacher}, which holds the teacher's own most probable ids, but "
            f"objective {config.objective.objective} compares at the student's, which change; use "
            "teacher_topk or one of its variants, or a teacher in this process"
        )


def view_problems(config: Config) -> Iterator[str]:
    """Report settings of the teacher's prompts that exclude each other."""
    name = config.view.teacher_template
    if config.teacher == "none" and has_view(config):
        yield (
            "teacher is none, but settings of the teacher's prompts are given; remove "
            "teacher_view, teacher_system, teacher_template and teacher_thinking, or set a teacher"
        )
        return
    if name == "own" and not teacher_type(config.teacher).is_separate:
        yield (
            f"teacher_template is own, but the teacher {config.teacher} has no chat template of "
            "its own in this process; leave it at student, or give a Jinja file"
        )
    if is_games(config.data.task) and config.games.layout == "trajectory" and name != "student":
        yield (
            f"teacher_template is {name}, but with layout trajectory a row holds the text between "
            "the student's responses too, in the student's chat template; set layout to turns"
        )


def without_teacher_problems(config: Config, objective: Objective) -> Iterator[str]:
    """Report settings that read a teacher where there is none.

    Args:
        config: Settings of a run or task without a teacher.
        objective: Its objective.

    Yields:
        The messages.
    """
    loss = config.objective
    for needed, what, remedy in (
        (
            objective.requirements.teacher,
            f"objective {loss.objective} with baseline {loss.baseline} reads one",
            "use negative_log_likelihood or reward_only",
        ),
        (loss.map_eos, "map_eos reads its EOS ids", "remove map_eos"),
        (
            loss.entropy_top_fraction < 1,
            f"entropy_top_fraction {loss.entropy_top_fraction:g} needs the statistics of both "
            "models' distributions",
            "set it to 1",
        ),
        (
            config.record.probe_every > 0,
            f"probe_every {config.record.probe_every} compares estimators of its divergence",
            "set it to 0",
        ),
    ):
        if needed:
            yield f"teacher is {NO_TEACHER}, but {what}; set a teacher, or {remedy}"


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
