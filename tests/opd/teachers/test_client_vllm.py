"""A remote teacher on a real vLLM server, which is killed and restarted during a run."""

import threading
import time
from pathlib import Path

import pytest
import torch

from opd.data.chain_task import Problem
from opd.data.prompts import encode_prompts
from opd.rollouts.hf_engine import sample
from opd.scoring.score import score_batch
from opd.teachers.connection import connect
from opd.teachers.pair import load_pair
from opd.teachers.teacher import ServerTeacher
from opd.training.train import train
from tests.helpers.processes.vllm_process import free_port, run_vllm_server, wide_pair
from tests.helpers.requests import full_request, lean_request
from tests.helpers.runs import rows, settings
from tests.opd.teachers.test_client import loss_and_gradients
from tests.opd.teachers.test_client_training import SHORT, assert_close_rows, remote_config

pytestmark = pytest.mark.vllm
K = 16
LIMIT = 128


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models with head sizes that vLLM supports on a CPU."""
    return wide_pair(tmp_path_factory.mktemp("pair"), tied=False)


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


def test_vllm_is_a_teacher_as_if_at_hand_and_may_die(
    pair: tuple[Path, Path], port: int, tmp_path: Path
) -> None:
    log = tmp_path / "vllm.log"
    local = train(settings(pair, tmp_path / "local", **SHORT)).folder
    with run_vllm_server(pair[1], port, log, LIMIT) as url:
        # `connect` waits for the server to start, as a run does
        models = load_pair(*map(str, pair), "cpu", "float32")
        options = {"timeout": 600.0, "concurrency": 4}
        client = connect(url, models.tokenizer, models.student.vocabulary, k=K, **options)
        assert client.limit == LIMIT
        with pytest.raises(ValueError, match="--max-logprobs 21, or lower support_k"):
            connect(url, models.tokenizer, models.student.vocabulary, k=21, **options)
        assert_remote_matches_local(models, client)
        finished = threading.Event()
        killer = threading.Thread(
            target=kill_and_restart, args=(pair, port, log, tmp_path, finished)
        )
        remote_run_config = remote_config(pair, tmp_path / "far", url, **SHORT)
        assert_close_rows(rows(train(remote_run_config).folder), rows(local))
    killer.start()
    try:
        restarted_config = remote_config(
            pair, tmp_path / "again", url, teacher_timeout=600.0, **SHORT
        )
        assert_close_rows(rows(train(restarted_config).folder), rows(local))
    finally:
        finished.set()
        killer.join()


def kill_and_restart(
    pair: tuple[Path, Path], port: int, log: Path, folder: Path, finished: threading.Event
) -> None:
    """Serve until the run has a row, kill the server, and start another until the run ends."""
    with run_vllm_server(pair[1], port, log, LIMIT):
        rows_path = folder / "again" / "rows.jsonl"
        while not (rows_path.exists() and rows_path.read_text()) and not finished.is_set():
            time.sleep(0.01)
    with run_vllm_server(pair[1], port, log, LIMIT):
        finished.wait(900)


def assert_remote_matches_local(models, remote) -> None:
    prompts = encode_prompts(models.tokenizer, [Problem("1+2" * n, "3") for n in (1, 3, 2)], 4, 64)
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
    server = ServerTeacher("vllm", remote)
    remote_scores, local, exact = (
        score_batch(models.student, teacher, prompts, batch, request).scored
        for teacher, request in (
            (server, lean_request(K, **sizes)),
            (models.teacher, lean_request(K, **sizes)),
            (models.teacher, full_request(K, **sizes)),
        )
    )
    for actual, expected in (
        (remote_scores, local),
        (remote_scores.support, local.support),
        (remote_scores, exact),
    ):
        gap = (actual.teacher_logp - expected.teacher_logp).abs().max()
        print(f"largest difference of log-probabilities: {float(gap):.1e}")
        assert float(gap) < 1e-4
    assert torch.equal(remote_scores.support.ids, local.support.ids)
    for name, objective_options in (("teacher_topk", {}), ("sampled_token", {"gamma": 0.9})):
        actual_values = loss_and_gradients(
            models, name, prompts, remote_scores, **objective_options
        )
        expected = loss_and_gradients(models, name, prompts, local, **objective_options)
        size = max(float(g.abs().max()) for g in expected[1:])
        gap = max(float((a - b).abs().max()) for a, b in zip(actual_values, expected, strict=True))
        print(f"{name}: largest difference of gradients {gap:.1e}, largest gradient {size:.1e}")
        assert gap < 1e-4 * size
