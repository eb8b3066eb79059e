"""Bytes of a scored batch against those of real ones, and master weights of adapters."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.analysis.plan.memory import batch_bytes
from opd.analysis.plan.plan import make_plan
from opd.analysis.plan.workload import make_workload
from opd.models.model import split_head
from opd.scoring.request import ScoreRequest
from opd.scoring.score import score_batch
from opd.teachers.teacher import LocalTeacher
from opd.training.setup import objective_from_config
from tests.opd.analysis.plan.pairs import MACHINE, padded_rows, real_network, saved, settings

ROWS, PROMPT, RESPONSE, WIDTH, V = 4, 12, 40, 64, 1000


def tensors(value: Any) -> list[Tensor]:
    """Tensors of a dataclass of dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    parts = [getattr(value, x.name) for x in fields(value)] if is_dataclass(value) else []
    return [x for part in parts for x in tensors(part)]


def planned_and_real_bytes(objective: str, k: int, dtype: str) -> tuple[float, float]:
    """Bytes of a batch as planned, and of the tensors of one that was scored."""
    config = settings(
        "",
        "",
        objective=objective,
        support_k=k,
        dtype=dtype,
        max_prompt=PROMPT,
        max_response=RESPONSE,
        prompts_per_step=ROWS,
        group_size=1,
    )
    needs = objective_from_config(config).requirements
    model = split_head(real_network("qwen2").to(getattr(torch, dtype)), V)
    prompts, rollouts = padded_rows(ROWS, PROMPT, RESPONSE)
    teacher = LocalTeacher("teacher", model)
    batch = score_batch(model, teacher, prompts, rollouts, ScoreRequest(requirements=needs))
    storages = [x.untyped_storage() for x in tensors(batch.scored)]
    if batch.teacher_hidden is not None:
        storages.append(batch.teacher_hidden.untyped_storage())
    real = sum({x.data_ptr(): x.nbytes() for x in storages}.values())
    workload = make_workload(config, 1, PROMPT, RESPONSE)
    return batch_bytes(workload, config, needs, WIDTH), real


@pytest.mark.parametrize("objective", ["sampled_token", "teacher_topk", "union_topk"])
def test_a_support_takes_the_bytes_of_a_real_one(objective: str) -> None:
    small, large = (planned_and_real_bytes(objective, k, "float32") for k in (4, 8))
    # a union has another byte an id, which says whether the id counts
    assert large[0] - small[0] == pytest.approx(large[1] - small[1], rel=0.07)
    assert small[1] < small[0] < 1.4 * small[1], "columns of training are added to those of scoring"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_the_teacher_take_the_bytes_of_real_ones(dtype: str) -> None:
    full, sampled = (
        planned_and_real_bytes(x, 4, dtype) for x in ("full_reverse_kl", "sampled_token")
    )
    assert full[0] - sampled[0] == full[1] - sampled[1]


def test_adapters_alone_have_master_weights(tmp_path: Path) -> None:
    student = saved(tmp_path, "qwen2")
    plan = make_plan(settings(student, "base", lora_rank=2, dtype="bfloat16"), MACHINE)
    assert 0 < plan.student.num_trainable < plan.student.num_weights / 10
    (optimizer,) = [x for x in plan.phases if x.name == "optimizer"]
    (masters,) = [x.bytes for x in optimizer.terms if x.name == "float32 master weights"]
    assert masters == 4 * plan.student.num_trainable
