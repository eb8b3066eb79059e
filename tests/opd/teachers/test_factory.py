"""LoRA, EMA teachers and bfloat16 in training runs: updates, checkpoints and resuming."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.models.loading import load_model
from opd.models.lora import merge_lora, without_adapters
from opd.teachers.factory import make_pair
from opd.teachers.teacher import make_ema_teacher
from opd.training.train import train
from tests.helpers.runs import rows, settings

NONZERO_UPDATES = {
    "reward_weight": 1.0,
    "weight_decay": 1.0,
}  # the tiny student gets no reward: weight decay changes it
KINDS: dict[str, dict[str, object]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "adapters": {"lora_rank": 4, "lr": 1e-2},
    "base": {"teacher": "base", "lora_rank": 4, **NONZERO_UPDATES, "lr": 1e-2},
    "ema": {"teacher": "ema", "ema_decay": 0.5, "objective": "sampled_token", **NONZERO_UPDATES},
    "cosine": {"schedule": "cosine", "warmup": 1, "updates_per_batch": 3},
}


def run_config(tiny_pair, out: Path, kind: str, **changes: object):
    options = dict(KINDS[kind]) | changes
    teacher = options.pop("teacher", str(tiny_pair[1]))
    return settings((tiny_pair[0], Path(str(teacher))), out, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_resumes_to_the_same_bits(tiny_pair, tmp_path: Path, kind: str) -> None:
    complete_folder = train(run_config(tiny_pair, tmp_path / "whole", kind)).folder
    interrupted_folder = tmp_path / "cut"
    if kind == "cosine":  # its schedule depends on `steps`, so the run is interrupted
        with pytest.raises(KeyboardInterrupt), InterruptedAfter(2):
            train(run_config(tiny_pair, interrupted_folder, kind))
    else:
        train(run_config(tiny_pair, interrupted_folder, kind, steps=2))
    train(run_config(tiny_pair, interrupted_folder, kind))
    assert rows(interrupted_folder) == rows(complete_folder)
    assert len(rows(complete_folder)) == 4
    final_weights = [
        (d / "final" / "model.safetensors").read_bytes()
        for d in (complete_folder, interrupted_folder)
    ]
    assert final_weights[0] == final_weights[1]


class InterruptedAfter:
    """Raise KeyboardInterrupt at the start of step number `steps`."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __enter__(self) -> None:
        from opd.training import train as module

        self.module, self.honest = module, module.run_step

        def interrupt(state, step: int, log):
            if step == self.steps:
                raise KeyboardInterrupt
            return self.honest(state, step, log)

        module.run_step = interrupt

    def __exit__(self, *_: object) -> None:
        self.module.run_step = self.honest


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    network = load_model(str(folder), "cpu", "float32")[1]
    return {name: p.detach() for name, p in network.named_parameters()}


def test_only_the_adapted_layers_of_the_final_model_differ(tiny_pair, tmp_path: Path) -> None:
    folder = train(run_config(tiny_pair, tmp_path / "run", "adapters")).folder
    initial_weights, final_weights = parameters(tiny_pair[0]), parameters(folder / "final")
    changed_names = {
        name
        for name in initial_weights
        if not torch.equal(initial_weights[name], final_weights[name])
    }
    linear_names = {n for n in initial_weights if "proj" in n and n.endswith("weight")}
    assert changed_names == linear_names
    assert all(
        torch.linalg.matrix_rank(final_weights[n] - initial_weights[n], rtol=1e-3) <= 4
        for n in changed_names
    )


def test_merged_adapters_are_the_model_that_was_trained(tiny_pair, tmp_path: Path) -> None:
    pair = make_pair(run_config(tiny_pair, tmp_path, "adapters"))
    generator = torch.Generator().manual_seed(0)
    for name, p in pair.student.network.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        adapted_logits = pair.student.network(ids).logits
        merged = merge_lora(pair.student.network)
        torch.testing.assert_close(merged(ids).logits, adapted_logits, atol=1e-4, rtol=1e-4)
        base_logits = load_model(str(tiny_pair[0]), "cpu", "float32")[1](ids).logits
    assert (adapted_logits - base_logits).abs().max() > 0.1
    assert hasattr(pair.student.network, "peft_config")  # the adapters were merged in a copy
    base = without_adapters(pair.student)
    attention, positions = torch.ones_like(ids), ids
    base_model_logits = base.hidden(ids, attention, positions) @ base.head.weight.T
    torch.testing.assert_close(base_model_logits, base_logits, atol=1e-5, rtol=1e-5)
    assert not base_model_logits.requires_grad
    torch.testing.assert_close(
        pair.student.network(ids).logits, adapted_logits
    )  # adapters are enabled again


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_a_teacher_that_is_the_student_is_met_at_the_start(
    tiny_pair, tmp_path: Path, kind: str
) -> None:
    run_rows = rows(train(run_config(tiny_pair, tmp_path / "run", kind)).folder)
    assert abs(run_rows[0]["divergence/reverse_kl"]) < 1e-6
    assert run_rows[3]["divergence/reverse_kl"] > 1e-5


