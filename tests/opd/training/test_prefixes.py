"""Runs whose responses the student, the teacher or the data write, and runs without a teacher."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.batch import DATASET, STUDENT, TEACHER, ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.missing import missing_fields
from diagnostics.records.batch_files import load_batch
from opd.config.prefixes import parse_prefixes
from opd.config.settings import Config
from opd.data.chain_task import problems
from opd.data.prompts import encode_prompts
from opd.models.loading import load_model
from opd.objectives.factory import OBJECTIVES
from opd.rollouts.base import BatchSlice
from opd.rollouts.hf_engine import HfEngine, sample
from opd.teachers.pair import ModelPair, load_pair
from opd.training.responses import draw_responses, writers
from opd.training.train import train
from opd.training.validation import validate
from tests.helpers.runs import rows, settings

ONE_STEP = {"steps": 1, "eval_every": 0, "eval_problems": 1, "save_batch_every": 1, "lr": 1e-3}


@pytest.fixture(scope="module")
def pair(tiny_pair: tuple[Path, Path]) -> ModelPair:
    return load_pair(str(tiny_pair[0]), str(tiny_pair[1]), "cpu")


def saved_batch(folder: Path, step: int = 0) -> ScoredRollouts:
    batch = load_batch(folder / "batches" / f"step_{step:06d}.safetensors")
    assert isinstance(batch, ScoredRollouts)
    return batch


def total_norm(network: Any) -> float:
    squares = [x.grad.square().sum() for x in network.parameters() if x.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def logp_of(network: Any, prompt: list[int], response: list[int]) -> Tensor:
    """(T,) log-probabilities of a response after a prompt, with gradient, without padding."""
    ids = torch.tensor([*prompt, *response])
    logits = network(ids[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


# --- who writes ---------------------------------------------------------------------------------


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
    mixed = draw(prompts, chosen, origins, part=part)
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
        part=BatchSlice(rows_of_part, 6),
    )
    for i, row in enumerate(rows_of_part):
        assert (
            smaller.tokens[i][smaller.mask[i]].tolist()
            == mixed.tokens[row][mixed.mask[row]].tolist()
        )


# --- runs ---------------------------------------------------------------------------------------


def test_given_responses_train_as_in_transformers(tiny_pair, tmp_path: Path) -> None:
    """Loss and gradient of the first step against `labels` of transformers, without a teacher."""
    config = settings(
        tiny_pair,
        tmp_path / "run",
        **ONE_STEP,
        prefixes="dataset",
        objective="negative_log_likelihood",
        teacher="none",
        group_size=1,
        max_response=100,
    )
    folder = train(config).folder
    row, batch = rows(folder)[0], saved_batch(folder)
    tokenizer, network = load_model(str(tiny_pair[0]), "cpu", "float32")
    sequences = []
    for problem in problems("train", 3, 0):
        prompt = encode_prompts(tokenizer, [problem], 1, 64)
        response = [
            *tokenizer.encode(problem.solution, add_special_tokens=False),
            tokenizer.eos_token_id,
        ]
        sequences.append((prompt.tokens[0].tolist(), response[:100]))
    num_tokens = sum(len(response) for _, response in sequences)
    for prompt_ids, response in sequences:
        ids = torch.tensor([[*prompt_ids, *response]])
        labels = torch.tensor([[-100] * len(prompt_ids) + response])
        (network(ids, labels=labels).loss * len(response) / num_tokens).backward()
    loss = -sum(float(logp_of(network, *x).sum()) for x in sequences) / num_tokens
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(total_norm(network), rel=1e-4)
    assert row["consistency/loss_error"] == 0
    assert batch.origin is not None
    assert batch.origin.tolist() == [DATASET] * 3
    assert missing_fields(batch).keys() == {"sampler_logp", "teacher_logp"}
    assert batch.lengths.tolist() == [len(response) for _, response in sequences]
    absent = (
        "divergence/",
        "signal/",
        "consistency/z",
        "consistency/sampler",
        "consistency/teacher",
    )
    assert not [name for name in row if name.startswith(absent) and "tokens" not in name]
    assert not any(
        math.isnan(x) for name, x in row.items() if isinstance(x, float) and "_se" not in name
    )


GRADER = """
def grade(response: str, answer: str) -> float:
    return float(len(response) % 3)
