"""The monitor: computes a panel of metrics over the micro-batches of a step.

Works with any trainer: pass `ScoredRollouts` micro-batches and log the returned row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from diagnostics.alarms.alarms import Alarm, Alarms
from diagnostics.batch import ScoredRollouts
from diagnostics.catalogue import PANEL, Metric
from diagnostics.core.optional_fields import MissingField
from diagnostics.core.totals import (
    Accumulator,
    compute,
    means_without_error,
    merge,
    pack,
    sum_rows,
    unpack,
)
from diagnostics.errors import InvalidInput
from diagnostics.records.sinks import Rewindable, Sink

Combine = Callable[[Mapping[str, Accumulator]], Mapping[str, Accumulator]]


class Monitor:
    """Computes metrics on the steps where they are due. It never changes a batch.

    Args:
        panel: Metric name to metric.
        interval: Steps between computations of a metric, one number for all or one per metric name
            (1 for absent names).
        sinks: Each is called with (step, row) after the row was computed
            (`diagnostics.records.sinks`).
        alarms: Rules that are applied to every row (`diagnostics.alarms.alarms`); the alarms of the
            latest row are in `raised`.
        combine: Applied to the accumulators of a step before values are computed:
            `all_reduce_totals` under torch.distributed, nothing by default.

    Attributes:
        missing: Metric name to the missing field, for each metric of the panel that some batch so
            far could not supply; those metrics are absent from the rows.
        totals: The accumulators of the latest row, to be merged with those of other steps.
    """

    def __init__(
        self,
        panel: Mapping[str, Metric] = PANEL,
        interval: int | Mapping[str, int] = 1,
        sinks: Sequence[Sink] = (),
        alarms: Alarms | None = None,
        combine: Combine = dict,
    ) -> None:
        self.panel = dict(panel)
        intervals = interval if isinstance(interval, Mapping) else dict.fromkeys(panel, interval)
        if unknown := sorted(intervals.keys() - panel.keys()):
            raise InvalidInput(f"interval names {unknown}, which are not in the panel {[*panel]}")
        if invalid := {name: n for name, n in intervals.items() if n < 1}:
            raise InvalidInput(f"interval is {invalid}, expected a positive number of steps")
        self.interval = dict.fromkeys(panel, 1) | dict(intervals)
        self.sinks, self.alarms, self.combine = list(sinks), alarms, combine
        self.raised: list[Alarm] = []
        self.missing: dict[str, str] = {}
        self.totals: Mapping[str, Accumulator] = {}

    def __call__(
        self, step: int, micro_batches: Iterable[ScoredRollouts], **numbers: float | Tensor
    ) -> dict[str, float]:
        """Return the row of this step: every value that is due, its "_se", and `numbers` unchanged.

        One host sync, which includes the 0-d tensors among `numbers`. Under torch.distributed these
        tensors are averaged over ranks; plain numbers are those of this rank. On a step where
        nothing is due the micro-batches are not consumed and the row holds `numbers` alone.

        Args:
            step: Number of the step.
            micro_batches: The batches of the step.
            **numbers: Further values of the row.

        Returns:
            The row.

        Raises:
            InvalidInput: The micro-batches of one step, or the ranks, do not hold the same parts;
                two metrics, or a metric and a number, have the same name.
        """
        due_metrics = [name for name, n in self.interval.items() if step % n == 0]
        totals: dict[str, Accumulator] = {}
        if due_metrics:
            parts = (self.measure(batch, due_metrics) for batch in micro_batches)
            totals = reduce(merge, parts, next(parts, {}))
        tensor_numbers = {name: x for name, x in numbers.items() if isinstance(x, Tensor)}
        host_numbers = {name: float(x) for name, x in numbers.items() if name not in tensor_numbers}
        self.totals = self.combine({**totals, **means_without_error(tensor_numbers)})
        metric_values = compute(self.totals)
        if clashing_names := sorted(
            host_numbers.keys() & metric_values.keys() | tensor_numbers.keys() & totals.keys()
        ):
            raise InvalidInput(
                f"{', '.join(clashing_names)}: names of metrics; rename these numbers"
            )
        row = host_numbers | metric_values
        self.raised = self.alarms.update({"step": step, **row}) if self.alarms else []
        for sink in self.sinks:
            sink(step, row)
        return row

    def measure(
        self, batch: ScoredRollouts, names: Iterable[str] | None = None
    ) -> dict[str, Accumulator]:
        """Return the accumulators of one micro-batch, to be merged. Nothing leaves the device.

        Args:
            batch: The micro-batch.
            names: Names of metrics; all metrics if None.

        Returns:
            Accumulators by name.

        Raises:
            InvalidInput: Two metrics return an accumulator of the same name.
        """
        totals: dict[str, Accumulator] = {}
        source: dict[str, str] = {}
        with torch.no_grad():
            for name in self.panel if names is None else names:
                try:
                    metric_totals = self.panel[name](batch)
                except MissingField as error:
                    self.missing.setdefault(name, str(error))
                    continue
                if duplicates := sorted(source.keys() & metric_totals.keys()):
                    raise InvalidInput(
                        f"the metrics {source[duplicates[0]]!r} and {name!r} both return "
                        f"{', '.join(duplicates)}; keep one of them in the panel"
                    )
                source |= dict.fromkeys(metric_totals, name)
                totals |= metric_totals
            sum_rows(totals.values())
        return totals

    def rewind(self, step: int) -> None:
        """Tell every sink that has a method `rewind` that the run continues after this step.

        Args:
            step: The last step whose row is kept; 0 at the beginning of a run.
        """
        for sink in self.sinks:
            if isinstance(sink, Rewindable):
                sink.rewind(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serialisable state for a checkpoint: `missing` and the alarms' state."""
        alarms = None if self.alarms is None else self.alarms.state_dict()
        return {"missing": dict(self.missing), "alarms": alarms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`. A monitor without alarms ignores the alarms' state."""
        self.missing = dict(state["missing"])
        if self.alarms is not None and state["alarms"] is not None:
            self.alarms.load_state_dict(state["alarms"])


@dataclass(frozen=True, eq=False)
class _LayoutCheck(Accumulator):
    """Hash of the accumulators of a rank; `compute` raises if ranks brought different ones."""

    count: Tensor
    total: Tensor
    square: Tensor

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        count, total, square = (float(x) for x in sums)
        if count * square != total**2:
            raise InvalidInput(
                f"the {count:.0f} ranks have different accumulators, which cannot be summed; "
                "give all ranks micro-batches with the same optional fields on every step"
            )
        return {}


def all_reduce_totals(totals: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
    """Sum the accumulators over all ranks of the default process group, in one all-reduce.

    Values are those of one process that saw the micro-batches of all ranks. So are standard errors
    if all rollouts of a prompt are on one rank (`diagnostics.core.totals`). Every rank must call
    this, and every rank gets the result. The vector is padded to a multiple of 2^17 sums (1 MiB),
    so that ranks with different accumulators still meet in one all-reduce; `compute` then raises
    InvalidInput, without a further sync.

    Args:
        totals: The accumulators of this rank.

    Returns:
        The accumulators of all ranks.
    """
    import torch.distributed as distributed

    kinds = [(name, type(x).__name__, [t.shape for t in x.tensors()]) for name, x in totals.items()]
    layout_hash = crc32(repr(kinds).encode()) % 2**20  # small enough that sums of squares are exact
    device = pack(totals).device
    sums = (1, layout_hash, layout_hash**2)
    layout = _LayoutCheck(*(torch.full((), x, dtype=torch.float64, device=device) for x in sums))
    all_totals: dict[str, Accumulator] = {"": layout, **totals}
    vector = pack(all_totals)
    size = len(vector)
    vector = torch.nn.functional.pad(vector, (0, -size % 2**17))
    if distributed.get_backend() == "nccl":  # NCCL reduces no host tensors
        vector = vector.cuda()
    distributed.all_reduce(vector)
    return unpack(vector[:size].to(device), all_totals)
