"""Networks without numbers: what a configuration says about a model, on the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diagnostics.errors import InvalidInput, MissingFile
from opd.analysis.plan.kernels import NAME, register_kernels
from opd.analysis.plan.presets import PRESETS
from opd.config.settings import Config
from opd.models.loading import FOUR_BIT_BLOCK, find_cached_folder
from opd.models.lora import add_lora
from opd.models.model import base_model


@dataclass(frozen=True, eq=False)
class MetaNetwork:
    """A network on the meta device."""

    name: str
    """Folder, hub name or preset."""
    network: Any
    """The Hugging Face model, with adapters if it is trained with LoRA."""
    dtype: torch.dtype
    """Precision of its weights."""
    num_weights: int
    """Number of weights, adapters included; tied ones count once."""
    num_trainable: int
    """Number of weights that training changes."""
    largest_weight: int
    """Size of the largest trainable weight."""

    @property
    def head_rows(self) -> int:
        """Rows of the head."""
        return int(self.network.get_output_embeddings().weight.shape[0])

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights in `dtype`."""
        return float(self.num_weights * self.dtype.itemsize)


def read_model_config(name: str, trust_remote_code: bool = False) -> Any:
    """Read the configuration of a model, without its weights.

    Args:
        name: Folder with config.json, hub name, or one of `PRESETS`.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The configuration of transformers.

    Raises:
        MissingFile: There is no config.json.
        InvalidInput: No model is given, or its architecture is unknown.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if not name:
        raise InvalidInput(
            "no model given; set --student and --teacher to a folder, a hub model or one of: "
            f"{', '.join(PRESETS)}"
        )
    if name.lower() in PRESETS:
        model_type, values = PRESETS[name.lower()]
        return CONFIG_MAPPING[model_type](**values)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise MissingFile(f"{name} has no config.json; give the folder of a model")
    looks_local = name.startswith((".", "/")) or name.count("/") != 1
    if not folder.is_dir() and looks_local:
        raise MissingFile(
            f"model folder {name!r} does not exist; give a folder, a hub model OWNER/NAME or one "
            f"of: {', '.join(PRESETS)}"
        )
    source = name if folder.is_dir() else str(find_cached_folder(name) or name)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise MissingFile(
            f"config.json of {name} is neither on this machine nor could it be downloaded; give a "
            f"folder, or one of: {', '.join(PRESETS)}"
        ) from error
    except (ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InvalidInput(
            f"the architecture of {name} is unknown to this version of transformers: {first_line}"
        ) from error


def make_network(
    name: str, dtype: torch.dtype, *, config: Config | None = None, trust_remote_code: bool = False
) -> MetaNetwork:
    """Build a network on the meta device, as training would load it.

    Args:
        name: See `read_model_config`.
        dtype: Precision of the weights.
        config: Settings with the rank of LoRA adapters; None for a frozen network.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The network, in evaluation mode.

    Raises:
        InvalidInput: The model is no causal LM.
    """
    from transformers import AutoModelForCausalLM

    register_kernels()
    model_config = read_model_config(name, trust_remote_code)
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=trust_remote_code
            ).eval()
    except ValueError as error:
        first_line = str(error).strip().splitlines()[0]
        raise InvalidInput(f"{name} is no causal language model: {first_line}") from error
    text_config = network.config.get_text_config()
    if text_config._attn_implementation == "sdpa":
        network.set_attn_implementation(NAME)
    if getattr(network.config, "_experts_implementation", None) in ("grouped_mm", "batched_mm"):
        network.set_experts_implementation(NAME)
    if config is None:
        network.requires_grad_(False)
    elif config.optimizer.lora_rank:
        network = add_lora(network, config)
    weights = list(network.parameters())
    trainable = [weight.numel() for weight in weights if weight.requires_grad]
    return MetaNetwork(
        name=name,
        network=network,
        dtype=dtype,
        num_weights=sum(weight.numel() for weight in weights),
        num_trainable=sum(trainable),
        largest_weight=max(trainable, default=0),
    )


def quantised_bytes(model: MetaNetwork, weights: str) -> float:
    """Return the bytes of a network whose linear layers, except the head, are quantised.

    Args:
        model: The network.
        weights: "saved", "int8" (a byte a weight and a float32 scale a row) or "nf4" (half a byte
            a weight and a float32 scale for `FOUR_BIT_BLOCK` weights).

    Returns:
        The bytes.
    """
    if weights == "saved":
        return model.weight_bytes
    head = model.network.get_output_embeddings()
    layers = [
        module.weight
        for module in model.network.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    count = sum(weight.numel() for weight in layers)
    if weights == "nf4":
        quantised = count * (0.5 + 4 / FOUR_BIT_BLOCK)
    else:
        quantised = count + 4 * sum(len(weight) for weight in layers)
    return quantised + (model.num_weights - count) * model.dtype.itemsize


def layer_list(network: Any) -> nn.ModuleList | None:
    """Return the list of a decoder's layers; None if there is not exactly one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [
        module
        for module in network.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    return lists[0] if len(lists) == 1 else None


def has_equal_layers(network: Any) -> bool:
    """Return whether all layers of a decoder have the same type and sizes."""
    layers = layer_list(network)
    kinds = getattr(base_model(network).config.get_text_config(), "layer_types", None)
    shapes = [
        (type(layer), tuple((name, weight.shape) for name, weight in layer.named_parameters()))
        for layer in layers or ()
    ]
    return all(shape == shapes[0] for shape in shapes) and len(set(kinds or [0])) == 1


@contextmanager
def with_layers(network: Any, count: int) -> Iterator[None]:
    """Keep only the first layers inside the block.

    Args:
        network: The network.
        count: Number of layers; 0 keeps all.

    Yields:
        Nothing.
    """
    layers = layer_list(network)
    if layers is None or not count or count == len(layers):
        yield
        return
    removed_layers = list(layers)[count:]
    del layers[count:]
    try:
        yield
    finally:
        layers.extend(removed_layers)


def gathered_bytes(model: MetaNetwork) -> float:
    """Return the bytes of what FSDP gathers at once: two layers, and all that is in no layer."""
    layers = layer_list(model.network)
    if layers is None:
        return model.weight_bytes
    sizes = sorted(sum(weight.numel() for weight in layer.parameters()) for layer in layers)
    outside = model.num_weights - sum(sizes)
    return float(model.dtype.itemsize * (outside + sum(sizes[-2:])))
