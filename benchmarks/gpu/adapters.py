"""Proofs: LoRA against the chain rule and its merged model; quantised against dense teachers."""

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.networks import gradients, relative, reloaded, small_network
from benchmarks.gpu.result import Check, Row, SkipPart, fact
from benchmarks.gpu.setting import Setting
from opd.config.settings import Config, with_settings
from opd.models.lora import add_lora, merge_lora

QUANTISED_LIMITS = {"int8": 0.05, "nf4": 1e-3}
"""Deviation of logits; LLM.int8() rounds activations too."""


def prove_lora(setting: Setting) -> Iterator[Row]:
    """Compare the merged model's logits, and the adapters' gradients with the chain rule."""
    if find_spec("peft") is None:
        raise SkipPart("peft is not installed")
    base = small_network(setting)
    config = with_settings(Config(student="s", teacher="t", out="o"), lora_rank=4, lora_alpha=12)
    network = add_lora(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if "lora_B" in name:  # zeros at the start, where half of the gradients vanish
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    merged = merge_lora(network).requires_grad_(True)
    ids = torch.randint(97, (3, 17), generator=generator).to(setting.device)
    logits, exact = (net(input_ids=ids, use_cache=False).logits for net in (network, merged))
    yield Check("logits of the merged model", relative(exact.detach(), logits.detach()), 1e-4)
    with torch.no_grad():
        moved = relative(base(input_ids=ids, use_cache=False).logits, logits)
    yield fact("adapters change the logits", moved > 1e-2)
    for output in (logits, exact):
        output.log_softmax(-1)[..., 5].square().mean().backward()
    frozen = [n for n, p in network.named_parameters() if p.grad is not None and "lora_" not in n]
    yield Check("gradients of frozen weights", len(frozen), 0)
    dense, num_layers = gradients(merged), 0
    deviations = {"A": 0.0, "B": 0.0}
    for name, module in network.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            num_layers += 1
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            dw, scale = dense[f"{name}.weight"], module.scaling["default"]
            # W + s B A: dB = s dW A^T, dA = s B^T dW
            deviations["B"] = max(deviations["B"], relative(b.grad, scale * dw @ a.T.detach()))
            deviations["A"] = max(deviations["A"], relative(a.grad, scale * b.T.detach() @ dw))
    for factor, deviation in deviations.items():
        yield Check(f"gradient of {factor}, {num_layers} layers", deviation, 1e-3)
    yield fact("all linear layers but the head have adapters", num_layers == count_layers(base))


def count_layers(network: Any) -> int:
    """Return the number of linear layers of the decoder."""
    return sum(isinstance(module, nn.Linear) for module in network.get_decoder().modules())


def prove_quantised(setting: Setting) -> Iterator[Row]:
    """Compare logits with those of a dense network that has the dequantised weights."""
    if find_spec("bitsandbytes") is None:
        raise SkipPart("bitsandbytes is not installed")
    plain = small_network(setting)
    ids = torch.randint(97, (3, 17), generator=torch.Generator().manual_seed(0))
    ids = ids.to(setting.device)
    for weights, limit in QUANTISED_LIMITS.items():
        quantised = reloaded(plain, setting, weights)
        exact = dequantised(quantised, plain)
        with torch.no_grad():
            logits, dense, saved = (
                net(input_ids=ids, use_cache=False).logits.float()
                for net in (quantised, exact, plain)
            )
        yield Check(f"{weights}: logits of the dequantised weights", relative(logits, dense), limit)
        yield fact(
            f"{weights}: weights are not those that were saved", relative(saved, dense) > 1e-4
        )
        size, dense_size = (weight_bytes(net) for net in (quantised, plain))
        share = {"int8": 0.3, "nf4": 0.2}[weights]
        yield Check(f"{weights}: bytes of the layers, share of float32", size / dense_size, share)


def dequantised(quantised: Any, plain: Any) -> Any:
    """Return a copy of the plain network with the dequantised weights of a quantised one."""
    from bitsandbytes import functional

    network = copy.deepcopy(plain)
    for name, module in quantised.named_modules():
        weight, kind = getattr(module, "weight", None), type(module).__name__
        if weight is not None and kind == "Linear4bit":
            values = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif kind == "Linear8bitLt":
            values = int8_values(module)
        else:
            continue
        target = network.get_submodule(name).weight
        target.data = values.reshape(target.shape).float()
    return network


def int8_values(module: nn.Module) -> Tensor:
    """Return the weights of an LLM.int8() layer; its first forward pass moves them to its state."""
    from bitsandbytes import functional

    weight: Any = module.weight
    state: Any = module.state
    if weight.SCB is not None:
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return functional.int8_vectorwise_dequant(state.CB, state.SCB)


def weight_bytes(network: Any) -> int:
    """Return the bytes of the weights of the decoder's linear layers."""
    layers = network.get_decoder().layers
    return sum(p.nbytes for n, p in layers.named_parameters() if n.endswith("proj.weight"))
