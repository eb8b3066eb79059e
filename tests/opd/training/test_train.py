"""The training loop on a tiny random pair: sampler against scorer, padding, resume."""

import re
from pathlib import Path

import pytest
import torch

from opd.data.chain_task import Problem, grade, problems
from opd.data.prompts import encode_prompts
from opd.models.forward import micro_batches
from opd.rollouts.hf_engine import sample
from opd.scoring.score import score_batch
from opd.teachers.pair import load_pair
from opd.training.train import train
from tests.helpers.requests import full_request
from tests.helpers.runs import rows, settings


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_scorer_agrees_with_sampler(tiny_pair, temperature: float, top_p: float) -> None:
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    addition_problems = [Problem("1+2" * n, "3") for n in (1, 4, 2, 7)]
    prompts = encode_prompts(pair.tokenizer, addition_problems, 2, 64)
    assert not prompts.mask.all(), "prompts of one length would not test the padding"
    batch = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=16,
        temperature=temperature,
        top_p=top_p,
        generator=torch.Generator().manual_seed(0),
    )
    single_batch, micro_batched = (
        score_batch(
            pair.student,
            pair.teacher,
            prompts,
            batch,
            full_request(5, temperature=temperature, max_tokens_per_microbatch=size),
        ).scored
        for size in (10_000, 60)
    )
    assert len(micro_batches(prompts, batch, 60)) > 1
    torch.testing.assert_close(
        single_batch.student_logp, micro_batched.student_logp, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(single_batch.prefix.reverse_kl, micro_batched.prefix.reverse_kl)
    gap = (batch.sampler_logp - single_batch.student_logp)[batch.mask]
    if top_p == 1:
        assert gap.abs().max() < 1e-5
    else:
        assert gap.min() > -1e-5, "a nucleus only adds mass"
        assert gap.max() > 0.01


@pytest.mark.parametrize("objective", ["sampled_token", "teacher_topk", "full_reverse_kl"])
def test_a_resumed_run_continues_identically(tiny_pair, tmp_path: Path, objective: str) -> None:
    complete = train(settings(tiny_pair, tmp_path / "whole", objective=objective)).folder
    resumed = train(settings(tiny_pair, tmp_path / "cut", objective=objective, steps=2)).folder
    with open(resumed / "rows.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')  # a kill in mid-write
    train(settings(tiny_pair, tmp_path / "cut", objective=objective))
    assert rows(resumed) == rows(complete)
    assert len(rows(complete)) == 4
    final_weights = [(d / "final" / "model.safetensors").read_bytes() for d in (complete, resumed)]
    assert final_weights[0] == final_weights[1]


def test_a_folder_of_other_settings_is_refused(tiny_pair, tmp_path: Path) -> None:
    train(settings(tiny_pair, tmp_path / "run", steps=1))
    with pytest.raises(ValueError, match=r"lr: 0\.001 -> 0\.01"):
        train(settings(tiny_pair, tmp_path / "run", steps=1, lr=0.01))


def test_support_larger_than_the_vocabulary_is_refused(tiny_pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="support_k is 262, but the shared vocabulary has 261"):
        train(settings(tiny_pair, tmp_path / "run", support_k=262))


def test_problems_are_disjoint_and_graded_exactly() -> None:
    train_set = {p.prompt for p in problems("train", 4000, 1)}
    test_set = problems("test", 500, 0)
    assert len({p.prompt for p in test_set}) == 500
    assert not train_set & {p.prompt for p in test_set}
    for p in test_set:
        steps, x, a, b = map(int, re.split(r"\D", p.prompt))
        for i in range(steps):
            x = (x * a + (b + i) % 10) % 10
        assert str(x) == p.answer
        assert grade(p.solution, p.answer) == 1
        assert grade(p.solution + "0", p.answer) == 0
        assert grade(p.answer, p.answer) == 0
        for line in p.solution.removeprefix("<think>").split("</think>")[0].split():
            product, total, result = line.split(":")[1].split("=")
            assert eval(product) == int(total.split("+")[0])
            assert eval(total) == int(result)
    with pytest.raises(ValueError, match=r"5000 problems requested, the test split has \d+"):
        problems("test", 5000, 0)
