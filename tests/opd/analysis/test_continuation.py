"""The continuation probe: the teacher from the student's own tokens, graded and paired."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.analysis import continuation
from opd.data.chain_task import Problem
from opd.data.prompts import encode
from opd.models.forward import response_hidden
from opd.rollouts.hf_engine import sample
from opd.teachers.pair import load_pair
from opd.training.train import train
from tests.opd.training.test_train import settings


@pytest.fixture(scope="module")
def run(tiny_pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("continuation") / "run"
    return train(settings(tiny_pair, folder, steps=1, eval_every=0, eval_problems=1))


def test_prefixes_stand_where_the_model_would_have_written_them(tiny_pair) -> None:
    """States behind a prompt with a prefix are those of the same tokens as a response."""
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    prompts = encode(pair.tokenizer, [Problem("1+2", "3"), Problem("1+2+3", "6")], 1, 64)
    whole = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=9,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert whole.mask.all(), "responses that end early would not test it"
    later = continuation.continued(prompts, whole.tokens[:, :4])
    rest = whole._map(lambda x: x[:, 4:] if x.dim() > 1 else x)
    states = response_hidden(pair.student, prompts, whole).view(2, 9, -1)[:, 4:]
    again = response_hidden(pair.student, later, rest).view(2, 5, -1)
    torch.testing.assert_close(again, states, atol=1e-5, rtol=1e-5)


def test_gains_are_paired_by_problem() -> None:
    teacher, student = np.array([1, 1, 0, 1.0]), np.array([0, 1, 0, 0.0])
    row = continuation.gain(teacher, student)
    assert (row["teacher"], row["student"], row["gain"]) == (0.75, 0.25, 0.5)
    assert row["low"] <= 0.5 <= row["high"]
    same = continuation.gain(teacher, teacher)
    assert same["low"] < same["gain"] == 0 < same["high"]


def test_a_row_a_length_and_none_for_lengths_that_few_reach(run: Path) -> None:
    found = continuation.continuation(run, [0, 4, 10, 500], 12)
    assert [row["length"] for row in found][:2] == [0, 4]
    assert all(row["length"] < 12 for row in found)
    counts = [row["problems"] for row in found]
    assert counts == sorted(counts, reverse=True)
    assert json.loads((run / "control" / "continuation.json").read_text()) == found
    assert found == continuation.continuation(run, [0, 4, 10, 500], 12), "not deterministic"
    with pytest.raises(ValueError, match="0 tokens or more"):
        continuation.continuation(run, [-1], 4)
