"""Hashes that bind a cache to a teacher and to a tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.files import parse_json, read_text

NUM_ELEMENTS = 256
"""Elements of each weight that are hashed, evenly spaced."""


@torch.no_grad()
def weights_fingerprint(network: Any) -> str:
    """Hash a sample of every weight of a model in memory.

    Args:
        network: Hugging Face model.

    Returns:
        16 hexadecimal digits, which depend on names, shapes, precision and values.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(network.named_parameters()):
        flat = weight.detach().flatten()
        index = torch.linspace(0, max(0, len(flat) - 1), min(NUM_ELEMENTS, len(flat))).long()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(flat[index.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash the vocabulary of a tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Returns:
        16 hexadecimal digits.
    """
    content = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def verify_text(path: Path, name: str, fingerprint: str) -> None:
    """Store a fingerprint in a file of fingerprints by name, or compare it with the stored one.

    Args:
        path: The file, JSON; made if there is none.
        name: Name of the teacher.
        fingerprint: Its fingerprint.

    Raises:
        InvalidInput: Another one is stored.
    """
    stored: Any = parse_json(read_text(path), str(path)) if path.exists() else {}
    if stored.setdefault(name, fingerprint) != fingerprint:
        raise InvalidInput(
            f"{name} holds the scores of another teacher than at the start of the run (weights "
            f"{fingerprint} instead of {stored[name]}); restore the cache, or start again with "
            "--anew"
        )
    write_text(path, json.dumps(stored))
