"""A vLLM server process for tests, and a pair of models that it supports on a CPU."""

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
    """(student, teacher) folders, with head sizes that vLLM's attention supports on a CPU."""
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
def run_vllm_server(
    model: Path,
    port: int,
    log: Path,
    limit: int,
    *options: str,
    dev_mode: bool = False,
    has_v2_runner: bool = False,
) -> Iterator[str]:
    """Serve a model with vLLM; kill the server with all its processes at the end of the block.

    The model runner V2 runs in Triton's interpreter. Its kernel for top_k and top_p does not, so
    that the model's own generation settings, which have a top_k, are left out.
    """
    flags = f"--model {model} --served-model-name {model.name} --host 127.0.0.1 --port {port} "
    flags += f"--dtype float32 --enforce-eager --max-model-len {limit}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags.split(), *options]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    variables |= {"VLLM_SERVER_DEV_MODE": "1"} if dev_mode else {}
    if has_v2_runner:
        variables |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
        variables["PYTHONPATH"] = str(Path(__file__).parents[1] / "triton_interpreter")
        command += ["--generation-config", "vllm"]
    with open(log, "a") as log_file:
        process = subprocess.Popen(
            command,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | variables,
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
