"""What a pair looks like before training, from a few hundred rollouts of the student.

All numbers come from the diagnostics of a training step: the panel of metrics, the gradient probe,
the mask rules' shares and the continuation probe. A bank of runs holds the same numbers of its
pairs, so that a forecast (`opd.analysis.scout.forecast`) compares like with like.

Shapes: B responses, T response positions, M problems.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diagnostics.errors import InvalidInput
from opd.analysis.continuation import grade_correct
from opd.analysis.scout.accuracies import accuracy_values, continuation_values, sample_responses
from opd.analysis.scout.columns import metric_values
from opd.analysis.scout.gradients import gradient_values
from opd.analysis.scout.special_tokens import RuleShare, rule_shares, special_rules
from opd.config.settings import Config, with_settings
from opd.data.prompts import encode_prompts
from opd.data.tasks import prompt_hash
from opd.runtime.seeds import ROLLOUT
from opd.scoring.request import METRICS_ONLY, ScoreRequest
from opd.scoring.score import score_batch
from opd.teachers.factory import make_pair
from opd.teachers.pair import ModelPair
from opd.teachers.teacher import teacher_type
from opd.training.checks.same_weights import is_same_source, same_weights
from opd.training.setup import load_problem_task, require_answers

MIN_PROMPTS = 8
"""Fewest different prompts: they are the sampling unit of every number."""
GROUP_SIZE = 4
"""Responses per prompt."""
SUPPORT_K = 32
"""Depth of both models' top-K lists, or the vocabulary's size if that is smaller."""


@dataclass(frozen=True)
class PairMeasurements:
    """What was measured on a pair."""

    values: Mapping[str, float]
    """Measurements by name."""
    rules: tuple[RuleShare, ...]
    """Special tokens that the student wrote, each by the rule that would mask it."""


def pair_measurements(
    student: str | Path,
    teacher: str | Path,
    task: str | Path = "lab",
    max_prompt: int = 512,
    max_response: int = 512,
    rollouts: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Measure a student and a teacher before training; see `measure_pair`.

    Args:
        student: Folder or hub name.
        teacher: Folder or hub name.
        task: A task of problems with answers (`opd.data.tasks.load_task`).
        max_prompt: Maximum prompt tokens.
        max_response: Maximum response tokens.
        rollouts: Responses of the student, GROUP_SIZE to each prompt.
        seed: Seed of problems and sampling.

    Returns:
        Measurements by name.
    """
    config = scout_config(
        str(student), str(teacher), str(task), max_prompt, max_response, rollouts, seed
    )
    return dict(measure_pair(config).values)


def scout_config(
    student: str,
    teacher: str,
    task: str,
    max_prompt: int,
    max_response: int,
    rollouts: int,
    seed: int,
) -> Config:
    """Return the settings of a scout: those of a run with one step of all rollouts.

    Args:
        student: Folder or hub name.
        teacher: Folder or hub name.
        task: Source of problems.
        max_prompt: Maximum prompt tokens.
        max_response: Maximum response tokens.
        rollouts: Responses of the student, GROUP_SIZE to each prompt.
        seed: Seed of problems and sampling.

    Returns:
        The settings.

    Raises:
        InvalidInput: Too few rollouts.
    """
    prompts = rollouts // GROUP_SIZE
    if prompts < MIN_PROMPTS:
        raise InvalidInput(
            f"rollouts is {rollouts}, {GROUP_SIZE} to each prompt, and so enough for {prompts} of "
            f"the {MIN_PROMPTS} prompts that a scout needs, since prompts are its sampling unit; "
            f"set rollouts to at least {MIN_PROMPTS * GROUP_SIZE}"
        )
    return with_settings(
        Config(student=student, teacher=teacher, out="scout", seed=seed),
        task=task,
        max_prompt=max_prompt,
        max_response=max_response,
        prompts_per_step=prompts,
        group_size=GROUP_SIZE,
    )


