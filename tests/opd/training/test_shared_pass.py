"""One forward pass for scores and gradient: against two passes, and the loss of a whole batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.hooks import RemovableHandle

from opd.config.settings import Config, with_settings
from opd.models.model import base_model
from opd.scoring.loss import policy_loss
from opd.scoring.score import ScoredBatch
from opd.tokens.masking import apply_mask_rules
from opd.training import train as trainer
from opd.training.state import TrainState
from tests.helpers.runs import rows, settings

SHORT = {"steps": 1, "eval_every": 0, "eval_problems": 1, "save_batch_every": 1, "rescore_every": 0}
MASKED = tuple(f"id:{token}" for token in range(20, 60))
SHARED: dict[str, dict[str, Any]] = {
    "sampled token": {"objective": "sampled_token"},
    "masked": {"objective": "sampled_token", "mask": MASKED, "denominator": "sequence_mean"},
    "later costs": {"objective": "sampled_token", "gamma": 0.7, "mask": MASKED},
    "costs of masked tokens": {
        "objective": "sampled_token", "gamma": 0.7, "mask": MASKED, "mask_scope": "loss",
    },
    "token ratio": {"objective": "sampled_token", "ratio": "token", "top_p": 0.8},
    "sequence ratio": {"objective": "teacher_topk", "ratio": "sequence", "top_p": 0.8},
    "local baseline": {"objective": "sampled_token", "baseline": "local_kl"},
    "top-K, few statistics": {"objective": "teacher_topk", "full_metrics_every": 2, "steps": 2},
    "union": {"objective": "union_topk", "denominator": "group_mean"},
    "tail": {"objective": "teacher_topk_sampled_tail"},
    "full reverse": {"objective": "full_reverse_kl", "denominator": "sequence_sum"},
    "full reverse, masked": {"objective": "full_reverse_kl", "mask": MASKED, "temperature": 0.7},
    "full reverse, later costs": {"objective": "full_reverse_kl", "gamma": 0.5},
    "full reverse, ratio": {"objective": "full_reverse_kl", "ratio": "sequence", "top_p": 0.8},
    "full reverse, clipped": {"objective": "full_reverse_kl", "ratio_clip": 0.5},
    "full mixture": {"objective": "full_jsd", "beta": 0.3},
    "full forward": {"objective": "full_forward_kl", "denominator": "group_mean"},
    "likelihood": {"objective": "negative_log_likelihood", "prefixes": "teacher"},
    "teacher's responses": {"objective": "full_forward_kl", "prefixes": "mixed:0.5"},
    "checkpointing": {"objective": "full_reverse_kl", "gradient_checkpointing": True},
    "small chunks": {"objective": "full_jsd", "max_logits_per_chunk": 4000},
    "adapters": {"objective": "teacher_topk", "lora_rank": 2},
    "bfloat16": {"objective": "full_reverse_kl", "dtype": "bfloat16"},
}  # fmt: skip
TWO_PASSES: dict[str, dict[str, Any]] = {
    "not asked for": {"share_forward_pass": False},
    "two updates": {"updates_per_batch": 2, "prompts_per_step": 4},
    "baseline over a prompt's rollouts": {
        "objective": "sampled_token",
        "baseline": "leave_one_out",
    },
    "reward": {"reward_weight": 1.0},
    "tokens by entropy": {"entropy_top_fraction": 0.5},
    "probe": {"probe_every": 1},
    "offloaded teacher": {"offload_teacher": True},
}


def count_passes(
    monkeypatch: pytest.MonkeyPatch, counts: list[int]
) -> Callable[[TrainState, int, Any], Any]:
    """Count forward passes of the student over prompts with responses in each step.

    Args:
        monkeypatch: Replaces `run_step`.
        counts: One number is appended per step: passes without a cache of keys, as scoring and
            updates need.

    Returns:
        The original step.
    """
    original = trainer.run_step

    def run_step(state: TrainState, step: int, log: Any) -> Any:
        counts.append(0)

        def count(_: Any, __: Any, inputs: dict[str, Any]) -> None:
            counts[-1] += inputs["use_cache"] is False

        decoder = base_model(state.student.network).get_decoder()
        handle: RemovableHandle = decoder.register_forward_pre_hook(count, with_kwargs=True)
        try:
            return original(state, step, log)
        finally:
            handle.remove()

    monkeypatch.setattr(trainer, "run_step", run_step)
    return original


def train_both(
    pair: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[list[Config], list[list[int]]]:
    """Train with one and with two passes; return the settings, and the passes of each step."""
    configs, counts = [], []
    for is_shared in (True, False):
        config = settings(pair, folder / str(is_shared), **{**SHORT, **changes})
        configs.append(with_settings(config, share_forward_pass=is_shared))
        counts.append(list[int]())
        with monkeypatch.context() as patches:
            count_passes(patches, counts[-1])
            trainer.train(configs[-1])
    return configs, counts


@pytest.mark.parametrize("name", SHARED)
def test_scores_loss_and_weights_are_those_of_two_passes(
    two_layer_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Several micro-batches; the second step of lean scoring starts from moved weights."""
    configs, (shared, separate) = train_both(
        two_layer_pair, tmp_path, monkeypatch, max_tokens_per_microbatch=60, **SHARED[name]
    )
    assert separate == [2 * count for count in shared], name
    assert min(shared) >= 2, name
    folders = [Path(config.out) for config in configs]
    step_rows, reference_rows = map(rows, folders)
    tolerance = 2e-2 if name == "bfloat16" else 2e-4
    for row, reference in zip(step_rows, reference_rows, strict=True):
        assert row.keys() == reference.keys()
        for key, value in reference.items():
            if isinstance(value, float):
                assert row[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    assert step_rows[0]["grad_norm"] > 0
    if "consistency/loss_error" in step_rows[0]:
        assert all(row["consistency/loss_error"] == 0 for row in step_rows)
    for path in sorted(folders[1].glob("batches/*.safetensors")):
        batch = load_file(folders[0] / "batches" / path.name)
        for key, value in load_file(path).items():
            torch.testing.assert_close(batch[key], value, atol=tolerance, rtol=tolerance, msg=key)
    weights, reference_weights = (
        load_file(folder / "final" / "model.safetensors") for folder in folders
    )
    for key, value in reference_weights.items():
        torch.testing.assert_close(weights[key], value, atol=2e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["later costs", "full reverse, masked", "top-K, few statistics"])
def test_the_gradient_is_that_of_the_loss_of_the_whole_batch(
    two_layer_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original, compared = trainer.score_and_sum_gradient, []

    def compare(state: TrainState, task: Any, *args: Any, **options: Any) -> Any:
        batch, summed = original(state, task, *args, **options)
        prompts, rollouts, request = args
        masked = apply_mask_rules(rollouts, task.masks)
        scored = trainer.score_batch(state.student, task.pair.teacher, prompts, masked, request)
        loss = policy_loss(
            state.student,
            ScoredBatch(prompts, scored.scored, scored.teacher_hidden),
            task.objective,
            teacher=task.pair.teacher,
            denominator=task.config.objective.denominator,
        )
        parameters = list(state.student.network.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        torch.testing.assert_close(summed.loss, loss.detach(), atol=1e-6, rtol=1e-5)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
        compared.append(float(loss.detach()))
        return batch, summed

    monkeypatch.setattr(trainer, "score_and_sum_gradient", compare)
    options = {**SHORT, "max_tokens_per_microbatch": 60, **SHARED[name]}
    trainer.train(settings(two_layer_pair, tmp_path / "run", **options))
    assert len(compared) == options["steps"]
    assert all(compared)


@pytest.mark.parametrize("name", TWO_PASSES)
def test_other_steps_read_the_student_twice(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    counts: list[int] = []
    count_passes(monkeypatch, counts)
    options = {**SHORT, "objective": "teacher_topk", "steps": 1, **TWO_PASSES[name]}
    trainer.train(settings(tiny_pair, tmp_path / "run", **options))
    assert counts[0] >= 2
