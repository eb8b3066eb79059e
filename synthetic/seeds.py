"""Random generators seeded by an experiment's name and one of its settings."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def derive(name: str, setting: dict[str, Any]) -> "torch.Generator":
    """Return a generator seeded by the experiment's name and the setting.

    The seed is a SHA-256 hash of both, so it is the same on every machine.

    Args:
        name: Name of the experiment.
        setting: One setting of a preset; values must be JSON-serialisable.

    Returns:
        A CPU generator.
    """
    import torch

    digest = hashlib.sha256(f"{name} {canonical_json(setting)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def canonical_json(setting: dict[str, Any]) -> str:
    """Return the setting as JSON with sorted keys."""
    return json.dumps(setting, sort_keys=True)
