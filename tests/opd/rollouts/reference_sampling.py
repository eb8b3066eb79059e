"""Plain forward passes and nuclei that the tests of rollout engines compare with."""

import pytest
import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.models.model import CausalLM

TEMPERATURE, TOP_P = 0.7, 0.8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def next_logp(network, prompt: Tensor, response: Tensor, vocabulary: int) -> Tensor:
    """(T, V) log-probabilities of the response from one unpadded forward pass without a cache."""
    logits = network(torch.cat([prompt, response])[None], use_cache=False).logits[0]
    response_logits = logits[len(prompt) - 1 : -1, :vocabulary].double()
    return (response_logits / TEMPERATURE).log_softmax(-1)


def nucleus_ids(logp: Tensor, top_p: float) -> set[int]:
    """The smallest set of most probable ids with mass >= top_p, built one id at a time."""
    mass, ids = 0.0, set()
    for value, token in sorted(((x, i) for i, x in enumerate(logp.exp().tolist())), reverse=True):
        if mass >= top_p:
            break
        mass += value
        ids.add(token)
    return ids


def assert_matches_forward_pass(
    batch: Rollouts, network, prompts: Prompts, vocabulary: int, top_p: float, atol: float = 1e-4
) -> None:
    for row in range(len(batch)):
        prompt, response = prompts.tokens[row][prompts.mask[row]], batch.tokens[row]
        logp = next_logp(network, prompt, response[batch.mask[row]], vocabulary)
        for t, token_logp in enumerate(logp):
            token = int(response[t])
            kept_ids = nucleus_ids(token_logp, top_p)
            assert token in kept_ids
            mass = token_logp[list(kept_ids)].exp().sum().log()
            assert batch.sampler_logp[row, t] == pytest.approx(
                float(token_logp[token] - mass), abs=atol
            )
            if batch.softmax_logp is not None:
                assert batch.softmax_logp[row, t] == pytest.approx(
                    float(token_logp[token]), abs=atol
                )


def first_token_statistic(model: CausalLM, prompt: Prompts, tokens: Tensor) -> tuple[float, int]:
    """Pearson's chi-square of the first tokens of a prompt, and its degrees of freedom."""
    logp = next_logp(model.network, prompt.tokens[0], torch.tensor([0]), model.vocabulary)[0]
    ids = sorted(nucleus_ids(logp, TOP_P))
    assert 3 < len(ids) < 60
    counts = torch.bincount(tokens, minlength=model.vocabulary)
    assert counts.sum() == counts[ids].sum(), "a token outside the nucleus was sampled"
    expected_counts = len(tokens) * logp[ids].softmax(-1)
    return float(((counts[ids] - expected_counts).square() / expected_counts).sum()), len(ids) - 1


def with_lora_adapters(peft, network):
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return peft.get_peft_model(network, settings).eval()
