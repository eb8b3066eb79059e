"""Master weights, skipped steps and schedules, against torch's AdamW in float32."""

import copy
import math

import pytest
import torch

from opd.training.optimizer import Optimizer, learning_rate, make_optimizer

BETAS = (0.9, 0.999)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(dtype: torch.dtype) -> torch.nn.Linear:
    layer = torch.nn.Linear(4, 3, bias=False)
    layer.weight.data = seeded(3, 4)
    return layer.to(dtype)


def gradients(net: torch.nn.Linear, step: int, parts: int = 1) -> None:
    """The gradient of the same rows in `parts` backward passes."""
    for x in seeded(8, 4, seed=step).to(net.weight.dtype).chunk(parts):
        net(x).square().sum().backward()


def train_network(net: torch.nn.Linear, steps: int, rate: float, parts: int = 1) -> Optimizer:
    optimizer = make_optimizer(net.parameters(), BETAS, 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        gradients(net, step, parts)
        optimizer.step(rate, 1.0)
    return optimizer


def test_float32_is_torchs_adamw_on_clipped_gradients() -> None:
    actual, expected = network(torch.float32), network(torch.float32)
    train_network(actual, 5, 1e-2)
    torch_adamw = torch.optim.AdamW(expected.parameters(), lr=1e-2, betas=BETAS, weight_decay=0.1)
    for step in range(5):
        torch_adamw.zero_grad()
        gradients(expected, step)
        assert torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0) > 1
        torch_adamw.step()
    assert torch.equal(actual.weight, expected.weight)


def test_steps_too_small_for_bfloat16_add_up_in_the_masters() -> None:
    net = network(torch.bfloat16)
    start = net.weight.detach().clone()
    optimizer = train_network(net, 200, 1e-5)
    change = (optimizer.master_weights[0] - start.float()).abs()
    assert change.max() > 1e-3  # 200 steps of up to 1e-5
    assert net.weight.dtype == torch.bfloat16
    assert torch.equal(net.weight, optimizer.master_weights[0].bfloat16())
    assert torch.equal(
        train_network(copy.deepcopy(net), 1, 1e-5).model_weights[0], net.weight
    )  # one is lost


def test_gradients_of_parts_are_summed_in_float32() -> None:
    """1 + 255 * 2^-9: every addend is rounded away in bfloat16, none in float32."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = make_optimizer([weight], BETAS, 0.0)
    for part in (1.0, *[2.0**-9] * 255):
        (weight * part).sum().backward()
        assert weight.grad is None
    assert optimizer.master_weights[0].grad is not None
    assert optimizer.master_weights[0].grad.item() == 1 + 255 * 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    net = network(dtype)
    optimizer = train_network(net, 3, 1e-2)
    state_before = copy.deepcopy(optimizer.state_tensors()), net.weight.detach().clone()
    optimizer.zero_grad()
    (net(seeded(2, 4).to(dtype)).sum() * bad).backward()
    norm, applied = optimizer.step(1e-2, 1.0)
    assert not applied
    assert not norm.isfinite()
    assert torch.equal(net.weight, state_before[1])
    state_after = optimizer.state_tensors()
    assert state_after.keys() >= {"0.exp_avg", "0.exp_avg_sq", "0.step"}
    for name, x in state_after.items():
        assert torch.equal(x, state_before[0][name]), name


def test_a_saved_optimizer_goes_on_to_the_same_bits() -> None:
    uninterrupted = network(torch.bfloat16)
    train_network(uninterrupted, 6, 1e-3)
    interrupted = network(torch.bfloat16)
    state = copy.deepcopy(train_network(interrupted, 3, 1e-3).state_tensors())
    resumed = network(torch.bfloat16)
    resumed.weight.data = interrupted.weight.data.clone()
    optimizer = make_optimizer(resumed.parameters(), BETAS, 0.1)
    for name, x in optimizer.state_tensors().items():
        x.copy_(state[name])
    for step in range(3, 6):
        optimizer.zero_grad()
        gradients(resumed, step)
        optimizer.step(1e-3, 1.0)
    assert torch.equal(resumed.weight, uninterrupted.weight)


def test_frozen_parameters_stay_and_all_frozen_is_refused() -> None:
    net = torch.nn.Sequential(network(torch.float32), torch.nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    assert len(make_optimizer(net.parameters(), BETAS, 0.0).model_weights) == 2
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer([net[0].weight], BETAS, 0.0)


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
    """The warm-up of transformers starts at rate 0, where its first step trains nothing."""
    from transformers import get_cosine_schedule_with_warmup

    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=0.3)
    schedule = get_cosine_schedule_with_warmup(sgd, warmup, 12)
    for step in range(12):
        rate = learning_rate(0.3, step, 12, warmup, "cosine")
        assert rate > 0
        if step >= warmup:
            assert rate == pytest.approx(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
