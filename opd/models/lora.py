"""LoRA adapters: add them to a student, and switch them off."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diagnostics.io.packages import load_package
from opd.config.settings import Config
from opd.models.model import CausalLM


def adapted(network: Any, config: Config) -> Any:
    """The network with LoRA adapters on all linear layers but the head; nothing else trains.

    The adapters' starting values depend on the seed alone.

    Raises:
      ImportError: peft is not installed.
    """
    peft = load_package("peft", "lora_rank", "lora", otherwise="set lora_rank to 0")
    how = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return peft.get_peft_model(network, how).eval()


def without_adapters(student: CausalLM) -> CausalLM:
    """The same network with its adapters off, as a frozen teacher; costs no memory."""

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad(), student.network.disable_adapter():
            return student.hidden(ids, attention, positions)

    return replace(student, hidden=hidden)


def ordinary(network: Any) -> Any:
    """The network as an ordinary Hugging Face model: adapters, if any, merged into a copy."""
    if not hasattr(network, "merge_and_unload"):
        return network
    return copy.deepcopy(network).merge_and_unload()
