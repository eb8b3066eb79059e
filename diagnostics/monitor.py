"""The monitor: a panel of metrics over the micro-batches of a step, read out once.

Works on anyone's run: hand it `ScoredRollouts` micro-batches and write the returned row wherever you log.
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
from diagnostics.core.totals import Accumulator, Mean, merge, pack, read, unpack
from diagnostics.errors import InvalidInput
from diagnostics.records.sinks import Rewindable, Sink

Combine = Callable[[Mapping[str, Accumulator]], Mapping[str, Accumulator]]


class Monitor:
    """Computes metrics on the steps when they are due. It observes and never changes a batch.

    panel: metric name to metric; every: steps between its readings, one number for all or one a
      metric name (1 where a name is absent).
    sinks: each is called with (step, row) after the row was read out (`diagnostics.records.sinks`).
    alarms: rules that see every row (`diagnostics.alarms.alarms`); what a row raised is in `raised`.
    combine: what is done to a step's totals before they are read out: `across_ranks` under
      torch.distributed, nothing by default.

    missing: metric name to what it lacked, for each metric of the panel that some batch so far
      could not supply; those metrics are absent from the rows.
    totals: what the latest row was read from, to be merged with those of other steps.
    """

    def __init__(
        self,
        panel: Mapping[str, Metric] = PANEL,
        every: int | Mapping[str, int] = 1,
        sinks: Sequence[Sink] = (),
        alarms: Alarms | None = None,
        combine: Combine = dict,
    ) -> None:
        self.panel = dict(panel)
        given = every if isinstance(every, Mapping) else dict.fromkeys(panel, every)
        if unknown := sorted(given.keys() - panel.keys()):
            raise InvalidInput(f"every names {unknown}, which the panel lacks; it has {[*panel]}")
        if wrong := {name: n for name, n in given.items() if n < 1}:
            raise InvalidInput(f"every is {wrong}, expected a positive number of steps")
        self.every = dict.fromkeys(panel, 1) | dict(given)
        self.sinks, self.alarms, self.combine = list(sinks), alarms, combine
        self.raised: list[Alarm] = []
        self.missing: dict[str, str] = {}
        self.totals: Mapping[str, Accumulator] = {}

    def __call__(
        self, step: int, micro_batches: Iterable[ScoredRollouts], **numbers: float | Tensor
    ) -> dict[str, float]:
        """The row of this step: every value that is due, its "_se", and `numbers` as they are.

        One host sync, which 0-d tensors among `numbers` share; ranks average those, and keep plain
        numbers to themselves. On a step when nothing is due, the micro-batches are not touched and
        the row holds `numbers` alone.

        Raises:
          ValueError: the micro-batches of one step, or the ranks, do not hold the same parts; two
            metrics, or a metric and a number, have one name.
        """
        due = [name for name, n in self.every.items() if step % n == 0]
        totals: dict[str, Accumulator] = {}
        if due:
            parts = (self.measure(batch, due) for batch in micro_batches)
            totals = reduce(merge, parts, next(parts, {}))
        waiting = {name: x for name, x in numbers.items() if isinstance(x, Tensor)}
        known = {name: float(x) for name, x in numbers.items() if name not in waiting}
        as_totals = {name: Mean(x, torch.ones_like(x)) for name, x in waiting.items()}
        self.totals = self.combine({**totals, **as_totals})
        measured = read(self.totals)
        if taken := sorted(known.keys() & measured.keys() | waiting.keys() & totals.keys()):
            raise InvalidInput(f"{', '.join(taken)}: names of metrics; give the numbers others")
        row = known | measured
        self.raised = self.alarms.update({"step": step, **row}) if self.alarms else []
        for sink in self.sinks:
            sink(step, row)
        return row

    def measure(
        self, batch: ScoredRollouts, names: Iterable[str] | None = None
    ) -> dict[str, Accumulator]:
        """Totals of one micro-batch, to be merged; of all metrics or those named.

        Nothing leaves the device.

        Raises:
          ValueError: two metrics give a total of the same name.
        """
        found: dict[str, Accumulator] = {}
        source: dict[str, str] = {}
        with torch.no_grad():
            for name in self.panel if names is None else names:
                try:
                    mine = self.panel[name](batch)
                except MissingField as lack:
                    self.missing.setdefault(name, str(lack))
                    continue
                if twice := sorted(source.keys() & mine.keys()):
                    raise InvalidInput(
                        f"the metrics {source[twice[0]]!r} and {name!r} both give "
                        f"{', '.join(twice)}; keep one of them in the panel"
                    )
                source |= dict.fromkeys(mine, name)
                found |= mine
        return found

    def rewind(self, step: int) -> None:
        """Say to every sink with a method `rewind` that the run goes on after this step.

        step: the last one whose row stays; 0 where a run begins.
        """
        for sink in self.sinks:
            if isinstance(sink, Rewindable):
                sink.rewind(step)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs, fit for JSON: `missing`, and the memory of the alarms."""
        alarms = None if self.alarms is None else self.alarms.state_dict()
        return {"missing": dict(self.missing), "alarms": alarms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. A monitor without alarms leaves their memory alone."""
        self.missing = dict(state["missing"])
        if self.alarms is not None and state["alarms"] is not None:
            self.alarms.load_state_dict(state["alarms"])


@dataclass(frozen=True, eq=False)
class _Layout(Accumulator):
    """Which sums a rank brought, as a number: `read` refuses when ranks brought different ones."""

    count: Tensor
    total: Tensor
    square: Tensor

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        count, total, square = (float(x) for x in sums)
        if count * square != total**2:
            raise InvalidInput(
                f"the {count:.0f} ranks measured different things, so that their sums do not add: "
                "give all of them micro-batches with the same optional parts on every step"
            )
        return {}


def across_ranks(totals: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
    """The totals of all ranks of torch.distributed's default group: one all-reduce of sums.

    Values are those of one process that saw every rank's micro-batches. So are standard errors if
    all rollouts of a prompt are on one rank (`diagnostics.core.totals`). Every rank gets the result, and
    every rank has to call. The vector is padded to a multiple of 2^17 sums (1 MiB): so ranks that
    measured different things still meet in one all-reduce, and `read` can say so, without a sync.
    What it says is a ValueError.
    """
    import torch.distributed as distributed

    kinds = [(name, type(x).__name__, [t.shape for t in x.tensors()]) for name, x in totals.items()]
    number = crc32(repr(kinds).encode()) % 2**20  # small, so that squares add exactly
    device = pack(totals).device
    sums = (1, number, number**2)
    layout = _Layout(*(torch.full((), x, dtype=torch.float64, device=device) for x in sums))
    all_totals: dict[str, Accumulator] = {"": layout, **totals}
    vector = pack(all_totals)
    size = len(vector)
    vector = torch.nn.functional.pad(vector, (0, -size % 2**17))
    if distributed.get_backend() == "nccl":  # which takes no sums that were made on the host
        vector = vector.cuda()
    distributed.all_reduce(vector)
    return unpack(vector[:size].to(device), all_totals)
