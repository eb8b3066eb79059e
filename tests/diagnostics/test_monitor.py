"""Intervals, restarts, sinks and ranks of the monitor."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed

from diagnostics.alarms.alarms import Alarms
from diagnostics.alarms.rules import AlarmRule
from diagnostics.batch import ScoredRollouts
from diagnostics.core.cluster_sums import position_counts, row_counts
from diagnostics.core.totals import pack
from diagnostics.monitor import PANEL, Monitor, all_reduce_totals
from diagnostics.records.rows import read_rows
from diagnostics.records.sinks import to_console, to_file
from tests.helpers.batches import batch
from tests.helpers.warm_process import run_ranks

LIMIT = AlarmRule(
    name="k1",
    metric="divergence/k1",
    null="",
    means="",
    remedy="",
    high=-1,
    min_outside=2,
    window=3,
)


def recording_metric(calls: list[str], name: str) -> Callable[[ScoredRollouts], dict]:
    def metric(scored: ScoredRollouts) -> dict:
        calls.append(name)
        return PANEL[name](scored)

    return metric


def test_each_metric_has_its_own_cadence() -> None:
    calls: list[str] = []
    panel = {name: recording_metric(calls, name) for name in ("length", "reward", "sign_shares")}
    monitor = Monitor(panel, interval={"reward": 2, "sign_shares": 3})
    rows = [monitor(step, [batch()]) for step in range(7)]
    assert calls.count("length") == 7
    assert ["response/graded_share" in row for row in rows] == [True, False] * 3 + [True]
    assert [s for s, row in enumerate(rows) if "signal/negative_share" in row] == [0, 3, 6]
    assert (calls.count("reward"), calls.count("sign_shares")) == (4, 3)


def test_a_step_when_nothing_is_due_does_not_touch_the_micro_batches() -> None:
    def untouchable():
        raise AssertionError("read")
        yield

    assert Monitor(interval=5)(3, untouchable(), loss=2.0) == {"loss": 2.0}
    due_row = Monitor(interval=5)(10, [batch()])
    assert due_row == pytest.approx(Monitor()(10, [batch()]), nan_ok=True)


def test_wrong_cadences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"interval names \['z'\]"):
        Monitor(interval={"z": 2})
    with pytest.raises(ValueError, match=r"interval is \{'length': 0\}"):
        Monitor(interval={"length": 0})


def test_one_read_out_a_step(monkeypatch) -> None:
    """Values are read through one call of `Tensor.cpu`; nothing else reads a tensor on the host."""
    cpu_calls: list[int] = []
    original_cpu = torch.Tensor.cpu

    def counting_cpu(x: torch.Tensor) -> torch.Tensor:
        cpu_calls.append(1)
        return original_cpu(x)

    def forbidden(*_: object) -> None:
        raise AssertionError("a host sync outside of `compute`")

    b, loss = batch(), torch.tensor(3.0)
    monkeypatch.setattr(torch.Tensor, "cpu", counting_cpu)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    row = Monitor()(0, [b.rows(slice(0, 6)), b.rows(slice(6, 12))], loss=loss)
    monkeypatch.undo()
    assert len(cpu_calls) == 1
    assert row["loss"] == 3


def test_sinks_get_every_row_and_alarms_their_state(tmp_path: Path, capsys) -> None:
    sink_rows: list[tuple[int, dict]] = []
    sinks = [to_file(tmp_path / "new" / "rows.jsonl"), to_console(["loss", "no"])]
    sinks.append(lambda step, row: sink_rows.append((step, dict(row))))
    monitor = Monitor({"k1": PANEL["sampled_divergence"]}, sinks=sinks, alarms=Alarms([LIMIT]))
    rows = []
    for step in range(4):
        rows.append(monitor(step, [batch()], loss=step / 2))
        assert [a.step for a in monitor.raised] == ([1] if step == 1 else [])
    assert sink_rows == list(enumerate(rows))
    assert read_rows(tmp_path / "new" / "rows.jsonl") == [
        {"step": s, **r} for s, r in enumerate(rows)
    ]
    assert capsys.readouterr().out.splitlines()[3] == "step 3  loss 1.5"
    to_console(["no"])(0, rows[0])
    assert capsys.readouterr().out == ""


def test_a_restart_goes_on_where_it_stopped() -> None:
    def batch_without_stats() -> ScoredRollouts:
        from dataclasses import replace

        return replace(batch(), prefix=None)

    def make_monitor() -> Monitor:
        panel = {name: PANEL[name] for name in ("sampled_divergence", "martingales")}
        return Monitor(panel, alarms=Alarms([LIMIT]))

    uninterrupted, first, second = make_monitor(), make_monitor(), make_monitor()
    raised = []
    for step in range(4):
        uninterrupted(step, [batch_without_stats()])
        raised.append(len(uninterrupted.raised))
    first(0, [batch_without_stats()])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.missing == first.missing
    assert "martingales" in second.missing
    num_raised = [len(first.raised)]
    for step in range(1, 4):
        second(step, [batch_without_stats()])
        num_raised.append(len(second.raised))
    assert num_raised == raised == [0, 1, 0, 0]
    assert second.state_dict() == uninterrupted.state_dict()


def test_a_batch_is_not_changed() -> None:
    b, expected = batch(), batch()
    Monitor()(0, [b])
    for x, y in zip(b._tensors().values(), expected._tensors().values(), strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y) or bool(x.isnan().all())


def test_parts_that_do_not_match_are_refused() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="in one of two parts only"):
        Monitor()(0, [batch(), replace(batch(), prefix=None)])


def test_one_name_for_two_numbers_is_refused() -> None:
    panel = {"first": PANEL["length"], "reward": PANEL["reward"], "again": PANEL["length"]}
    with pytest.raises(ValueError, match=r"'first' and 'again' both return response/"):
        Monitor(panel)(0, [batch()])
    Monitor(panel, interval={"again": 2})(1, [batch()])  # no clash: never due on the same step
    name = next(iter(Monitor({"x": PANEL["length"]})(0, [batch()])))
    for number in (1.0, torch.tensor(1.0)):
        with pytest.raises(ValueError, match=f"{name}: names of metrics"):
            Monitor({"x": PANEL["length"]})(0, [batch()], **{name: number})


def test_what_a_panel_shares_goes_with_the_tensor() -> None:
    """Cached counts of a mask are not used for another mask, nor after an in-place change."""
    for count in (row_counts, position_counts):
        mask_2d = torch.tensor([[True, False, True], [True, False, False]])
        first = count(mask_2d)
        assert count(mask_2d) is first
        assert not torch.equal(count(~mask_2d), first)
        assert torch.equal(count(mask_2d), first)
        mask_2d[1] = True
        assert count(mask_2d)[1].tolist() != first[1].tolist()
    expected = Monitor()(0, [batch()])
    with torch.inference_mode():
        mask = torch.ones(2, 3, dtype=torch.bool)
        assert row_counts(mask).tolist() == [3, 3]
        assert Monitor()(0, [batch()]) == pytest.approx(expected, nan_ok=True)
    assert Monitor()(0, [batch()]) == pytest.approx(expected, nan_ok=True)


# --- ranks --------------------------------------------------------------------------------------


def run_rank(folder: str) -> None:
    """Run a rank: its rows of the batch, then a step on which the ranks have different fields."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    b = batch()
    local_batches = [[b.rows([4, 5, 0, 1]), b.rows([2, 3])], [b.rows(slice(6, 12))]][rank]
    monitor = Monitor(combine=all_reduce_totals)
    row = monitor(0, local_batches, loss=torch.tensor(1.0 + rank), lr=0.1)
    from dataclasses import replace

    other_batch = replace(b, prefix=None) if rank else b
    try:
        monitor(1, [other_batch])
        message = "nothing"
    except ValueError as error:
        message = str(error)
    empty_row = Monitor({}, combine=all_reduce_totals)(2, [], loss=torch.tensor(float(rank)))
    Path(folder, f"{rank}.json").write_text(json.dumps([row, message, empty_row]))
    distributed.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    run_ranks(tmp_path, run_rank, str(tmp_path))
    rank_results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    expected = Monitor()(0, [batch()], loss=torch.tensor(1.5), lr=0.1)
    for row, message, empty_row in rank_results:
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
        assert "the 2 ranks have different accumulators" in message
        assert empty_row == {"loss": 0.5}


def test_the_sums_of_a_panel_stay_small() -> None:
    """The padding of the all-reduce exceeds a panel's sums, so mismatched ranks do not hang."""
    assert len(pack(Monitor().measure(batch()))) < 2**17
