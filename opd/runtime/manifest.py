"""A list of a folder's files with their sizes and checksums, which tells whether one is damaged.

The list, files.json, is written last. Checksums are CRC-32: they find damage, not forgery.
"""

import json
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from diagnostics.io.atomic import write_text

NAME = "files.json"
BLOCK = 1 << 22


def write_manifest(folder: Path) -> None:
    """List all files below a folder in its files.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib releases the lock
        sums = list(pool.map(checksum, files))
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": value}
        for path, value in zip(files, sums, strict=True)
    }
    write_text(folder / NAME, json.dumps(listed, indent=1))


def damage(folder: Path) -> str:
    """What is wrong with the first damaged file of a folder, with its name; "" if nothing is.

    Of a folder without a list, from before lists were written, JSON files are read and the headers
    of safetensors files compared with their sizes.
    """
    path = folder / NAME
    if not path.exists():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return next(filter(None, map(unreadable, files)), "")
    if problem := unreadable(path):
        return problem
    listed = json.loads(path.read_text("utf-8"))
    if not isinstance(listed, dict):
        return f"{path} is no JSON object"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next(filter(None, pool.map(lambda item: changed(folder, *item), listed.items())), "")


def changed(folder: Path, name: str, expected: dict[str, int]) -> str:
    """How a listed file differs from its entry, or ""."""
    path = folder / name
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path} has {size} bytes instead of {expected['bytes']}"
    if checksum(path) != expected["crc32"]:
        return f"{path} has other content than was written (its checksum differs)"
    return ""


def unreadable(path: Path) -> str:
    """Why a JSON, safetensors or zipped PyTorch file cannot be read, or ""; others pass."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".bin" and not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                if file.read(2) in (b"PK", b""):
                    return f"{path} ({path.stat().st_size} bytes) is cut short"
    except ValueError as error:  # of JSON, and of UTF-8
        return f"{path} ({path.stat().st_size} bytes) is no valid JSON: {error}"
    except SafetensorError as error:
        return f"{path} ({path.stat().st_size} bytes) is no whole safetensors file: {error}"
    return ""


def checksum(path: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value
