"""Master weights, refused steps and schedules, against torch's own AdamW in float32."""

import copy
import math

import pytest
import torch

from opd.training.optimizer import Optimizer, adamw, learning_rate

BETAS = (0.9, 0.999)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(dtype: torch.dtype) -> torch.nn.Linear:
    made = torch.nn.Linear(4, 3, bias=False)
    made.weight.data = seeded(3, 4)
    return made.to(dtype)


def gradients(net: torch.nn.Linear, step: int, parts: int = 1) -> None:
    """The same rows in `parts` backward passes."""
    for x in seeded(8, 4, seed=step).to(net.weight.dtype).chunk(parts):
        net(x).square().sum().backward()


def trained(net: torch.nn.Linear, steps: int, rate: float, parts: int = 1) -> Optimizer:
    optimizer = adamw(net.parameters(), BETAS, 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        gradients(net, step, parts)
        optimizer.step(rate, 1.0)
    return optimizer


def test_float32_is_torchs_adamw_on_clipped_gradients() -> None:
    ours, theirs = network(torch.float32), network(torch.float32)
    trained(ours, 5, 1e-2)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=BETAS, weight_decay=0.1)
    for step in range(5):
        plain.zero_grad()
        gradients(theirs, step)
        assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0) > 1
        plain.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_steps_too_small_for_bfloat16_add_up_in_the_masters() -> None:
    net = network(torch.bfloat16)
    start = net.weight.detach().clone()
    optimizer = trained(net, 200, 1e-5)
    moved = (optimizer.masters[0] - start.float()).abs()
    assert moved.max() > 1e-3  # 200 steps of up to 1e-5
    assert net.weight.dtype == torch.bfloat16
    assert torch.equal(net.weight, optimizer.masters[0].bfloat16())
    assert torch.equal(trained(copy.deepcopy(net), 1, 1e-5).live[0], net.weight)  # one is lost


def test_gradients_of_parts_are_summed_in_float32() -> None:
    """1 + 255 * 2^-9: every addend is lost in bfloat16, none in float32."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = adamw([weight], BETAS, 0.0)
    for part in (1.0, *[2.0**-9] * 255):
        (weight * part).sum().backward()
        assert weight.grad is None
    assert optimizer.masters[0].grad is not None
    assert optimizer.masters[0].grad.item() == 1 + 255 * 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    net = network(dtype)
    optimizer = trained(net, 3, 1e-2)
    before = copy.deepcopy(optimizer.tensors()), net.weight.detach().clone()
    optimizer.zero_grad()
    (net(seeded(2, 4).to(dtype)).sum() * bad).backward()
    norm, taken = optimizer.step(1e-2, 1.0)
    assert not taken
    assert not norm.isfinite()
    assert torch.equal(net.weight, before[1])
    after = optimizer.tensors()
    assert after.keys() >= {"0.exp_avg", "0.exp_avg_sq", "0.step"}
    for name, x in after.items():
        assert torch.equal(x, before[0][name]), name


def test_a_saved_optimizer_goes_on_to_the_same_bits() -> None:
    whole = network(torch.bfloat16)
    trained(whole, 6, 1e-3)
    half = network(torch.bfloat16)
    state = copy.deepcopy(trained(half, 3, 1e-3).tensors())
    other = network(torch.bfloat16)
    other.weight.data = half.weight.data.clone()
    optimizer = adamw(other.parameters(), BETAS, 0.1)
    for name, x in optimizer.tensors().items():
        x.copy_(state[name])
    for step in range(3, 6):
        optimizer.zero_grad()
        gradients(other, step)
        optimizer.step(1e-3, 1.0)
    assert torch.equal(other.weight, whole.weight)


def test_frozen_parameters_stay_and_all_frozen_is_refused() -> None:
    net = torch.nn.Sequential(network(torch.float32), torch.nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    assert len(adamw(net.parameters(), BETAS, 0.0).live) == 2
    with pytest.raises(ValueError, match="no trainable parameter"):
        adamw([net[0].weight], BETAS, 0.0)


def test_schedules_at_the_steps_worked_out_by_hand() -> None:
    assert [learning_rate(8.0, s, 9, 3, "constant") for s in range(5)] == [2, 4, 6, 8, 8]
    cosine = [learning_rate(8.0, s, 10, 0, "cosine") for s in range(11)]
    assert cosine[0] == 8
    assert cosine[5] == pytest.approx(4)
    assert cosine[9] == pytest.approx(8 * math.sin(math.pi / 20) ** 2)  # the last step trains
    assert cosine[10] == pytest.approx(0)
    assert learning_rate(8.0, 11, 11, 2, "cosine", floor=0.25) == pytest.approx(2)
    assert learning_rate(8.0, 0, 1, 0, "cosine") == 8
    assert learning_rate(8.0, 4, 5, 4, "cosine") == 8
    with pytest.raises(ValueError, match="unknown schedule 'linear'; known: constant, cosine"):
        learning_rate(1.0, 0, 1, 0, "linear")


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_cosine_is_that_of_transformers(warmup: int) -> None:
    """Side by side. Its warm-up begins at 0, in a step that trains nothing; ours does not."""
    from transformers import get_cosine_schedule_with_warmup

    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([weight], lr=0.3)
    schedule = get_cosine_schedule_with_warmup(theirs, warmup, 12)
    for step in range(12):
        rate = learning_rate(0.3, step, 12, warmup, "cosine")
        assert rate > 0
        if step >= warmup:
            assert rate == pytest.approx(theirs.param_groups[0]["lr"])
        theirs.step()
        schedule.step()
