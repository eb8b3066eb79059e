"""Who writes each response of a step, and that each is its writer's."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.batch import DATASET, STUDENT, TEACHER, Rollouts
from opd.config.prefixes import parse_prefixes
from opd.config.settings import Config
from opd.data.chain_task import problems
from opd.data.prompts import Prompts, encode_prompts
from opd.rollouts.base import BatchSlice
from opd.rollouts.hf_engine import HfEngine, sample
from opd.teachers.pair import ModelPair, load_pair
from opd.training.responses import draw_responses, writers
from tests.helpers.runs import settings


@pytest.fixture(scope="module")
def pair(tiny_pair: tuple[Path, Path]) -> ModelPair:
    return load_pair(str(tiny_pair[0]), str(tiny_pair[1]), "cpu")


def config_of(tiny_pair: tuple[Path, Path], **changes: object) -> Config:
    return settings(tiny_pair, Path("unused"), **changes)


def test_the_share_of_own_responses_is_the_setting(tiny_pair) -> None:
    """Within four standard errors over 4000 draws of each step, and exactly at 0 and 1."""
    config, n = config_of(tiny_pair, steps=11), 4000
    whole = BatchSlice(list(range(n)), n)
    falling = parse_prefixes("mixed:1-0:dataset")
    for step, share in ((0, 1.0), (3, 0.7), (8, 0.2), (10, 0.0)):
        drawn = writers(falling, config, step, 0, whole)
        assert set(drawn) <= {STUDENT, DATASET}
        error = 4 * math.sqrt(share * (1 - share) / n)
        assert abs(drawn.count(STUDENT) / n - share) <= error, step
    half = parse_prefixes("mixed:0.5")
    draws = [writers(half, config, step, task, whole) for step, task in ((0, 0), (1, 0), (0, 1))]
    assert set(draws[0]) == {STUDENT, TEACHER}
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            agreement = sum(a == b for a, b in zip(first, second, strict=True)) / n
            assert abs(agreement - 0.5) < 4 * 0.5 / math.sqrt(n), "independent of each other"
    part = BatchSlice([7, 2, 3999], n)
    assert writers(half, config, 0, 0, part) == [draws[0][i] for i in part.rows]
    assert writers(parse_prefixes("student"), config, 0, 0, part) == [STUDENT] * 3


def test_each_writer_writes_its_rows(tiny_pair, pair: ModelPair) -> None:
    """Each row is what its writer alone would have written, whatever the others are."""
    config = config_of(tiny_pair, max_response=9, max_prompt=64)
    chosen = problems("train", 6, 3)
    prompts = encode_prompts(pair.tokenizer, chosen, 1, 64)
    part = BatchSlice(list(range(6)), 6)
    options: dict[str, Any] = {"max_response": 9, "temperature": 1.0, "top_p": 1.0}
    draw = partial(draw_responses, pair, HfEngine(pair.student), config=config, seed=5, top_p=1.0)
    origins = [STUDENT, TEACHER, DATASET, TEACHER, STUDENT, DATASET]
    half = parse_prefixes("mixed:0.5:dataset")
    mixed = draw(prompts, chosen, origins, half, part=part)
    assert mixed.origin is not None
    assert mixed.origin.tolist() == origins
    assert mixed.prompt.tolist() == list(range(6))
    alone = {
        origin: sample(
            model, prompts, pair.eos, generator=torch.Generator().manual_seed(5), **options
        )
        for origin, model in ((STUDENT, pair.student), (TEACHER, pair.teacher.model))
    }
    for row, origin in enumerate(origins):
        tokens = mixed.tokens[row][mixed.mask[row]].tolist()
        if origin == DATASET:
            ids = pair.tokenizer.encode(chosen[row].solution, add_special_tokens=False)
            assert tokens == [*ids, pair.tokenizer.eos_token_id][:9]
            assert not mixed.ended[row]
            assert not mixed.sampler_logp[row].any()
            continue
        expected = alone[origin]
        assert tokens == expected.tokens[row][expected.mask[row]].tolist()
        length = len(tokens)
        torch.testing.assert_close(
            mixed.sampler_logp[row, :length], expected.sampler_logp[row, :length], atol=1e-5, rtol=0
        )
    # a part of the batch gets the same responses
    rows_of_part = [4, 1]
    smaller = draw(
        prompts.rows(rows_of_part),
        [chosen[i] for i in rows_of_part],
        [origins[i] for i in rows_of_part],
        half,
        part=BatchSlice(rows_of_part, 6),
    )
    for i, row in enumerate(rows_of_part):
        assert (
            smaller.tokens[i][smaller.mask[i]].tolist()
            == mixed.tokens[row][mixed.mask[row]].tolist()
        )


def test_an_end_that_only_the_teacher_uses_becomes_the_students(tiny_pair, pair: ModelPair) -> None:
    """Responses that reach the foreign id end there, and with map_eos in the student's."""
    prompts = encode_prompts(pair.tokenizer, problems("train", 40, 3), 1, 64)
    foreign = int(sample_all(pair, prompts, config_of(tiny_pair)).tokens[:, 0].mode().values)
    other = replace(pair, teacher=replace(pair.teacher, eos=(foreign,)))
    plain = sample_all(other, prompts, config_of(tiny_pair))
    mapped = sample_all(other, prompts, config_of(tiny_pair, map_eos=True))
    reached = plain.tokens[:, 0] == foreign
    assert reached.sum() > 1
    assert plain.lengths[reached].tolist() == [1] * int(reached.sum())
    assert plain.ended[reached].all()
    own = pair.tokenizer.eos_token_id
    assert torch.equal(mapped.tokens, torch.where(plain.tokens == foreign, own, plain.tokens))
    assert torch.equal(mapped.mask, plain.mask)
    assert torch.equal(mapped.sampler_logp, plain.sampler_logp)


def sample_all(pair: ModelPair, prompts: Prompts, config: Config) -> Rollouts:
    """A response of the teacher to every prompt."""
    n = len(prompts)
    return draw_responses(
        pair,
        HfEngine(pair.student),
        prompts,
        [],
        [TEACHER] * n,
        parse_prefixes("teacher"),
        config=config,
        seed=2,
        top_p=1.0,
        part=BatchSlice(list(range(n)), n),
    )
