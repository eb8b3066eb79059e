"""Rollouts against an uncached forward pass, a reference nucleus and sampling frequencies."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diagnostics.batch import Rollouts, ScoredRollouts
from diagnostics.monitor import Monitor
from diagnostics.records.batch_files import load_batch
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.models.model import CausalLM
from opd.rollouts.decoding import mask_until_eos
from opd.rollouts.factory import make_engine
from opd.rollouts.hf_engine import group_by_length, sample
from opd.teachers.pair import load_pair
from tests.opd.rollouts.reference_sampling import (
    TEMPERATURE,
    TOP_P,
    assert_matches_forward_pass,
    first_token_statistic,
    seeded,
    with_lora_adapters,
)


def sample_rollouts(
    model: CausalLM, prompts: Prompts, eos: list[int], **changes: object
) -> Rollouts:
    options = {
        "max_response": 16,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "generator": seeded(0),
    }
    return sample(model, prompts, eos, **(options | changes))  # type: ignore[arg-type]


def assert_same_rollouts(a: Rollouts, b: Rollouts, atol: float) -> None:
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.ended, b.ended)
    assert torch.equal(a.prompt, b.prompt)
    torch.testing.assert_close(a.sampler_logp, b.sampler_logp, atol=atol, rtol=0)
    torch.testing.assert_close(a.softmax_logp, b.softmax_logp, atol=atol, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("top_p", [TOP_P, 1.0])
def test_both_log_probabilities_are_those_of_a_plain_forward_pass(
    pair, prompts, cache: str, top_p: float
) -> None:
    batch = sample_rollouts(
        pair.student, prompts, pair.eos, cache=cache, generation_batch_size=4, top_p=top_p
    )
    batch.validate()
    assert int(batch.mask.sum()) > 60
    assert_matches_forward_pass(
        batch, pair.student.network, prompts, pair.student.vocabulary, top_p
    )
    gap = (batch.sampler_logp - batch.softmax_logp)[batch.mask]
    assert (gap.max() > 0.05) == (top_p < 1)


def test_a_response_depends_on_its_own_noise_alone(pair, prompts) -> None:
    reference = sample_rollouts(pair.student, prompts, pair.eos)
    assert len({tuple(x.tolist()) for x in reference.tokens}) == 10, (
        "rows of one prompt have the same responses"
    )
    for generation_batch_size, cache in (
        (1, "dynamic"),
        (3, "dynamic"),
        (3, "static"),
        (256, "static"),
    ):
        repeated = sample_rollouts(
            pair.student,
            prompts,
            pair.eos,
            generation_batch_size=generation_batch_size,
            cache=cache,
        )
        assert_same_rollouts(reference, repeated, 1e-4)
    other_seed = sample_rollouts(pair.student, prompts, pair.eos, generator=seeded(1))
    assert not torch.equal(other_seed.tokens, reference.tokens)


def test_the_global_generator_is_neither_read_nor_written(pair, prompts) -> None:
    torch.manual_seed(5)
    initial_state = torch.get_rng_state()
    first = sample_rollouts(pair.student, prompts, pair.eos)
    assert torch.equal(initial_state, torch.get_rng_state())
    torch.manual_seed(6)
    assert_same_rollouts(first, sample_rollouts(pair.student, prompts, pair.eos), 0)


def test_a_budget_takes_a_fixed_amount_from_the_generator(pair, prompts) -> None:
    states = []
    for eos in (pair.eos, list(range(pair.student.vocabulary))):
        generator = seeded(0)
        sample_rollouts(pair.student, prompts, eos, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states), "early EOS changes the generator state"


def test_first_tokens_have_the_frequencies_of_the_nucleus(pair) -> None:
    rows = 2000
    prompt = encode_prompts(pair.tokenizer, [Problem("7*3", "21")], rows, 64)
    options = {"max_response": 1, "generation_batch_size": rows}
    batches = [
        sample_rollouts(pair.student, prompt, pair.eos, **options, generator=seeded(i))
        for i in range(10)
    ]
    tokens = torch.cat([batch.tokens[:, 0] for batch in batches])
    chi, degrees_of_freedom = first_token_statistic(pair.student, prompt, tokens)
    # two-sided: a statistic that is too small would mean that rows are not independent
    assert abs(chi - degrees_of_freedom) < 4 * (2 * degrees_of_freedom) ** 0.5


def test_a_small_nucleus_is_greedy_decoding(pair, prompts) -> None:
    batch = sample_rollouts(pair.student, prompts, pair.eos, top_p=1e-9, temperature=1.0)
    assert not batch.sampler_logp.any()
    network = pair.student.network
    for row in (0, 2, 5):
        ids = prompts.tokens[row][prompts.mask[row]]
        for token in batch.tokens[row][batch.mask[row]]:
            with torch.no_grad():
                assert int(network(ids[None]).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, token[None]])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_call_stops_when_its_own_rows_have_ended(pair, prompts, cache: str) -> None:
    # EOS ids are the sampled first tokens; ten rows are padded to a bucket of 16
    first = sample_rollouts(pair.student, prompts, pair.eos, max_response=64, cache=cache)
    first = first.tokens[:, 0].tolist()
    eos = sorted(set(first))
    calls: list[int] = []
    hook = pair.student.network.register_forward_hook(lambda *_: calls.append(1))
    batch = sample_rollouts(pair.student, prompts, eos, max_response=64, cache=cache)
    hook.remove()
    assert batch.tokens.tolist() == [[x] for x in first]
    assert batch.ended.all()
    assert len(calls) == 1


def test_responses_are_cut_at_the_first_of_several_end_tokens() -> None:
    response = torch.tensor([[5, 1, 2, 7], [5, 2, 1, 1], [5, 5, 5, 5], [1, 0, 0, 0]])
    mask, ended = mask_until_eos(response, [1, 2])
    assert mask.sum(1).tolist() == [2, 2, 4, 1]
    assert mask[0].tolist() == [True, True, False, False]
    assert ended.tolist() == [True, True, False, True]


def test_batches_are_even_and_sorted_by_length(prompts) -> None:
    groups = group_by_length(prompts, 4)
    lengths = prompts.mask.sum(1)
    assert sorted(i for g in groups for i in g) == list(range(10))
    assert [len(g) for g in groups] == [4, 4, 2]
    assert [len(g) for g in group_by_length(prompts, 9)] == [5, 5]
    group_lengths = [int(lengths[i]) for g in groups for i in g]
    assert group_lengths == sorted(group_lengths)
    assert group_lengths != [int(x) for x in lengths]


def test_only_the_shared_vocabulary_is_drawn(pair, prompts) -> None:
    small = replace(pair.student, vocabulary=40)
    batch = sample_rollouts(small, prompts, [0], top_p=1.0)
    assert int(batch.tokens.max()) < 40
    assert_matches_forward_pass(batch, small.network, prompts, 40, 1.0)


def test_the_model_is_left_as_it_was(pair, prompts) -> None:
    network = pair.student.network
    layer = network.get_decoder().layers[0]
    defaults = network.generation_config
    network.train()
    layer.eval()
    try:
        sample_rollouts(pair.student, prompts, pair.eos)
        with pytest.raises(IndexError):
            sample_rollouts(pair.student, prompts, [])
        assert network.training
        assert not layer.training
        assert network.generation_config is defaults
    finally:
        network.eval()


def test_dropout_is_off_while_sampling(pair, prompts) -> None:
    reference = sample_rollouts(pair.student, prompts, pair.eos)
    layers = pair.student.network.get_decoder().layers
    pair.student.network.train()
    for layer in layers:
        layer.self_attn.attention_dropout = 0.5
    try:
        assert_same_rollouts(reference, sample_rollouts(pair.student, prompts, pair.eos), 0)
    finally:
        pair.student.network.eval()
        for layer in layers:
            layer.self_attn.attention_dropout = 0.0


def test_adapters_take_part(two_layer_pair, prompts) -> None:
    import peft

    pair = load_pair(*map(str, two_layer_pair), "cpu", "float32")
    plain = sample_rollouts(pair.student, prompts, pair.eos)
    network = with_lora_adapters(peft, pair.student.network)
    batch = sample_rollouts(replace(pair.student, network=network), prompts, pair.eos)
    assert not torch.equal(batch.tokens, plain.tokens)
    assert_matches_forward_pass(batch, network, prompts, pair.student.vocabulary, TOP_P)
    assert network.get_base_model().generation_config.top_k == 3, (
        "the generation config was not restored"
    )


def test_settings_and_memory_are_refused_with_the_remedy(pair, prompts) -> None:
    for changes, words in (
        ({"max_response": 0}, "max_response is 0"),
        ({"generation_batch_size": 0}, "generation_batch_size is 0"),
        ({"temperature": 0.0}, "temperature is 0.0 .* for greedy decoding set top_p=1e-9"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"cache": "paged"}, "unknown cache 'paged'; known: static, dynamic"),
    ):
        with pytest.raises(ValueError, match=words):
            sample_rollouts(pair.student, prompts, pair.eos, **changes)

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = pair.student.network.register_forward_pre_hook(exhausted)
    for cache in ("dynamic", "static"):
        with pytest.raises(torch.OutOfMemoryError, match=r"4 rows of \d+ prompt and 16 .* below 4"):
            sample_rollouts(pair.student, prompts, pair.eos, generation_batch_size=4, cache=cache)
    hook.remove()


def test_sampler_consistency_is_tested_before_the_nucleus(pair, prompts, tmp_path: Path) -> None:
    batch = sample_rollouts(pair.student, prompts, pair.eos)
    batch.save(tmp_path / "batch.safetensors")
    loaded_batch = load_batch(tmp_path / "batch.safetensors")
    torch.testing.assert_close(loaded_batch.softmax_logp, batch.softmax_logp, atol=0, rtol=0)
    zero = torch.zeros_like(batch.sampler_logp)
    student = batch.softmax_logp + 0.01 * batch.mask
    scored = ScoredRollouts(**vars(batch), student_logp=student, teacher_logp=zero)
    row = Monitor()(0, [scored])
    assert row["consistency/sampler_log_ratio"] == pytest.approx(0.01, rel=1e-3)
    assert row["consistency/sampler_log_ratio_square"] == pytest.approx(1e-4, rel=1e-2)
    without_softmax_logp = replace(scored, softmax_logp=None)
    expected = float((student - batch.sampler_logp)[batch.mask].mean())
    assert expected < -0.05
    log_ratio = Monitor()(0, [without_softmax_logp])["consistency/sampler_log_ratio"]
    assert log_ratio == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="softmax_logp has shape"):
        replace(batch, softmax_logp=zero[:, :1])


def test_the_hf_engine_follows_the_model_it_was_synced_with(pair, prompts) -> None:
    options = {"max_response": 16, "temperature": TEMPERATURE, "top_p": TOP_P}
    engine = make_engine("hf", pair.student, generation_batch_size=3)
    student_rollouts = engine.sample(prompts, pair.eos, **options, generator=seeded(0))
    assert_same_rollouts(student_rollouts, sample_rollouts(pair.student, prompts, pair.eos), 1e-4)
    engine.sync(pair.teacher.model)
    teacher_rollouts = engine.sample(prompts, pair.eos, **options, generator=seeded(0))
    assert_same_rollouts(
        teacher_rollouts, sample_rollouts(pair.teacher.model, prompts, pair.eos), 1e-4
    )
    assert not torch.equal(student_rollouts.tokens[:, :4], teacher_rollouts.tokens[:, :4])


def test_engines_are_refused_by_name(pair) -> None:
    with pytest.raises(
        ValueError, match="unknown rollout engine 'sglang'; known: hf, vllm, servers"
    ):
        make_engine("sglang", pair.student)
