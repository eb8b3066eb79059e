"""Rollouts in process: Hugging Face `generate` runs the model, we draw the tokens.

Shapes: B responses, T response positions, P prompt positions, V vocabulary that the pair shares.

Every token is drawn by inversion from one uniform number of its own, so a response depends on its
prompt, the weights and its row of a (B, T) table of noise that is drawn from the caller's
generator before the model runs. It does not depend on the rows beside it, on their order, on
`rows_at_once` or on the cache, up to the rounding of the model's arithmetic; and no global random
state is read or written.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.data.tasks import Prompts
from opd.models.model import Model, bare

ROWS_AT_ONCE = 256
# On CUDA every new (rows, cache length) is compiled anew: round both, so that few occur in a run.
ROW_BUCKET, WIDTH_BUCKET = 16, 64
# A text model's nucleus is nearly always within so many ids; selecting them is cheaper than a sort.
LIKELY_IDS = 1024


@dataclass(frozen=True)
class Share:
    """Which rows of a larger batch some rows are, so that they get the noise that they have in it.

    rows: the number of each in the whole; of: rows of the whole.
    """

    rows: list[int]
    of: int


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
    share: Share | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
    cache: str | None = None,
) -> Rollouts:
    """One response to every row of `prompts`, in their order.

    Tokens are drawn from softmax(logits / temperature) cut to its top-p nucleus, nothing else: the
    model's own generation settings (top-k, repetition penalty, ...) do not take part. Greedy
    decoding is the limit of a small nucleus: `top_p=1e-9`.

    Args:
      eos: ids that end a response; the one drawn belongs to it.
      max_response: budget T of a response, in tokens.
      generator: source of the (B, T) noise; B x T float64 numbers are taken from it, always.
      share: these rows among the B of a whole batch; None: they are all of it.
      rows_at_once: rows of one `generate` call. Rows of similar prompt length run together, and a
        call stops when all its rows have ended.
      cache: "static" (compiled on CUDA), "dynamic", or None: static on CUDA where the model allows.

    Raises:
      ValueError: logits are not finite, or a setting is out of range.
      torch.OutOfMemoryError: with the rows and positions that did not fit.
    """
    for name, size in (("max_response", max_response), ("rows_at_once", rows_at_once)):
        if size < 1:
            raise InvalidInput(f"{name} is {size}, expected at least 1")
    if not (temperature > 0 and 0 < top_p <= 1):
        raise InvalidInput(
            f"temperature is {temperature} and top_p {top_p}; expected above 0, and in (0, 1]; "
            "for greedy decoding set top_p=1e-9"
        )
    kind = cache or default_cache(model)
    if kind not in ("static", "dynamic"):
        raise InvalidInput(f"unknown cache {kind!r}; known: static, dynamic")
    noise = torch.rand(
        len(prompts) if share is None else share.of,
        max_response,
        generator=generator,
        device=generator.device,
        dtype=torch.float64,
    )
    noise = noise if share is None else noise[share.rows]
    parts, order = [], []
    with plain_generation(model.network), evaluating(model.network):
        for rows in batches(prompts, rows_at_once):
            sampler = Sampler(model.vocabulary, temperature, top_p, noise[rows].to(model.device))
            some = prompts.rows(rows)
            parts.append(respond(model, some, eos, sampler, static=kind == "static"))
            order += rows
    columns: dict[str, Any] = joined(parts, torch.tensor(order).argsort().to(model.device))
    return Rollouts(
        **columns, prompt=prompts.index.to(model.device), temperature=temperature, top_p=top_p
    )


class Sampler:
    """A logits processor that draws each token itself and keeps both of its log-probabilities.

    Cuts the logits to the shared vocabulary, applies temperature and top-p, draws, and leaves one
    finite score a row, so that `generate`'s argmax takes the token that was drawn.

    `sampler_logp` is under the distribution that was drawn from; `softmax_logp` is the same
    token's under the whole softmax(logits / temperature). They differ by the log of the nucleus's
    mass. noise: (B, T) uniform float64 in [0, 1), one number for each token.
    """

    def __init__(self, vocabulary: int, temperature: float, top_p: float, noise: Tensor) -> None:
        self.vocabulary, self.temperature, self.top_p = vocabulary, temperature, top_p
        self.noise = noise
        self.sampler_logp: list[Tensor] = []
        self.softmax_logp: list[Tensor] = []
        self.finite: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = len(self.noise)  # any further ones only fill a bucket
        logits = scores[:rows, : self.vocabulary].float()
        # NaN has no distribution: draw from anything, refuse after the rollout, without a sync here
        finite = logits.amax(1).isfinite()
        self.finite.append(finite.all())
        logits = torch.where(finite[:, None], logits, torch.zeros_like(logits))
        whole = (logits / self.temperature).log_softmax(-1)
        kept = whole if self.top_p >= 1 else nucleus(whole, self.top_p)
        token = draw(kept, self.noise[:, len(self.sampler_logp)])[:, None]
        self.sampler_logp.append(kept.gather(1, token)[:, 0])
        self.softmax_logp.append(whole.gather(1, token)[:, 0])
        chosen = torch.full_like(scores, -torch.inf)
        chosen[rows:, 0] = 0.0
        chosen[:rows].scatter_(1, token, 0.0)
        return chosen

    def check(self) -> None:
        """Raises ValueError: logits were NaN, or all of them infinite, at some token."""
        finite = torch.stack(self.finite)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0, 0])
            raise InvalidInput(
                f"the student's logits are not finite from response token {first} on; its weights "
                "have diverged: go back to a checkpoint and lower the learning rate"
            )


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Log-probabilities restricted to the smallest set of ids with mass >= top_p, renormalised.

    (B, V) -> (B, V), -inf outside. The id that crosses the threshold is kept, so the set is never
    empty. Sorts whole rows only where some row's most probable ids do not reach the mass.
    """
    logp = logits.log_softmax(-1)
    if top_p >= 1:
        return logp
    ordered, order = logp.topk(min(LIKELY_IDS, logp.shape[-1]))
    if not bool((ordered.exp().sum(-1) >= top_p).all()):
        ordered, order = logp.sort(-1, descending=True)
    keep = ordered.exp().cumsum(-1) - ordered.exp() < top_p
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, order, keep)
    return logp.masked_fill(~inside, -torch.inf).log_softmax(-1)


