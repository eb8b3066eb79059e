"""Batch files and dumps that are broken, impossible or decompress to huge sizes are rejected."""

import json
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import save_file

from diagnostics.core.partial import without_fields
from diagnostics.errors import InvalidInput, MissingFile, OperationFailed
from diagnostics.missing import missing_fields
from diagnostics.records.batch_files import load_batch
from diagnostics.records.reader import Records
from diagnostics.records.rows import read_rows
from diagnostics.records.token_dumps import load_dump, save_dump
from diagnostics.records.writer import save_records
from tests.diagnostics.records.test_token_dumps import full_batch


def changed_batch(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    """Write a batch file whose tensors and header were edited by `change`."""
    full_batch().save(path)
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    change(tensors, header)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, header)
    return path


def supervised_position() -> tuple[int, int]:
    """Return the first supervised position whose support has two ids."""
    b = full_batch()
    assert b.support is not None
    assert b.support.present is not None
    has_two_ids = b.mask & b.support.present[..., :2].all(-1)
    row, position = has_two_ids.nonzero()[0].tolist()
    return row, position


POSITION = supervised_position()
POSITION_PATTERN = rf"\({POSITION[0]}, {POSITION[1]}\)"


def set_value(name: str, index: tuple[int, ...], value: float) -> Callable[[Any, Any], None]:
    return lambda tensors, _: tensors[name].__setitem__(index, value)


def setting(name: str, value: Any) -> Callable[[Any, Any], None]:
    def change(_: Any, header: dict[str, str]) -> None:
        header["settings"] = json.dumps(json.loads(header["settings"]) | {name: value})

    return change


