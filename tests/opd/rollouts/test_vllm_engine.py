"""The vLLM engine samples from the student: log-probabilities, nucleus, ends, adapters."""

import copy
import sys
from dataclasses import replace

import pytest
import torch

from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.models.model import CausalLM
from opd.rollouts.decoding import mask_until_eos
from opd.rollouts.factory import make_engine
from opd.teachers.pair import load_pair
from tests.opd.rollouts.reference_sampling import (
    TEMPERATURE,
    TOP_P,
    assert_matches_forward_pass,
    first_token_statistic,
    seeded,
    with_lora_adapters,
)


@pytest.fixture(scope="module")
def long_prompts(pair) -> Prompts:
    """Prompts longer than a block of vLLM's cache, so that prefixes are shared."""
    problems = [Problem("1+2" * n, "3") for n in (50, 1, 61)]
    return encode_prompts(pair.tokenizer, problems, 4, 256)


@pytest.fixture(scope="module", params=["tied", "own head"])
def networks(request, tmp_path_factory, two_layer_pair) -> tuple[CausalLM, CausalLM]:
    """Two students of the same architecture with different weights."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config.from_pretrained(two_layer_pair[0])
    config.tie_word_embeddings = request.param == "tied"
    config.hidden_size, config.intermediate_size = 64, 128
    models = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Qwen2ForCausalLM(config)
        folder = tmp_path_factory.mktemp("student")
        network.save_pretrained(folder)
        models.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    pair = load_pair(*map(str, two_layer_pair), "cpu", "float32")
    return tuple(replace(pair.student, network=x) for x in models)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def engine(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    vllm_engine = make_engine("vllm", networks[0], max_length=256, folder=folder)
    yield vllm_engine
    vllm_engine.close()
    assert not list(folder.iterdir())


@pytest.mark.vllm
def test_vllm_samples_from_the_student_it_was_synced_with(
    engine, networks, pair, long_prompts
) -> None:
    for model in (*networks, networks[0]):
        engine.sync(model)
        for top_p in (TOP_P, 1.0):
            options = {"max_response": 16, "temperature": TEMPERATURE, "top_p": top_p}
            batch = engine.sample(long_prompts, pair.eos, **options, generator=seeded(0)).validate()
            assert int(batch.mask.sum()) > 60
            assert batch.prompt.tolist() == long_prompts.index.tolist()
            assert_matches_forward_pass(batch, model.network, long_prompts, model.vocabulary, top_p)
            assert (batch.softmax_logp is None) == (top_p < 1)
            repeated = engine.sample(long_prompts, pair.eos, **options, generator=seeded(0))
            assert torch.equal(repeated.tokens, batch.tokens)
            other_seed = engine.sample(long_prompts, pair.eos, **options, generator=seeded(1))
            assert not torch.equal(other_seed.tokens, batch.tokens)


@pytest.mark.vllm
def test_vllm_draws_first_tokens_from_the_nucleus(engine, networks, prompts) -> None:
    engine.sync(networks[0])
    rows = 4000
    prompt = prompts.rows([0] * rows)
    options = {"max_response": 1, "temperature": TEMPERATURE, "top_p": TOP_P}
    batch = engine.sample(prompt, [0], **options, generator=seeded(0))
    chi, degrees_of_freedom = first_token_statistic(networks[0], prompt, batch.tokens[:, 0])
    assert abs(chi - degrees_of_freedom) < 4 * (2 * degrees_of_freedom) ** 0.5


@pytest.mark.vllm
def test_vllm_keeps_the_end_token_and_the_shared_vocabulary(engine, networks, prompts) -> None:
    small = replace(networks[1], vocabulary=40)
    engine.sync(small)
    options = {"max_response": 32, "temperature": TEMPERATURE, "top_p": 1.0}
    batch = engine.sample(prompts, [3, 7, 11, 20], **options, generator=seeded(0))
    assert_matches_forward_pass(batch, small.network, prompts, 40, 1.0)
    mask, ended = mask_until_eos(batch.tokens, [3, 7, 11, 20])
    assert int(ended.sum()) >= 2
    assert torch.equal(batch.ended, ended)
    assert torch.equal(mask[ended], batch.mask[ended])
    with pytest.raises(
        ValueError, match=r"may have \d+ tokens, but the engine's max_length is 256"
    ):
        engine.sample(prompts, [3], **(options | {"max_response": 256}), generator=seeded(0))


@pytest.mark.vllm
def test_vllm_merges_adapters(engine, networks, prompts) -> None:
    import peft

    network = with_lora_adapters(peft, copy.deepcopy(networks[0].network))
    initial_weights = {name: x.clone() for name, x in network.state_dict().items()}
    engine.sync(replace(networks[0], network=network))
    options = {"max_response": 8, "temperature": TEMPERATURE, "top_p": TOP_P}
    batch = engine.sample(prompts, [1], **options, generator=seeded(0))
    assert_matches_forward_pass(batch, network, prompts, networks[0].vocabulary, TOP_P)
    assert all(torch.equal(x, initial_weights[name]) for name, x in network.state_dict().items())


@pytest.mark.vllm
def test_weights_that_vllm_did_not_load_are_refused(engine, networks, monkeypatch) -> None:
    import opd.rollouts.vllm_engine

    engine.sync(networks[0])
    real = opd.rollouts.vllm_engine.export_checkpoint
    stale = networks[0].network
    monkeypatch.setattr(
        opd.rollouts.vllm_engine, "export_checkpoint", lambda _, path: real(stale, path)
    )
    with pytest.raises(RuntimeError, match="vLLM does not sample from the student"):
        engine.sync(networks[1])


def test_a_missing_vllm_names_the_extra(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'opdlab\[vllm\]'"):
        make_engine("vllm", pair.student)
