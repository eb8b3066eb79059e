"""The continuation probe (B-9): teacher accuracy when continuing from student prefixes.

The student answers held-out problems; the teacher continues from the first L tokens of its
response, for several L, and both are graded. The gain is the teacher's accuracy minus the student's
own on the same problems: it measures directly what prefix drift costs, and is the most expensive
diagnostic.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.stats import gain_interval
from opd.analysis.probed_run import held_out_prompts, load_trained_student, read_probed_config
from opd.data.grading.graders import grade_responses
from opd.data.prompts import Prompts
from opd.data.tasks import Task
from opd.models.model import CausalLM
from opd.rollouts.hf_engine import sample
from opd.runtime.seeds import CONTINUATION, derive_seed
from opd.teachers.factory import make_pair
from opd.teachers.pair import ModelPair
from opd.training.setup import load_problem_task


def probe_continuation(
    run: Path,
    lengths: Sequence[int],
    count: int,
    trained: bool = False,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Measure the teacher's accuracy from student prefixes; write RUN/control/continuation.json.

    Args:
        run: A run folder.
        lengths: Prefix lengths in tokens.
        count: Number of held-out problems.
        trained: Use the trained student instead of the initial one.
        trust_remote_code: Run Python code stored with the models that the run's config names. The
            config's own setting is ignored, since the folder may come from somebody else.

    Returns:
        One row per length that some responses reach: the length and the values of `paired_gain`.

    Raises:
        InvalidInput: A negative length, several tasks, or a teacher that cannot be sampled
            independently of the student.
    """
    if min(lengths) < 0:
        raise InvalidInput(f"lengths are {list(lengths)}; each must be 0 tokens or more")
    config = read_probed_config(run, trust_remote_code)
    pair = make_pair(config)
    student = load_trained_student(run, config) if trained else pair.student
    task = load_problem_task(config, pair)
    prompts = held_out_prompts(config, pair, task, count)

    def sample_responses(model: CausalLM, inputs: Prompts, budget: int, length: int) -> Rollouts:
        return sample(
            model,
            inputs,
            response_eos_ids(pair),
            max_response=budget,
            temperature=config.rollout.temperature,
            top_p=1.0,
            generator=torch.Generator().manual_seed(derive_seed(config.seed, length, CONTINUATION)),
            generation_batch_size=config.rollout.generation_batch_size,
        )

    student_rollouts = sample_responses(student, prompts, config.rollout.max_response, 0)
    student_correct = grade_correct(
        pair, student_rollouts.tokens, student_rollouts.mask, prompts.answers, task
    )
    result_rows = []
    for length in sorted(set(lengths)):
        row_indices = (student_rollouts.mask.sum(1) > length).nonzero()[:, 0].tolist()
        if not row_indices or length >= config.rollout.max_response:
            continue
        gain = continuation_gain(
            pair,
            task,
            prompts.rows(row_indices),
            student_rollouts.rows(row_indices),
            [student_correct[i] for i in row_indices],
            length,
            partial(
                sample_responses,
                pair.teacher.model,
                budget=config.rollout.max_response - length,
                length=1 + length,
            ),
        )
        result_rows.append({"length": length, **gain})
    (run / "control").mkdir(exist_ok=True)
    write_text(run / "control" / "continuation.json", json.dumps(result_rows, indent=1))
    return result_rows


def continuation_gain(
    pair: ModelPair,
    task: Task,
    prompts: Prompts,
    student_rollouts: Rollouts,
    student_correct: Sequence[float],
    length: int,
    sample_continuations: Callable[[Prompts], Rollouts],
) -> dict[str, float]:
    """Let the teacher continue the first tokens of the student's responses, and grade both.

    Args:
        pair: Student and teacher.
        task: The task.
        prompts: B prompts.
        student_rollouts: The student's B responses, each longer than `length`.
        student_correct: 1 or 0 for each of them.
        length: Number of tokens that the teacher continues from.
        sample_continuations: Samples the teacher's responses to prompts with a prefix.

    Returns:
        `paired_gain`.
    """
    prefix = student_rollouts.tokens[:, :length]
    continuation = sample_continuations(append_prefix(prompts.teacher_prompts, prefix))
    tokens = torch.cat([prefix, continuation.tokens], 1)
    mask = torch.cat([student_rollouts.mask[:, :length], continuation.mask], 1)
    teacher_correct = grade_correct(pair, tokens, mask, prompts.answers, task)
    return paired_gain(np.array(teacher_correct), np.array(student_correct))


def response_eos_ids(pair: ModelPair) -> list[int]:
    """Return the ids that end a response of either model."""
    teacher_end_ids = pair.eos_map.teacher if pair.eos_map is not None else ()
    return sorted({*pair.eos, *teacher_end_ids})


def append_prefix(prompts: Prompts, prefix: torch.Tensor) -> Prompts:
    """Append (B, L) response tokens to the prompts, all of them unmasked."""
    return replace(
        prompts,
        tokens=torch.cat([prompts.tokens, prefix], 1),
        mask=torch.cat([prompts.mask, torch.ones_like(prefix, dtype=torch.bool)], 1),
    )


def grade_correct(
    pair: ModelPair, tokens: torch.Tensor, mask: torch.Tensor, answers: list[str], task: Task
) -> list[float]:
    """Return 1 for each correct response, else 0."""
    grades = grade_responses(
        pair.tokenizer, tokens, mask, answers, task.grade, response_eos_ids(pair)
    )
    return [float(grade.reward >= 1) for grade in grades]


def paired_gain(teacher: np.ndarray, student: np.ndarray) -> dict[str, float]:
    """Compute both accuracies on the same problems and their paired difference with its interval.

    Args:
        teacher: 1 or 0 for each problem.
        student: 1 or 0 for each problem.

    Returns:
        Number of problems, both accuracies, the gain and the ends of its interval.
    """
    differences = teacher - student
    low, high = gain_interval(differences)
    return {
        "problems": len(differences),
        "teacher": float(teacher.mean()),
        "student": float(student.mean()),
        "gain": float(differences.mean()),
        "low": low,
        "high": high,
    }
