"""Adapters, moving teachers and bfloat16 in real runs: what changes, is saved and resumes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.models.loading import load as load_model
from opd.models.lora import ordinary, without_adapters
from opd.teachers.factory import average, follow, make_pair
from opd.training.train import train
from tests.opd.training.test_train import rows, settings

PUSHED = {
    "reward_weight": 1.0,
    "weight_decay": 1.0,
}  # the tiny student earns no reward: decay moves it
KINDS: dict[str, dict[str, object]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "adapters": {"lora_rank": 4, "lr": 1e-2},
    "base": {"teacher": "base", "lora_rank": 4, **PUSHED, "lr": 1e-2},
    "ema": {"teacher": "ema", "ema_decay": 0.5, "objective": "sampled_token", **PUSHED},
    "cosine": {"schedule": "cosine", "warmup": 1, "updates_per_batch": 3},
}


def run(tiny_pair, out: Path, kind: str, **changes: object):
    chosen = dict(KINDS[kind]) | changes
    teacher = chosen.pop("teacher", str(tiny_pair[1]))
    return settings((tiny_pair[0], Path(str(teacher))), out, **chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_resumes_to_the_same_bits(tiny_pair, tmp_path: Path, kind: str) -> None:
    whole = train(run(tiny_pair, tmp_path / "whole", kind))
    cut = tmp_path / "cut"
    if kind == "cosine":  # its rate depends on the number of steps, so the run is cut by an error
        with pytest.raises(KeyboardInterrupt), interrupted_after(2):
            train(run(tiny_pair, cut, kind))
    else:
        train(run(tiny_pair, cut, kind, steps=2))
    train(run(tiny_pair, cut, kind))
    assert rows(cut) == rows(whole)
    assert len(rows(whole)) == 4
    same = [(d / "final" / "model.safetensors").read_bytes() for d in (whole, cut)]
    assert same[0] == same[1]


class interrupted_after:
    """Ctrl-C at the start of the step after so many."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __enter__(self) -> None:
        from opd.training import train as module

        self.module, self.honest = module, module.one_step

        def interrupt(run, step: int):
            if step == self.steps:
                raise KeyboardInterrupt
            return self.honest(run, step)

        module.one_step = interrupt

    def __exit__(self, *_: object) -> None:
        self.module.one_step = self.honest


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    network = load_model(str(folder), "cpu", "float32")[1]
    return {name: p.detach() for name, p in network.named_parameters()}


def test_only_the_adapted_layers_of_the_final_model_differ(tiny_pair, tmp_path: Path) -> None:
    folder = train(run(tiny_pair, tmp_path / "run", "adapters"))
    before, after = parameters(tiny_pair[0]), parameters(folder / "final")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {n for n in before if "proj" in n and n.endswith("weight")}
    assert moved == linear
    assert all(torch.linalg.matrix_rank(after[n] - before[n], rtol=1e-3) <= 4 for n in moved)


def test_merged_adapters_are_the_model_that_was_trained(tiny_pair, tmp_path: Path) -> None:
    pair = make_pair(run(tiny_pair, tmp_path, "adapters"))
    generator = torch.Generator().manual_seed(0)
    for name, p in pair.student.network.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = pair.student.network(ids).logits
        merged = ordinary(pair.student.network)
        torch.testing.assert_close(merged(ids).logits, ours, atol=1e-4, rtol=1e-4)
        plain = load_model(str(tiny_pair[0]), "cpu", "float32")[1](ids).logits
    assert (ours - plain).abs().max() > 0.1
    assert hasattr(pair.student.network, "peft_config")  # a copy was merged
    base = without_adapters(pair.student)
    real, places = torch.ones_like(ids), ids
    there = base.hidden(ids, real, places) @ base.head.weight.T
    torch.testing.assert_close(there, plain, atol=1e-5, rtol=1e-5)
    assert not there.requires_grad
    torch.testing.assert_close(pair.student.network(ids).logits, ours)  # adapters are on again


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_a_teacher_that_is_the_student_is_met_at_the_start(
    tiny_pair, tmp_path: Path, kind: str
) -> None:
    found = rows(train(run(tiny_pair, tmp_path / "run", kind)))
    assert abs(found[0]["divergence/reverse_kl"]) < 1e-6
    assert found[3]["divergence/reverse_kl"] > 1e-5


def test_a_teacher_that_is_the_student_needs_something_else_to_teach(tiny_pair, tmp_path) -> None:
    with pytest.raises(ValueError, match=r'teacher "ema" starts as the student.*set outcome'):
        train(run(tiny_pair, tmp_path / "run", "ema", reward_weight=0.0))


def test_base_without_adapters_is_refused(tiny_pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are none; set lora_rank, or name a teacher"):
        make_pair(run(tiny_pair, tmp_path, "base", lora_rank=0))


def test_adapters_start_from_the_seed_and_leave_the_random_state_alone(tiny_pair, tmp_path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        network = make_pair(run(tiny_pair, tmp_path, "adapters", seed=seed)).student.network
        weights = [p.flatten() for n, p in network.named_parameters() if "lora_A" in n]
        found.append(torch.cat(weights))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_average_follows_the_student(tiny_pair, tmp_path: Path) -> None:
    config = run(tiny_pair, tmp_path / "run", "ema", steps=1, ema_decay=0.75, save_every=1)
    folder = train(config)
    checkpoint = max((folder / "checkpoints").glob("step_*"))
    slow = load_file(checkpoint / "teacher.safetensors")
    slow.setdefault("lm_head.weight", slow.get("model.embed_tokens.weight"))
    slow.setdefault("model.embed_tokens.weight", slow["lm_head.weight"])
    start, end = parameters(tiny_pair[0]), parameters(folder / "final")
    for name, p in start.items():
        torch.testing.assert_close(slow[name], 0.75 * p + 0.25 * end[name], atol=1e-7, rtol=1e-6)
    assert any(not torch.equal(slow[name], end[name]) for name in start)


def test_small_steps_move_a_float32_average_of_a_bfloat16_student(tiny_pair, tmp_path) -> None:
    pair = make_pair(run(tiny_pair, tmp_path, "ema", dtype="bfloat16"))
    teacher = average(pair.student)
    with torch.no_grad():
        for p in pair.student.network.parameters():
            p.add_(1.0)
    for _ in range(3):
        follow(teacher, pair.student, 0.999)
    slow, fast = (next(m.network.parameters()) for m in (teacher, pair.student))
    assert slow.dtype == torch.float32
    start = load_model(str(tiny_pair[0]), "cpu", "bfloat16")[1]
    first = next(start.parameters()).float()
    want = 0.999**3 * first + (1 - 0.999**3) * fast.float()
    torch.testing.assert_close(slow, want, atol=1e-6, rtol=1e-6)


def test_bfloat16_weights_are_rounded_masters(tiny_pair, tmp_path: Path) -> None:
    folder = train(run(tiny_pair, tmp_path / "run", "bfloat16", steps=1, save_every=1))
    checkpoint = max((folder / "checkpoints").glob("step_*"))
    (shard,) = (checkpoint / "optimizer").iterdir()
    kept = load_file(shard)
    masters = [kept[f"{i}.master"] for i in range(sum(n.endswith("master") for n in kept))]
    network = load_model(str(folder / "final"), "cpu", "bfloat16")[1]
    live = list(network.parameters())
    assert len(live) == len(masters)
    for weight, master in zip(live, masters, strict=True):
        assert torch.equal(weight, master.bfloat16())
    assert any(not torch.equal(w.float(), m) for w, m in zip(live, masters, strict=True))
