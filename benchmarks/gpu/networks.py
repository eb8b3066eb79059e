"""Random models and batches that the parts share."""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.setting import Setting
from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.models.model import CausalLM, split_head


def small_config(setting: Setting, **changes: Any) -> dict[str, Any]:
    """Return sizes of a model that is cheap on the device."""
    sizes = {
        "vocab_size": setting.choose(97, 4099),
        "hidden_size": setting.choose(64, 256),
        "intermediate_size": setting.choose(64, 512),
        "num_hidden_layers": setting.choose(2, 4),
        "num_attention_heads": setting.choose(2, 4),
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
    }
    return sizes | changes


def small_network(setting: Setting, name: str = "Qwen2", seed: int = 0, **changes: Any) -> Any:
    """Return a random float32 network on the device, in evaluation mode."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**small_config(setting, **changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.generation_config.eos_token_id = None
    return network.to(setting.device).eval()


def small_model(setting: Setting, name: str = "Qwen2", seed: int = 0, **changes: Any) -> CausalLM:
    """Return the same, split at its head."""
    network = small_network(setting, name, seed, **changes)
    return split_head(network, network.get_output_embeddings().weight.shape[0])


def reloaded(network: Any, setting: Setting, weights: str) -> Any:
    """Save a network and load it with its layers quantised."""
    from opd.lab.build import make_tokenizer
    from opd.models.loading import load_model

    with TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return load_model(folder, setting.device, "float32", weights=weights)[1]


def random_prompts(rows: int, longest: int, vocabulary: int) -> Prompts:
    """Return prompts of lengths from half of the longest on, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(longest // 2, longest, rows).long().tolist()
    ids = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return Prompts.from_ids(ids, torch.arange(rows))


def random_rollouts(prompts: Prompts, length: int, vocabulary: int) -> Rollouts:
    """Return random responses of different lengths, on the CPU."""
    generator = torch.Generator().manual_seed(2)
    rows = len(prompts)
    mask = torch.arange(length) < torch.linspace(length // 2, length, rows).long()[:, None]
    tokens = torch.randint(vocabulary, (rows, length), generator=generator) * mask
    logp = torch.zeros(rows, length)
    return Rollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=logp,
        prompt=prompts.index,
        ended=torch.ones(rows, dtype=torch.bool),
    )


def normal(
    setting: Setting, *shape: int, seed: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """Return normal numbers on the device, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(setting.device, dtype)


def relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of a and the reference b, relative to the largest |b|."""
    scale = b.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((a.to(b.dtype) - b).abs().max() / scale)


def gradients(network: Any) -> dict[str, Tensor]:
    """Return the gradients of a network by name, and remove them."""
    result = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return result


def largest_relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest of `relative` over gradients of the same names."""
    if a.keys() != b.keys() or not b:
        raise ValueError(f"gradients of {sorted(a.keys() ^ b.keys()) or 'nothing'} are compared")
    return max(relative(a[name], b[name]) for name in b)
