"""Manifest of a folder: sizes and checksums of its files, to detect damaged files.

The manifest, files.json, is written last. Checksums are CRC-32: they detect damage, not tampering.
"""

import json
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from diagnostics.io.atomic import write_text

MANIFEST_NAME = "files.json"
BLOCK_BYTES = 1 << 22


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files below a folder."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME
    )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib releases the lock
        sums = list(pool.map(checksum, files))
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": value}
        for path, value in zip(files, sums, strict=True)
    }
    write_text(folder / MANIFEST_NAME, json.dumps(entries, indent=1))


def find_damage(folder: Path) -> str:
    """Find a damaged file in a folder.

    In folders without a manifest, which older versions wrote, JSON files are parsed and the headers
    of safetensors files are compared with the file sizes.

    Args:
        folder: The folder.

    Returns:
        A message about the first damaged file, or "" if there is none.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return next(filter(None, map(read_problem, files)), "")
    if problem := read_problem(path):
        return problem
    entries = json.loads(path.read_text("utf-8"))
    if not isinstance(entries, dict):
        return f"{path} is not a JSON object"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next(
            filter(None, pool.map(lambda item: entry_problem(folder, *item), entries.items())), ""
        )


def entry_problem(folder: Path, name: str, expected: dict[str, int]) -> str:
    """Compare a file with its manifest entry; return what differs, or ""."""
    path = folder / name
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path} has {size} bytes instead of {expected['bytes']}"
    if checksum(path) != expected["crc32"]:
        return f"{path} has changed since it was written (its checksum differs)"
    return ""


def read_problem(path: Path) -> str:
    """Return why a JSON, safetensors or PyTorch file cannot be read, or ""; ignore other files."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".bin" and not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                if file.read(2) in (b"PK", b""):
                    return f"{path} ({path.stat().st_size} bytes) is truncated"
    except ValueError as error:  # invalid JSON or UTF-8
        return f"{path} ({path.stat().st_size} bytes) is not valid JSON: {error}"
    except SafetensorError as error:
        return f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file: {error}"
    return ""


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file's content."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value
