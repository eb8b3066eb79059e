"""The gradient probe over two processes equals one process with all sequences."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from torch import Tensor
from torch.nn.functional import one_hot

from diagnostics.batch import ScoredRollouts
from diagnostics.concatenation import concatenate
from diagnostics.gradients.distributed import all_gather_rows, all_gather_sketches, gather_batch
from diagnostics.gradients.probe import GradientSketches, gradient_row, sketch_gradients
from diagnostics.gradients.sketch import identity_projection
from tests.diagnostics.gradients.test_probe import sample_batch, world
from tests.helpers.warm_process import run_ranks


def tabular(
    batch: ScoredRollouts, states_: Tensor, gathered: tuple[ScoredRollouts, slice] | None
) -> GradientSketches:
    _, student, teacher = world()
    flat = states_[:, : batch.mask.shape[1]][batch.mask]
    tables = student.log_softmax(-1), teacher.log_softmax(-1)
    return sketch_gradients(
        batch,
        one_hot(flat, 4).double(),
        lambda c: (tables[0][flat[c]], tables[1][flat[c]]),
        identity_projection(3, 4),
        gathered=gathered,
    )


def shares() -> list[tuple[ScoredRollouts, Tensor]]:
    """Split 20 sequences of 5 prompts into two shards, one trimmed; one prompt is in both."""
    trajectories = sample_batch(world()[0], 4, count=20, group=4)
    order = trajectories.batch.lengths.argsort()
    batch, states_ = trajectories.batch.rows(order), trajectories.states[order]
    parts = [
        (batch.rows(slice(9)).trim(), states_[:9]),
        (batch.rows(slice(9, 20)), states_[9:]),
    ]
    assert parts[0][0].mask.shape[1] < parts[1][0].mask.shape[1], trajectories.batch.lengths
    return parts


def work(folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    batch, states_ = shares()[rank]
    row = gradient_row(all_gather_sketches(tabular(batch, states_, gather_batch(batch))))
    try:
        all_gather_rows(torch.zeros(2, 3, 4 + rank))
        message = "no error"
    except ValueError as error:
        message = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps([row, message]))
    distributed.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    run_ranks(tmp_path, work, str(tmp_path))
    parts = shares()
    batch, states_ = concatenate([b for b, _ in parts]), torch.cat([s for _, s in parts])
    want = gradient_row(tabular(batch, states_, None))
    assert "gradient/noise/position_mean@1" in want
    for rank in (0, 1):
        row, message = json.loads((tmp_path / f"{rank}.json").read_text())
        assert row.keys() == want.keys()
        for name, value in want.items():
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
        assert "only rows and positions may differ" in message
    # baselines over other prompts differ without the other rank
    alone = gradient_row(tabular(*parts[1], None))
    assert alone["gradient/noise/position_mean@1"] != want["gradient/noise/position_mean@1"]
