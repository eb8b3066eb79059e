"""The continuation probe: the teacher continues student prefixes; grades are paired."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.analysis import continuation
from opd.data.chain_task import Problem
from opd.data.prompts import encode_prompts
from opd.models.forward import response_hidden_states
from opd.rollouts.hf_engine import sample
from opd.teachers.pair import load_pair
from opd.training.train import train
from tests.helpers.runs import settings


@pytest.fixture(scope="module")
def run(tiny_pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("continuation") / "run"
    return train(settings(tiny_pair, folder, steps=1, eval_every=0, eval_problems=1)).folder


def test_prefixes_equal_the_same_tokens_as_a_response(tiny_pair) -> None:
    """Hidden states after a prompt with a prefix equal those of the same tokens as a response."""
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    prompts = encode_prompts(pair.tokenizer, [Problem("1+2", "3"), Problem("1+2+3", "6")], 1, 64)
    full_rollouts = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=9,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert full_rollouts.mask.all(), "the test needs responses of full length"
    longer_prompts = continuation.append_prefix(prompts, full_rollouts.tokens[:, :4])
    remaining_rollouts = full_rollouts._map(lambda x: x[:, 4:] if x.dim() > 1 else x)
    states = response_hidden_states(pair.student, prompts, full_rollouts).view(2, 9, -1)[:, 4:]
    states_again = response_hidden_states(pair.student, longer_prompts, remaining_rollouts).view(
        2, 5, -1
    )
    torch.testing.assert_close(states_again, states, atol=1e-5, rtol=1e-5)


def test_gains_are_paired_by_problem() -> None:
    teacher, student = np.array([1, 1, 0, 1.0]), np.array([0, 1, 0, 0.0])
    row = continuation.paired_gain(teacher, student)
    assert (row["teacher"], row["student"], row["gain"]) == (0.75, 0.25, 0.5)
    assert row["low"] <= 0.5 <= row["high"]
    zero_gain = continuation.paired_gain(teacher, teacher)
    assert zero_gain["low"] < zero_gain["gain"] == 0 < zero_gain["high"]


def test_one_row_per_length_that_responses_reach(run: Path) -> None:
    result_rows = continuation.probe_continuation(run, [0, 4, 10, 500], 12)
    assert [row["length"] for row in result_rows][:2] == [0, 4]
    assert all(row["length"] < 12 for row in result_rows)
    counts = [row["problems"] for row in result_rows]
    assert counts == sorted(counts, reverse=True)
    assert json.loads((run / "control" / "continuation.json").read_text()) == result_rows
    assert result_rows == continuation.probe_continuation(run, [0, 4, 10, 500], 12), (
        "not deterministic"
    )
    with pytest.raises(ValueError, match="0 tokens or more"):
        continuation.probe_continuation(run, [-1], 4)
