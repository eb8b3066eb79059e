"""Batches from files: read, put together, and checked for values that no run writes.

Shapes: B responses, T response positions, K support ids.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diagnostics.batch import FORMAT, DistributionStats, Rollouts, ScoredRollouts, Support
from diagnostics.errors import InvalidInput
from diagnostics.io.files import KINDS, has_type, parse_json, reading, short

PARTS: dict[str, Any] = {
    "support": Support,
    "student_support": Support,
    "prefix": DistributionStats,
}
BATCH_TYPES: dict[str, type[Rollouts]] = {
    "Rollouts": Rollouts,
    "ScoredRollouts": ScoredRollouts,
    "Scored": ScoredRollouts,  # as older files call it
}
"""Type in the header of a batch file -> the class that it is read as."""
ID_LIMIT = 2**24
"""Token ids are below this: no vocabulary has 16 million ids, and tables of ids are bounded."""
MOST_MASS = 1.01
"""Largest sum of a support's probabilities; bfloat16 rounds true ones to a little above 1."""


def load(path: str | Path) -> Rollouts:
    """Read a batch that `save` wrote: `ScoredRollouts` if it was scored, else `Rollouts`.

    Raises:
      InvalidInput: not such a file, or one whose fields, shapes, types or values are wrong.
      MissingFile, OperationFailed: see `diagnostics.io.files.reading`.
    """
    with reading(path), Path(path).open("rb"):  # in our words, before safetensors has its own
        pass
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InvalidInput(
                    f"{path} has format {header.get('format')!r}, expected {FORMAT!r}"
                )
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise InvalidInput(f"{path} is not a whole safetensors file ({error})") from error
    settings = parse_json(header.get("settings", ""), f"{path}, its settings")
    if not isinstance(settings, dict):
        raise InvalidInput(f"{path}, its settings: {short(settings)} is not an object")
    kind = BATCH_TYPES.get(header.get("type", ""))
    if kind is None:
        raise InvalidInput(
            f"{path} has type {header.get('type')!r}, expected {' or '.join(BATCH_TYPES)}"
        )
    return assembled(kind, tensors | settings, str(path))


def assembled(kind: type[Rollouts], values: Mapping[str, Any], source: str) -> Any:
    """A checked batch of tensors and settings by name; those of its parts as "part.name".

    Raises:
      InvalidInput: with `source`; a field that is unknown, lacks, or has another shape, type or
        kind of value, and what `check_saved` refuses.
    """
    try:
        batch = _assembled(kind, values)
        check_saved(batch)
    except (InvalidInput, TypeError) as error:  # TypeError: a tensor of another dtype
        raise InvalidInput(f"{source}: {error}") from error
    return batch


def _assembled(kind: type[Rollouts], values: Mapping[str, Any]) -> Any:
    parts: dict[str, dict[str, Any]] = {name: {} for name in ("", *PARTS)}
    for name, value in values.items():
        part, _, own = name.rpartition(".")
        known: Any = {"": kind, **PARTS}.get(part)
        types: dict[str, Any] = {f.name: f.type for f in fields(known)} if known else {}
        if own not in types or own in PARTS or (part and kind is Rollouts):
            raise InvalidInput(f"unknown field {name!r}")
        expected = types[own] if types[own] in (float, str) else None
        if expected is not None and not has_type(value, expected):
            raise InvalidInput(f"{name} is {short(value)}, expected {KINDS[expected]}")
        if expected is None and not isinstance(value, Tensor):
            raise InvalidInput(f"{name} is {short(value)}, expected a tensor")
        parts[part][own] = value
    for part, known in PARTS.items():
        if parts[part]:
            parts[""][part] = _made(known, parts[part], f"{part}.")
    return _made(kind, parts[""], "")


def _made(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
    needed = [f.name for f in fields(kind) if f.default is MISSING]
    if lacking := [prefix + name for name in needed if name not in values]:
        raise InvalidInput(f"it lacks the fields {', '.join(lacking)}")
    return kind(**values)


LOWEST_LOGP = -998.0
"""What is lower is no log-probability but a sign that there is none: -999, -9999, -1e30."""


def check_saved(batch: Rollouts) -> None:
    """Refuse values that no run writes.

    Raises:
      InvalidInput: no response or position; an id that no vocabulary has; a support with an id
        twice or a mass above 1; a sampled token's log-probability below LOWEST_LOGP; what
        `Rollouts.checked` refuses. Names the field and the place.
    """
    if 0 in batch.tokens.shape:
        raise InvalidInput(f"tokens has shape {tuple(batch.tokens.shape)}: it holds no token")
    _check_ids("tokens", batch.tokens)
    batch.checked()
    for name in ("student_logp", "teacher_logp", "sampler_logp", "softmax_logp"):
        logp = getattr(batch, name, None)
        if logp is not None and bool((logp < LOWEST_LOGP).any()):
            place = tuple((logp < LOWEST_LOGP).nonzero()[0].tolist())
            raise InvalidInput(
                f"{name}: {float(logp[place]):g} at {place} marks a missing log-probability; leave "
                "the token out of the mask, or the response out of the file"
            )
    for name in ("support", "student_support"):
        support = getattr(batch, name, None)
        if support is not None:
            counted = batch.sampled[..., None].expand_as(support.ids)
            if support.present is not None:
                counted = counted & support.present
            _check_ids(f"{name}.ids", support.ids)
            _check_support(name, support, counted)


def _check_ids(name: str, ids: Tensor) -> None:
    wrong = (ids < 0) | (ids >= ID_LIMIT)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise InvalidInput(f"{name}: {int(ids[place])} at {place} is no token id")


def _check_support(part: str, support: Support, counted: Tensor) -> None:
    """counted: (B, T, K) bool, the ids that count at positions that were sampled."""
    if support.source != "full":  # of a whole vocabulary each id is there once, in its order
        apart = torch.where(counted, support.ids, -1 - torch.arange(support.k))
        ordered = apart.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        if bool(twice.any()):
            place = tuple(twice.nonzero()[0].tolist())
            raise InvalidInput(f"{part}.ids: an id stands twice at {place}")
    for name in ("student_logp", "teacher_logp"):
        mass = (getattr(support, name).exp() * counted).sum(-1)
        if bool((mass > MOST_MASS).any()):
            place = tuple((mass > MOST_MASS).nonzero()[0].tolist())
            raise InvalidInput(
                f"{part}.{name}: probabilities of {float(mass[place]):.4g} in sum at {place}, "
                "expected at most 1"
            )
