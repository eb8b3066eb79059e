"""vLLM's own server for tests, and a pair of models that it can hold on a CPU."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from opd.lab.build import make_tokenizer


def wide_pair(folder: Path, *, tied: bool) -> tuple[Path, Path]:
    """(student, teacher) with heads as wide as vLLM's attention on a CPU takes them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(make_tokenizer()),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.15,
            tie_word_embeddings=tied,
        )
        model = Qwen2ForCausalLM(config)
        model.generation_config.top_k, model.generation_config.do_sample = 3, True
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


@contextmanager
def vllm(
    model: Path, port: int, log: Path, limit: int, *more: str, develops: bool = False
) -> Iterator[str]:
    """vLLM's server of a model, killed with all its processes at the end of the block."""
    words = f"--model {model} --served-model-name {model.name} --host 127.0.0.1 --port {port} "
    words += f"--dtype float32 --enforce-eager --max-model-len {limit}"
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words.split(), *more]
    known = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    known |= {"VLLM_SERVER_DEV_MODE": "1"} if develops else {}
    with open(log, "a") as out:
        process = subprocess.Popen(
            line,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | known,
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]
