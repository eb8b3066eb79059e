"""Rollouts from real vLLM servers: a tied student, stale heads, a killed server."""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd.config.settings import with_settings
from opd.data.chain_task import Problem
from opd.data.prompts import encode_prompts
from opd.rollouts.decoding import mask_until_eos
from opd.rollouts.vllm_server_engine import VllmServerEngine
from opd.teachers.pair import load_pair
from opd.training.train import train
from tests.helpers.processes.vllm_process import free_port, run_vllm_server, wide_pair
from tests.helpers.runs import rows, settings
from tests.opd.rollouts.reference_sampling import (
    TEMPERATURE,
    TOP_P,
    assert_matches_forward_pass,
    seeded,
)
from tests.opd.training.test_distributed import two_ranks
from tests.opd.training.test_prefetch_runs import SERVER_SETTINGS

pytestmark = pytest.mark.vllm
LIMIT = 256
UNTIED = ("--load-format", "dummy", "--hf-overrides", '{"tie_word_embeddings": false}')
PROCESSED = ("--logprobs-mode", "processed_logprobs")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models with head sizes that vLLM supports on a CPU; the student's embeddings are tied."""
    return wide_pair(tmp_path_factory.mktemp("pair"), tied=True)


def run_rollout_server(
    model: Path, port: int, log: Path, *options: str
) -> AbstractContextManager[str]:
    """Serve a model with vLLM in development mode, which can load weights."""
    return run_vllm_server(
        model, port, log, LIMIT, "--no-enable-chunked-prefill", *options, dev_mode=True
    )


def make_pair_and_engine(pair: tuple[Path, Path], url: str, folder: Path):
    models = load_pair(*map(str, pair), "cpu", "float32")
    options = {"max_length": LIMIT, "timeout": 600.0, "concurrency": 32}
    return models, VllmServerEngine(models.student, urls=[url], folder=folder, **options)


