"""Observed GRPOTrainer: an assigned teacher, rewards, reused rollouts, lengths, bad settings."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.adapters.trl import observe_trl
from diagnostics.catalogue import FULL
from diagnostics.monitor import Monitor
from tests.helpers.trl_trainers import (
    Spy,
    by_hand,
    even,
    first,
    gold,
    grpo,
    iw_opd,
    log_softmaxes,
    sdft,
    sdpo,
    sequences,
)

pytestmark = pytest.mark.filterwarnings("error:step .* has no row:RuntimeWarning")


def run_observed(trainer: Any, panel: Any = FULL) -> tuple[list[dict], Monitor]:
    torch.manual_seed(11)
    monitor = Monitor(panel)
    with observe_trl(trainer, monitor, k=5) as rows:
        trainer.train()
    return rows, monitor


def test_a_teacher_assigned_as_ref_model_is_read_as_the_advice_says(
    pair: Any, tiny_pair: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"beta 0 .* assign trainer.ref_model = teacher"):
        run_observed(grpo(pair, tmp_path / "none", beta=0.0))
    trainer = grpo(pair, tmp_path / "run", temperature=0.7)
    trainer.ref_model = AutoModelForCausalLM.from_pretrained(tiny_pair[1])
    spy = Spy(trainer, pair[0])
    rows, _ = run_observed(trainer)
    for row in rows:
        expected = by_hand(list(spy.dense(row["step"], pair[1], 0.7)))
        for name in (
            "divergence/k1",
            "divergence/k1_se",
            "signal/negative_share",
            "divergence/tokens",
        ):
            assert row[name] == pytest.approx(expected[name], rel=2e-4), name
    for step, log in zip(
        (1, 2), trainer.state.log_history, strict=False
    ):  # TRL's k3 of the same tokens
        r = torch.cat(
            [
                (x["q"] - x["p"]).gather(-1, x["tokens"][:, None])[:, 0]
                for x in spy.dense(step, pair[1], 0.7)
            ]
        )
        parts = r.exp() - r - 1
        assert float(parts.mean()) == pytest.approx(log["kl"], rel=0.05)
    small = copy.deepcopy(pair[1])
    small.resize_token_embeddings(100)
    trainer = grpo(pair, tmp_path / "small")
    trainer.ref_model = small
    with pytest.raises(
        ValueError, match=r"ref_model has 100 vocabulary ids, but the student has \d"
    ):
        run_observed(trainer)
    trainer.ref_model = None
    with pytest.raises(ValueError, match="ref_model is None; set it to the teacher"):
        run_observed(trainer)


def test_rewards_are_weighted_as_trl_does_and_follow_their_responses(
    pair: Any, tmp_path: Path
) -> None:
    trainer = grpo(pair, tmp_path / "run", max_steps=4, steps_per_generation=4, logging_steps=4)
    spy = Spy(trainer, pair[0])
    rows, _ = run_observed(trainer)
    for row in rows:
        ids = [
            x["tokens"].tolist() for s, i, _ in spy.losses if s == row["step"] for x in sequences(i)
        ]
        sums = [e + 0.5 * (f or 0.0) for e, f in zip(even(ids), first(ids), strict=True)]
        assert row["response/reward"] == pytest.approx(sum(sums) / 4)
        assert row["response/graded_share"] == 1
    log = trainer.state.log_history[0]
    assert log["response/reward"] == pytest.approx(log["reward"], rel=1e-5)
    assert log["response/length"] == pytest.approx(log["completions/mean_length"])


def test_a_response_that_no_function_grades_is_not_graded(pair: Any, tmp_path: Path) -> None:
    trainer = grpo(pair, tmp_path / "run", reward_weights=None)
    trainer.reward_funcs = [first, first]
    spy = Spy(trainer, pair[0])
    rows, _ = run_observed(trainer)
    for row in rows:
        ids = [
            x["tokens"].tolist() for s, i, _ in spy.losses if s == row["step"] for x in sequences(i)
        ]
        known_rewards = [2 * x for x in first(ids) if x is not None]
        assert row["response/graded_share"] == pytest.approx(len(known_rewards) / len(ids))
        if known_rewards:
            assert row["response/reward"] == pytest.approx(sum(known_rewards) / len(known_rewards))


def test_reused_rollouts_have_ages_and_the_log_probabilities_of_their_sampler(
    pair: Any, tmp_path: Path
) -> None:
    trainer = grpo(pair, tmp_path / "run", num_iterations=2, max_steps=4)
    spy = Spy(trainer, pair[0])
    rows, monitor = run_observed(trainer)
    assert [row["consistency/age"] for row in rows] == [0, 1, 0, 1]
    assert "sampler_ratio" not in monitor.missing
    for row in rows:
        step = row["step"]
        sampler = next(m for s, _, m in spy.losses if s == step - row["consistency/age"])
        gaps = []
        for s, inputs, student in spy.losses:
            for x in sequences(inputs) if s == step else ():
                current_logp, sampler_logp = (
                    log_softmaxes(m, x["prompt"], x["tokens"], 1.0) for m in (student, sampler)
                )
                gaps.append((current_logp - sampler_logp).gather(-1, x["tokens"][:, None])[:, 0])
        gap = float(torch.cat(gaps).mean())
        assert row["consistency/sampler_log_ratio"] == pytest.approx(gap, abs=2e-5)
        assert (abs(gap) > 1e-3) is (row["consistency/age"] == 1)


def test_top_p_leaves_only_what_stood_before_it(pair: Any, tmp_path: Path) -> None:
    trainer = grpo(pair, tmp_path / "run", num_iterations=2, top_p=0.9)
    batches: list[Any] = []
    panel = {"keep": lambda batch: batches.append(batch) or {}}
    run_observed(trainer, panel)
    fresh = batches[0]
    assert fresh.top_p == 0.9
    assert torch.allclose(fresh.softmax_logp, fresh.student_logp, atol=1e-5)
    with pytest.raises(LookupError, match="has no sampler_logp"):
        _ = fresh.sampler_logp


def test_lengths_are_of_what_was_generated_where_the_loss_leaves_it_out(
    pair: Any, tmp_path: Path
) -> None:
    changes = {"max_completion_length": 20, "per_device_train_batch_size": 4}
    trainer = grpo(pair, tmp_path / "run", mask_truncated_completions=True, **changes)
    spy = Spy(trainer, pair[0])
    rows, _ = run_observed(trainer)
    masked = 0
    for row, log in zip(rows, trainer.state.log_history, strict=False):
        dense = list(spy.dense(row["step"], pair[1], 1.0))
        masked += sum(not x["mask"].any() for x in dense)
        for name, value in by_hand(dense).items():
            if name in row:
                assert row[name] == pytest.approx(value, rel=2e-4, nan_ok=True), name
        assert row["response/length"] == pytest.approx(log["completions/mean_length"])
        assert row["response/truncated_share"] == pytest.approx(log["completions/clipped_ratio"])
    assert 0 < masked < 16


def test_what_changes_the_sampled_distribution_takes_its_tests_away(
    pair: Any, tmp_path: Path
) -> None:
    for make, changes in ((iw_opd, {"top_k": 7}), (sdft, {"min_p": 0.1})):
        rows, monitor = run_observed(make(pair, tmp_path / make.__name__, max_steps=1, **changes))
        (name, value) = next(iter(changes.items()))
        assert "consistency/z_H" not in rows[0]
        assert f"sampling with {name} {value}, has no top_p" in monitor.missing["martingales"]


def test_an_engines_log_probabilities_are_the_samplers(pair: Any, tmp_path: Path) -> None:
    """vLLM's log-probabilities as TRL passes them on: NaN where the engine has none."""
    trainer = grpo(pair, tmp_path / "run", max_steps=1)
    generate = trainer._generate
    engine_logps: dict[tuple[int, ...], list[float]] = {}

    def with_log_probabilities(prompts: list[Any]) -> tuple[Any, ...]:
        parts = list(generate(prompts))
        parts[4] = [
            [-2.0 - 0.1 * i - 0.01 * j for j in range(len(x))] for i, x in enumerate(parts[1])
        ]
        parts[4][0][1] = float("nan")
        engine_logps.update({tuple(x): y for x, y in zip(parts[1], parts[4], strict=True)})
        return tuple(parts)

    trainer._generate = with_log_probabilities
    spy = Spy(trainer, pair[0])
    rows, _ = run_observed(trainer)
    gaps = []
    for x in spy.dense(1, pair[1], 1.0):
        sampler = torch.tensor(engine_logps[tuple(x["tokens"].tolist())])
        gap = x["p"].gather(-1, x["tokens"][:, None])[:, 0] - sampler
        gaps.append(gap[~sampler.isnan()])
    assert len(torch.cat(gaps)) == rows[0]["divergence/tokens"]
    assert rows[0]["consistency/sampler_log_ratio"] == pytest.approx(
        float(torch.cat(gaps).mean()), rel=1e-4
    )


