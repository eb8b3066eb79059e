"""Numbers about prompts, sampler, grader and update, each against a count by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from diagnostics.batch import ScoredRollouts
from opd.config.settings import Config
from opd.data.grading.graders import GRADERS, grade_exact
from opd.data.prompts import Prompts
from opd.training.checks.start import largest_gap
from opd.training.checks.step import grader_numbers, prompt_hashes, prompt_numbers, sampler_numbers
from opd.training.checks.update import (
    ELEMENTS,
    TENSORS,
    after_step,
    before_step,
    chosen,
    kept_gradients,
    leftover,
    lost_share,
)
from opd.training.optimizer import adamw
from tests.helpers.dense_batches import dense

BOS = 7


def config(**changes: Any) -> Config:
    return Config(**{"student": "s", "teacher": "t", "out": "o", "prompts_per_step": 4} | changes)


def prompts(*rows: list[int]) -> Prompts:
    """Each row twice, padded on the left."""
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
    found = prompt_numbers(config(), rows, BOS)
    assert float(found["data/repeated_prompts"]) == 0.25
    assert float(found["data/prompts_on_several_ranks"]) == 0
    assert float(found["data/doubled_bos"]) == 0.25, "at the beginning only"
    assert "data/doubled_bos" not in prompt_numbers(config(), rows, None)
    games = prompt_numbers(config(task="env:household"), rows, BOS)
    assert set(games) == {"data/doubled_bos"}
    single = prompt_numbers(config(), prompts([BOS], [BOS], [1], [2]), BOS)
    assert float(single["data/doubled_bos"]) == 0


def gap_batch(**changes: Any) -> ScoredRollouts:
    batch = dense(0).batch
    return replace(batch, softmax_logp=batch.sampler_logp, **changes)


def test_the_samplers_error_is_a_root_mean_square_in_units() -> None:
    batch = gap_batch()
    gap = (batch.student_logp - batch.sampler_logp)[batch.mask]
    units = float(gap.square().mean().sqrt()) / 2e-5
    found = sampler_numbers(config(), batch)["consistency/sampler_error"]
    assert float(found) == math.floor(units) > 100
    bfloat16 = sampler_numbers(config(dtype="bfloat16"), batch)["consistency/sampler_error"]
    assert float(bfloat16) == math.floor(units * 2e-5 / 0.05)
    old = gap_batch(age=torch.ones_like(batch.prompt))
    assert float(sampler_numbers(config(), old)["consistency/sampler_error"]) == 0
    assert sampler_numbers(config(), gap_batch(temperature=0.5)) == {}
    cut = replace(batch, softmax_logp=None, top_p=0.9)
    assert sampler_numbers(config(), cut) == {}


GOLD = {"exact": "x y", "numeric": "3/4", "lab": "5"}


@pytest.mark.parametrize("name", GOLD)
def test_a_grader_that_knows_its_answers_is_not_constant(name: str) -> None:
    def grade(texts: list[str], answer: str) -> list[float]:
        return [GRADERS[name](text, answer).reward for text in texts]

    zeros = torch.zeros(4)
    found = grader_numbers([GOLD[name]] * 4, zeros, grade)
    assert float(found["consistency/grader_constant"]) == 0


@pytest.mark.parametrize("reward", [0.0, 0.5, 1.0])
def test_a_constant_grader_is_seen_where_all_rewards_are_its_own(reward: float) -> None:
    def grade(texts: list[str], answer: str) -> list[float]:
        return [reward] * len(texts)

    for rewards, constant in ((torch.full((4,), reward), 1.0), (torch.arange(4.0), 0.0)):
        found = grader_numbers(["5"] * 4, rewards, grade)
        assert float(found["consistency/grader_constant"]) == constant
    unanswered = grader_numbers([""] * 4, torch.full((4,), reward), grade)
    assert float(unanswered["consistency/grader_constant"]) == 0, "nothing to be right about"
    some = grader_numbers(["5"] * 4, torch.tensor([0.0, math.nan, 0.0, 0.0]), grade)
    assert float(some["consistency/grader_missing"]) == 0.25
    assert grade_exact("5", "5").reward == 1


def weights(dtype: torch.dtype = torch.float32, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(40, 30, generator=generator).to(dtype) for _ in range(count)]
    return [weight.requires_grad_() for weight in made]


def backward(own: list[torch.Tensor], rows: int = 40) -> None:
    sum(weight[:rows].float().square().sum() for weight in own).backward()


def test_at_most_so_many_weights_are_looked_at_the_last_among_them() -> None:
    assert chosen(3) == [0, 1, 2]
    assert len(set(chosen(1000))) == TENSORS
    assert (chosen(1000)[0], chosen(1000)[-1]) == (0, 999)


def stepped(own: list[torch.Tensor], rate: float, rows: int = 40) -> dict[str, float]:
    optimizer = adamw(own, (0.9, 0.999), 0.0)
    assert leftover(optimizer) == 0
    backward(own, rows)
    optimizer.gather()
    before = before_step(optimizer)
    assert len(before.weights) == len(own) * ELEMENTS
    _, taken = optimizer.step(rate, 1.0)
    assert leftover(optimizer) == 1
    found = after_step(optimizer, before, taken)
    return {name.split("/")[1]: float(x) for name, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_with_a_gradient_move(dtype: torch.dtype) -> None:
    whole = {"moved_share": 1.0, "reached_share": 1.0, "unpublished_share": 0.0}
    assert stepped(weights(dtype), 1e-3) == whole
    assert stepped(weights(dtype), 1e-3, rows=20) == whole, "of those with a gradient"
    assert stepped(weights(dtype), 0.0) == whole | {"moved_share": 0.0}


def test_a_step_that_was_not_taken_is_no_reading() -> None:
    own = weights()
    optimizer = adamw(own, (0.9, 0.999), 0.0)
    backward(own)
    before = before_step(optimizer)
    own[0].grad[0, 0] = math.nan
    _, taken = optimizer.step(1e-3, 1.0)
    assert all(math.isnan(x) for x in after_step(optimizer, before, taken).values())


def test_gradients_that_are_not_added_to_are_lost() -> None:
    own = weights()
    optimizer = adamw(own, (0.9, 0.999), 0.0)
    backward(own)
    kept = kept_gradients(optimizer)
    backward(own)
    assert lost_share(kept) == 0
    own[0].grad = None
    backward(own)
    assert lost_share(kept) == pytest.approx(1 / 3)


def test_the_largest_gap_is_taken_over_probable_ids() -> None:
    one = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    other = one.clone()
    other[1, 2] += 0.25
    assert largest_gap(one, other) == pytest.approx(0.25, rel=1e-5)
    other[0, 0, one[0, 0].argmin()] += 100.0
    assert largest_gap(one, other) == pytest.approx(0.25, rel=1e-5), "a rare id does not count"
