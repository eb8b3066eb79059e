"""Checks of the values of one record; each message names the row, the field, the value, the place.

Shapes: T response positions, K support ids. `where` (file, row and field) opens every message.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from diagnostics.errors import InvalidInput
from diagnostics.io.files import has_type, short
from diagnostics.records.batch_files import ID_LIMIT, LOWEST_LOGP, MOST_MASS

ROUNDING = 1e-3
"""Nats by which neighbours of a list may be out of order."""


def listed(value: Any, where: str) -> list[Any]:
    """The value as a list."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{where}: {short(value)} is not a list")
    return list(value)


def wide_rows(value: Any, where: str, mask: np.ndarray, fill: Any) -> list[list[Any]]:
    """T lists of K values; a null where the mask is False becomes a list of `fill`."""
    rows = listed(value, where)
    same_length(len(rows), len(mask), where)
    sizes = [None if row is None else len(listed(row, where)) for row in rows]
    k = next((size for size in sizes if size is not None), 0)
    for t, size in enumerate(sizes):
        if size is None and mask[t]:
            raise InvalidInput(f"{where}: null at position {t}, which the mask holds supervised")
        if size is not None and size != k:
            raise InvalidInput(f"{where}: {size} values at position {t}, {k} before it")
    return [[fill] * k if row is None else listed(row, where) for row in rows]


def floats(
    value: Any, where: str, mask: np.ndarray, *, logp: bool, wide: bool = False
) -> np.ndarray:
    """(T,) or, with `wide`, (T, K) numbers, 0 where the mask, (T,) or (T, K), is False.

    Raises:
      InvalidInput: where the mask is True: true or false, no number, no finite number; of
        log-probabilities a positive one or one below LOWEST_LOGP.
    """
    rows = listed(value, where)
    same_length(len(rows), len(mask), where)
    refuse_other_types(rows, where)
    try:
        x = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"{where}: {short(rows)} does not hold numbers alone") from error
    if x.ndim > 1 + wide:
        raise InvalidInput(f"{where}: {short(rows)} is nested more deeply than expected")
    if x.ndim > mask.ndim:
        mask = mask[:, None]
    x = np.where(np.broadcast_to(mask, x.shape), x, 0.0)
    faults = [(~np.isfinite(x), "not finite (or null)")]
    if logp:
        faults.append((x > 1e-3, "a positive log-probability"))
        absent = "no log-probability but a server's sign that it has none; mask its token"
        faults.append((x < LOWEST_LOGP, absent))
    for bad, words in faults:
        if bad.any():
            place = tuple(int(i[0]) for i in np.nonzero(bad))
            raise InvalidInput(
                f"{where}: {x[place]} at position {place[0]} is {words}; {bad.sum()} such values"
            )
    return x


def ids(value: Any, where: str, ndim: int = 1) -> np.ndarray:
    """(T,) or (T, K) token ids, int64.

    Raises:
      InvalidInput: another value than a whole number in [0, ID_LIMIT).
    """
    rows = listed(value, where)
    refuse_other_types(rows, where)
    empty = not rows or (ndim == 2 and not rows[0])
    try:
        x = np.zeros((len(rows), 0)[:ndim], dtype=np.int64) if empty else np.asarray(rows)
    except ValueError as error:
        raise InvalidInput(f"{where}: {short(rows)} has parts of different sizes") from error
    huge = x.dtype.kind == "O" and all(type(v) is int for v in x.flat)  # beyond 64 bits
    if (x.dtype.kind not in "iu" and not huge) or x.ndim != ndim:
        raise InvalidInput(f"{where}: {short(rows)} does not hold whole numbers alone")
    for bad, words in (
        (x < 0, "is no id; say in mask what is not supervised"),
        (x >= ID_LIMIT, f"is no token id: no vocabulary has more than {ID_LIMIT} ids"),
    ):
        if bad.any():
            place = tuple(int(i[0]) for i in np.nonzero(bad))
            raise InvalidInput(f"{where}: {short(int(x[place]))} at position {place[0]} {words}")
    return x.astype(np.int64)


