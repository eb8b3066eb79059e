"""Checks of the values of a record; each message names row, field, value and position.

Shapes: T response positions, K support ids. `location` (file, row and field) begins every message.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from diagnostics.errors import InvalidInput
from diagnostics.io.files import has_type, short_repr
from diagnostics.records.batch_files import ID_LIMIT, MAX_SUPPORT_MASS, MIN_LOGP

ROUNDING = 1e-3
"""Nats by which neighbours in a sorted list may be out of order."""


def to_list(value: Any, location: str) -> list[Any]:
    """Return the value as a list."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{location}: {short_repr(value)} is not a list")
    return list(value)


def parse_topk_lists(value: Any, location: str, mask: np.ndarray, fill: Any) -> list[list[Any]]:
    """Return T lists of K values; null where the mask is False becomes a list of `fill`."""
    rows = to_list(value, location)
    check_length(len(rows), len(mask), location)
    sizes = [None if row is None else len(to_list(row, location)) for row in rows]
    k = next((size for size in sizes if size is not None), 0)
    for t, size in enumerate(sizes):
        if size is None and mask[t]:
            raise InvalidInput(f"{location}: null at position {t}, where the mask is true")
        if size is not None and size != k:
            raise InvalidInput(f"{location}: {size} values at position {t}, but {k} before it")
    return [[fill] * k if row is None else to_list(row, location) for row in rows]


def parse_floats(
    value: Any, location: str, mask: np.ndarray, *, logp: bool, wide: bool = False
) -> np.ndarray:
    """Return numbers (T,) or, with `wide`, (T, K), that are 0 where the mask is False.

    Args:
        value: List of numbers.
        location: Beginning of every message.
        mask: (T,) or (T, K) bool.
        logp: The numbers are log-probabilities.
        wide: Accept (T, K).

    Returns:
        float64 array.

    Raises:
        InvalidInput: Where the mask is True: a bool, not a number, not finite; for
            log-probabilities a positive one or one below MIN_LOGP.
    """
    rows = to_list(value, location)
    check_length(len(rows), len(mask), location)
    check_number_types(rows, location)
    try:
        x = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"{location}: {short_repr(rows)} does not hold numbers only") from error
    if x.ndim > 1 + wide:
        raise InvalidInput(f"{location}: {short_repr(rows)} is nested more deeply than expected")
    if x.ndim > mask.ndim:
        mask = mask[:, None]
    x = np.where(np.broadcast_to(mask, x.shape), x, 0.0)
    faults = [(~np.isfinite(x), "not finite (or null)")]
    if logp:
        faults.append((x > 1e-3, "a positive log-probability"))
        missing_logp_message = "a server's marker of a missing log-probability; mask its token"
        faults.append((x < MIN_LOGP, missing_logp_message))
    for is_invalid, message in faults:
        if is_invalid.any():
            position = tuple(int(i[0]) for i in np.nonzero(is_invalid))
            raise InvalidInput(
                f"{location}: {x[position]} at position {position[0]} is {message}; "
                f"{is_invalid.sum()} such values"
            )
    return x


def parse_ids(value: Any, location: str, ndim: int = 1) -> np.ndarray:
    """Return non-negative token ids, (T,) or (T, K).

    Args:
        value: List of ids.
        location: Beginning of every message.
        ndim: 1 or 2.

    Returns:
        int64 array.

    Raises:
        InvalidInput: Not integers, another depth, a negative id, or one of at least ID_LIMIT.
    """
    rows = to_list(value, location)
    check_number_types(rows, location)
    is_empty = not rows or (ndim == 2 and not rows[0])
    try:
        x = np.zeros((len(rows), 0)[:ndim], dtype=np.int64) if is_empty else np.asarray(rows)
    except ValueError as error:
        raise InvalidInput(
            f"{location}: {short_repr(rows)} has lists of different lengths"
        ) from error
    is_beyond_int64 = x.dtype.kind == "O" and all(type(v) is int for v in x.flat)
    if (x.dtype.kind not in "iu" and not is_beyond_int64) or x.ndim != ndim:
        raise InvalidInput(f"{location}: {short_repr(rows)} does not hold integers only")
    for is_invalid, message in (
        (x < 0, "is not an id; use mask for tokens outside the loss"),
        (x >= ID_LIMIT, f"is not a token id: no vocabulary has more than {ID_LIMIT} ids"),
    ):
        if is_invalid.any():
            position = tuple(int(i[0]) for i in np.nonzero(is_invalid))
            raise InvalidInput(
                f"{location}: {short_repr(int(x[position]))} at position {position[0]} {message}"
            )
    return x.astype(np.int64)


