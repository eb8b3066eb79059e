"""Runs whose responses the teacher or the data write, replayed ones, and runs without a teacher."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.alarms.alarms import replay
from diagnostics.batch import DATASET, STUDENT, TEACHER, ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.missing import missing_fields
from diagnostics.records.batch_files import load_batch
from opd.config.settings import with_settings
from opd.data.chain_task import problems
from opd.data.prompts import encode_prompts
from opd.models.loading import load_model
from opd.training import train as trainer
from opd.training.prefetch import TaskRollouts
from opd.training.train import train
from tests.helpers.runs import rows, settings, train_in_rank
from tests.helpers.warm_process import run_ranks

ONE_STEP = {"steps": 1, "eval_every": 0, "eval_problems": 1, "save_batch_every": 1, "lr": 1e-3}


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
    ends = [response[-1] == tokenizer.eos_token_id for _, response in sequences]
    assert batch.ended.tolist() == ends
    assert any(ends)
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
    assert row["update/reached_share"] > 0.2


def test_equal_rewards_are_no_fault_of_the_gradient(tiny_pair, tmp_path: Path) -> None:
    changes = {**ONE_STEP, "steps": 3, "teacher": "none", "grader": "exact"}
    config = settings(
        tiny_pair, tmp_path / "run", **changes, objective="reward_only", reward_weight=1.0
    )
    steps = rows(train(config).folder)
    assert [(row["response/reward"], row["grad_norm"]) for row in steps] == [(0, 0)] * 3
    assert [row["update/reached_share"] for row in steps] == [None] * 3
    assert "gradient_partial" not in {alarm.rule.name for alarm in replay(steps)}


def test_the_teacher_writes_what_it_is_scored_for(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probabilities when it samples are its scores; no test of the student's sampling."""
    probed: list[TaskRollouts] = []
    original = trainer.roll_out

    def recording(*arguments: Any, **options: Any) -> TaskRollouts:
        probed.append(original(*arguments, **options))
        return probed[-1]

    monkeypatch.setattr(trainer, "roll_out", recording)
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
    (probe,) = probed
    assert probe.rollouts.origin is None, "the probe samples from the student"
    assert not torch.equal(probe.rollouts.tokens[:, :4], batch.tokens[:, :4])
    assert any(name.startswith("gradient/") for name in row)


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


@pytest.mark.parametrize("text", ["mixed:0.5", "mixed:0.5:dataset"])
def test_a_nucleus_is_no_stale_sampler(tiny_pair, tmp_path: Path, text: str) -> None:
    changes = {**ONE_STEP, "top_p": 0.5, "prefixes": text, "objective": "full_jsd"}
    folder = train(settings(tiny_pair, tmp_path / "run", **changes)).folder
    row, batch = rows(folder)[0], saved_batch(folder)
    own_tokens = batch.own_tokens & batch.mask
    assert own_tokens.any()
    in_nucleus = (batch.sampler_logp - batch.student_logp)[own_tokens]
    assert float(in_nucleus.min()) > 0.1, "the sampler's own softmax is that of the nucleus"
    assert row["consistency/sampler_log_ratio_square"] < 1e-9
    assert row["consistency/sampler_error"] == 0


def test_a_prompt_may_have_several_given_responses(tiny_pair, tmp_path: Path) -> None:
    """Each is a row of its own, in the column that the setting names, and none is an alarm."""
    texts = ["<think>1</think>2", "<think>3</think>4"]
    lines = [{"prompt": f"4:{i // 2}*2+1", "answer": "2", "text": texts[i % 2]} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = settings(
        tiny_pair,
        tmp_path / "run",
        **ONE_STEP,
        prefixes="dataset",
        objective="full_forward_kl",
        group_size=1,
        prompts_per_step=36,  # all but the held-out prompts
        task=str(tmp_path / "data.jsonl"),
        response_column="text",
        grader="lab",
        max_response=30,
    )
    folder = train(config).folder
    row, batch = rows(folder)[0], saved_batch(folder)
    tokenizer = load_model(str(tiny_pair[0]), "cpu", "float32")[0]
    decoded = [tokenizer.decode(x[m]) for x, m in zip(batch.tokens, batch.mask, strict=True)]
    assert sorted(decoded) == sorted([f"{text}{tokenizer.eos_token}" for text in texts] * 18)
    assert batch.ended.all()
    assert row["response/reward"] == 0.5
    assert "data/repeated_prompts" not in row


OWN_LOSS = """
def likelihood(student_logp, mask):
    return -(student_logp * mask).sum() / mask.sum()
"""


def test_a_loss_of_the_users_own_needs_no_teacher_either(tiny_pair, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_LOSS)
    given = {"prefixes": "dataset", "group_size": 1, "teacher": "none"}
    own = {
        "objective": f"{tmp_path / 'own.py'}:likelihood",
        "allow_unweighted": True,
        "allow_faulty_loss": True,  # on the student's own samples its mean gradient is zero
    }
    losses = [
        rows(train(settings(tiny_pair, tmp_path / str(i), **ONE_STEP, **given, **extra)).folder)
        for i, extra in enumerate((own, {"objective": "negative_log_likelihood"}))
    ]
    for name in ("loss", "grad_norm"):
        assert losses[0][0][name] == pytest.approx(losses[1][0][name], rel=1e-5)


def test_two_processes_write_what_one_writes(tiny_pair, tmp_path: Path) -> None:
    """The same rows up to rounding; a process may have the rows of one writer only."""
    changes: dict[str, Any] = {**ONE_STEP, "prompts_per_step": 4, "max_response": 6}
    runs: tuple[dict[str, Any], ...] = (
        {"prefixes": "mixed:0.3:dataset", "objective": "full_jsd", "group_size": 1},
        {"prefixes": "mixed:0.5", "objective": "full_jsd"},
        {
            "prefixes": "dataset",
            "objective": "negative_log_likelihood",
            "teacher": "none",
            "group_size": 1,
        },
    )
    alone = [
        settings(tiny_pair, tmp_path / f"alone{i}", **(changes | run)) for i, run in enumerate(runs)
    ]
    for config in alone:
        train(config)
    several = [with_settings(config, out=f"{config.out}-in-two") for config in alone]
    run_ranks(tmp_path, train_in_rank, several)
    for config in alone:
        for expected, actual in zip(
            rows(Path(config.out)), rows(Path(f"{config.out}-in-two")), strict=True
        ):
            assert expected.keys() == actual.keys()
            for name in ("loss", "grad_norm", "response/length", "response/reward"):
                assert actual[name] == pytest.approx(expected[name], rel=2e-4), name
            for name in ("student", "teacher_sampled", "teacher"):
                assert actual[f"cost/{name}_tokens"] == expected[f"cost/{name}_tokens"], name
    (mixed_row,) = rows(Path(alone[1].out))
    assert min(mixed_row["cost/student_tokens"], mixed_row["cost/teacher_sampled_tokens"]) > 0


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


def test_a_teachers_responses_are_scored_by_the_student_itself(tiny_pair, tmp_path: Path) -> None:
    """A step without full statistics takes the sampler's softmax only where it is the student's."""
    changes = {"steps": 2, "full_metrics_every": 2, "prefixes": "teacher"}
    folder = train(settings(tiny_pair, tmp_path / "run", **(ONE_STEP | changes))).folder
    for step in range(2):
        batch = saved_batch(folder, step)
        gap = (batch.student_logp - batch.sampler_logp)[batch.mask].abs()
        assert gap.median() > 0.1, step
    assert rows(folder)[1]["consistency/student_rescored"] == 0
    assert rows(folder)[1]["consistency/loss_error"] == 0
