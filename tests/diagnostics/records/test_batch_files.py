"""Batch files and dumps that are broken, impossible or larger than they look: refused by name."""

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

from diagnostics.errors import InvalidInput, MissingFile, OperationFailed
from diagnostics.records.batch_files import load
from diagnostics.records.reader import Records
from diagnostics.records.rows import read
from diagnostics.records.token_dumps import load_dump, save_dump
from tests.diagnostics.records.test_token_dumps import full


def changed_batch(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    """A batch file after `change` edited its tensors and its header."""
    full().save(path)
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    change(tensors, header)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, header)
    return path


def counted() -> tuple[int, int]:
    """The first place whose token is supervised and whose support has two ids."""
    b = full()
    assert b.support is not None
    assert b.support.present is not None
    several = b.mask & b.support.present[..., :2].all(-1)
    row, position = several.nonzero()[0].tolist()
    return row, position


PLACE = counted()
WORDS = rf"\({PLACE[0]}, {PLACE[1]}\)"


def put(name: str, place: tuple[int, ...], value: float) -> Callable[[Any, Any], None]:
    return lambda tensors, _: tensors[name].__setitem__(place, value)


def setting(name: str, value: Any) -> Callable[[Any, Any], None]:
    def change(_: Any, header: dict[str, str]) -> None:
        header["settings"] = json.dumps(json.loads(header["settings"]) | {name: value})

    return change


BATCHES = {
    "negative id": (put("tokens", (0, 0), -5), r"tokens: -5 at \(0, 0\) is no token id"),
    "large id": (put("tokens", (0, 0), 2**40), r"tokens: 1099511627776 at \(0, 0\)"),
    "support id": (put("support.ids", (0, 0, 1), -1), r"support.ids: -1 at \(0, 0, 1\)"),
    "twice": (
        lambda t, _: t["support.ids"].__setitem__(PLACE, t["support.ids"][PLACE][0]),
        f"support.ids: an id stands twice at {WORDS}",
    ),
    "mass": (
        lambda t, _: t["support.teacher_logp"].__setitem__(PLACE, -0.01),
        rf"support.teacher_logp: probabilities of \d\.\d+ in sum at {WORDS}, expected at most 1",
    ),
    "nan": (put("teacher_logp", (0, 0), float("nan")), "teacher_logp: 1 of .* not finite"),
    "sentinel": (
        put("teacher_logp", PLACE, -9999.0),
        rf"teacher_logp: -9999 at {WORDS} marks a missing log-probability",
    ),
    "positive": (put("student_logp", PLACE, 0.5), "student_logp: 1 of .* positive log-prob"),
    "lacks": (lambda t, _: t.pop("student_logp"), "it lacks the fields student_logp"),
    "lacks in a part": (lambda t, _: t.pop("support.ids"), "it lacks the fields support.ids"),
    "shape": (lambda t, _: t.update(mask=t["mask"][:, 1:]), r"mask has shape \(12, 39\), expected"),
    "dtype": (lambda t, _: t.update(tokens=t["tokens"].float()), "tokens has dtype torch.float32"),
    "unknown": (lambda t, _: t.update(extra=t["mask"].clone()), "unknown field 'extra'"),
    "no tokens": (
        lambda t, _: t.update({k: x[:0] for k, x in t.items()}),
        r"tokens has shape \(0, 40\): it holds no token",
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
    change, words = BATCHES[name]
    path = changed_batch(tmp_path / "b.safetensors", change)
    with pytest.raises(InvalidInput, match=f"b.safetensors.*{words}"):
        load(path)


def test_files_that_are_not_batches_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    with pytest.raises(MissingFile, match=r"b\.safetensors does not exist"):
        load(path)
    with pytest.raises(OperationFailed, match="is a folder; give the file in it"):
        load(tmp_path)
    full().save(path)
    data = path.read_bytes()
    shape = json.dumps({"x": {"dtype": "F32", "shape": [2**31, 2**20], "data_offsets": [0, 4]}})
    huge = struct.pack("<Q", len(shape)) + shape.encode() + b"\0" * 4
    for content in (data[:500], data[:-1], b"", b"\xff" * 64, struct.pack("<Q", 2**62), huge):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match=r"b\.safetensors is not a whole safetensors file"):
            load(path)


def changed_dump(path: Path, **columns: Any) -> Path:
    """A dump in which each column is what a function makes of its list; None takes it out."""
    save_dump(path, full())
    table = parquet.read_table(path)
    for name, change in columns.items():
        at = table.column_names.index(name)
        if change is None:
            table = table.remove_column(at)
            continue
        made = change(table[name].to_pylist())
        if not isinstance(made, pyarrow.Array):
            made = pyarrow.array(made, table.schema.field(name).type)
        table = table.set_column(at, name, made)
    parquet.write_table(table, path)
    return path


def last(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:-1], value]