"""


def test_the_reward_alone_needs_no_teacher(tiny_pair, tmp_path: Path) -> None:
    """Loss and gradient of the first step by hand from the rewards of the saved batch."""
    (tmp_path / "grader.py").write_text(GRADER)
    config = settings(
        tiny_pair,
        tmp_path / "run",
        **ONE_STEP,
        objective="reward_only",
        reward_weight=0.5,
        teacher="none",
        grader=f"{tmp_path / 'grader.py'}:grade",
        denominator="sequence_sum",
    )
    folder = train(config).folder
    row, batch = rows(folder)[0], saved_batch(folder)
    tokenizer, network = load_model(str(tiny_pair[0]), "cpu", "float32")
    prompts = encode_prompts(tokenizer, problems("train", 3, 0), 2, 64)
    assert len(batch.reward.unique()) > 1
    loss = torch.zeros(())
    for i in range(6):
        advantage = float(batch.reward[i] - batch.reward[i ^ 1])
        prompt = prompts.tokens[i][prompts.mask[i]].tolist()
        logp = logp_of(network, prompt, batch.tokens[i][batch.mask[i]].tolist())
        loss = loss - 0.5 * advantage * logp.sum() / 6
    loss.backward()
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(total_norm(network), rel=1e-4)
    assert row["consistency/loss_error"] == 0
    assert row["consistency/sampler_log_ratio_square"] < 1e-9, "the student's own are still tested"
    assert missing_fields(batch).keys() == {"teacher_logp"}


def test_the_teacher_writes_what_it_is_scored_for(tiny_pair, tmp_path: Path) -> None:
    """Its log-probabilities when it samples are its scores; no test of the student's sampling."""
    config = settings(
        tiny_pair,
        tmp_path / "run",
        **ONE_STEP,
        prefixes="teacher",
        objective="sampled_token",
        ratio="token",
        probe_every=1,
    )
    folder = train(config).folder
    row, batch = rows(folder)[0], saved_batch(folder)
    assert batch.origin is not None
    assert batch.origin.tolist() == [TEACHER] * 6
    torch.testing.assert_close(batch.sampler_logp, batch.teacher_logp, atol=1e-5, rtol=0)
    assert (batch.student_logp - batch.sampler_logp).abs().max() > 0.1
    ratio = (batch.student_logp - batch.sampler_logp).exp() * batch.mask
    loss = ratio * (batch.student_logp - batch.teacher_logp) * batch.student_logp
    assert row["loss"] == pytest.approx(float(loss.sum() / batch.mask.sum()), rel=1e-4)
    assert not [name for name in row if name.startswith(("consistency/z", "consistency/sampler"))]
    assert any(name.startswith("gradient/") for name in row), "the probe samples its own"


def test_mixed_responses_are_reported_by_their_writer(tiny_pair, tmp_path: Path) -> None:
    config = settings(
        tiny_pair, tmp_path / "run", **ONE_STEP, prefixes="mixed:0.5:dataset", objective="full_jsd"
    )
    folder = train(config).folder
    row, batch = rows(folder)[0], saved_batch(folder)
    assert batch.origin is not None
    own = batch.origin == STUDENT
    assert own.any()
    assert not own.all()
    for name, chosen in (("student", own), ("dataset", ~own)):
        mask = batch.mask & chosen[:, None]
        mean = float((batch.log_ratio * mask).sum() / mask.sum())
        assert row[f"origin={name}/divergence/k1"] == pytest.approx(mean, rel=1e-5)
        assert row[f"origin={name}/response/length"] == pytest.approx(
            float(batch.lengths[chosen].double().mean())
        )
    difference = (batch.student_logp - batch.sampler_logp).square()[batch.mask & own[:, None]]
    assert row["consistency/sampler_log_ratio_square"] == pytest.approx(
        float(difference.mean()), abs=1e-9
    )
    assert float(difference.mean()) < 1e-9
    assert "consistency/z_H" in row


