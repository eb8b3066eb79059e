"""Define sixty healthy runs for `benchmarks.faults`: twelve architectures, five settings each."""

from collections.abc import Mapping
from typing import Any

ARCHITECTURES = (
    *("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text"),
    *("gpt2", "gpt_neox", "phi3", "olmo2", "granite", "mixtral"),
)
SETTINGS: tuple[Mapping[str, Any], ...] = (
    {},
    {"dtype": "bfloat16"},
    {"mask": ("role:eos",), "objective": "teacher_topk"},
    {"top_p": 0.8, "objective": "sampled_token", "ratio": "token"},
    {"temperature": 0.9, "objective": "student_topk_sampled_tail"},
    {"lora_rank": 4, "lr": 1e-2},
    {"dtype": "bfloat16", "objective": "teacher_topk", "full_metrics_every": 3},
    {"task": "env:household", "max_prompt": 200, "max_response": 6, "max_turns": 3},
    {"objective": "full_forward_kl", "denominator": "group_mean", "max_tokens_per_microbatch": 256},
    {"objective": "sampled_token", "gamma": 0.9, "baseline": "leave_one_out"},
    {"dtype": "bfloat16", "objective": "sampled_token", "max_tokens_per_microbatch": 256},
    {"updates_per_batch": 2, "objective": "sampled_token_clipped", "denominator": "sequence_mean"},
    {"teacher": "ema", "reward_weight": 1.0, "objective": "union_topk", "support_k": 4},
    {"mask": ("string:<think>:first",), "temperature": 1.3, "objective": "k3"},
    {"objective": "full_jsd", "entropy_top_fraction": 0.5, "schedule": "cosine", "warmup": 2},
    {"dtype": "bfloat16", "lora_rank": 4, "top_p": 0.9},
    {
        "objective": "teacher_topk_bucket",
        "denominator": "sequence_sum",
        "gradient_checkpointing": True,
    },
    {"objective": "mean_future", "gamma": 1.0, "weight_decay": 0.1, "lr": 1e-5},
)
PER_ARCHITECTURE = 5


def healthy_runs() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return architecture and settings by name.

    Every architecture is run in both precisions and with three other settings.
    """
    runs, place = {}, 2
    for architecture in ARCHITECTURES:
        indices = [0, 1]
        while len(indices) < PER_ARCHITECTURE:
            indices.append(place)
            place = 2 + (place - 1) % (len(SETTINGS) - 2)
        for index in indices:
            changes = SETTINGS[index]
            text = " ".join(f"{name}={value}" for name, value in changes.items()) or "float32"
            runs[f"{architecture}: {text}"] = (architecture, changes)
    return runs