BATCHES = {
    "negative id": (set_value("tokens", (0, 0), -5), r"tokens: -5 at \(0, 0\) is not a token id"),
    "large id": (set_value("tokens", (0, 0), 2**40), r"tokens: 1099511627776 at \(0, 0\)"),
    "support id": (set_value("support.ids", (0, 0, 1), -1), r"support.ids: -1 at \(0, 0, 1\)"),
    "twice": (
        lambda t, _: t["support.ids"].__setitem__(POSITION, t["support.ids"][POSITION][0]),
        f"support.ids: duplicate id at {POSITION_PATTERN}",
    ),
    "mass": (
        lambda t, _: t["support.teacher_logp"].__setitem__(POSITION, -0.01),
        rf"support.teacher_logp: the probabilities at {POSITION_PATTERN} sum to \d\.\d+, expected",
    ),
    "nan": (set_value("teacher_logp", (0, 0), float("nan")), "teacher_logp: 1 of .* not finite"),
    "sentinel": (
        set_value("teacher_logp", POSITION, -9999.0),
        rf"teacher_logp: -9999 at {POSITION_PATTERN} marks a missing log-probability",
    ),
    "positive": (
        set_value("student_logp", POSITION, 0.5),
        "student_logp: 1 of .* positive log-prob",
    ),
    "lacks": (lambda t, _: t.pop("student_logp"), "missing fields: student_logp"),
    "lacks in a part": (lambda t, _: t.pop("support.ids"), "missing fields: support.ids"),
    "shape": (lambda t, _: t.update(mask=t["mask"][:, 1:]), r"mask has shape \(12, 39\), expected"),
    "dtype": (lambda t, _: t.update(tokens=t["tokens"].float()), "tokens has dtype torch.float32"),
    "unknown": (lambda t, _: t.update(extra=t["mask"].clone()), "unknown field 'extra'"),
    "no tokens": (
        lambda t, _: t.update({k: x[:0] for k, x in t.items()}),
        r"tokens has shape \(0, 40\): it is empty",
    ),
    "temperature": (setting("temperature", "hot"), "temperature is 'hot', expected a number"),
    "false": (setting("top_p", False), "top_p is False, expected a number"),
    "rule": (setting("mask_rule", 3), "mask_rule is 3, expected text"),
    "unknown setting": (setting("speed", 3), "unknown field 'speed'"),
    "tensor as text": (setting("baseline", "none"), "baseline is 'none', expected a tensor"),
    "settings": (lambda _, h: h.update(settings="{"), "its settings is not JSON"),
    "settings list": (lambda _, h: h.update(settings="[1]"), r"its settings: \[1\] is not an obj"),
    "type": (lambda _, h: h.update(type="Other"), "type 'Other', expected Rollouts or Scored"),
    "format": (lambda _, h: h.update(format="x"), "format 'x', expected 'opdlab-batch-1'"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_wrong_batch_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, pattern = BATCHES[name]
    path = changed_batch(tmp_path / "b.safetensors", change)
    with pytest.raises(InvalidInput, match=f"b.safetensors.*{pattern}"):
        load_batch(path)


def test_files_that_are_not_batches_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    with pytest.raises(MissingFile, match=r"b\.safetensors does not exist"):
        load_batch(path)
    with pytest.raises(OperationFailed, match="is a folder; give a file in it"):
        load_batch(tmp_path)
    full_batch().save(path)
    data = path.read_bytes()
    shape = json.dumps({"x": {"dtype": "F32", "shape": [2**31, 2**20], "data_offsets": [0, 4]}})
    huge = struct.pack("<Q", len(shape)) + shape.encode() + b"\0" * 4
    for content in (data[:500], data[:-1], b"", b"\xff" * 64, struct.pack("<Q", 2**62), huge):
        path.write_bytes(content)
        with pytest.raises(
            InvalidInput, match=r"b\.safetensors is not a complete safetensors file"
        ):
            load_batch(path)


def changed_dump(path: Path, **columns: Any) -> Path:
    """Write a dump with columns replaced by functions of their values; None removes a column."""
    save_dump(path, full_batch())
    table = parquet.read_table(path)
    for name, change in columns.items():
        index = table.column_names.index(name)
        if change is None:
            table = table.remove_column(index)
            continue
        new_values = change(table[name].to_pylist())
        if not isinstance(new_values, pyarrow.Array):
            new_values = pyarrow.array(new_values, table.schema.field(name).type)
        table = table.set_column(index, name, new_values)
    parquet.write_table(table, path)
    return path


def replace_last(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:-1], value]


DUMPS = {
    "position": (
        {"position": replace_last(2**31 - 1)},
        "position 2147483647 in a response of",
    ),
    "negative position": ({"position": replace_last(-1)}, "position -1 in a response of"),
    "position null": ({"position": replace_last(None)}, "column position: 1 values are null"),
    "position text": (
        {"position": lambda x: pyarrow.array(["a"] * len(x))},
        "column position has type string, expected numbers",
    ),
    "position float": (
        {"position": lambda x: pyarrow.array([float(v) for v in x])},
        "column position does not hold integers",
    ),
    "no position": ({"position": None}, "missing columns position"),
    "no id": ({"id": None}, "missing fields: tokens"),
    "id": ({"id": lambda x: [-7, *x[1:]]}, r"tokens: -7 at \(0, 0\) is not a token id"),
    "ids": ({"id": lambda x: [2**50, *x[1:]]}, r"tokens: 1125899906842624 at \(0, 0\)"),
    "mask": ({"mask": lambda x: pyarrow.array([2.0] * len(x))}, "mask has dtype torch.float64"),
    "sentinel": ({"teacher_logp": replace_last(-9999.0)}, "-9999 at .* marks a missing log-prob"),
    "support null": ({"support.ids": lambda x: [None, *x[1:]]}, "support.ids: .* null"),
    "mass": (
        {"support.student_logp": lambda x: [[0.0] * 4 for _ in x]},
        "sum to [234]",
    ),
}


@pytest.mark.parametrize("name", DUMPS)
def test_a_wrong_dump_is_refused_by_name(name: str, tmp_path: Path) -> None:
    columns, pattern = DUMPS[name]
    path = changed_dump(tmp_path / "d.parquet", **columns)
    with pytest.raises(InvalidInput, match=rf"d\.parquet.*({pattern})"):
        load_dump(path)


def test_what_was_sampled_and_is_not_supervised_survives_a_dump(tmp_path: Path) -> None:
    b = replace(full_batch(), support=None, prefix=None)
    keep = torch.ones_like(b.mask)
    keep[:, 10:] = False
    b = b.restrict_mask(keep)
    save_dump(tmp_path / "d.parquet", b)
    loaded, expected = load_dump(tmp_path / "d.parquet"), b.trim()
    for name in ("mask", "sampled", "student_logp", "sampler_logp"):
        assert torch.equal(getattr(loaded, name), getattr(expected, name)), name
    assert int(loaded.sampled.sum()) > int(loaded.mask.sum())


@contextmanager
def limit_memory(num_bytes: int) -> Iterator[None]:
    """Limit the process to so many bytes more than it uses now."""
    current_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old_limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (current_bytes + num_bytes, old_limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old_limits)


def test_small_files_that_unfold_to_gigabytes_are_not_read(tmp_path: Path) -> None:
    """Run-length and dictionary encoding: a few kB for 10 million equal values."""
    size = 10_000_000
    lists = pyarrow.ListArray.from_arrays([0, size], pyarrow.repeat(7, size))
    parquet.write_table(pyarrow.table({"tokens": lists}), tmp_path / "r.parquet")
    save_dump(tmp_path / "d.parquet", full_batch())
    metadata = parquet.read_schema(tmp_path / "d.parquet").metadata
    tokens = pyarrow.table({x: pyarrow.repeat(0, size) for x in ("response", "position", "id")})
    parquet.write_table(tokens.replace_schema_metadata(metadata), tmp_path / "d.parquet")
    for path, reader in (("r.parquet", Records), ("d.parquet", load_dump)):
        assert (tmp_path / path).stat().st_size < 1 << 18
        with (
            limit_memory(60 << 20),
            pytest.raises(
                InvalidInput, match=rf"{path} has \d+ bytes and decompresses to at least \d{{8}}"
            ),
        ):
            reader(tmp_path / path)


def test_a_dump_that_pads_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    """One response of 20,000 tokens and 20,000 responses of one token: 400 million positions."""
    save_dump(tmp_path / "d.parquet", replace(full_batch(), support=None, prefix=None))
    table = parquet.read_table(tmp_path / "d.parquet").slice(0, 1)
    count = 20_000
    padded_table = pyarrow.concat_tables([table] * 2 * count).combine_chunks()
    response = [0] * count + list(range(1, count + 1))
    position = [*range(count), *[0] * count]
    for name, values in (("response", response), ("position", position)):
        index = padded_table.column_names.index(name)
        padded_table = padded_table.set_column(index, name, pyarrow.array(values, pyarrow.int32()))
    padded_table = padded_table.set_column(
        padded_table.column_names.index("student_logp"),
        "student_logp",
        pyarrow.array(torch.rand(2 * count).neg().numpy()),
    )
    parquet.write_table(padded_table, tmp_path / "d.parquet")
    with pytest.raises(
        InvalidInput, match="40000 tokens, but padding its 20001 responses to 20000"
    ):
        load_dump(tmp_path / "d.parquet")


def test_files_that_are_not_parquet_are_refused_by_name(tmp_path: Path) -> None:
    save_dump(tmp_path / "d.parquet", full_batch())
    data = (tmp_path / "d.parquet").read_bytes()
    for content in (data[:-9], data[: len(data) // 2], b"", b"PAR1" + data[4:9] + b"PAR1"):
        (tmp_path / "d.parquet").write_bytes(content)
        for reader in (load_dump, Records):
            with pytest.raises(InvalidInput, match=r"d\.parquet is not a complete parquet file"):
                reader(tmp_path / "d.parquet")
    middle = data[:200] + bytes(len(data[200:400])) + data[400:]
    (tmp_path / "d.parquet").write_bytes(middle)
    with pytest.raises(InvalidInput, match=r"d\.parquet"):
        load_dump(tmp_path / "d.parquet")
    for reader in (load_dump, Records):
        with pytest.raises(MissingFile, match=r"none\.parquet does not exist"):
            reader(tmp_path / "none.parquet")


def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(OperationFailed, match=r"rows\.jsonl: no permission to read it"):
            read_rows(path)
    finally:
        os.seteuid(user)


def test_a_batch_tells_who_wrote_it_and_what_nobody_scored(tmp_path: Path) -> None:
    whole = full_batch()
    origin = torch.arange(len(whole)) % 3
    without = without_fields(whole, ["teacher_logp", "sampler_logp"]).with_fields(
        origin=origin, support=None, prefix=None
    )
    without.save(tmp_path / "batch.safetensors")
    loaded = load_batch(tmp_path / "batch.safetensors")
    assert torch.equal(loaded.origin, origin)  # type: ignore[arg-type]
    assert missing_fields(loaded) == missing_fields(without)
    assert torch.equal(loaded.student_logp, whole.student_logp)  # type: ignore[attr-defined]
    own = (origin == 0)[:, None] & whole.sampled
    assert torch.equal(loaded.own_tokens, own)
    rows = tmp_path / "rows.jsonl"
    save_records(rows, [whole.with_fields(origin=origin, support=None)])
    origins = [number for part in Records(rows) for number in part.origin.tolist()]  # type: ignore[union-attr]
    assert origins == origin.tolist()
    whole.with_fields(origin=origin + 1).save(tmp_path / "batch.safetensors")
    with pytest.raises(InvalidInput, match="it must hold indices of student, teacher, dataset"):
        load_batch(tmp_path / "batch.safetensors")
