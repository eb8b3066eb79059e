"""Functions that the vLLM engine and the vLLM server engine share: checkpoints, seeds, columns."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diagnostics.ragged import right_pad
from opd.data.prompts import Prompts
from opd.models.contexts import evaluation_mode
from opd.rollouts.base import BatchSlice

PROBE_TOKENS = 64


def row_seeds(count: int, generator: torch.Generator, batch_slice: BatchSlice | None) -> list[int]:
    """Draw a seed for each row.

    Args:
        count: Number of rows.
        generator: Source of the seeds; consumes one number per row of the whole batch.
        batch_slice: Which rows of a larger batch these are; None: the whole batch.

    Returns:
        `count` seeds.
    """
    total_rows = count if batch_slice is None else batch_slice.total_rows
    seeds = torch.randint(2**62, (total_rows,), generator=generator, device=generator.device)
    return (seeds if batch_slice is None else seeds[batch_slice.rows]).tolist()


def unpad_prompts(prompts: Prompts) -> list[list[int]]:
    """Return the ids of each prompt without padding."""
    pairs = zip(prompts.tokens, prompts.mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def rollout_columns(
    rows: Sequence[tuple[list[int], list[float]]], eos: list[int], top_p: float
) -> dict[str, Any]:
    """Build columns of `Rollouts` from vLLM's responses.

    vLLM returns only log-probabilities under the distribution that was sampled from. They equal
    `softmax_logp` at top_p = 1; below 1 the mass of the nucleus is unknown and `softmax_logp` is
    None.

    Args:
        rows: Ids of each response and their log-probabilities.
        eos: Ids that end a response.
        top_p: Probability mass of the nucleus.

    Returns:
        The columns, padded on the right with zeros.
    """
    logp = right_pad([row_logp for _, row_logp in rows], torch.float32)
    ended = torch.tensor([ids[-1] in eos for ids, _ in rows])
    softmax_logp = logp.clone() if top_p == 1 else None  # safetensors rejects shared memory
    return {
        "tokens": right_pad([ids for ids, _ in rows], torch.long),
        "mask": right_pad([[True] * len(ids) for ids, _ in rows], torch.bool),
        "sampler_logp": logp,
        "softmax_logp": softmax_logp,
        "ended": ended,
    }


@torch.no_grad()
def prompt_logp(network: Any, ids: Tensor) -> Tensor:
    """Compute the log-probabilities of a sequence under a Hugging Face model.

    Args:
        network: The model.
        ids: (P,) token ids.

    Returns:
        (P - 1,) log-probabilities of ids[1:], on the CPU.
    """
    device = next(network.parameters()).device
    with evaluation_mode(network):
        logits = network(ids[None].to(device)).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None].to(device))[:, 0].cpu()


def export_checkpoint(network: Any, path: Path) -> None:
    """Save a checkpoint with merged LoRA adapters and an untied LM head.

    Args:
        network: The model, possibly with adapters; it is not changed.
        path: The folder to write.
    """
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
