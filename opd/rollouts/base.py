"""The interface of rollout engines, and the slice of a batch that one process samples."""

from dataclasses import dataclass
from typing import Protocol

import torch

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.models.model import CausalLM


@dataclass(frozen=True)
class BatchSlice:
    """Rows of a larger batch; each row gets the same noise as when the whole batch is sampled."""

    rows: list[int]
    """Index of each row in the whole batch."""
    total_rows: int
    """Number of rows of the whole batch."""


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
        batch_slice: BatchSlice | None = None,
    ) -> Rollouts:
        """Sample rollouts that depend only on the prompts, the weights and `generator`.

        Args:
            prompts: B encoded prompts.
            eos: Ids that end a response.
            max_response: Maximum response length in tokens.
            temperature: Softmax temperature.
            top_p: Probability mass of the nucleus.
            generator: Source of the noise.
            batch_slice: The rows of a larger batch that `prompts` are; each is sampled as in that
                batch. None: `prompts` are the whole batch.

        Returns:
            One response per prompt row, in order.
        """
        ...

    def sync(self, model: CausalLM) -> None:
        """Sample from this model's current weights from now on."""
        ...

    def close(self) -> None:
        """Free the engine's own resources; `sample` must not be called afterwards."""
        ...
