"""The floor of a step has the products of a real step, and the benchmark runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floor.products import (
    Floor,
    ModelShape,
    Product,
    Work,
    decoder,
    head,
    step_products,
    with_gradients,
)
from benchmarks.floor.report import comparison_table, fit_slope, growth_tables
from benchmarks.floor.trainers import Size, run_toolkit
from benchmarks.random_pair import save_pair
from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.models.model import CausalLM, split_head
from opd.objectives.catalogue import OBJECTIVES
from opd.rollouts.hf_engine import sample
from opd.scoring.loss import policy_loss
from opd.scoring.request import ScoreRequest
from opd.scoring.score import ScoredBatch, score_batch
from opd.teachers.teacher import LocalTeacher

V, ROWS, PROMPT, RESPONSE, K = 97, 3, 5, 4, 6
WORK = Work(ROWS, PROMPT, RESPONSE, K)


def tiny_model(seed: int, **changes: int) -> CausalLM:
    """A random Qwen2 with grouped queries; its attention is plain products, which are counted."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = Qwen2Config(
        vocab_size=V,
        **sizes | changes,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    return split_head(Qwen2ForCausalLM(config).eval(), V)


STUDENT, TEACHER = tiny_model(0), tiny_model(1, hidden_size=32, num_hidden_layers=3)
SHAPES = [
    ModelShape.of(name, model.network.config)
    for name, model in (("student", STUDENT), ("teacher", TEACHER))
]


def floor_flops(phase: str, objective: str) -> int:
    return sum(p.flops for p in step_products(*SHAPES, WORK, objective)[phase])


