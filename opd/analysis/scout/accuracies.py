"""Accuracies of a pair on the same problems, and the teacher's when it continues the student.

Shapes: B responses, T response positions, M problems, S responses of the student to each.
"""

import math
from functools import partial

import numpy as np
import torch

from diagnostics.batch import Rollouts
from diagnostics.stats import gain_interval, share_interval
from opd.analysis.continuation import continuation_gain, grade_correct, response_eos_ids
from opd.config.settings import Config
from opd.data.prompts import Prompts
from opd.data.tasks import Task
from opd.models.model import CausalLM
from opd.rollouts.hf_engine import sample
from opd.runtime.seeds import CONTINUATION, CONTROL, derive_seed
from opd.teachers.pair import ModelPair


def sample_responses(
    config: Config,
    model: CausalLM,
    prompts: Prompts,
    eos: list[int],
    purpose: int,
    prefix_length: int = 0,
) -> Rollouts:
    """Sample one response of a model to each prompt, with the settings of a scout.

    Args:
        config: Settings of the scout.
        model: The model.
        prompts: B prompts.
        eos: Ids that end a response.
        purpose: Purpose of the noise (`opd.runtime.seeds`).
        prefix_length: Tokens of the response that the prompts hold already.

    Returns:
        The B responses.
    """
    return sample(
        model,
        prompts,
        eos,
        max_response=config.rollout.max_response - prefix_length,
        temperature=config.rollout.temperature,
        top_p=1.0,
        generator=torch.Generator().manual_seed(derive_seed(config.seed, 0, purpose)),
        generation_batch_size=config.rollout.generation_batch_size,
    )


def accuracy_values(
    config: Config, pair: ModelPair, task: Task, prompts: Prompts, student_correct: np.ndarray
) -> dict[str, float]:
    """Sample one response of the teacher to each problem and compare accuracies.

    Args:
        config: Settings of the scout.
        pair: Student and teacher.
        task: The task.
        prompts: M prompts.
        student_correct: (M, S) 1 or 0 for each response of the student.

    Returns:
        Accuracies and their paired difference, with 95 % intervals over problems.
    """
    rollouts = sample_responses(
        config, pair.teacher.model, prompts.teacher_prompts, response_eos_ids(pair), CONTROL
    )
    teacher = np.array(grade_correct(pair, rollouts.tokens, rollouts.mask, prompts.answers, task))
    student = student_correct.mean(1)
    columns = {
        "student_accuracy": (student, share_interval(student)),
        "teacher_accuracy": (teacher, share_interval(teacher)),
        "accuracy_gap": (teacher - student, gain_interval(teacher - student)),
    }
    return {
        key: value
        for name, (column, (low, high)) in columns.items()
        for key, value in (
            (name, float(column.mean())),
            (f"{name}_low", low),
            (f"{name}_high", high),
        )
    } | {"teacher_truncated_share": 1 - float(rollouts.ended.double().mean())}


def continuation_values(
    config: Config,
    pair: ModelPair,
    task: Task,
    prompts: Prompts,
    rollouts: Rollouts,
    student_correct: np.ndarray,
) -> dict[str, float]:
    """Let the teacher continue the student's first response to each problem.

    It continues from half of the median length of the student's responses.

    Args:
        config: Settings of the scout.
        pair: Student and teacher.
        task: The task.
        prompts: M prompts.
        rollouts: M S responses of the student.
        student_correct: (M, S) 1 or 0 for each of them.

    Returns:
        continuation_gain with its 95 % interval, and continuation_length in tokens; NaN where no
        response is long enough.
    """
    lengths = rollouts.mask.sum(1)
    prefix_length = int(lengths.double().median()) // 2
    group_size = student_correct.shape[1]
    first_rows = torch.arange(len(prompts), device=lengths.device) * group_size
    long_rows = (lengths[first_rows] > prefix_length).nonzero()[:, 0].tolist()
    names = {"gain": "continuation_gain", "low": "continuation_gain_low"}
    names["high"] = "continuation_gain_high"
    if not long_rows or prefix_length < 1:
        return dict.fromkeys([*names.values(), "continuation_length"], math.nan)
    gain = continuation_gain(
        pair,
        task,
        prompts.rows(long_rows),
        rollouts.rows([i * group_size for i in long_rows]),
        student_correct[long_rows, 0].tolist(),
        prefix_length,
        partial(
            sample_responses,
            config,
            pair.teacher.model,
            eos=response_eos_ids(pair),
            purpose=CONTINUATION,
            prefix_length=prefix_length,
        ),
    )
    return {name: gain[key] for key, name in names.items()} | {
        "continuation_length": float(prefix_length)
    }
