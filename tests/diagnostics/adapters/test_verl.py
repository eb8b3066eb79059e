"""verl's losses with the observer installed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.adapters.verl import install
from diagnostics.monitor import Monitor
from diagnostics.records.reader import Records

DP_SIZE = 2
MASKS = ([1, 1, 1], [1, 0, 1, 1, 1], [1, 1], [1, 1, 1, 0])


def make_rows(seed: int, num_topk: int) -> list[dict[str, Any]]:
    """Build four responses: prompts (two of them equal), tokens, masks and log-probabilities."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i, mask in enumerate(MASKS):
        prompt = torch.tensor([[7, 8], [7, 8], [5, 6, 7], [9]][i])
        n, size = len(mask), len(prompt) + len(mask)
        ids = torch.stack([torch.randperm(20, generator=g)[:num_topk] for _ in range(size)])
        rows.append(
            {
                "prompts": prompt,
                "responses": torch.randint(20, (n,), generator=g),
                "response_mask": torch.tensor(mask),
                "rollout_log_probs": -torch.rand(n, generator=g),
                "log_probs": -torch.rand(size, generator=g),
                "teacher_logprobs": -1.5 * torch.rand(size, num_topk, generator=g)
                - math.log(num_topk),
                "teacher_ids": ids,
                "distillation_losses": torch.rand(size, generator=g),
                "student_mass": torch.rand(size, generator=g),
                "teacher_mass": torch.rand(size, generator=g),
            }
        )
    return rows


