"""Token dumps: lossless round trip, uniform and reproducible samples, bounded sizes."""

import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.monitor import Monitor
from diagnostics.records.token_dumps import DumpWriter, load_dump, sample_rows, save_dump
from tests.helpers.batches import batch


def full_batch(width: int = 40) -> ScoredRollouts:
    """Build a batch with all optional fields, gaps, an empty response and different lengths."""
    b = batch(width=width)
    mask = b.mask.clone()
    mask[:, 30:] = False
    mask[3] = False
    mask[4, 5:] = False

    def zero_outside_mask(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 2 or not x.dtype.is_floating_point:
            return x
        return x * mask.reshape(*mask.shape, *[1] * (x.dim() - 2))

    b = replace(
        b._map(zero_outside_mask),
        mask=mask,
        softmax_logp=zero_outside_mask(b.sampler_logp) * 0.5,
        baseline=zero_outside_mask(b.teacher_logp).double() / 3,
        reward=torch.tensor([1.0, 0.0, math.nan, 1.0] * 3),
        task=torch.arange(12) % 3,
        turn=torch.arange(12) % 2,
        temperature=0.7,
        top_p=0.9,
        mask_rule="response - role:eos",
        score_temperature=0.7,
    )
    assert b.support is not None
    present = torch.rand(b.support.ids.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    return replace(b, support=replace(b.support, present=present, source="union"))


def test_a_batch_comes_back_bit_by_bit(tmp_path: Path) -> None:
    b = full_batch()
    save_dump(tmp_path / "a.parquet", b, step=7)
    loaded = load_dump(tmp_path / "a.parquet")
    expected = b.trim()
    assert expected.tokens.shape == loaded.tokens.shape == (12, 30)
    is_dumped = expected.mask.long().flip(1).cumsum(1).flip(1) > 0
    is_dumped[:, 0] = True
    for expected_part, loaded_part in (
        (expected, loaded),
        (expected.support, loaded.support),
        (expected.prefix, loaded.prefix),
    ):
        assert expected_part is not None
        for f in fields(expected_part):
            x, y = getattr(expected_part, f.name), getattr(loaded_part, f.name)
            if not isinstance(x, torch.Tensor):
                assert x == y or f.name in ("support", "prefix"), f.name
            elif x.dim() == 1:
                assert torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)), f.name
            else:
                assert x.dtype == y.dtype
                assert torch.equal(x[is_dumped], y[is_dumped]), f.name
                assert not y[~is_dumped].any(), f.name


def test_the_panel_runs_on_a_dump(tmp_path: Path) -> None:
    for b in (full_batch(), replace(full_batch(), support=None, prefix=None)):
        save_dump(tmp_path / "a.parquet", b)
        row, expected = (Monitor()(0, [x]) for x in (load_dump(tmp_path / "a.parquet"), b))
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


def test_columns_mean_what_the_schema_says(tmp_path: Path) -> None:
    b = full_batch()
    save_dump(tmp_path / "a.parquet", b, step=7)
    table = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(table) == sum(
        max(1, max(_supervised_positions(b, i), default=0) + 1) for i in range(12)
    )
    assert b.support is not None
    for line in table:
        i, t = line["response"], line["position"]
        assert line["step"] == 7
        assert line["prompt"] == int(b.prompt[i])
        assert line["id"] == int(b.tokens[i, t])
        assert line["mask"] == bool(b.mask[i, t])
        assert line["student_logp"] == float(b.student_logp[i, t])
        among = [int(v) for v, p in zip(b.support.ids[i, t], b.support.present[i, t]) if p]  # noqa: B905
        assert line["in_support"] == (line["id"] in among)
    types = parquet.read_schema(tmp_path / "a.parquet")
    assert types.field("position").type == pyarrow.int32()
    assert types.field("support.ids").type == pyarrow.list_(pyarrow.int64(), 4)


def _supervised_positions(b: ScoredRollouts, i: int) -> list[int]:
    return [t for t in range(b.mask.shape[1]) if b.mask[i, t]]


