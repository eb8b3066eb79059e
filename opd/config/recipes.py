"""Recipes: functions that return a configuration, whose settings the command line can override."""

from collections.abc import Callable

from opd.config.groups import (
    DataConfig,
    EvalConfig,
    GamesConfig,
    HardwareConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RecordConfig,
    RolloutConfig,
)
from opd.config.settings import Config


def smoke() -> Config:
    """Smoke-test an installation in seconds on a CPU, with the pair of `opd lab --tiny`."""
    return Config(
        student="lab-tiny/student",
        teacher="lab-tiny/teacher",
        out="runs/smoke",
        steps=4,
        data=DataConfig(
            prompts_per_step=4,
            group_size=2,
            max_prompt=64,
        ),
        rollout=RolloutConfig(
            max_response=32,
        ),
        objective=ObjectiveConfig(
            support_k=8,
        ),
        optimizer=OptimizerConfig(
            lr=1e-3,
        ),
        evaluation=EvalConfig(
            eval_problems=8,
        ),
        record=RecordConfig(
            eval_every=2,
            save_every=2,
            save_batch_every=2,
        ),
    )


def lab() -> Config:
    """Distil the pair of `opd lab`, two minutes on one CPU core."""
    return Config(
        student="lab/student",
        teacher="lab/teacher",
        out="runs/lab",
        steps=60,
        data=DataConfig(
            prompts_per_step=64,
            group_size=1,
            max_prompt=64,
        ),
        rollout=RolloutConfig(
            max_response=176,
        ),
        objective=ObjectiveConfig(
            support_k=16,
        ),
        optimizer=OptimizerConfig(
            lr=3e-4,
            betas=(0.9, 0.95),
            warmup=10,
        ),
        evaluation=EvalConfig(
            eval_problems=256,
        ),
        record=RecordConfig(
            eval_every=20,
            save_every=20,
            save_batch_every=20,
        ),
    )


def household() -> Config:
    """Distil on a text game, turn by turn, the pair of `opd lab --household`; 3 minutes."""
    return Config(
        student="lab-household/student",
        teacher="lab-household/teacher",
        out="runs/household",
        steps=40,
        data=DataConfig(
            task="env:household",
            prompts_per_step=16,
            group_size=1,
            max_prompt=144,
        ),
        rollout=RolloutConfig(
            max_response=64,
        ),
        objective=ObjectiveConfig(
            support_k=16,
        ),
        optimizer=OptimizerConfig(
            lr=3e-4,
            betas=(0.9, 0.95),
            warmup=5,
        ),
        evaluation=EvalConfig(
            eval_problems=256,
        ),
        record=RecordConfig(
            eval_every=20,
            save_every=20,
            save_batch_every=20,
            full_metrics_every=5,
        ),
        games=GamesConfig(
            max_turns=16,
        ),
    )


def pair() -> Config:
    """Distil any two models with the same tokenizer: set --student, --teacher and --task FILE."""
    return Config(
        student="",
        teacher="",
        out="runs/pair",
        data=DataConfig(
            task="",
        ),
    )


def smollm() -> Config:
    """Distil the pretrained pair of `opd lab --smollm` on sums in words; 8 minutes."""
    return Config(
        student="smollm/student",
        teacher="smollm/teacher",
        out="runs/smollm",
        steps=32,
        data=DataConfig(
            task="smollm/problems.jsonl",
            prompts_per_step=8,
            group_size=1,
            max_prompt=64,
        ),
        rollout=RolloutConfig(
            max_response=32,
        ),
        objective=ObjectiveConfig(
            support_k=16,
        ),
        optimizer=OptimizerConfig(
            lr=2e-5,
        ),
        evaluation=EvalConfig(
            eval_problems=32,
        ),
        record=RecordConfig(
            eval_every=0,
            save_every=32,
            save_batch_every=1,
        ),
    )


def qwen_small() -> Config:
    """Distil Qwen2.5-1.5B-Instruct into Qwen2.5-0.5B-Instruct on DAPO-Math; one GPU of 24 GB."""
    return Config(
        student="Qwen/Qwen2.5-0.5B-Instruct",
        teacher="Qwen/Qwen2.5-1.5B-Instruct",
        out="runs/qwen-small",
        steps=200,
        data=DataConfig(
            task="dapo-math",
            skip_long_prompts=True,
            prompts_per_step=16,
            group_size=4,
            max_prompt=512,
        ),
        rollout=RolloutConfig(
            max_response=1024,
            top_p=0.9,
        ),
        objective=ObjectiveConfig(
            support_k=32,
        ),
        optimizer=OptimizerConfig(
            lr=2e-6,
            weight_decay=0.01,
        ),
        evaluation=EvalConfig(
            eval_top_p=0.9,
        ),
        record=RecordConfig(
            full_metrics_every=10,
        ),
        hardware=HardwareConfig(
            max_logits_per_chunk=1 << 28,
            dtype="bfloat16",
            gradient_checkpointing=True,
        ),
    )


def paper_math() -> Config:
    """Distil OpenThinker3-7B into Qwen2.5-7B-Instruct as in arXiv 2603.25562, table A1.

    Settings are from the table and the published scripts. Local support matching without a mask:
    128 responses per step in two updates, K = 32, top-p 0.9. Every response has the same weight,
    which results from the micro-batch size of one in the published code (equation 8 of the paper is
    `group_mean`). For the sampled-token baseline use `--objective sampled_token_clipped --top-p 1`;
    for the mask, `--mask paper`. Differences from the paper: the wording of the prompt, one process
    instead of 8 GPUs, and the vLLM version.

    Returns:
        The configuration.
    """
    return Config(
        student="Qwen/Qwen2.5-7B-Instruct",
        teacher="open-thoughts/OpenThinker3-7B",
        out="runs/paper-math",
        seed=42,
        steps=400,
        data=DataConfig(
            task="dapo-math",
            skip_long_prompts=True,
            prompts_per_step=16,
            group_size=8,
            max_prompt=2048,
        ),
        rollout=RolloutConfig(
            max_response=16384,
            engine="vllm",
            temperature=1.0,
            top_p=0.9,
        ),
        objective=ObjectiveConfig(
            objective="teacher_topk",
            support_k=32,
            denominator="sequence_mean",
        ),
        optimizer=OptimizerConfig(
            updates_per_batch=2,
            lr=2e-6,
            weight_decay=0.01,
            betas=(0.9, 0.999),
            max_grad_norm=1.0,
        ),
        evaluation=EvalConfig(
            eval_task="aime24",
            eval_problems=30,
            eval_samples=32,
            eval_temperature=1.0,
            eval_top_p=0.9,
        ),
        record=RecordConfig(
            eval_every=80,
            save_every=80,
            save_batch_every=80,
            full_metrics_every=10,
        ),
        hardware=HardwareConfig(
            max_logits_per_chunk=1 << 28,
            dtype="bfloat16",
            gradient_checkpointing=True,
            offload_teacher=True,
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "smoke": smoke,
    "lab": lab,
    "pair": pair,
    "smollm": smollm,
    "household": household,
    "qwen-small": qwen_small,
    "paper-math": paper_math,
}

RENAMED_RECIPES = {"rooms": "household"}
"""Former name of a recipe to its current name."""
