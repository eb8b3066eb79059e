"""Recipes: functions that return a configuration, to be overridden on the command line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diagnostics.errors import InvalidInput
from opd.config.settings import Config, TaskSettings, to_json


def smoke() -> Config:
    """Seconds on a CPU, on the tiny pair of `opd lab --tiny`: does it run?"""
    return Config(
        student="lab-tiny/student",
        teacher="lab-tiny/teacher",
        out="runs/smoke",
        steps=4,
        prompts_per_step=4,
        group_size=2,
        max_prompt=64,
        max_response=32,
        lr=1e-3,
        support_k=8,
        eval_every=2,
        eval_problems=8,
        save_every=2,
        batch_every=2,
    )


def lab() -> Config:
    """A real distillation in two minutes of one CPU core, on the pair of `opd lab`."""
    return Config(
        student="lab/student",
        teacher="lab/teacher",
        out="runs/lab",
        steps=60,
        prompts_per_step=64,
        group_size=1,
        max_prompt=64,
        max_response=176,
        lr=3e-4,
        betas=(0.9, 0.95),
        warmup=10,
        support_k=16,
        eval_every=20,
        eval_problems=256,
        save_every=20,
        batch_every=20,
    )


def rooms() -> Config:
    """A household played in text, turn by turn, on the pair of `opd lab --rooms`; 3 minutes."""
    return Config(
        student="lab-rooms/student",
        teacher="lab-rooms/teacher",
        out="runs/rooms",
        task="env:rooms",
        max_turns=16,
        steps=40,
        prompts_per_step=16,
        group_size=1,
        max_prompt=144,
        max_response=64,
        lr=3e-4,
        betas=(0.9, 0.95),
        warmup=5,
        support_k=16,
        eval_every=20,
        eval_problems=256,
        save_every=20,
        batch_every=20,
        exact_every=5,
    )


def pair() -> Config:
    """Any two models with one tokenizer: give --student, --teacher and --task FILE."""
    return Config(student="", teacher="", out="runs/pair", task="")


def smollm() -> Config:
    """A pretrained pair on sums asked in words, on the models of `opd lab --smollm`; 8 minutes."""
    return Config(
        student="smollm/student",
        teacher="smollm/teacher",
        out="runs/smollm",
        task="smollm/problems.jsonl",
        steps=32,
        prompts_per_step=8,
        group_size=1,
        max_prompt=64,
        max_response=32,
        lr=2e-5,
        support_k=16,
        eval_every=0,
        eval_problems=32,
        save_every=32,
        batch_every=1,
    )


def qwen_small() -> Config:
    """Qwen2.5-0.5B-Instruct from Qwen2.5-1.5B-Instruct on DAPO-Math: one GPU of 24 GB."""
    return Config(
        student="Qwen/Qwen2.5-0.5B-Instruct",
        teacher="Qwen/Qwen2.5-1.5B-Instruct",
        out="runs/qwen-small",
        task="dapo-math",
        drop_long=True,
        prompts_per_step=16,
        group_size=4,
        max_prompt=512,
        max_response=1024,
        top_p=0.9,
        support_k=32,
        steps=200,
        lr=2e-6,
        weight_decay=0.01,
        eval_top_p=0.9,
        exact_every=10,
        chunk_elements=1 << 28,
        dtype="bfloat16",
        checkpointing=True,
    )


def paper_math() -> Config:
    """Qwen2.5-7B-Instruct from OpenThinker3-7B as in arXiv 2603.25562, table A1 and its scripts.

    Local support matching without a mask: 128 responses a step in two updates, K = 32, top-p 0.9,
    every response weighs the same, as a micro-batch of one makes it in the published code (its
    equation 8 is `group_mean`). The sampled-token baseline: `--objective sampled_token_clipped
    --top-p 1`; with mask: `--mask paper`. Not ours: its prompt's wording, its 8 GPUs (this is one
    process), its vLLM version.
    """
    return Config(
        student="Qwen/Qwen2.5-7B-Instruct",
        teacher="open-thoughts/OpenThinker3-7B",
        out="runs/paper-math",
        task="dapo-math",
        drop_long=True,
        prompts_per_step=16,
        group_size=8,
        max_prompt=2048,
        max_response=16384,
        engine="vllm",
        temperature=1.0,
        top_p=0.9,
        objective="teacher_topk",
        support_k=32,
        denominator="sequence_mean",
        steps=400,
        updates=2,
        lr=2e-6,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        clip=1.0,
        seed=42,
        eval_task="aime24",
        eval_every=80,
        eval_problems=30,
        eval_samples=32,
        eval_temperature=1.0,
        eval_top_p=0.9,
        save_every=80,
        batch_every=80,
        exact_every=10,
        chunk_elements=1 << 28,
        dtype="bfloat16",
        checkpointing=True,
        offload_teacher=True,
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "smoke": smoke,
    "lab": lab,
    "pair": pair,
    "smollm": smollm,
    "rooms": rooms,
    "qwen-small": qwen_small,
    "paper-math": paper_math,
}


def parse(argv: list[str]) -> Config:
    """`RECIPE [--field value ...]`; `--show` prints the settings and ends."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: opd train RECIPE [--show] [--anew] [--tasks FILE.toml] [--field value ...]\n")
        print("--show prints the settings; --anew begins at step 0 and moves what the run folder")
        print("holds to earlier/ in it; without it, a run goes on from its last checkpoint.")
        print(
            "--tasks names a file of several tasks, each with its own teacher (opd/training/multitask.py)."
        )
        print("\nrecipes:")
        for name, recipe in RECIPES.items():
            print(f"  {name:11} {(recipe.__doc__ or '').splitlines()[0]}")
        print("\n`opd train RECIPE --help` lists every setting of a recipe.")
        raise SystemExit(0)
    name, rest = argv[0], argv[1:]
    if name not in RECIPES:
        raise SystemExit(f"opd train: unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    import tyro

    given, tasks = with_tasks([word for word in rest if word != "--show"])
    default = replace(RECIPES[name](), tasks=tasks)
    config = tyro.cli(Config, default=default, args=given, prog=f"opd train {name}")
    if "--show" in rest:
        print(json.dumps(to_json(config), indent=1))
        raise SystemExit(0)
    return config


def with_tasks(words: list[str]) -> tuple[list[str], tuple[TaskSettings, ...]]:
    """The words without `--tasks FILE`, and the tasks of that file."""
    if "--tasks" not in words:
        return words, ()
    from opd.training.multitask import read_tasks

    at = words.index("--tasks")
    if at + 1 == len(words):
        raise InvalidInput("--tasks needs a file: [[tasks]] in TOML, see opd.training.multitask")
    return words[:at] + words[at + 2 :], read_tasks(Path(words[at + 1]))
