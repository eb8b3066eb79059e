"""Rollouts in process: Hugging Face `generate` runs the model, we draw the tokens.

Shapes: B responses, T response positions, P prompt positions, V vocabulary that the pair shares.

Every token is drawn by inversion from one uniform number of its own, so a response depends on its
prompt, the weights and its row of a (B, T) table of noise that is drawn from the caller's
generator before the model runs. It does not depend on the rows beside it, on their order, on
`generation_batch_size` or on the cache, up to the rounding of the model's arithmetic; and no global random
state is read or written.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.data.prompts import Prompts
from opd.models.contexts import evaluating
from opd.models.model import CausalLM, bare
from opd.rollouts.base import BatchSlice
from opd.rollouts.sampler import Sampler

ROWS_AT_ONCE = 256
# On CUDA every new (rows, cache length) is compiled anew: round both, so that few occur in a run.
ROW_BUCKET, WIDTH_BUCKET = 16, 64


@torch.no_grad()
def sample(
    model: CausalLM,
    prompts: Prompts,
    eos: list[int],
    *,
    max_response: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    share: BatchSlice | None = None,
    generation_batch_size: int = ROWS_AT_ONCE,
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
      generation_batch_size: rows of one `generate` call. Rows of similar prompt length run together, and a
        call stops when all its rows have ended.
      cache: "static" (compiled on CUDA), "dynamic", or None: static on CUDA where the model allows.

    Raises:
      ValueError: logits are not finite, or a setting is out of range.
      torch.OutOfMemoryError: with the rows and positions that did not fit.
    """
    for name, size in (
        ("max_response", max_response),
        ("generation_batch_size", generation_batch_size),
    ):
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
        for rows in batches(prompts, generation_batch_size):
            sampler = Sampler(model.vocabulary, temperature, top_p, noise[rows].to(model.device))
            some = prompts.rows(rows)
            parts.append(respond(model, some, eos, sampler, static=kind == "static"))
            order += rows
    columns: dict[str, Any] = joined(parts, torch.tensor(order).argsort().to(model.device))
    return Rollouts(
        **columns, prompt=prompts.index.to(model.device), temperature=temperature, top_p=top_p
    )


def batches(prompts: Prompts, generation_batch_size: int) -> list[list[int]]:
    """Row numbers in groups of at most `generation_batch_size`, nearly equal, by rising prompt length."""
    lengths = prompts.mask.sum(1).tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = math.ceil(len(order) / math.ceil(len(order) / generation_batch_size))
    return [order[i : i + size] for i in range(0, len(order), size)]


def respond(
    model: CausalLM, prompts: Prompts, eos: list[int], sampler: Sampler, *, static: bool
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
            f"tokens at once; set generation_batch_size below {rows}"
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


def default_cache(model: CausalLM) -> str:
    """Static on CUDA for models that say they can be compiled whole; else dynamic."""
    able = getattr(bare(model.network), "_can_compile_fullgraph", False)
    return "static" if model.device.type == "cuda" and able else "dynamic"


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


class HfEngine:
    """`opd.rollouts.hf_engine.sample` as an engine; it samples from the student itself, nothing is copied.

    generation_batch_size: rows of one `generate` call; their key-value cache has to fit.
    """

    def __init__(self, model: CausalLM, *, generation_batch_size: int = ROWS_AT_ONCE) -> None:
        self.model, self.generation_batch_size = model, generation_batch_size

    def sample(self, prompts: Prompts, eos: list[int], **settings: Any) -> Rollouts:
        return sample(
            self.model, prompts, eos, generation_batch_size=self.generation_batch_size, **settings
        )

    def sync(self, model: CausalLM) -> None:
        self.model = model

    def close(self) -> None:
        pass
