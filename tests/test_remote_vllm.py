"""The same against vLLM's own server, killed and started again in the middle of a run."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from opd.data import encode
from opd.lab import make_tokenizer
from opd.model import load_pair
from opd.problems import Problem
from opd.remote import connect
from opd.rollout import sample
from opd.scoring import score, score_support
from opd.told import asked
from opd.train import train
from tests.test_remote import loss_and_gradients
from tests.test_remote_train import SHORT, close, served
from tests.test_train import rows, settings

pytestmark = pytest.mark.slow
K = 16
LIMIT = 128


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models with heads as wide as vLLM's attention on a CPU takes them."""
    pytest.importorskip("vllm")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("pair")
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
        )
        Qwen2ForCausalLM(config).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


@contextmanager
def vllm(model: Path, port: int, log: Path) -> Iterator[str]:
    """vLLM's server of a model, killed with all its processes at the end of the block."""
    words = f"--model {model} --served-model-name teacher --host 127.0.0.1 --port {port} "
    words += f"--dtype float32 --enforce-eager --max-model-len {LIMIT}"
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words.split()]
    with open(log, "a") as out:
        process = subprocess.Popen(
            line,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_vllm_is_a_teacher_as_if_at_hand_and_may_die(
    pair: tuple[Path, Path], port: int, tmp_path: Path
) -> None:
    log = tmp_path / "vllm.log"
    local = train(settings(pair, tmp_path / "local", **SHORT))
    with vllm(pair[1], port, log) as url:
        # waits for the server to come up, as a run does
        models = load_pair(*map(str, pair), "cpu", "float32")
        how = {"patience": 600.0, "in_flight": 4}
        remote = connect(url, models.tokenizer, models.student.vocabulary, k=K, **how)
        assert remote.limit == LIMIT
        with pytest.raises(ValueError, match="--max-logprobs 21, or lower support_k"):
            connect(url, models.tokenizer, models.student.vocabulary, k=21, **how)
        equal(models, remote)
        done = threading.Event()
        killer = threading.Thread(target=kill_and_restart, args=(pair, port, log, tmp_path, done))
        far = served(pair, tmp_path / "far", url, **SHORT)
        close(rows(train(far)), rows(local))
    killer.start()
    try:
        again = served(pair, tmp_path / "again", url, teacher_patience=600.0, **SHORT)
        close(rows(train(again)), rows(local))
    finally:
        done.set()
        killer.join()


def kill_and_restart(
    pair: tuple[Path, Path], port: int, log: Path, folder: Path, done: threading.Event
) -> None:
    """A server until the run has a row, then none for a while, then one until the run is done."""
    with vllm(pair[1], port, log):
        written = folder / "again" / "rows.jsonl"
        while not (written.exists() and written.read_text()) and not done.is_set():
            time.sleep(0.01)
    with vllm(pair[1], port, log):
        done.wait(900)


def equal(models, remote) -> None:
    prompts = encode(models.tokenizer, [Problem("1+2" * n, "3") for n in (1, 3, 2)], 4, 64)
    batch = sample(
        models.student,
        prompts,
        models.eos,
        max_response=24,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    sizes = {"micro_tokens": 200, "chunk_elements": 1 << 16}
    told = asked(remote, prompts, batch, K)
    found = score_support(models, prompts, batch, k=K, temperature=1.0, told=told, **sizes)
    local = score_support(models, prompts, batch, k=K, temperature=1.0, **sizes)
    exact, _ = score(models, prompts, batch, k=K, temperature=1.0, keep_teacher=False, **sizes)
    for mine, theirs in ((found, local), (found.support, local.support), (found, exact)):
        gap = (mine.teacher_logp - theirs.teacher_logp).abs().max()
        print(f"largest difference of log-probabilities: {float(gap):.1e}")
        assert float(gap) < 1e-4
    assert torch.equal(found.support.ids, local.support.ids)
    for name, choices in (("teacher_topk", {}), ("sampled_token", {"gamma": 0.9})):
        ours = loss_and_gradients(models, name, prompts, found, **choices)
        theirs = loss_and_gradients(models, name, prompts, local, **choices)
        size = max(float(g.abs().max()) for g in theirs[1:])
        gap = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        print(f"{name}: largest difference of gradients {gap:.1e}, largest gradient {size:.1e}")
        assert gap < 1e-4 * size
