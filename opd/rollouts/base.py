"""What every rollout engine shares: its protocol, and a process's slice of a batch."""

from dataclasses import dataclass
from typing import Protocol

import torch

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.models.model import CausalLM


@dataclass(frozen=True)
class BatchSlice:
    """Which rows of a larger batch some rows are, so that they get the noise that they have in it.

    rows: the number of each in the whole; of: rows of the whole.
    """

    rows: list[int]
    of: int


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
        share: BatchSlice | None = None,
    ) -> Rollouts:
        """Rollouts that depend on the prompts, the weights and `generator` alone.

        share: these rows of a larger batch, each as it is there.
        """
        ...

    def sync(self, model: CausalLM) -> None:
        """Sample from this model's present weights from now on."""
        ...

    def close(self) -> None:
        """Free what the engine holds beside the student; it samples no more."""
        ...
