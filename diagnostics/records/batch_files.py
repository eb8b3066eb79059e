"""Reading of saved batches, with checks for values that no run writes.

Shapes: B responses, T response positions, K support ids.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diagnostics.batch import (
    FIELDS_OF_ANOTHER,
    FORMAT,
    ORIGINS,
    DistributionStats,
    Rollouts,
    ScoredRollouts,
    Support,
)
from diagnostics.errors import InvalidInput
from diagnostics.io.files import TYPE_NAMES, has_type, parse_json, short_repr, translate_read_errors
from diagnostics.missing import Missing, OptionalField, missing_fields

PARTS: dict[str, Any] = {
    "support": Support,
    "student_support": Support,
    "prefix": DistributionStats,
}
BATCH_TYPES: dict[str, type[Rollouts]] = {
    "Rollouts": Rollouts,
    "ScoredRollouts": ScoredRollouts,
    "Scored": ScoredRollouts,  # name in older files
}
"""Type in the header of a batch file -> the class that it is read as."""
ID_LIMIT = 2**24
"""Token ids are below this, which bounds tables indexed by id; no vocabulary has 16 million ids."""
MAX_SUPPORT_MASS = 1.01
"""Largest sum of a support's probabilities; bfloat16 rounds true ones to a little above 1."""


def load_batch(path: str | Path) -> Rollouts:
    """Read a batch that `save` wrote.

    Args:
        path: The safetensors file.

    Returns:
        `ScoredRollouts` if the batch was scored, else `Rollouts`.

    Raises:
        InvalidInput: Not such a file, or one whose fields, shapes, types or values are wrong.
        MissingFile: See `diagnostics.io.files.translate_read_errors`.
        OperationFailed: See `diagnostics.io.files.translate_read_errors`.
    """
    with translate_read_errors(path), Path(path).open("rb"):
        # raise a clear error before safetensors raises its own
        pass
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InvalidInput(
                    f"{path} has format {header.get('format')!r}, expected {FORMAT!r}; "
                    "give a batch file that a run saved"
                )
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise InvalidInput(f"{path} is not a complete safetensors file ({error})") from error
    settings = parse_json(header.get("settings", ""), f"{path}, its settings")
    if not isinstance(settings, dict):
        raise InvalidInput(f"{path}, its settings: {short_repr(settings)} is not an object")
    kind = BATCH_TYPES.get(header.get("type", ""))
    if kind is None:
        raise InvalidInput(
            f"{path} has type {header.get('type')!r}, expected {' or '.join(BATCH_TYPES)}"
        )
    missing = parse_json(header.get("missing", "{}"), f"{path}, its missing fields")
    if not isinstance(missing, dict) or not missing.keys() <= FIELDS_OF_ANOTHER:
        raise InvalidInput(
            f"{path}, its missing fields: {short_repr(missing)}; only "
            f"{', '.join(sorted(FIELDS_OF_ANOTHER))} may be missing"
        )
    absent = {name: Missing(str(subject)) for name, subject in missing.items()}
    return build_batch(kind, tensors | settings | absent, str(path))


def build_batch(kind: type[Rollouts], values: Mapping[str, Any], source: str) -> Any:
    """Build a checked batch from tensors and settings.

    Args:
        kind: Class of the batch.
        values: Values by field name; those of its parts as "part.name".
        source: Beginning of every message.

    Returns:
        The batch.

    Raises:
        InvalidInput: A field is unknown, is missing, or has another shape, type or kind of value,
            or `check_batch` fails.
    """
    try:
        batch = _build_batch(kind, values)
        check_batch(batch)
    except (InvalidInput, TypeError) as error:  # TypeError: wrong dtype
        raise InvalidInput(f"{source}: {error}") from error
    return batch


SETTING_TYPES: Mapping[Any, type] = {float: float, OptionalField[float]: float, str: str}
"""Types of fields that are no tensors -> the type of their values."""