def parse_bools(value: Any, location: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return booleans of that shape, from true, false, 0 and 1."""
    rows = to_list(value, location)
    check_length(len(rows), shape[0], location)
    try:
        x = np.asarray(rows).reshape(shape) if rows else np.zeros(shape, dtype=bool)
    except ValueError as error:
        raise InvalidInput(f"{location}: {short_repr(rows)} is not {shape} booleans") from error
    if x.dtype.kind not in "biuf" or not np.isin(x, (0, 1)).all():
        raise InvalidInput(
            f"{location}: {short_repr(rows)} holds values other than true, false, 0 and 1"
        )
    return x.astype(bool)


def parse_number(value: Any, location: str) -> float:
    """Return a finite number; bools are rejected."""
    is_invalid = not has_type(value, float) and not isinstance(value, np.number)
    if is_invalid or not np.isfinite(float(value)):
        raise InvalidInput(f"{location}: {short_repr(value)} is not a number")
    return float(value)


def check_support(row: dict[str, np.ndarray], mask: np.ndarray, location: str) -> None:
    """Raise on a support that no two softmaxes have: a duplicate id, or a probability sum above 1.

    Args:
        row: `support.ids` (T, K), optionally `support.present`, `support.student_logp` and
            `support.teacher_logp`.
        mask: (T,); other positions are not checked.
        location: Beginning of every message.
    """
    ids = row["support.ids"]
    if len(ids) and not ids.shape[1]:
        raise InvalidInput(
            f"{location}, field support.ids: no id at any position; remove the field"
        )
    is_valid = row.get("support.present", np.ones(ids.shape, dtype=bool)) & mask[:, None]
    distinct_ids = np.where(is_valid, ids, -1 - np.arange(ids.shape[1]))
    sorted_ids = np.sort(distinct_ids, axis=1)
    is_duplicate = (sorted_ids[:, 1:] == sorted_ids[:, :-1]).any(1)
    if is_duplicate.any():
        t = int(is_duplicate.argmax())
        duplicate_id = next(v for v in ids[t][is_valid[t]] if (ids[t][is_valid[t]] == v).sum() > 1)
        raise InvalidInput(
            f"{location}, field support.ids: duplicate id {duplicate_id} at position {t}; a "
            "support holds every id once"
        )
    for name in ("support.student_logp", "support.teacher_logp"):
        if name in row:
            mass = np.where(is_valid, np.exp(np.minimum(row[name], 1.0)), 0.0).sum(1)
            if (mass > MAX_SUPPORT_MASS).any():
                t = int((mass > MAX_SUPPORT_MASS).argmax())
                raise InvalidInput(
                    f"{location}, field {name}: the probabilities at position {t} sum to "
                    f"{mass[t]:.4g}, expected at most 1; are they logits, or renormalised?"
                )


def sort_support(row: dict[str, Any], mask: np.ndarray) -> None:
    """Sort the ids of a teacher's or student's list by descending log-probability, in place.

    Some servers put the sampled token first, others sort by id; metrics of smaller K read the first
    ids. Ids that do not count go last. Lists that are sorted up to rounding are unchanged.

    Args:
        row: As in `check_support`.
        mask: (T,) bool.
    """
    logp = row.get(f"support.{row.get('support.source', 'teacher')}_logp")
    if logp is None or not logp.size:
        return
    is_valid = row.get("support.present", np.ones(logp.shape, dtype=bool)) & mask[:, None]
    running_min = np.minimum.accumulate(np.where(is_valid, logp, np.inf), axis=1)
    is_unsorted = (np.where(is_valid, logp, -np.inf)[:, 1:] > running_min[:, :-1] + ROUNDING).any(1)
    order = np.argsort(np.where(is_valid, -logp, np.inf), axis=1, kind="stable")
    order[~is_unsorted] = np.arange(logp.shape[1])
    names = ("support.ids", "support.present", "support.student_logp", "support.teacher_logp")
    for name in (name for name in names if name in row):
        row[name] = np.take_along_axis(row[name], order, axis=1)


def check_number_types(rows: Iterable[Any], location: str) -> None:
    """Raise on bools and text among numbers, at either depth."""
    kinds = set(map(type, rows))
    for row in rows if list in kinds else ():
        if isinstance(row, list):
            kinds |= set(map(type, row))
    if bool in kinds:
        raise InvalidInput(f"{location}: true or false among the values, expected numbers only")
    if str in kinds:
        raise InvalidInput(f"{location}: {short_repr(rows)} does not hold numbers only")


def check_length(size: int, expected: int, location: str) -> None:
    """Raise unless a list has one value per token."""
    if size != expected:
        raise InvalidInput(
            f"{location}: {size} values, tokens has {expected} (if tokens holds prompt and "
            "response, add response_length, the number of response tokens)"
        )