def measure_pair(config: Config) -> PairMeasurements:
    """Measure a pair from one step of rollouts on training problems.

    The student writes `group_size` responses to each of `prompts_per_step` problems; the teacher
    one to each, and it continues the student's first response to each from half of the median
    length.

    Args:
        config: Settings of a run; its task, models, lengths, temperature and seed are used.

    Returns:
        Measurements by name, with standard errors over prompts under NAME_se, or the ends of 95 %
        intervals over prompts under NAME_low and NAME_high:
        student_accuracy, teacher_accuracy, accuracy_gap: Shares of correct responses, and the
            teacher's minus the student's on the same problems.
        continuation_gain: Of the teacher over the student, from the student's prefixes
            (`opd.analysis.continuation.paired_gain`).
        The names of `columns.COLUMNS`: Metrics of the catalogue; special tokens are those of
            `special_rules`, their gap is the mean of log student - log teacher over them, "plain"
            that over others.
        The names of `gradients.ESTIMATORS`: Squared length of the mean gradient of the LM head
            divided by the variance of one response's gradient, NaN where it cannot be estimated.
        best_gamma: Discount of the estimator with the least error at this number of responses.
        prompts, responses: Their numbers.

    Raises:
        InvalidInput: The teacher has no weights in this process, or those of the student; the
            tokenizers differ; the task has no answers or too few prompts.
    """
    check_teacher(config)
    pair = make_pair(config)
    if same_weights(pair.student.network, pair.teacher.model.network):
        raise _equal_models(config)
    task = load_problem_task(config, pair)
    require_answers(task, config, "a scout compares accuracies", "choose another task")
    drawn_problems = task.train(0, config.data.prompts_per_step)  # repeated from the second epoch
    problems = list({prompt_hash(problem): problem for problem in drawn_problems}.values())
    if len(problems) < MIN_PROMPTS:
        raise InvalidInput(
            f"{config.data.task} has {len(problems)} different prompts, but prompts are the "
            f"sampling unit and a scout needs {MIN_PROMPTS} or more; add problems"
        )
    max_prompt = config.data.max_prompt
    prompts, first_prompts = (
        encode_prompts(pair.tokenizer, problems, count, max_prompt).to(pair.student.device)
        for count in (config.data.group_size, 1)
    )
    rollouts = sample_responses(config, pair.student, prompts, pair.eos, ROLLOUT)
    correct = grade_correct(pair, rollouts.tokens, rollouts.mask, prompts.answers, task)
    rollouts = rollouts.with_fields(reward=torch.tensor(correct, device=rollouts.mask.device))
    batch = score_batch(pair.student, pair.teacher, prompts, rollouts, _score_request(config, pair))
    student_correct = np.array(correct).reshape(len(problems), -1)
    rules = special_rules(pair, batch.scored)
    values = {
        **metric_values(batch.scored, rules),
        **accuracy_values(config, pair, task, first_prompts, student_correct),
        **continuation_values(config, pair, task, first_prompts, rollouts, student_correct),
        **gradient_values(config, pair, batch),
        "prompts": float(len(problems)),
        "responses": float(len(prompts)),
    }
    return PairMeasurements(values, rule_shares(batch.scored, rules))


def check_teacher(config: Config) -> None:
    """Refuse a teacher whose distributions are not available, or that is the student.

    Args:
        config: Settings of the scout.

    Raises:
        InvalidInput: See above; the message names the teacher.
    """
    if not teacher_type(config.teacher).is_separate:
        raise InvalidInput(
            f"teacher is {config.teacher!r}, but a scout reads the teacher's distributions and "
            "lets it write; name a folder or hub model whose weights are loaded in this process"
        )
    if is_same_source(config.student, config.teacher):
        raise _equal_models(config)


def _equal_models(config: Config) -> InvalidInput:
    return InvalidInput(
        f"the teacher {config.teacher} has the weights of the student {config.student}, so there "
        "is nothing to distil; name another teacher"
    )


def _score_request(config: Config, pair: ModelPair) -> ScoreRequest:
    """Return a request of both top-K lists and of statistics of the distributions."""
    depth = min(SUPPORT_K, pair.student.vocabulary)
    return ScoreRequest(
        requirements=replace(METRICS_ONLY, support="union", support_k=depth),
        temperature=config.rollout.temperature,
        eos_map=pair.eos_map,
        max_tokens_per_microbatch=config.hardware.max_tokens_per_microbatch,
        max_logits_per_chunk=config.hardware.max_logits_per_chunk,
    )