def test_replayed_responses_grow_old_and_survive_a_resume(tiny_pair, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "prefixes": "replay:2",
        "objective": "sampled_token_weighted",
        "ratio": "token",
        "updates_per_batch": 3,
        "steps": 5,
        "save_every": 1,
        "save_batch_every": 1,
        "eval_every": 0,
        "eval_problems": 1,
        "max_response": 6,
    }
    whole = train(settings(tiny_pair, tmp_path / "whole", **changes)).folder
    batches = [saved_batch(whole, step) for step in range(5)]
    assert [batch.age.unique().tolist() for batch in batches] == [[0], [3], [6], [0], [3]]
    for step in (1, 2):
        assert torch.equal(batches[step].tokens, batches[0].tokens)
        assert torch.equal(batches[step].sampler_logp, batches[0].sampler_logp)
        assert not torch.equal(batches[step].student_logp, batches[0].student_logp)
    assert not torch.equal(batches[3].tokens, batches[0].tokens)
    assert torch.equal(batches[4].tokens, batches[3].tokens)
    assert [row["consistency/age"] for row in rows(whole)] == [0, 3, 6, 0, 3]
    resumed = settings(tiny_pair, tmp_path / "resumed", **(changes | {"steps": 2}))
    train(resumed)
    folder = train(settings(tiny_pair, tmp_path / "resumed", **changes)).folder
    assert json.dumps(rows(folder)) == json.dumps(rows(whole))
    weights = [load_model(str(run / "final"), "cpu", "float32")[1] for run in (whole, folder)]
    for a, b in zip(*(x.parameters() for x in weights), strict=True):
        assert torch.equal(a, b)


def test_a_teacher_with_a_view_writes_from_what_it_reads(tiny_pair, tmp_path: Path) -> None:
    """Its log-probabilities as sampler are those of its scores after its own prompts."""
    (tmp_path / "view.jinja").write_text("{{ prompt }} {{ answer }}{{ answer }}")
    changes = {"prefixes": "teacher", "objective": "full_forward_kl"}
    view = {"teacher_view": str(tmp_path / "view.jinja")}
    folders = [
        train(settings(tiny_pair, tmp_path / str(i), **ONE_STEP, **changes, **extra)).folder
        for i, extra in enumerate(({}, view))
    ]
    plain, viewed = map(saved_batch, folders)
    torch.testing.assert_close(viewed.sampler_logp, viewed.teacher_logp, atol=1e-5, rtol=0)
    assert not torch.equal(plain.tokens, viewed.tokens)
    (tmp_path / "view.jinja").write_text("{{ prompt }} {{ response }}")
    config = settings(tiny_pair, tmp_path / "run", **ONE_STEP, **changes, **view)
    with pytest.raises(InvalidInput, match="cannot read a response before it writes it"):
        train(config)


# --- what is refused ----------------------------------------------------------------------------


def problems_of(tiny_pair: tuple[Path, Path], **changes: object) -> str:
    return " ".join(validate(config_of(tiny_pair, **changes)))


