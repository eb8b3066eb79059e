"""Models that cannot decode with a static cache are found out and sample with the dynamic one."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import StaticCache

from opd.data.prompts import Prompts
from opd.models.model import CausalLM, split_head
from opd.rollouts.hf_engine import sample
from opd.rollouts.static_cache import (
    NUM_TOKENS,
    PROMPT_LENGTH,
    probe_length,
    relative_difference,
    static_cache_problem,
)
from tests.opd.rollouts.reference_sampling import (
    TEMPERATURE,
    assert_matches_forward_pass,
    seeded,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
}
FALCON = {"alibi": True, "new_decoder_architecture": False}
ALIBI_PROBLEM = "ValueError: too many values to unpack"


def model(name: str, **changes: object) -> CausalLM:
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config).eval()
    return split_head(network, 61)


def prompts() -> Prompts:
    generator = seeded(1)
    ids = [torch.randint(1, 61, (n,), generator=generator).tolist() for n in (9, 3, 6)]
    return Prompts.from_ids(ids, torch.arange(3))


def rollouts(student: CausalLM, cache: str, top_p: float = 0.9) -> Any:
    return sample(
        student,
        prompts(),
        [0],
        max_response=12,
        temperature=TEMPERATURE,
        top_p=top_p,
        generator=seeded(0),
        cache=cache,
    )


def assert_same(a: Any, b: Any) -> None:
    assert torch.equal(a.tokens, b.tokens)
    torch.testing.assert_close(a.sampler_logp, b.sampler_logp, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": 8}),
        ("Gemma2", {"head_dim": 16, "sliding_window": 40}),
        ("Falcon", {"alibi": False}),
        ("Bloom", {"n_layer": 2, "n_head": 2}),
    ],
)
def test_models_whose_caches_agree_sample_with_the_static_one(name: str, changes: dict) -> None:
    student = model(name, **changes)
    assert relative_difference(student) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = rollouts(student, "static")
    assert_same(batch, rollouts(student, "dynamic"))
    assert_matches_forward_pass(batch, student.network, prompts(), 61, 0.9)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("Falcon", FALCON, ALIBI_PROBLEM),
        ("Mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2}, "transformers does not compile"),
    ],
)
def test_models_that_cannot_fall_back_with_one_warning(
    name: str, changes: dict, problem: str
) -> None:
    student = model(name, **changes)
    assert problem in str(static_cache_problem(student))
    with pytest.warns(UserWarning, match=f"{name}ForCausalLM cannot .*{problem}.* dynamic cache"):
        batch = rollouts(student, "static")
    assert_same(batch, rollouts(student, "dynamic"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(rollouts(student, "static"), batch)


@pytest.mark.parametrize(
    ("changes", "crosses"),
    [
        ({"sliding_window": 40}, 40),
        ({"sliding_window": 8}, None),
        ({"sliding_window": None}, None),
        ({"sliding_window": 10_000}, None),
        ({"sliding_window": 60, "max_position_embeddings": 50}, None),
        ({"sliding_window": None, "max_position_embeddings": 20}, None),
        ({"sliding_window": None, "max_position_embeddings": 4}, None),
    ],
)
def test_the_compared_tokens_cross_the_window_and_fit_the_context(
    changes: dict, crosses: int | None
) -> None:
    student = model("Mistral", **changes)
    length, longest = probe_length(student.network), student.network.config.max_position_embeddings
    assert length >= 1
    assert length + NUM_TOKENS <= max(longest, 1 + NUM_TOKENS)
    if crosses is not None:
        assert length < crosses < length + NUM_TOKENS
    elif longest == 128:
        assert length == PROMPT_LENGTH


def test_logits_that_are_no_numbers_do_not_agree() -> None:
    student = model("Qwen2")
    student.head.weight.data.fill_(torch.nan)
    assert "its logits differ" in str(static_cache_problem(student))


def with_hook(student: CausalLM, change: Any) -> CausalLM:
    """Let `change` edit the decoder's keyword arguments where its cache is static."""

    def hook(_: Any, arguments: Any, keywords: dict) -> Any:
        if isinstance(keywords["past_key_values"], StaticCache):
            change(keywords)
        return arguments, keywords

    student.network.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    return student


def test_wrong_numbers_are_found_without_an_error() -> None:
    """Attention to the padding is what a static cache with a wrong mask would do."""

    def attend_to_padding(keywords: dict) -> None:
        keywords["attention_mask"] = None

    student = with_hook(model("Qwen2"), attend_to_padding)
    difference = relative_difference(student)
    assert difference > 0.05
    flat = with_hook(model("Qwen2"), attend_to_padding)
    flat.head.weight.data /= 128  # the same difference, relative to flatter logits
    assert relative_difference(flat) == pytest.approx(difference, rel=1e-3)
    with pytest.warns(UserWarning, match="its logits differ from those with the dynamic cache"):
        batch = rollouts(student, "static")
    assert_same(batch, rollouts(student, "dynamic"))


def test_a_late_failure_is_sampled_again_with_the_same_noise() -> None:
    """What cannot be compiled fails only in the first real call, after the comparison."""

    def fail(keywords: dict) -> None:
        if len(keywords["input_ids"]) > 2:
            raise RuntimeError("no C compiler\nsecond line")

    student = with_hook(model("Qwen2"), fail)
    assert static_cache_problem(student) is None
    with pytest.warns(UserWarning, match=r"RuntimeError: no C compiler\. It samples"):
        batch = rollouts(student, "static")
    assert_same(batch, rollouts(student, "dynamic"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(rollouts(student, "static"), batch)


def test_what_is_no_fault_of_the_cache_is_raised() -> None:
    def exhaust(_: dict) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        rollouts(with_hook(model("Qwen2"), exhaust), "static")
    diverged = model("Qwen2")
    rollouts(diverged, "static")  # compares the caches
    diverged.network.get_input_embeddings().weight.data.fill_(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="logits are not finite"):
            rollouts(diverged, "static")