def test_columns_of_others_and_other_orders_are_read(tmp_path: Path) -> None:
    """A file to which a data tool added columns, and whose rows it sorted, is the same dump."""
    save_dump(tmp_path / "a.parquet", full_batch())
    table = parquet.read_table(tmp_path / "a.parquet")
    table = table.append_column("note", pyarrow.array(["x"] * len(table)))
    table = table.take(pyarrow.array(torch.randperm(len(table)).numpy()))
    parquet.write_table(table, tmp_path / "b.parquet")
    a, b = (load_dump(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert torch.equal(a.teacher_logp, b.teacher_logp)
    assert torch.equal(a.prompt, b.prompt)
    assert torch.equal(a.ended, b.ended)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    save_dump(tmp_path / "a.parquet", full_batch())
    table = parquet.read_table(tmp_path / "a.parquet")
    truncated = pyarrow.concat_tables([table.slice(0, 4), table.slice(5)])
    duplicated = [pyarrow.concat_tables([table, table.slice(i, 1)]) for i in (0, 3)]
    for broken_table in (truncated, *duplicated):
        parquet.write_table(broken_table, tmp_path / "b.parquet")
        with pytest.raises(ValueError, match="are missing or duplicated"):
            load_dump(tmp_path / "b.parquet")
    parquet.write_table(table.replace_schema_metadata({}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="format None, expected 'opdlab-dump-1'"):
        load_dump(tmp_path / "b.parquet")


def test_columns_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    save_dump(path, batch(0))
    table = parquet.read_table(path)
    count, names = len(table), table.column_names

    def write_column(name: str, values: pyarrow.Array) -> None:
        parquet.write_table(table.set_column(names.index(name), name, values), path)

    write_column("prompt", pyarrow.array(range(count)))
    with pytest.raises(
        InvalidInput, match=r"column prompt: .* at the first token of the same resp"
    ):
        load_dump(path)
    write_column("id", pyarrow.array([2**64 - 1] * count, pyarrow.uint64()))
    with pytest.raises(InvalidInput, match="column id: a number exceeds signed 64 bits"):
        load_dump(path)
    write_column("id", table["id"].cast(pyarrow.uint64()))
    assert torch.equal(
        load_dump(path).tokens * batch(0).sampled, batch(0).tokens * batch(0).sampled
    )
    parquet.write_table(table.append_column("id", table["id"]), path)
    with pytest.raises(InvalidInput, match="has a duplicate column"):
        load_dump(path)


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    b = replace(full_batch(), support=None, prefix=None)
    b = replace(b, teacher_logp=b.teacher_logp.bfloat16())
    save_dump(tmp_path / "a.parquet", b)
    assert torch.equal(
        load_dump(tmp_path / "a.parquet").teacher_logp[:, :30].bfloat16(), b.teacher_logp[:, :30]
    )


def test_the_sample_is_by_response_fair_and_depends_on_seed_and_step(tmp_path: Path) -> None:
    b = full_batch()
    for folder in ("a", "b"):
        path = DumpWriter(folder=tmp_path / folder, responses=5, seed=3)(11, b)
        assert path is not None
        assert path.name == "step_00000011.parquet"
    first, second = (load_dump(tmp_path / x / "step_00000011.parquet") for x in "ab")
    assert torch.equal(first.student_logp, second.student_logp)
    row_indices = sorted(sample_rows(12, 5, 3, 11))
    column = parquet.read_table(tmp_path / "a" / "step_00000011.parquet")["response"].to_pylist()
    assert column == sorted(column)
    assert sorted(set(column)) == row_indices
    assert torch.equal(first.prompt, b.prompt[row_indices])
    assert torch.equal(first.lengths, b.lengths[row_indices])
    assert row_indices not in (sorted(sample_rows(12, 5, 3, 12)), sorted(sample_rows(12, 5, 4, 11)))
    count = Counter(i for step in range(600) for i in sample_rows(12, 5, 0, step))
    expected, error = 600 * 5 / 12, math.sqrt(600 * 5 / 12 * 7 / 12)
    assert all(abs(count[i] - expected) < 4.5 * error for i in range(12))


def test_files_and_folder_stay_within_their_bytes(tmp_path: Path) -> None:
    b = batch(size=240)  # large enough that the columns outweigh the footer
    size = dump_size(tmp_path, b)
    limit = size // 2
    dumps = DumpWriter(
        folder=tmp_path / "d", responses=240, file_bytes=limit, total_bytes=3 * limit
    )
    sizes: dict[int, int] = {}
    for step in range(12):
        path = dumps(step, b.rows([0, 1]) if step in (4, 5, 6) else b)
        assert path is not None
        assert path.stat().st_size <= limit
        files = sorted((tmp_path / "d").iterdir())
        assert sum(file.stat().st_size for file in files) <= 3 * limit
        assert files[0].name == "step_00000000.parquet"
        assert files[-1] == path
        assert 1 < len(load_dump(path)) < 240
        kept_steps = [int(file.stem[5:]) for file in files]
        removed_sizes = [sizes.get(s, 0) for s in range(1, step + 1) if s not in kept_steps]
        sizes[step] = path.stat().st_size
        newest_removed_size = removed_sizes[-1] if removed_sizes else math.inf
        folder_size = sum(sizes[s] for s in kept_steps)
        assert folder_size + newest_removed_size > 3 * limit, "no more was removed than had to be"
    assert 3 <= len(files) < 12
    steps = [int(file.stem[5:]) for file in files[1:]]
    assert steps == list(range(steps[0], 12)), "the newest without gaps"


def dump_size(folder: Path, b: ScoredRollouts) -> int:
    save_dump(folder / "whole.parquet", b)
    return (folder / "whole.parquet").stat().st_size


def test_a_response_that_does_not_fit_is_told(tmp_path: Path) -> None:
    dumps = DumpWriter(folder=tmp_path / "d", file_bytes=100, total_bytes=200)
    with pytest.warns(UserWarning, match=r"one response takes \d+ bytes, more than file_bytes"):
        assert dumps(0, full_batch()) is None
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match="twice file_bytes"):
        DumpWriter(folder=tmp_path, file_bytes=100, total_bytes=199)