def test_a_teacher_that_is_the_student_needs_something_else_to_teach(tiny_pair, tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r'teacher "ema" starts as a copy of the student.*set reward_weight'
    ):
        train(run_config(tiny_pair, tmp_path / "run", "ema", reward_weight=0.0))


def test_base_without_adapters_is_refused(tiny_pair, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="lora_rank is 0; set lora_rank, or choose another teacher"
    ):
        make_pair(run_config(tiny_pair, tmp_path, "base", lora_rank=0))


def test_adapters_start_from_the_seed_and_leave_the_random_state_alone(tiny_pair, tmp_path) -> None:
    torch.manual_seed(3)
    initial_state = torch.random.get_rng_state()
    adapter_weights = []
    for seed in (0, 0, 1):
        network = make_pair(run_config(tiny_pair, tmp_path, "adapters", seed=seed)).student.network
        weights = [p.flatten() for n, p in network.named_parameters() if "lora_A" in n]
        adapter_weights.append(torch.cat(weights))
    assert torch.equal(adapter_weights[0], adapter_weights[1])
    assert not torch.equal(adapter_weights[0], adapter_weights[2])
    assert torch.equal(torch.random.get_rng_state(), initial_state)


def test_the_average_follows_the_student(tiny_pair, tmp_path: Path) -> None:
    config = run_config(tiny_pair, tmp_path / "run", "ema", steps=1, ema_decay=0.75, save_every=1)
    folder = train(config).folder
    checkpoint = max((folder / "checkpoints").glob("step_*"))
    slow = load_file(checkpoint / "teacher.safetensors")
    slow.setdefault("lm_head.weight", slow.get("model.embed_tokens.weight"))
    slow.setdefault("model.embed_tokens.weight", slow["lm_head.weight"])
    start, end = parameters(tiny_pair[0]), parameters(folder / "final")
    for name, p in start.items():
        torch.testing.assert_close(slow[name], 0.75 * p + 0.25 * end[name], atol=1e-7, rtol=1e-6)
    assert any(not torch.equal(slow[name], end[name]) for name in start)


def test_small_steps_move_a_float32_average_of_a_bfloat16_student(tiny_pair, tmp_path) -> None:
    pair = make_pair(run_config(tiny_pair, tmp_path, "ema", dtype="bfloat16"))
    teacher = make_ema_teacher(pair.student, 0.999)
    with torch.no_grad():
        for p in pair.student.network.parameters():
            p.add_(1.0)
    for _ in range(3):
        teacher.update(pair.student)
    slow, fast = (next(m.network.parameters()) for m in (teacher.model, pair.student))
    assert slow.dtype == torch.float32
    start = load_model(str(tiny_pair[0]), "cpu", "bfloat16")[1]
    first = next(start.parameters()).float()
    want = 0.999**3 * first + (1 - 0.999**3) * fast.float()
    torch.testing.assert_close(slow, want, atol=1e-6, rtol=1e-6)


def test_bfloat16_weights_are_rounded_masters(tiny_pair, tmp_path: Path) -> None:
    folder = train(
        run_config(tiny_pair, tmp_path / "run", "bfloat16", steps=1, save_every=1)
    ).folder
    checkpoint = max((folder / "checkpoints").glob("step_*"))
    (shard,) = (checkpoint / "optimizer").iterdir()
    optimizer_state = load_file(shard)
    masters = [
        optimizer_state[f"{i}.master"]
        for i in range(sum(n.endswith("master") for n in optimizer_state))
    ]
    network = load_model(str(folder / "final"), "cpu", "bfloat16")[1]
    live = list(network.parameters())
    assert len(live) == len(masters)
    for weight, master in zip(live, masters, strict=True):
        assert torch.equal(weight, master.bfloat16())
    assert any(not torch.equal(w.float(), m) for w, m in zip(live, masters, strict=True))
