"""The continuation probe (B-9): is the teacher still useful where the student has got to?

The student answers held-out problems; the teacher goes on from its first L tokens, for several L,
and both outcomes are graded. The gain is the teacher's accuracy from there minus the student's own,
on the same problems: the ground truth of what prefix drift costs, and the dearest diagnostic.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.stats import gain_interval
from opd.config.settings import from_json
from opd.data.chain_task import Problem
from opd.data.grading.graders import grade_responses, refuse_own_of_record
from opd.data.prompts import Prompts, encode
from opd.data.tasks import Task
from opd.models.model import CausalLM
from opd.rollouts.hf_engine import sample
from opd.runtime.seeds import CONTINUATION, derive
from opd.serving.addresses import is_url
from opd.teachers.factory import make_pair
from opd.teachers.pair import ModelPair
from opd.training.setup import load


def continuation(
    run: Path, lengths: Sequence[int], count: int, trained: bool = False, trust: bool = False
) -> list[dict[str, Any]]:
    """A row for each length, also written to RUN/control/continuation.json.

    Args:
      trust: run Python code that lies beside the weights of the models that the record names; what
        the record itself says of it counts for nothing, since the folder may be a stranger's.

    Raises:
      ValueError: a negative length, or the run has several tasks or a teacher of its student.
    """
    if min(lengths) < 0:
        raise InvalidInput(f"lengths are {list(lengths)}; a prefix has 0 tokens or more")
    config = replace(from_json(run / "config.json"), trust_remote_code=trust)
    refuse_own_of_record(config.grader, run / "config.json", trust)
    if config.tasks or config.teacher in ("base", "ema") or is_url(config.teacher):
        raise InvalidInput(
            f"{run} has no teacher of its own, several, or one on a server; the probe samples from "
            "one"
        )
    pair = make_pair(config)
    student = pair.student
    if trained:
        whole = replace(config, student=str(run / "final"), lora_rank=0)
        student = make_pair(whole).student
    task = load(config, pair)
    prompts = encode(pair.tokenizer, task.test(count), 1, config.max_prompt).to(student.device)

    def drawn(model: CausalLM, asked: Prompts, budget: int, length: int) -> Rollouts:
        return sample(
            model,
            asked,
            ends(pair),
            max_response=budget,
            temperature=config.temperature,
            top_p=1.0,
            generator=torch.Generator().manual_seed(derive(config.seed, length, CONTINUATION)),
            generation_batch_size=config.generation_batch_size,
        )

    own = drawn(student, prompts, config.max_response, 0)
    right = graded(pair, own.tokens, own.mask, prompts.answers, task)
    found = []
    for length in sorted(set(lengths)):
        rows = (own.mask.sum(1) > length).nonzero()[:, 0].tolist()
        if not rows or length >= config.max_response:
            continue
        asked = continued(prompts.rows(rows), own.tokens[rows, :length])
        more = drawn(pair.teacher, asked, config.max_response - length, 1 + length)
        tokens = torch.cat([own.tokens[rows, :length], more.tokens], 1)
        mask = torch.cat([own.mask[rows, :length], more.mask], 1)
        answers = [prompts.answers[i] for i in rows]
        both = np.array([graded(pair, tokens, mask, answers, task), [right[i] for i in rows]])
        found.append({"length": length, **gain(both[0], both[1])})
    (run / "control").mkdir(exist_ok=True)
    write_text(run / "control" / "continuation.json", json.dumps(found, indent=1))
    return found


def ends(pair: ModelPair) -> list[int]:
    """Ids that end a response of either model."""
    theirs = pair.endings.teacher if pair.endings is not None else ()
    return sorted({*pair.eos, *theirs})


def continued(prompts: Prompts, prefix: torch.Tensor) -> Prompts:
    """The prompts with (B, L) tokens of a response behind them, all of them real."""
    return replace(
        prompts,
        tokens=torch.cat([prompts.tokens, prefix], 1),
        mask=torch.cat([prompts.mask, torch.ones_like(prefix, dtype=torch.bool)], 1),
    )


def graded(
    pair: ModelPair, tokens: torch.Tensor, mask: torch.Tensor, answers: list[str], task: Task
) -> list[float]:
    """1 for each response that is right, else 0."""
    known = [Problem(prompt="", answer=answer) for answer in answers]
    rewards = grade_responses(pair.tokenizer, tokens, mask, known, task.grade, ends(pair))
    return [float(reward >= 1) for reward in rewards]


def gain(teacher: np.ndarray, student: np.ndarray) -> dict[str, float]:
    """Accuracies of both on the same problems and their paired difference, with its interval."""
    away = teacher - student
    low, high = gain_interval(away)
    return {
        "problems": len(away),
        "teacher": float(teacher.mean()),
        "student": float(student.mean()),
        "gain": float(away.mean()),
        "low": low,
        "high": high,
    }
