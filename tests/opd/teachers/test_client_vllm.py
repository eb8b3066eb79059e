"""The same against vLLM's own server, killed and started again in the middle of a run."""

import threading
import time
from pathlib import Path

import pytest
import torch

from opd.data.chain_task import Problem
from opd.data.prompts import encode
from opd.rollouts.hf_engine import sample
from opd.scoring.score import score, score_support
from opd.teachers.client import connect
from opd.teachers.pair import load_pair
from opd.teachers.remote_scores import asked
from opd.training.train import train
from tests.helpers.vllm_process import free_port, vllm, wide_pair
from tests.opd.teachers.test_client import loss_and_gradients
from tests.opd.teachers.test_client_training import SHORT, close, served
from tests.opd.training.test_train import rows, settings

pytestmark = pytest.mark.vllm
K = 16
LIMIT = 128


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models with heads as wide as vLLM's attention on a CPU takes them."""
    return wide_pair(tmp_path_factory.mktemp("pair"), tied=False)


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


def test_vllm_is_a_teacher_as_if_at_hand_and_may_die(
    pair: tuple[Path, Path], port: int, tmp_path: Path
) -> None:
    log = tmp_path / "vllm.log"
    local = train(settings(pair, tmp_path / "local", **SHORT))
    with vllm(pair[1], port, log, LIMIT) as url:
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
        again = served(pair, tmp_path / "again", url, teacher_timeout=600.0, **SHORT)
        close(rows(train(again)), rows(local))
    finally:
        done.set()
        killer.join()


def kill_and_restart(
    pair: tuple[Path, Path], port: int, log: Path, folder: Path, done: threading.Event
) -> None:
    """A server until the run has a row, then none for a while, then one until the run is done."""
    with vllm(pair[1], port, log, LIMIT):
        written = folder / "again" / "rows.jsonl"
        while not (written.exists() and written.read_text()) and not done.is_set():
            time.sleep(0.01)
    with vllm(pair[1], port, log, LIMIT):
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
    sizes = {"max_tokens_per_microbatch": 200, "max_logits_per_chunk": 1 << 16}
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