def scored_batch(objective: str) -> tuple[ScoredBatch, int]:
    """A scored batch without padding, and the FLOPs of its scoring."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(V, (ROWS, PROMPT + RESPONSE), generator=generator)
    prompts = Prompts.from_ids(tokens[:, :PROMPT].tolist(), torch.arange(ROWS))
    rollouts = Rollouts(
        tokens=tokens[:, PROMPT:],
        mask=torch.ones(ROWS, RESPONSE, dtype=torch.bool),
        sampler_logp=torch.zeros(ROWS, RESPONSE),
        prompt=torch.arange(ROWS),
        ended=torch.zeros(ROWS, dtype=torch.bool),
    )
    needs = replace(OBJECTIVES[objective], support_k=K).requirements
    with FlopCounterMode(display=False) as counter:
        batch = score_batch(
            STUDENT,
            LocalTeacher("teacher", TEACHER),
            prompts,
            rollouts,
            ScoreRequest(requirements=needs),
        )
    return batch, counter.get_total_flops()


def test_scoring_has_the_products_of_the_floor_and_one_pass_of_the_student() -> None:
    # one forward pass is a third of what it takes with gradients
    extra = floor_flops("update", "full_reverse_kl") // 3
    for objective in ("full_reverse_kl", "teacher_topk"):
        assert scored_batch(objective)[1] == floor_flops("score", objective) + extra


@pytest.mark.parametrize("objective", ["full_reverse_kl", "teacher_topk"])
def test_an_update_has_the_products_of_the_floor(objective: str) -> None:
    batch, _ = scored_batch(objective)
    with FlopCounterMode(display=False) as counter:
        policy_loss(
            STUDENT,
            batch,
            replace(OBJECTIVES[objective], support_k=K),
            teacher=LocalTeacher("teacher", TEACHER),
        ).backward()
    expected = floor_flops("update", objective)
    tokens = ROWS * RESPONSE
    if objective == "teacher_topk":  # rows of the head are gathered, which is not counted
        expected -= 3 * head(SHAPES[0], tokens, K).flops
    else:  # the teacher's head is computed again; a sum in place (`addmm_`) is not counted
        expected += head(SHAPES[1], tokens, V).flops - head(SHAPES[0], tokens, V).flops
    assert counter.get_total_flops() == expected


def test_a_rollout_has_the_products_of_the_floor() -> None:
    prompts = Prompts.from_ids([[1 + i] * PROMPT for i in range(ROWS)], torch.arange(ROWS))
    with FlopCounterMode(display=False) as counter:
        rollouts = sample(
            STUDENT,
            prompts,
            [V + 1],
            max_response=RESPONSE,
            temperature=1.0,
            top_p=1.0,
            generator=torch.Generator().manual_seed(0),
        )
    assert rollouts.mask.all()
    assert counter.get_total_flops() == floor_flops("rollout", "teacher_topk")


def test_the_floor_runs_the_products_that_it_lists() -> None:
    phases = step_products(*SHAPES, WORK, "full_reverse_kl")
    floor = Floor(phases, torch.float32, torch.device("cpu"))
    for phase, products in phases.items():
        with FlopCounterMode(display=False) as counter:
            assert floor.seconds(phase) >= 0
        assert counter.get_total_flops() == sum(p.flops for p in products)


def test_gradients_have_the_shapes_and_the_factors_of_their_products() -> None:
    def stored(p: Product) -> tuple[int, int]:
        return (p.columns, p.inner) if p.right_transposed else (p.inner, p.columns)

    for product in decoder(SHAPES[0], ROWS, 3, 5):
        _, by_left, by_right = with_gradients([product])
        assert (by_left.rows, by_left.columns) == (product.rows, product.inner)
        assert (by_right.rows, by_right.columns) == stored(product)
        assert (by_left.right, stored(by_left)) == (product.right, stored(product))
        assert by_left.batch == by_right.batch == product.batch


def test_a_training_step_is_timed_beside_its_floor(tmp_path: Path) -> None:
    save_pair(tmp_path, vocabulary=300, width=32, layers=1, rows=2, response=3)
    size = Size(tmp_path, rows=2, response=3, k=8, dtype="float32", device="cpu", steps=2)
    result = run_toolkit(size, "teacher_topk")
    assert len(result["steps"]) == 2
    for step in result["steps"]:
        phases = sum(step[name] for name in ("rollout", "score", "update", "record"))
        assert 0 < step["floor/rollout"] + step["floor/score"] + step["floor/update"] < phases
        assert phases < step["step"]
    table = comparison_table({"teacher_topk": result})
    assert table.count("\n") == 2
    assert table.splitlines()[2].startswith("| teacher_topk |")


def test_tables_hold_ratios_of_simultaneous_times_and_slopes_per_thousand() -> None:
    def steps(scale: float) -> dict[str, Any]:
        floor = {"floor/rollout": 1.0, "floor/score": 2.0, "floor/update": 1.0}
        part = {"rollout": 2.0, "score": 3.0, "update": 1.5, "record": 0.5, "step": 7.0}
        step = {name: x * scale for name, x in (part | floor).items()}
        return {"steps": [step, step | {"step": 10.0 * scale}], "mebibytes": 3.0}

    row = comparison_table({"ours": steps(1.0), "trl": steps(2.0)}).splitlines()[2].split(" | ")
    assert row[1:5] == [
        "2.00 s, 2.00 (2.00 to 2.00)",
        "3.00 s, 1.50 (1.50 to 1.50)",
        "1.50 s, 1.50 (1.50 to 1.50)",
        "0.500 s (5.9%)",
    ]
    assert row[5:] == ["8.50 s", "4.00 s", "2.12 (1.75 to 2.50)", "2.00", "3 MiB |"]
    growth = growth_tables(
        {"response": [(n, {"ours": steps(n / 100)}) for n in (100, 200, 300)]}, rows=4
    )
    # 0.02 s of rollout a token of the response, for 4 rows
    assert growth.splitlines()[2].split(" | ")[2] == "5.0000 ± 0.0000"


def test_a_slope_and_its_error_are_those_of_a_least_squares_line() -> None:
    generator = np.random.default_rng(0)
    x = np.arange(9.0)
    y = 3 - 0.7 * x + generator.normal(size=9)
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    assert fit_slope(x, y) == pytest.approx((coefficients[0], covariance[0, 0] ** 0.5))
