"""Cadence, restarts, sinks and ranks of the monitor."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

from diagnostics.alarms.alarms import Alarms
from diagnostics.alarms.rules import AlarmRule
from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import counts, pack, position_counts
from diagnostics.monitor import PANEL, Monitor, across_ranks
from diagnostics.records.rows import read
from diagnostics.records.sinks import to_console, to_file
from tests.diagnostics.test_panel import batch

LIMIT = AlarmRule(
    name="k1", metric="divergence/k1", null="", means="", remedy="", high=-1, need=2, last=3
)


def spied(calls: list[str], name: str) -> Callable[[ScoredRollouts], dict]:
    def metric(scored: ScoredRollouts) -> dict:
        calls.append(name)
        return PANEL[name](scored)

    return metric


def test_each_metric_has_its_own_cadence() -> None:
    calls: list[str] = []
    panel = {name: spied(calls, name) for name in ("length", "reward", "sign_shares")}
    monitor = Monitor(panel, every={"reward": 2, "sign_shares": 3})
    rows = [monitor(step, [batch()]) for step in range(7)]
    assert calls.count("length") == 7
    assert ["response/graded_share" in row for row in rows] == [True, False] * 3 + [True]
    assert [s for s, row in enumerate(rows) if "signal/negative_share" in row] == [0, 3, 6]
    assert (calls.count("reward"), calls.count("sign_shares")) == (4, 3)


def test_a_step_when_nothing_is_due_does_not_touch_the_micro_batches() -> None:
    def untouchable():
        raise AssertionError("read")
        yield

    assert Monitor(every=5)(3, untouchable(), loss=2.0) == {"loss": 2.0}
    assert "divergence/k1" in Monitor(every=5)(10, [batch()])


def test_wrong_cadences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every names \['z'\]"):
        Monitor(every={"z": 2})
    with pytest.raises(ValueError, match=r"every is \{'length': 0\}"):
        Monitor(every={"length": 0})


def test_one_read_out_a_step(monkeypatch) -> None:
    """A read-out goes through `Tensor.cpu`, once; nothing else asks a tensor for its value."""
    count: list[int] = []
    plain = torch.Tensor.cpu

    def counted(x: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return plain(x)

    def forbidden(*_: object) -> None:
        raise AssertionError("a host sync outside of `read`")

    b, loss = batch(), torch.tensor(3.0)
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    row = Monitor()(0, [b.rows(slice(0, 6)), b.rows(slice(6, 12))], loss=loss)
    monkeypatch.undo()
    assert len(count) == 1
    assert row["loss"] == 3


def test_sinks_get_every_row_and_alarms_their_state(tmp_path: Path, capsys) -> None:
    seen: list[tuple[int, dict]] = []
    sinks = [to_file(tmp_path / "new" / "rows.jsonl"), to_console(["loss", "no"])]
    sinks.append(lambda step, row: seen.append((step, dict(row))))
    monitor = Monitor({"k1": PANEL["sampled_divergence"]}, sinks=sinks, alarms=Alarms([LIMIT]))
    rows = []
    for step in range(4):
        rows.append(monitor(step, [batch()], loss=step / 2))
        assert [a.step for a in monitor.raised] == ([1] if step == 1 else [])
    assert seen == list(enumerate(rows))
    assert read(tmp_path / "new" / "rows.jsonl") == [{"step": s, **r} for s, r in enumerate(rows)]
    assert capsys.readouterr().out.splitlines()[3] == "step 3  loss 1.5"
    to_console(["no"])(0, rows[0])
    assert capsys.readouterr().out == ""


def test_a_restart_goes_on_where_it_stopped() -> None:
    def bare() -> ScoredRollouts:
        from dataclasses import replace

        return replace(batch(), prefix=None)

    def fresh() -> Monitor:
        panel = {name: PANEL[name] for name in ("sampled_divergence", "martingales")}
        return Monitor(panel, alarms=Alarms([LIMIT]))

    whole, first, second = fresh(), fresh(), fresh()
    raised = []
    for step in range(4):
        whole(step, [bare()])
        raised.append(len(whole.raised))
    first(0, [bare()])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.missing == first.missing
    assert "martingales" in second.missing
    got = [len(first.raised)]
    for step in range(1, 4):
        second(step, [bare()])
        got.append(len(second.raised))
    assert got == raised == [0, 1, 0, 0]
    assert second.state_dict() == whole.state_dict()


def test_a_batch_is_not_changed() -> None:
    b, other = batch(), batch()
    Monitor()(0, [b])
    for x, y in zip(b._tensors().values(), other._tensors().values(), strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y) or bool(x.isnan().all())


def test_parts_that_do_not_match_are_refused() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="in one part only"):
        Monitor()(0, [batch(), replace(batch(), prefix=None)])


def test_one_name_for_two_numbers_is_refused() -> None:
    panel = {"first": PANEL["length"], "reward": PANEL["reward"], "again": PANEL["length"]}
    with pytest.raises(ValueError, match=r"'first' and 'again' both give response/"):
        Monitor(panel)(0, [batch()])
    Monitor(panel, every={"again": 2})(1, [batch()])  # never on one step is no clash
    name = next(iter(Monitor({"x": PANEL["length"]})(0, [batch()])))
    for number in (1.0, torch.tensor(1.0)):
        with pytest.raises(ValueError, match=f"{name}: names of metrics"):
            Monitor({"x": PANEL["length"]})(0, [batch()], **{name: number})


def test_what_a_panel_shares_goes_with_the_tensor() -> None:
    """The counts of a mask are not taken for those of another, nor of itself before a change."""
    for count in (counts, position_counts):
        one = torch.tensor([[True, False, True], [True, False, False]])
        first = count(one)
        assert count(one) is first
        assert not torch.equal(count(~one), first)
        assert torch.equal(count(one), first)
        one[1] = True
        assert count(one)[1].tolist() != first[1].tolist()
    with torch.inference_mode():
        mask = torch.ones(2, 3, dtype=torch.bool)
        assert counts(mask).tolist() == [3, 3]
        assert "divergence/k1" in Monitor()(0, [batch()])
    assert "divergence/k1" in Monitor()(0, [batch()])


# --- ranks --------------------------------------------------------------------------------------


def work(rank: int, folder: str) -> None:
    """A rank: its rows of the batch, then a step on which the ranks disagree."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    b = batch()
    mine = [[b.rows([4, 5, 0, 1]), b.rows([2, 3])], [b.rows(slice(6, 12))]][rank]
    monitor = Monitor(combine=across_ranks)
    row = monitor(0, mine, loss=torch.tensor(1.0 + rank), lr=0.1)
    from dataclasses import replace

    lacking = replace(b, prefix=None) if rank else b
    try:
        monitor(1, [lacking])
        told = "nothing"
    except ValueError as error:
        told = str(error)
    empty = Monitor({}, combine=across_ranks)(2, [], loss=torch.tensor(float(rank)))
    Path(folder, f"{rank}.json").write_text(json.dumps([row, told, empty]))
    distributed.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    whole = Monitor()(0, [batch()], loss=torch.tensor(1.5), lr=0.1)
    for row, told, empty in found:
        assert row.keys() == whole.keys()
        for name, value in whole.items():
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
        assert "the 2 ranks measured different things" in told
        assert empty == {"loss": 0.5}


def test_the_sums_of_a_panel_stay_small() -> None:
    """Ranks that disagree meet in one all-reduce because the padding exceeds a panel's sums."""
    assert len(pack(Monitor().measure(batch()))) < 2**17
