"""Proof: FSDP2 on one process trains as without it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from benchmarks.gpu.networks import relative, small_network
from benchmarks.gpu.result import Check, Row, SkipPart, fact
from benchmarks.gpu.setting import Setting
from opd.models.fsdp import gather_network, shard_model, unsharded
from opd.models.model import CausalLM, split_head
from opd.training.optimizer import make_optimizer

STEPS = 3


def prove(setting: Setting) -> Iterator[Row]:
    """Compare losses, gradient norms and weights after three steps, in float32 and bfloat16."""
    if not distributed.is_available() or distributed.is_initialized():
        raise SkipPart("torch has no distributed package, or a process group exists already")
    with single_process_group(setting):
        for dtype, limit in ((torch.float32, 5e-4), (torch.bfloat16, 2e-2)):
            plain = small_network(setting).to(dtype)
            sharded = copy.deepcopy(plain)
            label = str(dtype).removeprefix("torch.")
            vocabulary = plain.get_output_embeddings().weight.shape[0]
            models = [split_head(plain, vocabulary), shard_model(split_head(sharded, vocabulary))]
            histories = [train(model, setting) for model in models]
            for name in ("loss", "gradient norm"):
                a, b = (torch.tensor(history[name]) for history in histories)
                yield Check(f"{label}: {name} of {STEPS} steps", relative(b, a), limit)
            final = gather_network(models[1]).state_dict()
            pairs = [
                (final[name].to(weight).float(), weight.float())
                for name, weight in plain.state_dict().items()
            ]
            # not the largest: AdamW moves a weight whose gradient is rounding noise by a whole step
            deviation = max(float((a - b).norm() / b.norm()) for a, b in pairs if b.any())
            yield Check(f"{label}: weights after {STEPS} steps", deviation, limit)
            with unsharded(models[1]), torch.no_grad():
                states, exact = (forward(model, setting) for model in reversed(models))
            yield Check(f"{label}: states while all weights are gathered",
                        relative(states, exact), limit)  # fmt: skip
            losses = histories[0]["loss"]
            moved = abs(losses[-1] - losses[0]) > 1e-3 * abs(losses[0])
            yield fact(f"{label}: training changes the loss", moved)


@contextmanager
def single_process_group(setting: Setting) -> Iterator[None]:
    """Begin a process group of this process alone, and end it."""
    backend = "nccl" if setting.device == "cuda" else "gloo"
    if setting.device == "cuda":
        torch.cuda.set_device(0)
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def forward(model: CausalLM, setting: Setting) -> torch.Tensor:
    """Return hidden states of fixed ids."""
    ids = torch.randint(97, (4, 19), generator=torch.Generator().manual_seed(0))
    ids = ids.to(setting.device)
    positions = torch.arange(19, device=ids.device).expand_as(ids)
    return model.hidden(ids, torch.ones_like(ids), positions)


def train(model: CausalLM, setting: Setting) -> dict[str, list[float]]:
    """Take steps on a loss of the head's logits; return loss and gradient norm of each."""
    optimizer = make_optimizer(model.network.parameters(), (0.9, 0.95), 0.01, rounded=False)
    history: dict[str, list[float]] = {"loss": [], "gradient norm": []}
    for _ in range(STEPS):
        optimizer.zero_grad()
        states = forward(model, setting).flatten(0, 1)
        ids = torch.arange(5, device=states.device).expand(len(states), 5)
        loss = model.head.gather(states, ids).log_softmax(-1)[:, 0].square().mean()
        loss.backward()
        norm, applied = optimizer.step(1e-3, 1.0)
        assert applied, "the gradient is not finite"
        history["loss"].append(float(loss.detach()))
        history["gradient norm"].append(float(norm))
    return history