def micro_batch(rows: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Return (data, model_output) in verl's layout without padding."""
    from tensordict import TensorDict

    def nested(name: str) -> Any:
        return torch.nested.as_nested_tensor([r[name] for r in rows], layout=torch.jagged)

    names = ("prompts", "responses", "response_mask", "rollout_log_probs")
    names = (*names, "teacher_logprobs", "teacher_ids")
    data = TensorDict({name: nested(name) for name in names}, batch_size=[len(rows)])
    for name, value in (("dp_size", DP_SIZE), ("global_batch_size", 4)):
        data.set_non_tensor(name, value)
    data.set_non_tensor("batch_num_tokens", sum(map(sum, MASKS)))
    outputs = ("log_probs", "distillation_losses", "student_mass", "teacher_mass")
    return data, {name: nested(name) for name in outputs}


def settings(mode: str, num_topk: int) -> tuple[Any, Any]:
    from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

    loss = DistillationLossConfig(
        loss_mode=mode, topk=num_topk, use_task_rewards=False, use_policy_gradient=False
    )
    distillation = DistillationConfig.__new__(DistillationConfig)
    object.__setattr__(distillation, "distillation_loss", loss)
    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    return actor, distillation


def run(mode: str, num_topk: int, parts: list[list[dict[str, Any]]]) -> tuple[list, list[dict]]:
    from verl.trainer.distillation.losses import distillation_loss

    actor, distillation = settings(mode, num_topk)
    losses, metrics = [], []
    for rows in parts:
        data, output = micro_batch(rows)
        loss, step_metrics = distillation_loss(actor, distillation, output, data)
        losses.append(float(loss))
        metrics.append(step_metrics)
    return losses, metrics


def reduce_metrics(metrics: list[dict]) -> dict[str, float]:
    """Reduce metrics as verl's workers do: two ranks with equally many micro-batches."""
    from verl.utils.metric import Metric

    ranks = [metrics[: len(metrics) // 2], metrics[len(metrics) // 2 :]]
    reduced = {}
    for name, x in metrics[0].items():
        if isinstance(x, Metric):
            rank_lists = [x.init_list() for _ in ranks]
            for values_of_rank, part in zip(rank_lists, ranks, strict=True):
                for values in part:
                    values_of_rank.append(values[name])
            reduced[name] = Metric.aggregate_dp(rank_lists)
    return reduced


@pytest.fixture
def registry() -> Any:
    from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY

    original = dict(DISTILLATION_LOSS_REGISTRY)
    yield DISTILLATION_LOSS_REGISTRY
    DISTILLATION_LOSS_REGISTRY.update(original)


def supervised_values(rows: list[dict[str, Any]], name: str) -> torch.Tensor:
    """Return the values of supervised tokens; token t is predicted one position earlier."""
    parts = []
    for r in rows:
        x, start = r[name], len(r["prompts"])
        if len(x) > len(r["responses"]):
            x = x[start - 1 : start - 1 + len(r["responses"])]
        parts.append(x[r["response_mask"].bool()])
    return torch.cat(parts)


@pytest.mark.verl
def test_estimator_losses_are_observed_exactly(registry: Any, tmp_path: Path) -> None:
    rows = make_rows(0, 1)
    parts = [rows[:1], rows[1:2], rows[2:3], rows[3:]]  # two ranks of two micro-batches
    plain = run("k3", 1, parts)
    install("k3", tmp_path / "records")
    observed_loss = registry["k3"]
    install("k3")
    assert registry["k3"] is observed_loss
    losses, metrics = run("k3", 1, parts)
    assert losses == plain[0]
    row, unobserved_row = reduce_metrics(metrics), reduce_metrics(plain[1])
    assert unobserved_row.items() <= row.items()
    r = supervised_values(rows, "log_probs") - supervised_values(rows, "teacher_logprobs")[:, 0]
    d = supervised_values(rows, "log_probs") - supervised_values(rows, "rollout_log_probs")
    expected = {
        "divergence/k1": r.mean(),
        "divergence/abs_ratio": r.abs().mean(),
        "divergence/teacher_prob": supervised_values(rows, "teacher_logprobs").exp().mean(),
        "signal/negative_share": (r > 0).float().mean(),
        "signal/positive_mass": (-r).clamp(min=0).mean(),
        "consistency/sampler_log_ratio": d.mean(),
        "consistency/sampler_log_ratio_square": d.square().mean(),
        "repetition/repeated_share": torch.tensor(0.0),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
    assert "divergence/outside_topk" not in row
    # the recorded files give the full panel and list missing fields
    files = sorted((tmp_path / "records").iterdir())
    recorded_batches = [b for file in files for b in Records(file)]
    monitor = Monitor()
    offline = monitor(0, recorded_batches)
    assert offline["divergence/k1"] == pytest.approx(float(r.mean()), rel=1e-5)
    assert len({int(b.prompt) for b in recorded_batches}) == 3
    prompts = [next(Records(f).rows())["prompt_tokens"].tolist() for f in files]
    assert prompts == [r["prompts"].tolist() for r in rows]
    assert monitor.missing["length"] == "the records have no ended"


@pytest.mark.verl
def test_the_topk_loss_is_observed_exactly(registry: Any) -> None:
    rows = make_rows(1, 4)
    parts = [rows[:1], rows[1:2], rows[2:3], rows[3:]]
    plain = run("forward_kl_topk", 4, parts)
    install("forward_kl_topk")
    losses, metrics = run("forward_kl_topk", 4, parts)
    assert losses == plain[0]
    row = reduce_metrics(metrics)
    inside = supervised_values(rows, "teacher_ids") == supervised_values(rows, "responses")[:, None]
    mass = supervised_values(rows, "teacher_logprobs").exp().sum(-1)
    assert 0 < float(inside.any(-1).float().mean()) < 1
    assert row["divergence/outside_topk"] == pytest.approx(1 - float(inside.any(-1).float().mean()))
    assert row["divergence/topk_teacher_mass"] == pytest.approx(float(mass.mean()), rel=1e-5)
    assert "divergence/k1" not in row
    assert "consistency/sampler_log_ratio" in row
    with pytest.raises(ValueError, match="Unsupported loss mode: k9"):
        install("k9")


@pytest.mark.verl
def test_a_run_on_nothing_but_the_topk_is_observed_without_the_students_side(
    registry: Any,
) -> None:
    """In this mode verl does not compute the log_probs of sampled tokens."""
    from verl.trainer.distillation.losses import distillation_loss

    rows = make_rows(2, 4)
    install("forward_kl_topk")
    actor, distillation = settings("forward_kl_topk", 4)
    data, output = micro_batch(rows)
    del output["log_probs"]
    _, metrics = distillation_loss(actor, distillation, output, data)
    row = reduce_metrics([metrics, metrics])  # each of the two ranks has all tokens
    mass = supervised_values(rows, "teacher_logprobs").exp().sum(-1)
    assert row["divergence/topk_teacher_mass"] == pytest.approx(
        DP_SIZE * float(mass.mean()), rel=1e-5
    )
    assert "consistency/sampler_log_ratio" not in row
