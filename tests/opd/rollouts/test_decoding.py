"""Decoding in a shrinking batch: every architecture, the work that is done, and dead weights."""

import pytest
import torch

from diagnostics.errors import InvalidInput
from opd.data.prompts import Prompts
from opd.models.model import CausalLM, split_head
from opd.rollouts.decoding import can_select_rows, prefill
from opd.rollouts.hf_engine import sample
from tests.helpers.architectures import ARCHITECTURES, random_network
from tests.opd.rollouts.reference_sampling import (
    TEMPERATURE,
    TOP_P,
    assert_matches_forward_pass,
    seeded,
)

EOS = list(range(2, 61, 6))
RECURRENT = {"Mamba"}


def prompts_of_lengths(lengths: list[int], rows_each: int) -> Prompts:
    ids = [torch.randint(1, 60, (n,), generator=seeded(n)).tolist() for n in lengths]
    index = torch.arange(len(ids)).repeat_interleave(rows_each)
    return Prompts.from_ids([ids[i] for i in index], index)


def sample_all(model: CausalLM, prompts: Prompts, max_response: int = 20, **changes: int):
    options = {"temperature": TEMPERATURE, "top_p": TOP_P, "cache": "dynamic"} | changes
    return sample(model, prompts, EOS, max_response=max_response, generator=seeded(0), **options)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_samples_from_its_forward_pass(name: str) -> None:
    """Rows leave the batch at different times; prompts of three lengths, one token among them."""
    model = split_head(random_network(name), 61)
    prompts = prompts_of_lengths([7, 1, 12], 4)
    assert can_select_rows(model.network) == (name not in RECURRENT)
    batch = sample_all(model, prompts)
    assert len(set(batch.mask.sum(1).tolist())) > 2
    assert_matches_forward_pass(batch, model.network, prompts, model.vocabulary, TOP_P)


def test_equal_prompts_in_any_order_share_their_prefill() -> None:
    """Each row has the logits of its own prompt, alone and without padding."""
    network = random_network("Llama")
    distinct = [[9, 4, 7], [3, 8], [5, 4, 7]]
    rows = [distinct[i] for i in (0, 2, 1, 0, 2)]
    prompts = Prompts.from_ids(rows, torch.arange(5))
    with torch.no_grad():
        logits, cache = prefill(network, prompts.tokens, prompts.mask)
        for row, ids in enumerate(rows):
            expected = network(input_ids=torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
    assert len(cache.layers[0].keys) == 5


def test_ended_rows_leave_the_batch_and_prompts_are_run_once() -> None:
    model = split_head(random_network("Llama"), 61)
    prompts = prompts_of_lengths([7, 5, 12, 3], 8)
    sizes: list[tuple[int, ...]] = []
    hook = model.network.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    batch = sample_all(model, prompts, max_response=40)
    hook.remove()
    lengths = batch.mask.sum(1)
    assert sizes[0] == (4, 12), "each of the four prompts is run once"
    assert len(sizes) == int(lengths.max())
    for step, (rows, width) in enumerate(sizes[1:], 1):
        live = int((lengths > step).sum())
        assert width == 1
        assert live <= rows < live / (1 - 0.125) + 1, "an eighth of the rows may have ended"


def test_a_shrinking_batch_keeps_each_row_with_its_own_noise() -> None:
    model = split_head(random_network("Qwen2"), 61)
    prompts = prompts_of_lengths([7, 5, 12, 3], 3)
    together = sample_all(model, prompts)
    alone = sample_all(model, prompts, generation_batch_size=1)
    assert torch.equal(together.tokens, alone.tokens)
    for name in ("sampler_logp", "softmax_logp"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), atol=1e-5, rtol=0)


def test_dead_weights_are_named_at_the_token_where_they_appear() -> None:
    network = random_network("Llama")
    model = split_head(network, 61)
    prompts = prompts_of_lengths([7, 5], 4)
    calls: list[int] = []

    def kill(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            network.get_output_embeddings().weight.data.fill_(torch.nan)

    hook = network.register_forward_pre_hook(kill)
    with pytest.raises(InvalidInput, match="not finite from response token 3 on"):
        sample_all(model, prompts)
    hook.remove()
