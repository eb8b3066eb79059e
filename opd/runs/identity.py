"""Fingerprints of a run's models and tasks: identities.json beside the settings.

A folder may be rebuilt under the same name, and a copy may have another name. Runs are therefore
pooled as seeds of one method by the contents of their inputs, not by their names.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import replace_folder, write_text
from diagnostics.io.files import read_object

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
TEXT_FILES = ("config.json", "tokenizer.json", "adapter_config.json")
EDGE_BYTES = 1 << 20
"""Number of bytes read at each end of a weight file."""


def record_identities(folder: Path, config: dict[str, Any]) -> None:
    """Write identities.json into a run folder that has none.

    Args:
        folder: Run folder.
        config: Settings. Fingerprints are stored under student, teacher, task and the templates of
            the teacher's prompts; names that are not local paths are left out.
    """
    path = folder / "identities.json"
    if path.exists():
        return
    fingerprints = {
        name: digest
        for name in ("student", "teacher", "task", "teacher_view", "teacher_template")
        if not config.get("tasks") and (digest := fingerprint(Path(str(config.get(name) or ""))))
    }
    write_text(path, json.dumps(fingerprints))


def record_templates(folder: Path, templates: Mapping[str, str], step: int) -> None:
    """Write the texts of a run's template files into its folder, or compare them with it.

    Args:
        folder: Run folder.
        templates: Text of each file, by its path in the settings.
        step: First step to take; 0 records the texts.

    Raises:
        InvalidInput: A file has changed since the run was started.
    """
    path = folder / "templates.json"
    if not templates:
        return
    if step == 0 or not path.exists():
        write_text(path, json.dumps(dict(templates), indent=1, ensure_ascii=False))
        return
    recorded = read_object(path)
    changed = sorted(name for name, text in templates.items() if recorded.get(name) != text)
    if changed:
        raise InvalidInput(
            f"{', '.join(changed)} changed since the run was started with the text in {path}; "
            "restore it to resume, or start another run"
        )


def record_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Save the tokenizer into a run folder that has none, so that its token ids can be decoded."""
    target = folder / "tokenizer"
    if not target.exists():
        partial_folder = folder / "tokenizer.part"
        shutil.rmtree(partial_folder, ignore_errors=True)
        try:
            tokenizer.save_pretrained(partial_folder)
            replace_folder(partial_folder, target)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)


def fingerprint(path: Path) -> str:
    """Hash a file or a model folder.

    Of weight files, only the size and both ends are read, so that large models take no time.

    Args:
        path: File or folder.

    Returns:
        12 hexadecimal digits; empty if the path does not exist or has nothing to hash.
    """
    if path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.name in TEXT_FILES or p.suffix in WEIGHT_SUFFIXES
        )
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
            digest.update(data.read(EDGE_BYTES))
            if size > EDGE_BYTES:
                data.seek(max(EDGE_BYTES, size - EDGE_BYTES))
                digest.update(data.read())
    return digest.hexdigest()[:12]