@pytest.mark.parametrize("objective", ["iw_opd", "top_1", "whole"])
def test_every_objective_of_iw_opd_is_read(pair: Any, tmp_path: Path, objective: str) -> None:
    changes = {
        "iw_opd": {"distillation_objective": "iw_opd"},
        "top_1": {"distillation_objective": "jsd", "beta": 0.5, "loss_top_k": 1},
        "whole": {"distillation_objective": "jsd", "beta": 1.0, "loss_top_k": 0},
    }[objective]
    trainer = iw_opd(pair, tmp_path / "run", max_steps=1, **changes)
    spy = Spy(trainer, pair[0])
    rows, _ = run_observed(trainer)
    for name, value in by_hand(list(spy.dense(1, pair[1], 0.7))).items():
        assert rows[0][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name


def test_runs_without_whole_distributions_are_refused(pair: Any, tmp_path: Path) -> None:
    trainer = sdpo(pair, tmp_path / "sdpo", distillation_weight=0.0)
    with pytest.raises(ValueError, match="distillation_weight 0 uses no teacher"):
        run_observed(trainer)
    trainer.use_teacher_server = True
    with pytest.raises(ValueError, match="use_teacher_server is set"):
        run_observed(trainer)
    trainer = gold(pair, tmp_path / "gold")
    trainer.use_uld_loss, trainer.teacher_tokenizer = True, pair[2]
    with pytest.raises(ValueError, match="use_uld_loss compares spans of two tokenizers"):
        run_observed(trainer)
    trainer = iw_opd(pair, tmp_path / "iw_opd")
    trainer.teacher_model = None
    with pytest.raises(ValueError, match="has a remote teacher"):
        run_observed(trainer)


@pytest.mark.parametrize(
    ("make", "flags", "changes"),
    [
        (gold, "_buffered_on_policy", {}),
        (iw_opd, "_buffered_on_policy_flags", {"distillation_objective": "jsd"}),
    ],
)
def test_off_policy_micro_batches_are_counted_and_not_measured(
    pair: Any, tmp_path: Path, make: Any, flags: str, changes: dict[str, Any]
) -> None:
    trainer = make(pair, tmp_path, lmbda=0.5, max_steps=4, seed=5, **changes)
    recorded_flags: list[list[bool]] = []
    fill_buffer = trainer._fill_buffer

    def record_flags(*args: Any) -> None:
        fill_buffer(*args)
        recorded_flags.append(list(getattr(trainer, flags)))

    trainer._fill_buffer = record_flags
    spy = Spy(trainer, pair[0])
    rows, _ = run_observed(trainer)
    assert [row["trl/on_policy_share"] for row in rows] == [sum(f) / 2 for f in recorded_flags]
    assert len({sum(f) for f in recorded_flags}) > 1
    for row, is_on_policy in zip(rows, recorded_flags, strict=True):
        inputs = [i for s, i, _ in spy.losses if s == row["step"]]
        counts = [int((i["labels"] != -100).sum()) for i in inputs]
        tokens = sum(n for n, sampled in zip(counts, is_on_policy, strict=True) if sampled)
        assert row.get("divergence/tokens", 0) == tokens
