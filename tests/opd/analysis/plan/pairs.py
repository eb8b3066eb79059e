"""Small real networks, the same without numbers, and settings for them."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from diagnostics.batch import Rollouts
from opd.analysis.plan.machines import Machine
from opd.config.recipes import smoke
from opd.config.settings import Config, with_settings
from opd.data.prompts import Prompts

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, head_dim=16),
    "gpt2": GPT2Config(
        vocab_size=1000, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=1
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "deepseek": DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
}
MACHINE = Machine(
    name="test",
    kind="cpu",
    memory=1e9,
    half_flops=2e12,
    float32_flops=1e12,
    bandwidth=1e11,
    elementwise_bandwidth=1e10,
    flops_share=0.5,
    bandwidth_share=0.5,
    seconds_per_operation=1e-6,
    seconds_per_backward_operation=1e-6,
    seconds_per_token=0.0,
    fixed_reserve=0.0,
    fragmentation=0.0,
)
"""A machine of round numbers."""


def real_network(name: str, attention: str | None = None, **sizes: Any) -> Any:
    """Return a random network of MODELS in memory, with other sizes, in evaluation mode."""
    config = type(MODELS[name])(**MODELS[name].to_dict() | sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval()


def saved(folder: Any, name: str, **sizes: Any) -> str:
    """Write only config.json of a model of MODELS, with other sizes; returns the folder."""
    values = MODELS[name].to_dict() | sizes
    if "num_hidden_layers" in sizes:
        del values["layer_types"]
    config = type(MODELS[name])(**values)
    config.save_pretrained(folder)
    return str(folder)


def settings(student: str, teacher: str, **changes: Any) -> Config:
    """Return settings of a small run."""
    return with_settings(smoke(), student=student, teacher=teacher, device="cpu", **changes)


def padded_rows(count: int, prompt: int, response: int) -> tuple[Prompts, Rollouts]:
    """Return rows whose prompts differ in length, so that attention needs a mask."""
    ids = [list(range(3, 3 + prompt - (i % 2))) for i in range(count)]
    prompts = Prompts.from_ids(ids, torch.arange(count))
    full = torch.ones(count, response, dtype=torch.bool)
    zeros = torch.zeros(count, response)
    rollouts = Rollouts(
        prompt=torch.arange(count),
        tokens=torch.full((count, response), 5),
        mask=full,
        sampler_logp=zeros,
        softmax_logp=zeros,
        ended=torch.ones(count, dtype=torch.bool),
        temperature=1.0,
        top_p=1.0,
    )
    return prompts, rollouts
