"""Opening of parquet files with a check of their decompressed size before they are read."""

from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import translate_read_errors
from diagnostics.io.packages import load_package

MAX_UNCHECKED_BYTES, MAX_EXPANSION_RATIO = 1 << 26, 512
"""Decompressed size that is always allowed, and the largest decompression ratio beyond it."""


def open_parquet(path: str | Path) -> Any:
    """Open a parquet file whose decompressed size is proportionate to its file size.

    Args:
        path: The file.

    Returns:
        A `pyarrow.parquet.ParquetFile`.

    Raises:
        InvalidInput: Not a parquet file, or a small file that decompresses to a huge size.
        MissingFile: See `diagnostics.io.files.translate_read_errors`.
        OperationFailed: See `diagnostics.io.files.translate_read_errors`.
        MissingPackage: Pyarrow is not installed.
    """
    arrow = load_package("pyarrow", str(path), "data")
    parquet = load_package("pyarrow.parquet", str(path), "data")
    with translate_read_errors(path):
        size = Path(path).stat().st_size
        with Path(path).open("rb"):  # pyarrow's errors for folders and permissions vary
            pass
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} is not a complete parquet file ({error})") from error
    uncompressed = _uncompressed_size(file.metadata)
    if uncompressed > max(MAX_UNCHECKED_BYTES, MAX_EXPANSION_RATIO * size):
        raise InvalidInput(
            f"{path} has {size} bytes and decompresses to at least {uncompressed}, more than "
            f"{MAX_EXPANSION_RATIO} times as many; real records do not"
        )
    return file


def _uncompressed_size(metadata: Any) -> int:
    """Return the bytes of all values by the file's metadata, at least 8 per value."""
    total = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        total += sum(max(8 * x.num_values, x.total_uncompressed_size) for x in columns)
    return max(total, 8 * metadata.num_rows)
