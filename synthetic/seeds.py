"""Random generators derived from an experiment, a setting and its seed."""

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def derive(name: str, setting: dict[str, Any]) -> "torch.Generator":
    """A generator that depends on the experiment and the setting alone, on every machine."""
    import torch

    digest = hashlib.sha256(f"{name} {canonical_json(setting)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def canonical_json(setting: dict[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)
