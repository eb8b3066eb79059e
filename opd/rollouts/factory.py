"""Rollout engines: what turns prompts into rollouts of the current student.

An engine holds a copy of, or a reference to, the student's weights. The trainer calls `sync` after
each update and `sample` before the next.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.data.tasks import Prompts
from opd.models.model import Model
from opd.rollouts.hf_engine import ROWS_AT_ONCE, Share, sample


class Engine(Protocol):
    """Samples one response to each prompt row, in order; several rows may share a prompt."""

    def sample(
        self,
        prompts: Prompts,
        eos: list[int],
        *,
        max_response: int,
        temperature: float,
        top_p: float,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> Rollouts:
        """Rollouts that depend on the prompts, the weights and `generator` alone.

        share: these rows of a larger batch, each as it is there.
        """
        ...

    def sync(self, model: Model) -> None:
        """Sample from this model's present weights from now on."""
        ...

    def close(self) -> None:
        """Free what the engine holds beside the student; it samples no more."""
        ...


class InProcess:
    """`opd.rollouts.hf_engine.sample` as an engine; it samples from the student itself, nothing is copied.

    rows_at_once: rows of one `generate` call; their key-value cache has to fit.
    """

    def __init__(self, model: Model, *, rows_at_once: int = ROWS_AT_ONCE) -> None:
        self.model, self.rows_at_once = model, rows_at_once

    def sample(self, prompts: Prompts, eos: list[int], **settings: Any) -> Rollouts:
        return sample(self.model, prompts, eos, rows_at_once=self.rows_at_once, **settings)

    def sync(self, model: Model) -> None:
        self.model = model

    def close(self) -> None:
        pass


def _vllm(model: Model, **settings: Any) -> Engine:
    from opd.rollouts.vllm_engine import Vllm

    return Vllm(model, **settings)


def _servers(model: Model, **settings: Any) -> Engine:
    from opd.rollouts.vllm_server_engine import Servers

    return Servers(model, **settings)


ENGINES: dict[str, Callable[..., Engine]] = {"hf": InProcess, "vllm": _vllm, "servers": _servers}


def make_engine(name: str, model: Model, **settings: Any) -> Engine:
    """The engine of that name, loaded with the model's weights.

    Args:
      name: "hf", in this process; "vllm", colocated (`pip install 'opdlab[vllm]'`); or "servers",
        vLLM servers elsewhere.
      settings: of the engine's constructor: `InProcess`, `opd.rollouts.vllm_engine.Vllm` or
        `opd.rollouts.vllm_server_engine.Servers`.

    Raises:
      ValueError: unknown name. ImportError: vLLM is not installed.
    """
    if name not in ENGINES:
        raise InvalidInput(f"unknown rollout engine {name!r}; known: {', '.join(ENGINES)}")
    return ENGINES[name](model, **settings)
