"""Rows of files of torch.save and of verl's pickled `DataProto`, read without running code.

Shapes: B responses; each tensor has B rows.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr, translate_read_errors

SAMPLES = "samples"
"""Field of slime's files that holds the samples."""

ZIP_START = b"PK\x03\x04"
"""First bytes of a file of torch.save; a pickled DataProto has such a file inside."""

REMEDY = "save plain tensors: torch.save({**data.batch, **data.non_tensor_batch}, FILE)"


class _PickledDataProto:
    """State of a verl `DataProto`; its class is not needed."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _rebuild_batch(metadata: Mapping[str, Any], storage: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a consolidated TensorDict, which are slices of one storage of bytes."""
    tensors = {}
    for name, (dtype, shape, start, stop, _) in metadata["leaves"].items():
        if not isinstance(name, str) or name.startswith("<NJT"):
            raise InvalidInput(f"the batch holds the nested tensor {short_repr(name)}; {REMEDY}")
        size = torch.Size(shape)
        kind = getattr(torch, str(dtype).removeprefix("torch."))
        tensors[name] = storage[start:stop].view(kind)[: size.numel()].view(size)
    return tensors


_REBUILD_NAME = "tensordict._reductions._rebuild_tensordict_files_consolidated"
_PICKLED: dict[tuple[str, str], Any] = {
    ("verl.protocol", "DataProto"): _PickledDataProto,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("torch", "Size"): torch.Size,
    **{
        (module, "_reconstruct"): multiarray._reconstruct
        for module in ("numpy._core.multiarray", "numpy.core.multiarray")
    },
}
"""Everything that a pickled DataProto may name; loading any of it runs no code of the file."""


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class or function."""
        if (module, name) not in _PICKLED:
            raise InvalidInput(
                f"it names {module}.{name}, which is not loaded from a file; {REMEDY}"
            )
        return _PICKLED[module, name]


def tensor_file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file of tensors.

    Args:
        path: A file of torch.save with an object of tensors and lists, or slime's with samples; or
            a pickled DataProto.

    Yields:
        (location, row).

    Raises:
        InvalidInput: Another content, or fields with different numbers of rows.
        MissingFile: There is no such file.
    """
    with translate_read_errors(path):
        data = path.read_bytes()
    content = _load(data, str(path))
    if isinstance(content, Mapping) and isinstance(content.get(SAMPLES), list):
        content = content[SAMPLES]
    if isinstance(content, list):
        for i, row in enumerate(content, 1):
            yield f"{path} row {i}", _plain(row)
        return
    if not isinstance(content, Mapping):
        raise InvalidInput(f"{path} holds {type(content).__name__}, expected an object of tensors")
    fields = {str(k): v for k, v in content.items() if isinstance(v, Tensor | np.ndarray | list)}
    sizes = {name: len(value) for name, value in fields.items() if np.ndim(value) or len(value)}
    if not sizes:
        raise InvalidInput(f"{path} holds no tensors; {REMEDY}")
    if len(set(sizes.values())) > 1:
        raise InvalidInput(
            f"{path}: its fields have different numbers of rows, {short_repr(sizes)}"
        )
    for i in range(next(iter(sizes.values()))):
        yield f"{path} row {i + 1}", {name: _plain(value[i]) for name, value in fields.items()}


def _load(data: bytes, source: str) -> Any:
    """Load the content of a file; a DataProto becomes an object of its tensors and arrays."""
    try:
        if data.startswith(ZIP_START):
            content = _load_tensors(data)
        else:
            content = _SafeUnpickler(io.BytesIO(data)).load()
        if not isinstance(content, _PickledDataProto):
            return content
        batch, others, _ = content.state
        tensors = _load_tensors(batch) if isinstance(batch, bytes) else _numpy_batch(batch)
        return {**tensors, **others}
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error}") from error
    except Exception as error:  # a damaged or foreign file can make the loaders raise anything
        reason = (str(error) or type(error).__name__).partition(". ")[0].splitlines()[0]
        raise InvalidInput(f"{source} cannot be read as tensors ({reason}); {REMEDY}") from error


def _load_tensors(data: bytes) -> Any:
    allowed: list[Any] = [
        (_rebuild_batch, _REBUILD_NAME),
        (_PickledDataProto, "verl.protocol.DataProto"),
        (multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
        (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(object)),
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _numpy_batch(state: Any) -> dict[str, Tensor]:
    """Return the tensors of verl's other form: (dtype, shape, bytes) by name."""
    _, _, tensors = state
    return {
        name: torch.from_numpy(data.copy()).view(getattr(torch, dtype)).view(shape)
        for name, (dtype, shape, data) in tensors.items()
    }


def _plain(value: Any) -> Any:
    """Return plain lists and values for tensors and arrays, at any depth of objects."""
    if isinstance(value, Tensor):
        return (value.float() if value.dtype == torch.bfloat16 else value).tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
