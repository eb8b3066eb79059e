"""Which objectives are valid on responses of which writer, before a model is loaded.

A loss that reads the sampled token estimates a mean over the student's own samples. On responses of
a sampler whose log-probabilities are known it needs an importance ratio, and on given ones it has
no meaning. A loss of the prefix alone, on a support or the whole vocabulary, is the divergence at
whatever prefixes it is given.
"""

from collections.abc import Iterator

from diagnostics.errors import InvalidInput
from opd.config.prefixes import Prefixes, parse_prefixes
from opd.config.settings import Config
from opd.envs.task import is_games
from opd.objectives.objective import Objective
from opd.teachers.teacher import Capability, teacher_type
from opd.training.multitask import task_configs

LIKELIHOOD = "negative_log_likelihood"


def prefix_problems(config: Config, objective: Objective) -> Iterator[str]:
    """Report prefixes that do not go with the objective, the data, the engine or the teacher.

    Args:
        config: Settings of the run.
        objective: Its objective.

    Yields:
        The messages.
    """
    text = config.rollout.prefixes
    try:
        prefixes = parse_prefixes(text)
    except InvalidInput:  # reported with the settings
        return
    if objective.local.likelihood and prefixes.has_own:
        yield (
            f"objective {config.objective.objective} with prefixes {text} learns from the "
            "student's own samples, on which its mean gradient is zero; set prefixes to dataset or "
            "teacher"
        )
    if prefixes.is_on_policy:
        return
    if config.rollout.rollout_lag:
        yield (
            f"rollout_lag is {config.rollout.rollout_lag} and prefixes is {text}; only the "
            "student's own responses can be sampled ahead: set rollout_lag to 0"
        )
    if prefixes.replay_age and len(config.tasks) > 1 and config.data.task_order != "mixed":
        yield (
            f"prefixes is {text}, but with task_order {config.data.task_order} the next step is of "
            "another task; set task_order to mixed"
        )
    if prefixes.partner == "dataset" and not prefixes.has_own and config.data.group_size > 1:
        yield (
            f"group_size is {config.data.group_size}, but prefixes dataset has one response to a "
            "prompt, so a group would be copies of it; set group_size to 1"
        )
    for task_config in task_configs(config):
        yield from _task_problems(task_config, prefixes)
    yield from _objective_problems(config, objective, prefixes)


def _task_problems(config: Config, prefixes: Prefixes) -> Iterator[str]:
    """Report a task whose responses cannot come from there."""
    text = config.rollout.prefixes
    if prefixes.partner and is_games(config.data.task):
        yield (
            f"prefixes is {text}, but {config.data.task} is a game, whose turns are the student's; "
            "set prefixes to student"
        )
    if not prefixes.samples_teacher:
        return
    kind = teacher_type(config.teacher)
    if Capability.HIDDEN_STATES not in kind.possible_capabilities:
        yield (
            f"prefixes is {text}, but the teacher {config.teacher} does not run in this process "
            "and cannot be sampled from; set teacher to a model, or write its responses to a file "
            "and set prefixes to dataset"
        )


def _objective_problems(config: Config, objective: Objective, prefixes: Prefixes) -> Iterator[str]:
    """Report a loss that would be biased on responses of others, or of an older student."""
    name, ratio, text = config.objective.objective, config.objective.ratio, config.rollout.prefixes
    loss = objective.user_loss
    if prefixes.reads_data and loss is not None and "sampler_logp" in loss.asks:
        yield (
            f"objective {loss.name} asks for sampler_logp, which is not known of responses from a "
            "dataset; set prefixes to student or teacher"
        )
    if prefixes.reads_data and ratio != "none":
        yield (
            f"ratio is {ratio}, which compares the student with the sampler of a response, but "
            f"with prefixes {text} the sampler is not known; set ratio to none"
        )
        return
    if not objective.requirements.own_samples or config.objective.allow_unweighted:
        return
    bias = f"prefixes is {text}, but {name} takes each token as a sample of the student"
    if config.objective.reward_weight or config.objective.gamma:
        bias += ", also where it weighs it by later costs or the reward"
    override = "or set allow_unweighted to train with this bias"
    if prefixes.reads_data:
        yield (
            f"{bias}, and responses from a dataset have no importance ratio; use "
            f"{LIKELIHOOD}, or an objective that compares both models at the prefix (on a support "
            f"or the whole vocabulary, at gamma 0 and without a reward), {override}"
        )
    elif ratio == "none":
        yield (
            f"{bias}; set ratio to token or sequence, use an objective that compares both models "
            f"at the prefix, at gamma 0 and without a reward, {override}"
        )
    elif ratio == "token" and prefixes.samples_teacher and _spans_tokens(config):
        yield (
            f"ratio is token, but {name} weighs a token by later costs or the reward, which depend "
            f"on the tokens that the teacher wrote after it; set ratio to sequence, {override}"
        )


def _spans_tokens(config: Config) -> bool:
    """Return whether the credit of a token contains what later tokens lead to."""
    return bool(config.objective.gamma or config.objective.reward_weight)
