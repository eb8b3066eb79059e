"""Rollouts of given responses, and of several writers."""

import pytest
import torch

from diagnostics.batch import DATASET, STUDENT, TEACHER, Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.missing import missing_fields
from opd.data.prompts import Prompts
from opd.rollouts.given import given_rollouts, join_rollouts


def prompts_of(index: list[int]) -> Prompts:
    return Prompts.from_ids([[1, 2]] * len(index), torch.tensor(index), [""] * len(index))


def given(responses: list[list[int]], index: list[int], vocabulary: int = 10) -> Rollouts:
    return given_rollouts(
        prompts_of(index), responses, vocabulary=vocabulary, max_response=3, temperature=0.7
    )


def test_a_response_ends_where_it_is_not_cut() -> None:
    rollouts = given([[4, 0], [5, 6, 0], [7, 8, 9, 0]], [2, 0, 1])
    assert rollouts.ended.tolist() == [True, True, False]
    assert rollouts.lengths.tolist() == [2, 3, 3]
    assert rollouts.tokens.tolist() == [[4, 0, 0], [5, 6, 0], [7, 8, 9]]
    assert rollouts.mask.tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert rollouts.prompt.tolist() == [2, 0, 1]
    assert rollouts.temperature == 0.7
    assert missing_fields(rollouts).keys() == {"sampler_logp"}
    with pytest.raises(InvalidInput, match="has the id 9, but the models share 9 ids"):
        given([[4, 0], [9, 0]], [0, 1], vocabulary=9)


def sampled(tokens: list[list[int]], logp: float, index: list[int]) -> Rollouts:
    ids = torch.tensor(tokens)
    return Rollouts(
        tokens=ids,
        mask=ids > 0,
        sampler_logp=logp * (ids > 0),
        softmax_logp=2 * logp * (ids > 0),
        prompt=torch.tensor(index),
        ended=torch.tensor([True] * len(index)),
        temperature=0.7,
        top_p=0.9,
    )


def test_rows_of_several_writers_keep_their_places() -> None:
    parts = [
        (STUDENT, [3], sampled([[1]], -1.0, [5])),
        (TEACHER, [2, 0], sampled([[2, 3], [4, 5]], -2.0, [6, 7])),
        (DATASET, [1], given([[6, 7, 8, 0]], [8])),
    ]
    joined = join_rollouts(parts, top_p=0.9, with_softmax=True)
    assert joined.tokens.tolist() == [[4, 5, 0], [6, 7, 8], [2, 3, 0], [1, 0, 0]]
    assert joined.sampler_logp.tolist() == [[-2, -2, 0], [0] * 3, [-2, -2, 0], [-1, 0, 0]]
    assert joined.prompt.tolist() == [7, 8, 6, 5]
    assert joined.ended.tolist() == [True, False, True, True]
    assert joined.origin is not None
    assert joined.origin.tolist() == [TEACHER, DATASET, TEACHER, STUDENT]
    assert joined.softmax_logp is not None
    assert joined.softmax_logp.tolist() == [[-4, -4, 0], [0] * 3, [-4, -4, 0], [-2, 0, 0]]
    given_only = [(DATASET, [0], given([[6, 0]], [8]))]
    for with_softmax in (True, False):
        of_dataset = join_rollouts(given_only, top_p=0.9, with_softmax=with_softmax)
        sampled_too = join_rollouts(parts, top_p=0.9, with_softmax=with_softmax)
        assert (of_dataset.softmax_logp is None) == (sampled_too.softmax_logp is None)
        assert of_dataset.top_p == sampled_too.top_p == 0.9
    assert (joined.temperature, joined.top_p) == (0.7, 0.9)
    assert joined.own_tokens.tolist() == [[False] * 3] * 3 + [[True, False, False]]
    joined.validate()