def bools(value: Any, where: str, shape: tuple[int, ...]) -> np.ndarray:
    """Truth values of that shape, of true, false, 0 and 1."""
    rows = listed(value, where)
    same_length(len(rows), shape[0], where)
    try:
        x = np.asarray(rows).reshape(shape) if rows else np.zeros(shape, dtype=bool)
    except ValueError as error:
        raise InvalidInput(f"{where}: {short(rows)} is not {shape} truth values") from error
    if x.dtype.kind not in "biuf" or not np.isin(x, (0, 1)).all():
        raise InvalidInput(f"{where}: {short(rows)} holds other values than true, false, 0 and 1")
    return x.astype(bool)


def number(value: Any, where: str) -> float:
    """A finite number; true and false are none."""
    wrong = not has_type(value, float) and not isinstance(value, np.number)
    if wrong or not np.isfinite(float(value)):
        raise InvalidInput(f"{where}: {short(value)} is not a number")
    return float(value)


def check_support(row: dict[str, np.ndarray], mask: np.ndarray, where: str) -> None:
    """Refuse a support that no two softmaxes have: an id twice, or more probability than 1.

    Args:
      row: `support.ids` (T, K), optionally `support.present`, `support.student_logp` and
        `support.teacher_logp`. mask: (T,); other positions are not looked at.
    """
    chosen = row["support.ids"]
    if len(chosen) and not chosen.shape[1]:
        raise InvalidInput(f"{where}, field support.ids: no id at any position; leave it out")
    counted = row.get("support.present", np.ones(chosen.shape, dtype=bool)) & mask[:, None]
    distinct = np.where(counted, chosen, -1 - np.arange(chosen.shape[1]))
    ordered = np.sort(distinct, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if twice.any():
        t = int(twice.argmax())
        double = next(v for v in chosen[t][counted[t]] if (chosen[t][counted[t]] == v).sum() > 1)
        raise InvalidInput(
            f"{where}, field support.ids: the id {double} stands twice at position {t}; a support "
            "holds every id once"
        )
    for name in ("support.student_logp", "support.teacher_logp"):
        if name in row:
            mass = np.where(counted, np.exp(np.minimum(row[name], 1.0)), 0.0).sum(1)
            if (mass > MOST_MASS).any():
                t = int((mass > MOST_MASS).argmax())
                raise InvalidInput(
                    f"{where}, field {name}: the probabilities at position {t} sum to "
                    f"{mass[t]:.4g}, expected at most 1; are they logits, or renormalised?"
                )


def order_support(row: dict[str, Any], mask: np.ndarray) -> None:
    """Put the ids of a teacher's or student's list in descending order of its model, in place.

    Some servers write the sampled token first, others sort by id; measures of shallower lists read
    the first ids. Ids that do not count go last. Lists in order, up to rounding, stay as they are.

    Args:
      row, mask: as of `check_support`.
    """
    logp = row.get(f"support.{row.get('support.source', 'teacher')}_logp")
    if logp is None or not logp.size:
        return
    counted = row.get("support.present", np.ones(logp.shape, dtype=bool)) & mask[:, None]
    least = np.minimum.accumulate(np.where(counted, logp, np.inf), axis=1)
    rising = (np.where(counted, logp, -np.inf)[:, 1:] > least[:, :-1] + ROUNDING).any(1)
    order = np.argsort(np.where(counted, -logp, np.inf), axis=1, kind="stable")
    order[~rising] = np.arange(logp.shape[1])
    names = ("support.ids", "support.present", "support.student_logp", "support.teacher_logp")
    for name in (name for name in names if name in row):
        row[name] = np.take_along_axis(row[name], order, axis=1)


def refuse_other_types(rows: Iterable[Any], where: str) -> None:
    """Refuse true, false and text among numbers, at either depth."""
    kinds = set(map(type, rows))
    for row in rows if list in kinds else ():
        if isinstance(row, list):
            kinds |= set(map(type, row))
    if bool in kinds:
        raise InvalidInput(f"{where}: true or false among the values, expected numbers")
    if str in kinds:
        raise InvalidInput(f"{where}: {short(rows)} does not hold numbers alone")


def same_length(size: int, expected: int, where: str) -> None:
    """Refuse a list that has not a value for every token."""
    if size != expected:
        raise InvalidInput(
            f"{where}: {size} values, tokens has {expected} (where tokens is prompt and response, "
            "response_length says how many are the response's)"
        )
