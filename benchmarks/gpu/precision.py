"""Proof: bfloat16 with float32 master weights learns as float32 does; pure bfloat16 stalls."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.networks import small_network
from benchmarks.gpu.result import Check, Measurement, Row
from benchmarks.gpu.setting import Setting
from opd.models.lm_head import LmHead
from opd.models.model import split_head
from opd.objectives.divergences import reverse_kl
from opd.training.optimizer import make_optimizer

STEPS, RATE = 50, 5e-5
"""At this rate an update of most weights is less than bfloat16 can represent beside them."""
CURVE_LIMIT, STALLED = 0.15, 0.4
"""Largest difference of the curves, and largest fall of a stalled one, both in units of the fall
of the loss in float32.
"""


def prove(setting: Setting) -> Iterator[Row]:
    """Distil the same batch for 50 steps in three ways, from the same rounded weights."""
    student = small_network(setting, seed=0).bfloat16()
    teacher = small_network(setting, seed=1)
    ids = torch.randint(97, (8, 33), generator=torch.Generator().manual_seed(0))
    ids = ids.to(setting.device)
    with torch.no_grad():
        q = teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    curves = {
        "float32": curve(copy.deepcopy(student).float(), ids, q, masters=True),
        "bfloat16, float32 masters": curve(copy.deepcopy(student), ids, q, masters=True),
        "pure bfloat16": curve(copy.deepcopy(student), ids, q, masters=False),
    }
    falls = {name: float(losses[0] - losses[-1]) for name, losses in curves.items()}
    fall = falls["float32"]
    for name, value in falls.items():
        yield Measurement(
            f"fall of the loss, {name}", value, "nats", ratio=value / fall, reference="of float32"
        )
    start, masters = curves["float32"], curves["bfloat16, float32 masters"]
    # rounding moves a whole curve: what is compared is how far each has fallen
    difference = (masters[0] - masters) - (start[0] - start)
    yield Check(
        f"curve of {STEPS} steps, float32 masters",
        float(difference.abs().max()) / fall,
        CURVE_LIMIT,
    )
    share = falls["pure bfloat16"] / fall
    yield Check(f"fall at a rate of {RATE:g}, pure bfloat16", share, STALLED, "has to stall")
    yield Check("the loss falls in float32, share of its start", -fall / float(start[0]), -1e-3)


def curve(network: Any, ids: Tensor, q: Tensor, *, masters: bool) -> Tensor:
    """Return the loss before each step and after the last; AdamW is the toolkit's or torch's."""
    network.requires_grad_(True)
    model = split_head(network, q.shape[-1])
    ours = make_optimizer(network.parameters(), (0.9, 0.95), 0.0) if masters else None
    plain = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[Tensor] = []
    assert isinstance(model.head, LmHead)
    weight = model.head.weight
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1], device=ids.device)
    for _ in range(STEPS + 1):
        states = model.hidden(ids, mask, positions.expand_as(ids))
        logits = states.float() @ weight.float().T
        loss = reverse_kl(logits.log_softmax(-1), q).mean()
        losses.append(loss.detach())
        network.zero_grad(set_to_none=True)
        if ours is None:
            loss.backward()
            plain.step()
        else:
            ours.zero_grad()
            loss.backward()
            ours.step(RATE, 1e9)
    return torch.stack(losses).cpu()
