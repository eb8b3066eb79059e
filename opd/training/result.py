"""The result of `opd.train`."""

from functools import cached_property
from pathlib import Path

from diagnostics.records.rows import Row, read_rows
from opd.models.loading import load_model, num_head_rows
from opd.models.model import CausalLM, split_head
from opd.runs.hub import push_model


class TrainResult:
    """What a run has given: its folder, its numbers and the trained model.

    Args:
        folder: The run folder.
        student: The trained student; None to load it from final/ when it is asked for.
    """

    def __init__(self, folder: Path, student: CausalLM | None = None) -> None:
        self.folder = folder
        self._student = student

    @cached_property
    def row(self) -> Row:
        """The row of the last step; empty without steps."""
        rows = read_rows(self.folder / "rows.jsonl")
        return rows[-1] if rows else {}

    @cached_property
    def evaluations(self) -> list[Row]:
        """The evaluations on held-out problems, in order."""
        return read_rows(self.folder / "evals.jsonl")

    @cached_property
    def student(self) -> CausalLM:
        """The trained model; of a run that an earlier call had finished, loaded from final/."""
        if self._student is not None:
            return self._student
        _, network = load_model(str(self.folder / "final"), "auto", "float32")
        return split_head(network, num_head_rows(network))

    def push(self, name: str) -> str:
        """Upload the trained model to the hub (`opd.runs.hub.push_model`); return its address."""
        return push_model(self.folder, name)
