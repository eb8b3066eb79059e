"""What a vLLM engine in this process and vLLM servers share: weight export, seeds, columns."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd.data.prompts import Prompts
from opd.models.contexts import evaluating
from opd.rollouts.base import BatchSlice

PROBE_TOKENS = 64


# Largest mean of |log-prob of vLLM - log-prob of the student| on the probe that is arithmetic.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.03}


def row_seeds(count: int, generator: torch.Generator, share: BatchSlice | None) -> list[int]:
    """A seed for each of `count` rows; as many numbers are drawn as the whole batch has rows."""
    whole = count if share is None else share.of
    seeds = torch.randint(2**62, (whole,), generator=generator, device=generator.device)
    return (seeds if share is None else seeds[share.rows]).tolist()


def unpadded(prompts: Prompts) -> list[list[int]]:
    """The ids of each prompt."""
    pairs = zip(prompts.tokens, prompts.mask, strict=True)
    return [ids[real].tolist() for ids, real in pairs]


def columns_of(
    rows: Sequence[tuple[list[int], list[float]]], eos: list[int], top_p: float
) -> dict[str, Any]:
    """Columns of `Rollouts` from the ids of each response and their log-probabilities.

    These are of the distribution drawn from, all that vLLM tells. `softmax_logp` is the same at
    top_p = 1 and None below, where the mass of the nucleus is not told.
    """
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    logp = torch.zeros(len(rows), width)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (ids, told) in enumerate(rows):
        size = len(ids)
        tokens[row, :size] = torch.tensor(ids)
        logp[row, :size] = torch.tensor(told)
        mask[row, :size] = True
    ended = torch.tensor([ids[-1] in eos for ids, _ in rows])
    whole = logp.clone() if top_p == 1 else None  # files take no two tensors of one memory
    return {
        "tokens": tokens,
        "mask": mask,
        "sampler_logp": logp,
        "softmax_logp": whole,
        "ended": ended,
    }


@torch.no_grad()
def prompt_logp(network: Any, ids: Tensor) -> Tensor:
    """(P - 1,) log-probabilities of ids[1:] under the network, on the CPU."""
    device = next(network.parameters()).device
    with evaluating(network):
        logits = network(ids[None].to(device)).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None].to(device))[:, 0].cpu()


def export(network: Any, path: Path) -> None:
    """Save a checkpoint in which adapters are merged and the head is a tensor of its own."""
    if hasattr(network, "merge_and_unload"):
        network = copy.deepcopy(network).merge_and_unload()  # merging in place cannot be undone
    network.save_pretrained(path, max_shard_size="1TB")
    head = network.get_output_embeddings()
    name = next(n for n, module in network.named_modules() if module is head) + ".weight"
    with safe_open(path / "model.safetensors", framework="pt") as file:
        if name in file.keys():  # noqa: SIM118, not a dict
            return
    save_file({name: head.weight.detach().cpu().contiguous()}, path / "head.safetensors")
    config = json.loads((path / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = False
    (path / "config.json").write_text(json.dumps(config))
