"""A tiny pair and prompts of different lengths, for the tests of rollout engines."""

import pytest

from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.teachers.pair import load_pair


@pytest.fixture(scope="module")
def pair(two_layer_pair):
    return load_pair(*map(str, two_layer_pair), "cpu", "float32")


@pytest.fixture(scope="module")
def prompts(pair) -> Prompts:
    """Ten rows of five prompts of different lengths, not sorted by length."""
    problems = [Problem("1+2" * n, "3") for n in (4, 1, 9, 2, 7)]
    return encode_prompts(pair.tokenizer, problems, 2, 64)
