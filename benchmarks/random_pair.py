"""A random pair whose responses have equal length, and the settings of a training run with it."""

import json
from pathlib import Path
from typing import Any

from opd.config.settings import Config, with_settings


def save_pair(
    folder: Path,
    *,
    vocabulary: int,
    width: int,
    layers: int,
    rows: int,
    response: int,
    kv_heads: int | None = None,
    has_answers: bool = True,
) -> None:
    """Save student/ and teacher/, Qwen2 models without an end token, and a task of their prompts.

    Args:
        folder: Folder of the pair and of task.jsonl.
        vocabulary: Number of ids.
        width: Hidden width; a head has 32.
        layers: Number of layers.
        rows: Prompts of a step, 64 times as many are written.
        response: Longest response in tokens.
        kv_heads: Heads of keys and values; as many as of queries if None.
        has_answers: Whether the problems have answers; without, no task is evaluated.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from opd.lab.build import make_tokenizer

    heads = width // 32
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            max_position_embeddings=response + 128,
        )
        network = Qwen2ForCausalLM(config)
        network.generation_config.eos_token_id = vocabulary - 1  # of probability 1 / V
        network.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    answer = {"answer": "0"} if has_answers else {}
    problems = [{"prompt": f"{i}+{i}*{i}", **answer} for i in range(100, 100 + 64 * rows)]
    (folder / "task.jsonl").write_text("\n".join(json.dumps(row) for row in problems))


def training_config(
    folder: Path, out: Path, *, rows: int, response: int, steps: int, **settings: Any
) -> Config:
    """Return the settings of a run that only trains: no evaluations, no batches on disk.

    Args:
        folder: Folder of `save_pair`.
        out: Run folder.
        rows: Prompts of a step, with one response each.
        response: Longest response in tokens.
        steps: Number of steps.
        **settings: Further settings.

    Returns:
        The settings.
    """
    config = Config(
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        out=str(out),
        steps=steps,
    )
    config = with_settings(
        config,
        task=str(folder / "task.jsonl"),
        prompts_per_step=rows,
        group_size=1,
        max_response=response,
        lr=1e-6,
        eval_every=0,
        eval_problems=1,
        save_every=0,
        save_batch_every=0,
        device="cpu",
    )
    return with_settings(config, **settings)
