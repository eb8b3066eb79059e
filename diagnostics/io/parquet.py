"""Open parquet files of others: what they are, and how much they unfold to, before it is read."""

from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import reading
from diagnostics.io.packages import load_package

HARMLESS, UNFOLDING = 1 << 26, 512
"""Bytes that a file may always unfold to, and how many times its own size beyond them."""


def open_parquet(path: str | Path) -> Any:
    """A `pyarrow.parquet.ParquetFile` whose values fit in memory in proportion to the file.

    Raises:
      InvalidInput: not a parquet file, or one of a few bytes that unfolds to very many.
      MissingFile, OperationFailed: see `diagnostics.io.files.reading`. MissingPackage: no pyarrow.
    """
    arrow = load_package("pyarrow", str(path), "data")
    parquet = load_package("pyarrow.parquet", str(path), "data")
    with reading(path):
        size = Path(path).stat().st_size
        with Path(path).open("rb"):  # pyarrow's words for a folder or a lack of permission vary
            pass
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} is not a whole parquet file ({error})") from error
    unfolded = _unfolded(file.metadata)
    if unfolded > max(HARMLESS, UNFOLDING * size):
        raise InvalidInput(
            f"{path} has {size} bytes and unfolds to {unfolded} and more, over {UNFOLDING} times "
            "as many: not a record of real tokens"
        )
    return file


def _unfolded(metadata: Any) -> int:
    """Bytes of all values, by what the file says of itself: at least a value's own 8."""
    total = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        total += sum(max(8 * x.num_values, x.total_uncompressed_size) for x in columns)
    return max(total, 8 * metadata.num_rows)
