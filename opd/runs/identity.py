"""What a run's models and tasks hold, as short fingerprints beside its settings: identities.json.

A folder may be made anew under the same name, and a copy may have another: runs are pooled as seeds
of one method by what was read, not by what it was called.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from diagnostics.io.atomic import replace_folder
from opd.runs.run_folder import write_text

WEIGHTS = (".safetensors", ".bin", ".pt")
TEXTS = ("config.json", "tokenizer.json", "adapter_config.json")
END = 1 << 20
"""Bytes of each end of a file of weights that are read."""


def record_identities(folder: Path, config: dict[str, Any]) -> None:
    """Write identities.json into a run folder that has none; names that are no local ones are out.

    Keys are the settings student, teacher and task.
    """
    path = folder / "identities.json"
    if path.exists():
        return
    found = {
        name: digest
        for name in ("student", "teacher", "task")
        if not config.get("tasks") and (digest := fingerprint(Path(str(config.get(name) or ""))))
    }
    write_text(path, json.dumps(found))


def record_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Save the tokenizer into a run folder that has none: what the ids of the record spell."""
    target = folder / "tokenizer"
    if not target.exists():
        part = folder / "tokenizer.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            tokenizer.save_pretrained(part)
            replace_folder(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def fingerprint(path: Path) -> str:
    """12 hexadecimal digits of a file, or of a model's folder; empty if it is neither.

    Of weights the size and both ends of each file count, so that large models take no time.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name in TEXTS or p.suffix in WEIGHTS)
    else:
        files = [path] if path.is_file() else []
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        name = file.name if path.is_dir() else ""
        digest.update(f"{name} {size}\n".encode())
        with open(file, "rb") as data:
            digest.update(data.read(END))
            if size > END:
                data.seek(max(END, size - END))
                digest.update(data.read())
    return digest.hexdigest()[:12]
