"""LoRA adapters: add them to a student, disable them, merge them, save them."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.io.atomic import write_text
from diagnostics.io.packages import load_package
from diagnostics.terminal import escape_control_chars
from opd.config.settings import Config
from opd.models.model import CausalLM


def add_lora(network: Any, config: Config) -> Any:
    """Add LoRA adapters to all linear layers except the head; only the adapters are trained.

    The initial values of the adapters depend on the seed only.

    Args:
        network: Hugging Face model.
        config: Settings with rank, alpha and seed.

    Returns:
        The model with adapters, in evaluation mode.

    Raises:
        ImportError: peft is not installed.
    """
    peft = load_package("peft", "lora_rank", "lora", alternative="set lora_rank to 0")
    lora_config = peft.LoraConfig(
        r=config.optimizer.lora_rank,
        lora_alpha=config.optimizer.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return peft.get_peft_model(network, lora_config).eval()


def without_adapters(student: CausalLM) -> CausalLM:
    """Return the same network with its adapters off, as a frozen teacher that needs no memory."""

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad(), student.network.disable_adapter():
            return student.hidden(ids, attention, positions)

    return replace(student, hidden=hidden)


def save_adapters(network: Any, folder: Path, base: str) -> None:
    """Save the adapters of a model alone, so that they can be put on its base model again.

    Args:
        network: A model; nothing is saved if it has no adapters of peft.
        folder: Folder of the adapters.
        base: Name of the base model, which the adapters refer to.
    """
    if not hasattr(network, "merge_and_unload"):
        return
    network.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = base
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2))
    card = (
        f"---\nlibrary_name: peft\n---\n\nLoRA adapters of {escape_control_chars(base)}; the model "
        "card is in the folder above, which holds the merged model.\n"
    )
    write_text(folder / "README.md", card)


def merge_lora(network: Any) -> Any:
    """Return an ordinary Hugging Face model: adapters, if any, are merged into a copy."""
    if not hasattr(network, "merge_and_unload"):
        return network
    return copy.deepcopy(network).merge_and_unload()