GIVEN = {"prefixes": "dataset", "group_size": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes": "mixed:2"}, "must lie in [0, 1]"),
        ({**GIVEN, "objective": "sampled_token"}, "have no importance ratio"),
        ({**GIVEN, "objective": "sampled_token", "ratio": "token"}, "the sampler is not known"),
        ({**GIVEN, "objective": "k2"}, "takes each token as a sample of the student"),
        ({**GIVEN, "objective": "full_reverse_kl", "gamma": 0.5}, "later costs or the reward"),
        ({**GIVEN, "reward_weight": 1.0, "group_size": 2}, "later costs or the reward"),
        ({"prefixes": "mixed:0.5:dataset", "objective": "k3"}, "have no importance ratio"),
        ({"prefixes": "teacher", "objective": "sampled_token"}, "set ratio to token or sequence"),
        (
            {"prefixes": "teacher", "objective": "sampled_token", "ratio": "token", "gamma": 1.0},
            "set ratio to sequence",
        ),
        ({"prefixes": "replay:1", "objective": "sampled_token"}, "set ratio to token or sequence"),
        ({"objective": "negative_log_likelihood"}, "its mean gradient is zero"),
        (
            {"objective": "negative_log_likelihood", "prefixes": "mixed:0.5"},
            "its mean gradient is zero",
        ),
        ({"prefixes": "dataset"}, "group would be copies of it; set group_size to 1"),
        ({**GIVEN, "task": "env:household"}, "is a game"),
        ({"prefixes": "teacher", "teacher": "http://h:1/v1"}, "cannot be sampled from"),
        ({"prefixes": "teacher", "teacher": "none"}, "cannot be sampled from"),
        (
            {
                "prefixes": "replay:1",
                "rollout_lag": 1,
                "engine": "servers",
                "rollout_servers": ("http://h:1/v1",),
            },
            "set rollout_lag to 0",
        ),
        ({"response_column": "text"}, "only if prefixes is dataset"),
        ({"objective": "reward_only"}, "reward_weight is 0"),
        ({"teacher": "none"}, "objective teacher_topk with baseline none reads one"),
        (
            {"teacher": "none", "objective": "reward_only", "reward_weight": 1.0, "probe_every": 1},
            "probe_every 1 compares",
        ),
        ({"teacher": "none", "objective": "k2"}, "objective k2 with baseline none reads one"),
        (
            {
                "teacher": "none",
                "objective": "reward_only",
                "reward_weight": 1.0,
                "map_eos": True,
                "entropy_top_fraction": 0.5,
            },
            "map_eos reads its EOS ids",
        ),
    ],
)
def test_combinations_that_are_refused(tiny_pair, changes: dict[str, Any], message: str) -> None:
    assert message in problems_of(tiny_pair, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {**GIVEN, "objective": "negative_log_likelihood"},
        {
            "prefixes": "teacher",
            "objective": "negative_log_likelihood",
            "teacher": "base",
            "lora_rank": 2,
        },
        {"prefixes": "teacher", "objective": "sampled_token", "ratio": "sequence", "gamma": 1.0},
        {"prefixes": "mixed:0.5", "objective": "k2", "ratio": "token"},
        {**GIVEN, "objective": "sampled_token", "allow_unweighted": True},
        {"prefixes": "replay:2", "objective": "teacher_topk"},
        {"prefixes": "replay:2", "objective": "sampled_token", "ratio": "token", "gamma": 0.5},
        *({**GIVEN, "objective": name} for name in ("full_forward_kl", "union_topk", "full_jsd")),
        {"teacher": "none", "objective": "reward_only", "reward_weight": 1.0, "temperature": 0.7},
        {**GIVEN, "objective": "negative_log_likelihood", "teacher": "none"},
    ],
)
def test_combinations_that_are_valid(tiny_pair, changes: dict[str, Any]) -> None:
    assert problems_of(tiny_pair, **changes) == ""


def test_rows_without_a_response_are_named(tiny_pair, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"p{i}", "answer": "1", "response": "r"} for i in range(12)]
    del lines[3]["response"]
    lines[7]["response"] = " "
    path.write_text("\n".join(map(json.dumps, lines)))
    config = settings(
        tiny_pair,
        tmp_path / "run",
        prefixes="dataset",
        objective="negative_log_likelihood",
        group_size=1,
        task=str(path),
        grader="exact",
    )
    with pytest.raises(InvalidInput, match=r"row 3 lacks the response .*row 7 has an empty"):
        train(config)
    assert {"full_forward_kl", "union_topk", "full_jsd"} <= OBJECTIVES.keys()