def draw(logp: Tensor, noise: Tensor) -> Tensor:
    """(B,) ids drawn by inversion: the first id whose cumulative probability exceeds the noise.

    logp: (B, V) normalised, -inf where the probability is 0; noise: (B,) float64 in [0, 1). The
    cumulative sums are float64, so an id's frequency errs by the float32 rounding of its own
    probability only. An id of probability 0 is never drawn.
    """
    mass = logp.exp().cumsum(-1, dtype=torch.float64)
    # noise is at most 1 - 2^-53, so the product stays below the total, which is about 1
    return torch.searchsorted(mass, noise[:, None] * mass[:, -1:], right=True)[:, 0]


def batches(prompts: Prompts, rows_at_once: int) -> list[list[int]]:
    """Row numbers in groups of at most `rows_at_once`, nearly equal, by rising prompt length."""
    lengths = prompts.mask.sum(1).tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = math.ceil(len(order) / math.ceil(len(order) / rows_at_once))
    return [order[i : i + size] for i in range(0, len(order), size)]


def respond(
    model: Model, prompts: Prompts, eos: list[int], sampler: Sampler, *, static: bool
) -> dict[str, Tensor]:
    """The columns of `Rollouts` for one `generate` call; a static cache gets padded shapes."""
    from transformers import GenerationConfig

    rows, budget = sampler.noise.shape
    ids, real = prompts.tokens, prompts.mask
    if static:
        ids, real = bucketed(ids, real)
    settings = GenerationConfig(
        do_sample=False,  # argmax of what the sampler leaves
        max_new_tokens=budget,
        eos_token_id=eos,
        pad_token_id=eos[0],
        cache_implementation="static" if static else None,
    )
    try:
        out = bare(model.network).generate(
            inputs=ids.to(model.device),
            attention_mask=real.long().to(model.device),
            generation_config=settings,
            logits_processor=[sampler],
            stopping_criteria=[lambda x, _: torch.arange(len(x), device=x.device) >= rows],
            synced_gpus=False,  # every process has the whole weights, and its own number of calls
        )
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"no memory to sample {len(ids)} rows of {ids.shape[1]} prompt and {budget} response "
            f"tokens at once; set rows_at_once below {rows}"
        ) from error
    sampler.check()
    response = out[:rows, ids.shape[1] :]
    mask, ended = until_end(response, eos)
    columns = {"tokens": torch.where(mask, response, 0), "mask": mask, "ended": ended}
    for name in ("sampler_logp", "softmax_logp"):
        logp = torch.stack(getattr(sampler, name)[: response.shape[1]], 1)
        columns[name] = torch.where(mask, logp, 0.0)
    return columns


def bucketed(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P) prompts with rows (copies of the last) and padding on the left up to full buckets."""
    count, width = tokens.shape
    rows = list(range(count)) + [count - 1] * (-count % ROW_BUCKET)
    left = (-width % WIDTH_BUCKET, 0)
    pad = torch.nn.functional.pad
    return pad(tokens, left)[rows], pad(mask, left)[rows]


def joined(parts: list[dict[str, Tensor]], order: Tensor) -> dict[str, Tensor]:
    """Columns of all parts, padded on the right with zeros to the longest, rows in `order`."""
    width = max(part["tokens"].shape[1] for part in parts)

    def pad(x: Tensor) -> Tensor:
        return x if x.dim() == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1]))

    return {name: torch.cat([pad(part[name]) for part in parts])[order] for name in parts[0]}


def until_end(response: Tensor, eos: list[int]) -> tuple[Tensor, Tensor]:
    """(B, T) mask of the tokens up to and with the first end token, and (B,) if there is one."""
    stop = torch.isin(response, torch.tensor(eos, device=response.device))
    earlier = stop.long().cumsum(1) - stop.long()
    return earlier == 0, stop.any(1)


def default_cache(model: Model) -> str:
    """Static on CUDA for models that say they can be compiled whole; else dynamic."""
    able = getattr(bare(model.network), "_can_compile_fullgraph", False)
    return "static" if model.device.type == "cuda" and able else "dynamic"


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Evaluation mode: no dropout, and a cache in spite of checkpointing; then as it was."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def plain_generation(network: Any) -> Iterator[None]:
    """Set the model's generation defaults aside: `generate` fills unset options from them."""
    from transformers import GenerationConfig

    owner = bare(network)
    saved = owner.generation_config
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = saved
