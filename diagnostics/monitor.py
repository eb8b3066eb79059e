"""The monitor: a panel of metrics over the micro-batches of a step, read out once.

Works on anyone's run: hand it `Scored` micro-batches and write the returned row wherever you log.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from diagnostics.access import Missing
from diagnostics.batch import Scored
from diagnostics.collapse import length, reward
from diagnostics.drift import (
    exact_divergence,
    sampled_divergence,
    support_mass,
    teacher_rank,
    tokens_by_position,
    uncertainty,
)
from diagnostics.repetition import repetition
from diagnostics.supervision import (
    energy_concentration,
    sign_null,
    sign_shares,
    signal_concentration,
)
from diagnostics.totals import Mean, Total, merge, read
from diagnostics.validity import martingales, sampler_ratio

Metric = Callable[[Scored], dict[str, Total]]

PANEL: Mapping[str, Metric] = {
    "sign_shares": sign_shares,
    "sign_null": sign_null,
    "signal_concentration": signal_concentration,
    "energy_concentration": energy_concentration,
    "repetition": repetition,
    "sampled_divergence": sampled_divergence,
    "exact_divergence": exact_divergence,
    "teacher_rank": teacher_rank,
    "support_mass": support_mass,
    "uncertainty": uncertainty,
    "tokens_by_position": tokens_by_position,
    "length": length,
    "reward": reward,
    "martingales": martingales,
    "sampler_ratio": sampler_ratio,
}


class Monitor:
    """Computes a panel on every `every`-th step. It observes and never changes a batch.

    missing: metric name to what it lacked, for each metric of the panel that some batch so far
      could not supply; those metrics are absent from the rows.
    """

    def __init__(self, panel: Mapping[str, Metric] = PANEL, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, expected a positive number of steps")
        self.panel = dict(panel)
        self.every = every
        self.missing: dict[str, str] = {}

    def __call__(
        self, step: int, micro_batches: Iterable[Scored], **numbers: float | Tensor
    ) -> dict[str, float]:
        """The row of this step: every value of the panel, its "_se", and `numbers` as they are.

        One host sync, which 0-d tensors among `numbers` share. On a step that is not due, the
        micro-batches are not touched and the row holds `numbers` alone.

        Raises:
          ValueError: the micro-batches of one step do not hold the same optional parts.
        """
        totals: dict[str, Total] = {}
        if step % self.every == 0:
            parts = (self.measure(batch) for batch in micro_batches)
            totals = reduce(merge, parts, next(parts, {}))
        waiting = {name: x for name, x in numbers.items() if isinstance(x, Tensor)}
        known = {name: float(x) for name, x in numbers.items() if name not in waiting}
        as_totals = {name: Mean(x, torch.ones_like(x)) for name, x in waiting.items()}
        return known | read({**totals, **as_totals})

    def measure(self, batch: Scored) -> dict[str, Total]:
        """Totals of one micro-batch, to be merged; nothing leaves the device."""
        found: dict[str, Total] = {}
        with torch.no_grad():
            for name, metric in self.panel.items():
                try:
                    found |= metric(batch)
                except Missing as lack:
                    self.missing.setdefault(name, str(lack))
        return found