@pytest.fixture(scope="module")
def url(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with run_rollout_server(pair[0], free_port(), log, *UNTIED, *PROCESSED) as url:
        yield url


def test_rows_are_those_of_the_student_that_was_loaded(pair, url: str, tmp_path: Path) -> None:
    models, engine = make_pair_and_engine(pair, url, tmp_path)
    student, network = models.student, models.student.network
    assert network.config.tie_word_embeddings
    problems = [Problem("1+2" * n, "3") for n in (30, 1, 17)]
    prompts = encode_prompts(models.tokenizer, problems, 4, 200)
    for turn in range(3):
        for top_p in (TOP_P, 1.0):
            options = {"max_response": 24, "temperature": TEMPERATURE, "top_p": top_p}
            eos = list(range(0, 80, 8))
            batch = engine.sample(prompts, eos, **options, generator=seeded(turn)).validate()
            assert int(batch.mask.sum()) > 60
            assert_matches_forward_pass(batch, network, prompts, student.vocabulary, top_p)
            mask, ended = mask_until_eos(batch.tokens, eos)
            assert int(ended.sum()) > 0
            assert torch.equal(batch.ended, ended)
            assert torch.equal(mask[ended], batch.mask[ended])
            repeated = engine.sample(prompts, eos, **options, generator=seeded(turn))
            assert torch.equal(repeated.tokens, batch.tokens)
        with torch.no_grad():
            for i, x in enumerate(network.parameters()):
                x += 0.03 * torch.randn(x.shape, generator=seeded(100 * turn + i))
        engine.sync(student)
    small = replace(student, vocabulary=60)
    engine = VllmServerEngine(
        small, urls=[url], folder=tmp_path / "small", max_length=99, timeout=60.0, concurrency=8
    )
    options = {"max_response": 24, "temperature": TEMPERATURE, "top_p": 1.0}
    batch = engine.sample(prompts, [1], **options, generator=seeded(0))
    assert int(batch.tokens.max()) < 60
    assert_matches_forward_pass(batch, network, prompts, 60, 1.0)


def test_a_run_ahead_survives_a_kill_of_the_server(pair, url: str, tmp_path: Path) -> None:
    options = {
        **SERVER_SETTINGS,
        "max_response": 48,
        "rollout_lag": 1,
        "rollout_timeout": 600.0,
        "steps": 6,
    }
    reference_folder = train(
        settings(pair, tmp_path / "whole", rollout_servers=(url,), **options)
    ).folder
    assert [row["consistency/age"] for row in rows(reference_folder)] == [0, 1, 1, 1, 1, 1]
    port, log = free_port(), tmp_path / "vllm.log"
    config = settings(
        pair, tmp_path / "again", rollout_servers=(f"http://127.0.0.1:{port}/v1",), **options
    )
    finished = threading.Event()
    killer = threading.Thread(target=kill_and_restart, args=(pair, port, log, config.out, finished))
    killer.start()
    try:
        restarted_folder = train(config).folder
    finally:
        finished.set()
        killer.join()
    for actual_row, expected_row in zip(
        rows(restarted_folder), rows(reference_folder), strict=True
    ):
        for name in ("loss", "grad_norm", "divergence/k1", "consistency/sampler_log_ratio_square"):
            assert actual_row[name] == pytest.approx(expected_row[name], rel=2e-3, abs=2e-4), name
    assert "Reloading weights" in log.read_text()


def kill_and_restart(
    pair: tuple[Path, Path], port: int, log: Path, folder: str, finished: threading.Event
) -> None:
    """Serve until the run has two rows, kill the server, and start another until the run ends."""
    with run_rollout_server(pair[0], port, log, *UNTIED, *PROCESSED):
        rows_path = Path(folder) / "rows.jsonl"
        while not (rows_path.exists() and rows_path.read_text().count("\n") > 1):
            if finished.is_set():
                return
            time.sleep(0.01)
    with run_rollout_server(pair[0], port, log, *UNTIED, *PROCESSED):
        finished.wait(900)


def test_two_processes_sample_as_one(pair, url: str, tmp_path: Path) -> None:
    options = {
        **SERVER_SETTINGS,
        "max_response": 24,
        "rollout_lag": 1,
        "rollout_timeout": 600.0,
        "prompts_per_step": 4,
    }
    config = settings(pair, tmp_path / "one", rollout_servers=(url,), **options)
    two = with_settings(config, out=str(tmp_path / "two"), sharding="full")
    train(config)
    with two_ranks(tmp_path, [two]) as process:
        assert process.wait(timeout=600) == 0, process.stdout + process.stderr
    for actual_row, expected_row in zip(
        rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True
    ):
        for name in ("loss", "grad_norm", "divergence/k1", "consistency/sampler_log_ratio_square"):
            assert actual_row[name] == pytest.approx(expected_row[name], rel=2e-3, abs=2e-4), name


def test_a_tied_server_takes_a_head_of_its_own_and_one_without_is_refused(
    pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a tied head keeps its old weights if the checkpoint has no head, as tied ones."""
    import opd.rollouts.vllm_server_engine

    with run_rollout_server(pair[0], free_port(), tmp_path / "tied.log", *PROCESSED) as tied:
        models, engine = make_pair_and_engine(pair, tied, tmp_path)
        network = models.student.network
        prompts = encode_prompts(
            models.tokenizer, [Problem("1+2" * n, "3") for n in (30, 1)], 4, 200
        )
        with torch.no_grad():
            network.lm_head.weight += 0.05 * torch.randn(
                network.lm_head.weight.shape, generator=seeded(0)
            )
        engine.sync(models.student)
        options = {"max_response": 24, "temperature": TEMPERATURE, "top_p": 1.0}
        batch = engine.sample(prompts, [1], **options, generator=seeded(0))
        assert_matches_forward_pass(batch, network, prompts, models.student.vocabulary, 1.0)
        monkeypatch.setattr(
            opd.rollouts.vllm_server_engine,
            "export_checkpoint",
            lambda net, path: net.save_pretrained(path),
        )
        with pytest.raises(RuntimeError, match="does not have the student's weights"):
            make_pair_and_engine(pair, tied, tmp_path)


def test_log_probabilities_before_temperature_are_refused(pair, tmp_path: Path) -> None:
    with (
        run_rollout_server(pair[0], free_port(), tmp_path / "raw.log", *UNTIED) as raw,
        pytest.raises(RuntimeError, match="--logprobs-mode processed_logprobs"),
    ):
        make_pair_and_engine(pair, raw, tmp_path)
