"""The responses of a step: who writes each of them, and how they are drawn.

The student samples with the rollout engine, the teacher with its own weights in this process, and
a dataset gives its text. `opd.config.prefixes` is the setting. A row's response depends on its
writer and on its own noise only, so that the split of a batch over processes changes nothing.

Shapes: B responses of this rank.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diagnostics.batch import ORIGINS, STUDENT, TEACHER, Rollouts
from opd.config.prefixes import Prefixes
from opd.config.settings import Config
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts
from opd.data.responses import encode_response
from opd.rollouts.base import BatchSlice, Engine
from opd.rollouts.given import given_rollouts, join_rollouts
from opd.rollouts.hf_engine import sample
from opd.runtime.seeds import WRITER, derive_seed
from opd.teachers.pair import ModelPair
from opd.tokens.eos import student_tokens


def writers(
    prefixes: Prefixes, config: Config, step: int, task: int, part: BatchSlice
) -> list[int]:
    """Draw who writes each response of a step.

    Args:
        prefixes: Who writes responses.
        config: Settings of the task.
        step: Step of the run.
        task: Index of the task.
        part: Rows of this rank.

    Returns:
        An index of `diagnostics.batch.ORIGINS` for each row.
    """
    if not prefixes.partner:
        return [STUDENT] * len(part.rows)
    seed = derive_seed(config.seed, step, WRITER, *([task] if task else []))
    noise = torch.rand(part.total_rows, generator=torch.Generator().manual_seed(seed))
    is_own = noise < prefixes.own_share(step, config.steps)
    partner = ORIGINS.index(prefixes.partner)
    return torch.where(is_own, STUDENT, partner)[part.rows].tolist()


def draw_responses(
    pair: ModelPair,
    engine: Engine,
    prompts: Prompts,
    problems: Sequence[Problem],
    origins: Sequence[int],
    prefixes: Prefixes,
    *,
    config: Config,
    seed: int,
    top_p: float,
    part: BatchSlice,
) -> Rollouts:
    """Return one response to every prompt row, each by its writer.

    Args:
        pair: Student and teacher.
        engine: Rollout engine of the student.
        prompts: B prompts.
        problems: The problem of each row.
        origins: Who writes each response.
        prefixes: Who writes responses of this batch.
        config: Settings of the task.
        seed: Seed of the sampling noise. Every writer draws from the same table of noise, of which
            a row belongs to one writer.
        top_p: Nucleus mass of student and teacher.
        part: Rows of this rank.

    Returns:
        B rollouts.
    """
    options: dict[str, Any] = {
        "max_response": config.rollout.max_response,
        "temperature": config.rollout.temperature,
        "top_p": top_p,
    }
    parts: list[tuple[int, list[int], Rollouts]] = []
    for writer in sorted(set(origins)):
        rows = [row for row, origin in enumerate(origins) if origin == writer]
        row_prompts = prompts if len(rows) == len(origins) else prompts.rows(rows)
        noise: dict[str, Any] = {
            "generator": torch.Generator().manual_seed(seed),
            "batch_slice": BatchSlice([part.rows[row] for row in rows], part.total_rows),
        }
        if writer == STUDENT:
            rollouts = engine.sample(row_prompts, pair.eos, **options, **noise)
        elif writer == TEACHER:
            rollouts = sample_teacher(pair, row_prompts.teacher_prompts, config, **options, **noise)
        else:
            rollouts = given_rollouts(
                row_prompts,
                [encode_response(pair.tokenizer, problems[row], pair.eos) for row in rows],
                vocabulary=pair.student.vocabulary,
                max_response=config.rollout.max_response,
                temperature=config.rollout.temperature,
            )
        parts.append((writer, rows, rollouts))
    if prefixes.partner and prefixes.has_own:
        # also where this process has the rows of one writer, so that all have the same fields
        # at top_p 1 sampler_logp is that of the whole softmax, and vLLM does not know it below 1
        has_softmax = config.rollout.engine == "hf" and top_p < 1
        return join_rollouts(parts, top_p=top_p, with_softmax=has_softmax)
    ((writer, _, rollouts),) = parts
    if writer == TEACHER:
        return rollouts.with_fields(origin=torch.full_like(rollouts.prompt, TEACHER))
    return rollouts


def sample_teacher(pair: ModelPair, prompts: Prompts, config: Config, **options: Any) -> Rollouts:
    """Sample responses from the teacher's own weights.

    They end at an EOS id of either model; with `map_eos` an EOS that only the teacher uses becomes
    the student's own.

    Args:
        pair: Student and teacher.
        prompts: What the teacher reads.
        config: Settings of the task.
        **options: Arguments of `opd.rollouts.hf_engine.sample`.

    Returns:
        The rollouts; `sampler_logp` and `softmax_logp` are the teacher's.
    """
    teacher = pair.teacher
    eos = [*pair.eos, *(token for token in teacher.eos or () if token not in pair.eos)]
    with teacher.on_device(pair.student.device), teacher.generating() as model:
        rollouts = sample(
            model,
            prompts,
            eos,
            generation_batch_size=config.rollout.generation_batch_size,
            **options,
        )
    eos_map = pair.eos_map
    if not config.objective.map_eos or eos_map is None:
        return rollouts
    return replace(rollouts, tokens=student_tokens(rollouts.tokens, eos_map) * rollouts.mask)
