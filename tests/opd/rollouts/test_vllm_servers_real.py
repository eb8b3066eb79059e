"""Rollouts from vLLM's own servers: a tied student, stale heads, a kill in the middle of a run."""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd.data.chain_task import Problem
from opd.data.prompts import encode
from opd.rollouts.hf_engine import until_end
from opd.rollouts.vllm_server_engine import VllmServerEngine
from opd.teachers.pair import load_pair
from opd.training.train import train
from tests.helpers.vllm_process import free_port, vllm, wide_pair
from tests.opd.rollouts.test_hf_engine import TEMPERATURE, TOP_P, agrees_with_a_forward_pass, seeded
from tests.opd.training.test_distributed import run_in_two
from tests.opd.training.test_prefetch import HOW
from tests.opd.training.test_train import rows, settings

pytestmark = pytest.mark.vllm
LIMIT = 256
UNTIED = ("--load-format", "dummy", "--hf-overrides", '{"tie_word_embeddings": false}')
PROCESSED = ("--logprobs-mode", "processed_logprobs")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models with heads as wide as vLLM's attention on a CPU takes them; the student is tied."""
    return wide_pair(tmp_path_factory.mktemp("pair"), tied=True)


def sampling(model: Path, port: int, log: Path, *more: str) -> AbstractContextManager[str]:
    """vLLM's server of a model, which takes weights."""
    return vllm(model, port, log, LIMIT, "--no-enable-chunked-prefill", *more, develops=True)


def made(pair: tuple[Path, Path], url: str, folder: Path):
    models = load_pair(*map(str, pair), "cpu", "float32")
    how = {"max_length": LIMIT, "patience": 600.0, "in_flight": 32}
    return models, VllmServerEngine(models.student, urls=[url], folder=folder, **how)


@pytest.fixture(scope="module")
def url(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with sampling(pair[0], free_port(), log, *UNTIED, *PROCESSED) as url:
        yield url


def test_rows_are_those_of_the_student_that_was_loaded(pair, url: str, tmp_path: Path) -> None:
    models, engine = made(pair, url, tmp_path)
    student, network = models.student, models.student.network
    assert network.config.tie_word_embeddings
    asked = [Problem("1+2" * n, "3") for n in (30, 1, 17)]
    prompts = encode(models.tokenizer, asked, 4, 200)
    for turn in range(3):
        for top_p in (TOP_P, 1.0):
            how = {"max_response": 24, "temperature": TEMPERATURE, "top_p": top_p}
            end = list(range(0, 80, 8))
            batch = engine.sample(prompts, end, **how, generator=seeded(turn)).checked()
            assert int(batch.mask.sum()) > 60
            agrees_with_a_forward_pass(batch, network, prompts, student.vocabulary, top_p)
            mask, ended = until_end(batch.tokens, end)
            assert int(ended.sum()) > 0
            assert torch.equal(batch.ended, ended)
            assert torch.equal(mask[ended], batch.mask[ended])
            again = engine.sample(prompts, end, **how, generator=seeded(turn))
            assert torch.equal(again.tokens, batch.tokens)
        with torch.no_grad():
            for i, x in enumerate(network.parameters()):
                x += 0.03 * torch.randn(x.shape, generator=seeded(100 * turn + i))
        engine.sync(student)
    small = replace(student, vocabulary=60)
    engine = VllmServerEngine(
        small, urls=[url], folder=tmp_path / "small", max_length=99, patience=60.0, in_flight=8
    )
    how = {"max_response": 24, "temperature": TEMPERATURE, "top_p": 1.0}
    batch = engine.sample(prompts, [1], **how, generator=seeded(0))
    assert int(batch.tokens.max()) < 60
    agrees_with_a_forward_pass(batch, network, prompts, 60, 1.0)


def test_a_run_ahead_survives_a_kill_of_the_server(pair, url: str, tmp_path: Path) -> None:
    how = {**HOW, "max_response": 48, "rollout_lag": 1, "rollout_timeout": 600.0, "steps": 6}
    whole = train(settings(pair, tmp_path / "whole", rollout_servers=(url,), **how))
    assert [row["consistency/age"] for row in rows(whole)] == [0, 1, 1, 1, 1, 1]
    port, log = free_port(), tmp_path / "vllm.log"
    config = settings(
        pair, tmp_path / "again", rollout_servers=(f"http://127.0.0.1:{port}/v1",), **how
    )
    done = threading.Event()
    killer = threading.Thread(target=kill_and_restart, args=(pair, port, log, config.out, done))
    killer.start()
    try:
        again = train(config)
    finally:
        done.set()
        killer.join()
    for mine, theirs in zip(rows(again), rows(whole), strict=True):
        for name in ("loss", "grad_norm", "divergence/k1", "consistency/sampler_log_ratio_square"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), name
    assert "Reloading weights" in log.read_text()


def kill_and_restart(
    pair: tuple[Path, Path], port: int, log: Path, folder: str, done: threading.Event
) -> None:
    """A server until the run has two rows, then none for a while, then one to the end of it."""
    with sampling(pair[0], port, log, *UNTIED, *PROCESSED):
        written = Path(folder) / "rows.jsonl"
        while not (written.exists() and written.read_text().count("\n") > 1):
            if done.is_set():
                return
            time.sleep(0.01)
    with sampling(pair[0], port, log, *UNTIED, *PROCESSED):
        done.wait(900)


def test_two_processes_sample_as_one(pair, url: str, tmp_path: Path) -> None:
    how = {
        **HOW,
        "max_response": 24,
        "rollout_lag": 1,
        "rollout_timeout": 600.0,
        "prompts_per_step": 4,
    }
    config = settings(pair, tmp_path / "one", rollout_servers=(url,), **how)
    two = replace(config, out=str(tmp_path / "two"), sharding="full")
    train(config)
    run_in_two(tmp_path, [two])
    for mine, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for name in ("loss", "grad_norm", "divergence/k1", "consistency/sampler_log_ratio_square"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), name


def test_a_tied_server_takes_a_head_of_its_own_and_one_without_is_refused(
    pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a tied head keeps its weights where a checkpoint leaves it out, as tied ones do."""
    import opd.rollouts.vllm_server_engine

    with sampling(pair[0], free_port(), tmp_path / "tied.log", *PROCESSED) as tied:
        models, engine = made(pair, tied, tmp_path)
        network = models.student.network
        prompts = encode(models.tokenizer, [Problem("1+2" * n, "3") for n in (30, 1)], 4, 200)
        with torch.no_grad():
            network.lm_head.weight += 0.05 * torch.randn(
                network.lm_head.weight.shape, generator=seeded(0)
            )
        engine.sync(models.student)
        how = {"max_response": 24, "temperature": TEMPERATURE, "top_p": 1.0}
        batch = engine.sample(prompts, [1], **how, generator=seeded(0))
        agrees_with_a_forward_pass(batch, network, prompts, models.student.vocabulary, 1.0)
        monkeypatch.setattr(
            opd.rollouts.vllm_server_engine, "export", lambda net, path: net.save_pretrained(path)
        )
        with pytest.raises(RuntimeError, match="did not become the student"):
            made(pair, tied, tmp_path)


def test_log_probabilities_before_temperature_are_refused(pair, tmp_path: Path) -> None:
    with (
        sampling(pair[0], free_port(), tmp_path / "raw.log", *UNTIED) as raw,
        pytest.raises(RuntimeError, match="--logprobs-mode processed_logprobs"),
    ):
        made(pair, raw, tmp_path)