def _build_batch(kind: type[Rollouts], values: Mapping[str, Any]) -> Any:
    parts: dict[str, dict[str, Any]] = {name: {} for name in ("", *PARTS)}
    for name, value in values.items():
        part, _, field_name = name.rpartition(".")
        part_type: Any = {"": kind, **PARTS}.get(part)
        types: dict[str, Any] = {f.name: f.type for f in fields(part_type)} if part_type else {}
        if field_name not in types or field_name in PARTS or (part and kind is Rollouts):
            raise InvalidInput(f"unknown field {name!r}")
        expected = SETTING_TYPES.get(types[field_name])
        if expected is not None and not has_type(value, expected):
            raise InvalidInput(f"{name} is {short_repr(value)}, expected {TYPE_NAMES[expected]}")
        if expected is None and not isinstance(value, Tensor | Missing):
            raise InvalidInput(f"{name} is {short_repr(value)}, expected a tensor")
        parts[part][field_name] = value
    for part, part_type in PARTS.items():
        if parts[part]:
            parts[""][part] = _construct(part_type, parts[part], f"{part}.")
    return _construct(kind, parts[""], "")


def _construct(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
    required_names = [f.name for f in fields(kind) if f.default is MISSING]
    if missing_names := [prefix + name for name in required_names if name not in values]:
        raise InvalidInput(f"missing fields: {', '.join(missing_names)}")
    return kind(**values)


MIN_LOGP = -998.0
"""Lower values are markers of a missing log-probability: -999, -9999, -1e30."""


def check_batch(batch: Rollouts) -> None:
    """Raise if a batch holds values that no run writes.

    Args:
        batch: The batch.

    Raises:
        InvalidInput: No response or position; a token id outside any vocabulary; a support with a
            duplicate id or a mass above 1; a sampled token's log-probability below MIN_LOGP;
            anything that `Rollouts.validate` rejects. Names the field and the position.
    """
    if 0 in batch.tokens.shape:
        raise InvalidInput(f"tokens has shape {tuple(batch.tokens.shape)}: it is empty")
    _check_ids("tokens", batch.tokens)
    batch.validate()
    missing = missing_fields(batch)
    origin = batch.origin
    if origin is not None and bool(((origin < 0) | (origin >= len(ORIGINS))).any()):
        raise InvalidInput(
            f"origin holds {origin.unique().tolist()}; it must hold indices of {', '.join(ORIGINS)}"
        )
    for name in ("student_logp", "teacher_logp", "sampler_logp", "softmax_logp"):
        logp = None if name in missing else getattr(batch, name, None)
        if logp is not None and bool((logp < MIN_LOGP).any()):
            position = tuple((logp < MIN_LOGP).nonzero()[0].tolist())
            raise InvalidInput(
                f"{name}: {float(logp[position]):g} at {position} marks a missing log-probability; "
                "remove the token from the mask, or the response from the file"
            )
    for name in ("support", "student_support"):
        support = getattr(batch, name, None)
        if support is not None:
            is_valid = batch.sampled[..., None].expand_as(support.ids)
            if support.present is not None:
                is_valid = is_valid & support.present
            _check_ids(f"{name}.ids", support.ids)
            _check_support(name, support, is_valid)


def _check_ids(name: str, ids: Tensor) -> None:
    is_invalid = (ids < 0) | (ids >= ID_LIMIT)
    if bool(is_invalid.any()):
        position = tuple(is_invalid.nonzero()[0].tolist())
        raise InvalidInput(f"{name}: {int(ids[position])} at {position} is not a token id")


def _check_support(part: str, support: Support, is_valid: Tensor) -> None:
    """Raise on duplicate ids or a mass above 1.

    Args:
        part: Name of the support in messages.
        support: The support.
        is_valid: (B, T, K) bool, the ids that count at sampled positions.
    """
    if support.source != "full":  # "full": each id of the vocabulary once, in order
        distinct_ids = torch.where(is_valid, support.ids, -1 - torch.arange(support.k))
        sorted_ids = distinct_ids.sort(-1).values
        is_duplicate = (sorted_ids[..., 1:] == sorted_ids[..., :-1]).any(-1)
        if bool(is_duplicate.any()):
            position = tuple(is_duplicate.nonzero()[0].tolist())
            raise InvalidInput(f"{part}.ids: duplicate id at {position}")
    for name in ("student_logp", "teacher_logp"):
        mass = (getattr(support, name).exp() * is_valid).sum(-1)
        if bool((mass > MAX_SUPPORT_MASS).any()):
            position = tuple((mass > MAX_SUPPORT_MASS).nonzero()[0].tolist())
            raise InvalidInput(
                f"{part}.{name}: the probabilities at {position} sum to "
                f"{float(mass[position]):.4g}, expected at most 1"
            )
