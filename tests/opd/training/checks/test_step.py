"""Checks of prompts, sampler, grader and update, each against a computation by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from diagnostics.batch import ScoredRollouts
from opd.config.settings import Config, with_settings
from opd.data.grading.graders import GRADERS, grade_exact
from opd.data.prompts import Prompts
from opd.training.checks.start import largest_gap
from opd.training.checks.step import (
    grader_check_columns,
    prompt_check_columns,
    prompt_hashes,
    sampler_check_columns,
)
from opd.training.checks.update import (
    MAX_ELEMENTS,
    MAX_TENSORS,
    columns_after_step,
    has_leftover_gradient,
    lost_gradient_share,
    sample_before_step,
    sampled_gradients,
    sampled_indices,
)
from opd.training.optimizer import make_optimizer
from tests.helpers.dense_batches import make_dense_batch

BOS = 7


def config(**changes: Any) -> Config:
    return with_settings(
        Config(student="", teacher="", out=""),
        **{"student": "s", "teacher": "t", "out": "o", "prompts_per_step": 4} | changes,
    )


def prompts(*rows: list[int]) -> Prompts:
    """Each row twice, with left padding."""
    width = max(map(len, rows)) + 2
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    twice = torch.arange(len(rows)).repeat_interleave(2)
    answers = [""] * len(twice)
    return Prompts(tokens=tokens[twice], mask=mask[twice], index=twice, answers=answers)


def test_hashes_know_ids_and_order_and_not_padding() -> None:
    wide, narrow = prompts([1, 2, 3], [3, 2, 1, 0, 0]), prompts([1, 2, 3], [0, 1, 2, 3])
    first, second = prompt_hashes(wide), prompt_hashes(narrow)
    assert first[0] == first[1] == second[0]
    assert len({int(h) for h in torch.cat([first, second])}) == 3  # a leading 0 is an id too


def test_copies_and_doubled_bos_are_counted() -> None:
    rows = prompts([BOS, 1], [BOS, 1], [BOS, BOS, 1], [BOS, 2, BOS, BOS])
    columns = prompt_check_columns(config(), rows, BOS)
    assert float(columns["data/repeated_prompts"]) == 0.25
    assert float(columns["data/prompts_on_several_ranks"]) == 0
    assert float(columns["data/doubled_bos"]) == 0.25, "at the beginning only"
    assert "data/doubled_bos" not in prompt_check_columns(config(), rows, None)
    games = prompt_check_columns(config(task="env:household"), rows, BOS)
    assert set(games) == {"data/doubled_bos"}
    single = prompt_check_columns(config(), prompts([BOS], [BOS], [1], [2]), BOS)
    assert float(single["data/doubled_bos"]) == 0


def gap_batch(**changes: Any) -> ScoredRollouts:
    batch = make_dense_batch(0).batch
    return replace(batch, softmax_logp=batch.sampler_logp, **changes)


def test_the_samplers_error_is_a_root_mean_square_in_units() -> None:
    batch = gap_batch()
    gap = (batch.student_logp - batch.sampler_logp)[batch.mask]
    units = float(gap.square().mean().sqrt()) / 2e-5
    sampler_error = sampler_check_columns(config(), batch)["consistency/sampler_error"]
    assert float(sampler_error) == math.floor(units) > 100
    bfloat16 = sampler_check_columns(config(dtype="bfloat16"), batch)["consistency/sampler_error"]
    assert float(bfloat16) == math.floor(units * 2e-5 / 0.05)
    stale_batch = gap_batch(age=torch.ones_like(batch.prompt))
    assert float(sampler_check_columns(config(), stale_batch)["consistency/sampler_error"]) == 0
    assert sampler_check_columns(config(), gap_batch(temperature=0.5)) == {}
    nucleus_batch = replace(batch, softmax_logp=None, top_p=0.9)
    assert sampler_check_columns(config(), nucleus_batch) == {}


GOLD = {"exact": "x y", "numeric": "3/4", "lab": "5"}


@pytest.mark.parametrize("name", GOLD)
def test_a_grader_that_knows_its_answers_is_not_constant(name: str) -> None:
    def grade(texts: list[str], answer: str) -> list[float]:
        return [GRADERS[name](text, answer).reward for text in texts]

    zeros = torch.zeros(4)
    columns = grader_check_columns([GOLD[name]] * 4, zeros, grade)
    assert float(columns["consistency/grader_constant"]) == 0


@pytest.mark.parametrize("reward", [0.0, 0.5, 1.0])
def test_a_constant_grader_is_seen_where_all_rewards_are_its_own(reward: float) -> None:
    def grade(texts: list[str], answer: str) -> list[float]:
        return [reward] * len(texts)

    for rewards, constant in ((torch.full((4,), reward), 1.0), (torch.arange(4.0), 0.0)):
        columns = grader_check_columns(["5"] * 4, rewards, grade)
        assert float(columns["consistency/grader_constant"]) == constant
    unanswered = grader_check_columns([""] * 4, torch.full((4,), reward), grade)
    assert float(unanswered["consistency/grader_constant"]) == 0, "nothing to be right about"
    partly_graded = grader_check_columns(["5"] * 4, torch.tensor([0.0, math.nan, 0.0, 0.0]), grade)
    assert float(partly_graded["consistency/grader_missing"]) == 0.25
    some_answers = ["5", "5", " ", ""]
    without_rewards = torch.tensor([0.0, math.nan, math.nan, math.nan])
    graded_where_possible = grader_check_columns(some_answers, without_rewards, grade)
    assert float(graded_where_possible["consistency/grader_missing"]) == 0.5
    ungraded = grader_check_columns([""] * 4, torch.full((4,), math.nan), grade)
    assert float(ungraded["consistency/grader_missing"]) == 0, "nothing that could be graded"
    assert grade_exact("5", "5").reward == 1


def weights(dtype: torch.dtype = torch.float32, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(40, 30, generator=generator).to(dtype) for _ in range(count)]
    return [weight.requires_grad_() for weight in tensors]


def backward(tensors: list[torch.Tensor], rows: int = 40) -> None:
    sum(weight[:rows].float().square().sum() for weight in tensors).backward()


def test_at_most_so_many_weights_are_looked_at_the_last_among_them() -> None:
    assert sampled_indices(3) == [0, 1, 2]
    assert len(set(sampled_indices(1000))) == MAX_TENSORS
    assert (sampled_indices(1000)[0], sampled_indices(1000)[-1]) == (0, 999)


def take_step(tensors: list[torch.Tensor], rate: float, rows: int = 40) -> dict[str, float]:
    optimizer = make_optimizer(tensors, (0.9, 0.999), 0.0)
    assert has_leftover_gradient(optimizer) == 0
    backward(tensors, rows)
    optimizer.all_reduce_gradients()
    snapshot = sample_before_step(optimizer)
    assert len(snapshot.weights) == len(tensors) * MAX_ELEMENTS
    _, applied = optimizer.step(rate, 1.0)
    assert has_leftover_gradient(optimizer) == 1
    columns = columns_after_step(optimizer, snapshot, applied)
    return {name.split("/")[1]: float(x) for name, x in columns.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_with_a_gradient_move(dtype: torch.dtype) -> None:
    healthy = {"moved_share": 1.0, "reached_share": 1.0, "unpublished_share": 0.0}
    assert take_step(weights(dtype), 1e-3) == healthy
    assert take_step(weights(dtype), 1e-3, rows=20) == healthy, "of those with a gradient"
    assert take_step(weights(dtype), 0.0) == healthy | {"moved_share": 0.0}


def test_a_step_that_was_not_taken_is_no_reading() -> None:
    tensors = weights()
    optimizer = make_optimizer(tensors, (0.9, 0.999), 0.0)
    backward(tensors)
    snapshot = sample_before_step(optimizer)
    tensors[0].grad[0, 0] = math.nan
    _, applied = optimizer.step(1e-3, 1.0)
    assert all(math.isnan(x) for x in columns_after_step(optimizer, snapshot, applied).values())


def test_gradients_that_are_not_added_to_are_lost() -> None:
    tensors = weights()
    optimizer = make_optimizer(tensors, (0.9, 0.999), 0.0)
    backward(tensors)
    first_gradients = sampled_gradients(optimizer)
    backward(tensors)
    assert lost_gradient_share(first_gradients) == 0
    tensors[0].grad = None
    backward(tensors)
    assert lost_gradient_share(first_gradients) == pytest.approx(1 / 3)


def test_the_largest_gap_is_taken_over_probable_ids() -> None:
    first = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    second = first.clone()
    second[1, 2] += 0.25
    assert largest_gap(first, second) == pytest.approx(0.25, rel=1e-5)
    second[0, 0, first[0, 0].argmin()] += 100.0
    assert largest_gap(first, second) == pytest.approx(0.25, rel=1e-5), "a rare id does not count"
