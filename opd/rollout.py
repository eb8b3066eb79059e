"""Rollouts: sample responses with Hugging Face `generate`, keeping what the sampler believed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from opd.data import Prompts
from opd.model import Model


class Sampler:
    """A logits processor that makes the sampled distribution and records it.

    Cuts the logits to the shared vocabulary, applies temperature and top-p, and keeps the
    log-probability of each token that was then drawn from exactly that distribution. Holds one
    (B, V) tensor: a token's log-probability is looked up when the next call shows the token.
    """

    def __init__(self, vocabulary: int, temperature: float, top_p: float) -> None:
        self.vocabulary, self.temperature, self.top_p = vocabulary, temperature, top_p
        self.pending: Tensor | None = None
        self.columns: list[Tensor] = []
        self.finite: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._settle(input_ids[:, -1])
        beyond = scores.shape[1] - self.vocabulary
        scores = scores[:, : self.vocabulary]
        # drawing from NaN would kill a CUDA context: draw from anything, refuse after the rollout
        finite = scores.amax(1).isfinite()
        self.finite.append(finite.all())
        scores = torch.where(finite[:, None], scores, torch.zeros_like(scores))
        self.pending = nucleus(scores / self.temperature, self.top_p)
        return torch.nn.functional.pad(self.pending, (0, beyond), value=-torch.inf)

    def _settle(self, token: Tensor) -> None:
        if self.pending is not None:
            inside = token.clamp(max=self.vocabulary - 1)
            self.columns.append(self.pending.gather(1, inside[:, None])[:, 0])

    def logp(self, response: Tensor) -> Tensor:
        """(B, T) of a finished response.

        Raises:
          ValueError: the model's logits were NaN, or all of them infinite, at some token.
        """
        finite = torch.stack(self.finite)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0, 0])
            raise ValueError(
                f"the student's logits are not finite from response token {first} on; its weights "
                "have diverged: go back to a checkpoint and lower the learning rate"
            )
        if len(self.columns) < response.shape[1]:
            self._settle(response[:, -1])
        return torch.stack(self.columns[: response.shape[1]], 1)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Log-probabilities restricted to the smallest set of ids with mass >= top_p, renormalised.

    (B, V) -> (B, V), -inf outside. The id that crosses the threshold is kept, so the set is never
    empty.
    """
    logp = logits.log_softmax(-1)
    if top_p >= 1:
        return logp
    ordered, order = logp.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = (before >= top_p).scatter(-1, order, before >= top_p)
    return logp.masked_fill(outside, -torch.inf).log_softmax(-1)


@torch.no_grad()
def sample(
    model: Model,
    prompts: Prompts,
    eos: list[int],
    *,
    max_response: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> Rollouts:
    """One response to every row of `prompts`.

    The model's own generation settings (top-k, repetition penalty, ...) do not take part: tokens
    are drawn from softmax(logits / temperature) cut to its top-p nucleus, nothing else.
    """
    from transformers import GenerationConfig

    network, device = model.network, model.device
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_response,
        eos_token_id=eos,
        pad_token_id=eos[0],
    )
    sampler = Sampler(model.vocabulary, temperature, top_p)
    with plain_generation(network), fenced(generator, device):
        out = network.generate(
            inputs=prompts.tokens.to(device),
            attention_mask=prompts.mask.long().to(device),
            generation_config=settings,
            logits_processor=[sampler],
        )
    response = out[:, prompts.tokens.shape[1] :]
    mask, ended = until_end(response, eos)
    logp = torch.where(mask, sampler.logp(response).float(), torch.zeros((), device=device))
    return Rollouts(
        tokens=torch.where(mask, response, torch.zeros_like(response)),
        mask=mask,
        sampler_logp=logp,
        prompt=prompts.index.to(device),
        ended=ended,
        temperature=temperature,
        top_p=top_p,
    )


def until_end(response: Tensor, eos: list[int]) -> tuple[Tensor, Tensor]:
    """(B, T) mask of the tokens up to and with the first end token, and (B,) if there is one."""
    stop = torch.isin(response, torch.tensor(eos, device=response.device))
    earlier = stop.long().cumsum(1) - stop.long()
    return earlier == 0, stop.any(1)


@contextmanager
def plain_generation(network: Any) -> Iterator[None]:
    """Set the model's generation defaults aside: `generate` fills unset options from them."""
    from transformers import GenerationConfig

    saved = network.generation_config
    network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = saved


@contextmanager
def fenced(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """`generate` draws from the global generator; seed it from ours here and put it back."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