DUMPS = {
    "position": (
        {"position": last(2**31 - 1)},
        "position 2147483647 in a resp|position 0 in a response of",
    ),
    "negative position": ({"position": last(-1)}, "position -1 in a response of"),
    "position null": ({"position": last(None)}, "column position: 1 values are null"),
    "position text": (
        {"position": lambda x: pyarrow.array(["a"] * len(x))},
        "column position has type string, expected numbers",
    ),
    "position float": (
        {"position": lambda x: pyarrow.array([float(v) for v in x])},
        "column position does not hold whole numbers",
    ),
    "no position": ({"position": None}, "lacks the columns position"),
    "no id": ({"id": None}, "it lacks the fields tokens"),
    "id": ({"id": lambda x: [-7, *x[1:]]}, r"tokens: -7 at \(0, 0\) is no token id"),
    "ids": ({"id": lambda x: [2**50, *x[1:]]}, r"tokens: 1125899906842624 at \(0, 0\)"),
    "mask": ({"mask": lambda x: pyarrow.array([2.0] * len(x))}, "mask has dtype torch.float64"),
    "sentinel": ({"teacher_logp": last(-9999.0)}, "-9999 at .* marks a missing log-prob"),
    "support null": ({"support.ids": lambda x: [None, *x[1:]]}, "support.ids: .* null"),
    "mass": (
        {"support.student_logp": lambda x: [[0.0] * 4 for _ in x]},
        "of [234] in sum",
    ),
}


@pytest.mark.parametrize("name", DUMPS)
def test_a_wrong_dump_is_refused_by_name(name: str, tmp_path: Path) -> None:
    columns, words = DUMPS[name]
    path = changed_dump(tmp_path / "d.parquet", **columns)
    with pytest.raises(InvalidInput, match=rf"d\.parquet.*({words})"):
        load_dump(path)


def test_what_was_sampled_and_is_not_supervised_survives_a_dump(tmp_path: Path) -> None:
    b = replace(full(), support=None, prefix=None)
    keep = torch.ones_like(b.mask)
    keep[:, 10:] = False
    b = b.supervise(keep)
    save_dump(tmp_path / "d.parquet", b)
    back, kept = load_dump(tmp_path / "d.parquet"), b.trimmed()
    for name in ("mask", "sampled", "student_logp", "sampler_logp"):
        assert torch.equal(getattr(back, name), getattr(kept, name)), name
    assert int(back.sampled.sum()) > int(back.mask.sum())


@contextmanager
def little_memory(more: int) -> Iterator[None]:
    """Let the process have no more than so many bytes beside what it has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def test_small_files_that_unfold_to_gigabytes_are_not_read(tmp_path: Path) -> None:
    """Run-length and dictionary coding: a few kB of 10 million equal values."""
    size = 10_000_000
    lists = pyarrow.ListArray.from_arrays([0, size], pyarrow.repeat(7, size))
    parquet.write_table(pyarrow.table({"tokens": lists}), tmp_path / "r.parquet")
    save_dump(tmp_path / "d.parquet", full())
    about = parquet.read_schema(tmp_path / "d.parquet").metadata
    tokens = pyarrow.table({x: pyarrow.repeat(0, size) for x in ("response", "position", "id")})
    parquet.write_table(tokens.replace_schema_metadata(about), tmp_path / "d.parquet")
    for path, reader in (("r.parquet", Records), ("d.parquet", load_dump)):
        assert (tmp_path / path).stat().st_size < 1 << 18
        with (
            little_memory(60 << 20),
            pytest.raises(InvalidInput, match=rf"{path} has \d+ bytes and unfolds to \d{{8}}"),
        ):
            reader(tmp_path / path)


def test_a_dump_that_pads_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    """One response of 20,000 tokens beside 20,000 of one: 400 million positions."""
    save_dump(tmp_path / "d.parquet", replace(full(), support=None, prefix=None))
    table = parquet.read_table(tmp_path / "d.parquet").slice(0, 1)
    count = 20_000
    many = pyarrow.concat_tables([table] * 2 * count).combine_chunks()
    response = [0] * count + list(range(1, count + 1))
    position = [*range(count), *[0] * count]
    for name, values in (("response", response), ("position", position)):
        at = many.column_names.index(name)
        many = many.set_column(at, name, pyarrow.array(values, pyarrow.int32()))
    many = many.set_column(
        many.column_names.index("student_logp"),
        "student_logp",
        pyarrow.array(torch.rand(2 * count).neg().numpy()),
    )
    parquet.write_table(many, tmp_path / "d.parquet")
    with pytest.raises(InvalidInput, match="40000 tokens, and its 20001 responses padded to 20000"):
        load_dump(tmp_path / "d.parquet")


def test_files_that_are_not_parquet_are_refused_by_name(tmp_path: Path) -> None:
    save_dump(tmp_path / "d.parquet", full())
    data = (tmp_path / "d.parquet").read_bytes()
    for content in (data[:-9], data[: len(data) // 2], b"", b"PAR1" + data[4:9] + b"PAR1"):
        (tmp_path / "d.parquet").write_bytes(content)
        for reader in (load_dump, Records):
            with pytest.raises(InvalidInput, match=r"d\.parquet is not a whole parquet file"):
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
            read(path)
    finally:
        os.seteuid(user)
