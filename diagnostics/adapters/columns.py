"""Columns of a record: their names, the names that others use, and the checks of one row.

A row is one response. Shapes: T response positions, K support ids.

| column | value | also read as |
|---|---|---|
| tokens | T ids | response_ids, response_tokens, completion_ids, output_ids, responses |
| mask | T bools, all true if absent | response_mask, completion_mask, loss_mask |
| student_logp | T | student_logprobs, student_log_probs, old_log_probs, old_per_token_logps |
| teacher_logp | T | teacher_logprobs, teacher_log_probs, ref_log_prob, ref_per_token_logps |
| sampler_logp | T | rollout_log_probs, sampling_per_token_logps, sampler_logprobs |
| softmax_logp | T, before top-p | |
| baseline | T | |
| prompt | id or text of the prompt | prompt_id, prompt_index, uid, group_id |
| prompt_tokens | ids, only for scoring | prompt_ids, prompt_token_ids |
| ended | bool | finished, terminated; finish_reason (stop, length); not truncated |
| reward | number or null | score |
| task, turn | number or name; number | data_source, dataset; turn_index |
| support.ids | T lists of K ids | topk_ids, teacher_topk_ids, teacher_ids |
| support.student_logp | T x K | topk_student_logp, student_topk_logp, student_topk_logprobs |
| support.teacher_logp | T x K | topk_teacher_logp, teacher_topk_logp, teacher_topk_logprobs |
| support.present | T x K bools | |
| support.source | "teacher" if absent | topk_source |
| prefix.NAME | T, the fields of `diagnostics.batch.Prefix` | |
| temperature, top_p, score_temperature, mask_rule | one value a file | |

`support` and `prefix` may also be objects. A list may hold null where the mask is false.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from diagnostics.batch import Prefix
from diagnostics.errors import InvalidInput

Record = dict[str, Any]
"""A checked row: canonical column names to numpy arrays (T,), (T, K) or plain values."""

PREFIX = tuple(f"prefix.{f.name}" for f in fields(Prefix))
PREFIX_NEEDED = tuple(f"prefix.{f.name}" for f in fields(Prefix) if f.default is MISSING)
LOGPS = ("student_logp", "teacher_logp", "sampler_logp", "softmax_logp")
SUPPORT = ("support.student_logp", "support.teacher_logp")
CONSTANTS = ("temperature", "top_p", "score_temperature", "mask_rule", "support.source")
"""Columns that hold one value in the whole file."""

_ALSO = {
    "tokens": "response_ids response_tokens completion_ids output_ids responses",
    "mask": "response_mask completion_mask loss_mask",
    "student_logp": "student_logprobs student_log_probs old_log_probs old_per_token_logps",
    "teacher_logp": "teacher_logprobs teacher_log_probs ref_log_prob ref_per_token_logps",
    "sampler_logp": "rollout_log_probs sampling_per_token_logps sampler_logprobs",
    "softmax_logp": "",
    "baseline": "",
    "prompt": "prompt_id prompt_index uid group_id",
    "prompt_tokens": "prompt_ids prompt_token_ids",
    "ended": "finished terminated finish_reason truncated",
    "reward": "score",
    "task": "data_source dataset",
    "turn": "turn_index",
    "support.ids": "topk_ids teacher_topk_ids teacher_ids",
    "support.student_logp": "topk_student_logp student_topk_logp student_topk_logprobs",
    "support.teacher_logp": "topk_teacher_logp teacher_topk_logp teacher_topk_logprobs",
    "support.present": "",
    "support.source": "topk_source",
    **dict.fromkeys((*PREFIX, *CONSTANTS[:4]), ""),
}
NAMES = {also: name for name, others in _ALSO.items() for also in (name, *others.split())}
"""Every understood column, and what it means."""

_REASONS = {"stop": True, "eos": True, "eos_token": True, "length": False, "max_tokens": False}


def read_row(raw: Any, where: str, rename: Mapping[str, str]) -> Record:
    """One row, checked; `where` (file and row) opens every message.

    Per-token floats become 0 where the mask is False, whatever stood there.

    Raises:
      ValueError: with `where`, the field, the value and its position.
    """
    if not isinstance(raw, Mapping):
        raise InvalidInput(f"{where}: {_short(raw)} is not an object with columns")
    given = _named(raw, where, rename)
    if "tokens" not in given:
        raise InvalidInput(
            f"{where}: no field tokens among {', '.join(map(str, raw)) or 'no columns'}; ids of "
            "the response are needed, under this or another known name (or give rename=)"
        )
    tokens = _ids(given["tokens"], f"{where}, field tokens")
    mask = np.ones(len(tokens), dtype=bool)
    if "mask" in given:
        mask = _bools(given["mask"], f"{where}, field mask", tokens.shape)
    row: Record = {"tokens": tokens, "mask": mask}
    for name, value in given.items():
        if name not in row:
            row[name] = _value(name, value, mask, f"{where}, field {name}")
    wide = {row[n].shape for n in ("support.ids", "support.present", *SUPPORT) if n in row}
    if len(wide) > 1:
        raise InvalidInput(f"{where}: the support's fields have shapes {sorted(wide)}")
    return row


def number_of(value: Any) -> int:
    """An id as it is, anything else by a 62-bit hash of its content."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    plain = value.tolist() if isinstance(value, np.ndarray) else value
    text = json.dumps(plain, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def _named(raw: Mapping[str, Any], where: str, rename: Mapping[str, str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if key in ("support", "prefix") and isinstance(value, Mapping):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[str(key)] = value
    given: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in flat.items():
        name = rename.get(key, NAMES.get(key))
        if name is None or (value is None and name != "reward"):
            continue
        if name in given:
            raise InvalidInput(
                f"{where}: columns {origin[name]!r} and {key!r} both mean {name}; rename one"
            )
        given[name], origin[name] = value, key
        if key in ("finish_reason", "truncated"):
            given[name] = _ended(key, value, f"{where}, field {key}")
    return given


def _value(name: str, value: Any, mask: np.ndarray, where: str) -> Any:
    if name in LOGPS or name in PREFIX or name == "baseline":
        return _floats(value, where, mask, logp=name in LOGPS)
    if name in SUPPORT:
        return _floats(_rows(value, where, mask, 0.0), where, mask, logp=True)
    if name == "support.ids":
        return _ids(_rows(value, where, mask, 0), where, 2)
    if name == "support.present":
        rows = _rows(value, where, mask, False)
        return _bools(rows, where, (len(mask), len(rows[0]) if rows else 0))
    if name == "prompt_tokens":
        return _ids(value, where)
    if name == "ended":
        return bool(_bools([value], where, (1,))[0])
    if name == "turn":
        return int(_ids([value], where)[0])
    if name == "reward" and value is None:
        return float("nan")
    if name in ("reward", "temperature", "top_p", "score_temperature"):
        if isinstance(value, bool | int | float | np.number):
            return float(value)
        raise InvalidInput(f"{where}: {_short(value)} is not a number")
    return value


def _ended(key: str, value: Any, where: str) -> bool:
    if key == "truncated":
        return not bool(_bools([value], where, (1,))[0])
    if value not in _REASONS:
        raise InvalidInput(f"{where}: {_short(value)} is none of {', '.join(_REASONS)}")
    return _REASONS[value]


def _listed(value: Any, where: str) -> list[Any]:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{where}: {_short(value)} is not a list")
    return list(value)


def _rows(value: Any, where: str, mask: np.ndarray, fill: Any) -> list[Any]:
    """T lists of K values; a null where the mask is False becomes a list of `fill`."""
    rows = _listed(value, where)
    _same_length(len(rows), len(mask), where)
    sizes = [None if row is None else len(_listed(row, where)) for row in rows]
    k = next((size for size in sizes if size is not None), 0)
    for t, size in enumerate(sizes):
        if size is None and mask[t]:
            raise InvalidInput(f"{where}: null at position {t}, which the mask holds supervised")
        if size is not None and size != k:
            raise InvalidInput(f"{where}: {size} values at position {t}, {k} before it")
    return [[fill] * k if row is None else _listed(row, where) for row in rows]


def _floats(value: Any, where: str, mask: np.ndarray, logp: bool) -> np.ndarray:
    rows = _listed(value, where)
    _same_length(len(rows), len(mask), where)
    try:
        x = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInput(f"{where}: {_short(rows)} does not hold numbers alone") from None
    kept = mask if x.ndim == 1 else np.broadcast_to(mask[:, None], x.shape)
    x = np.where(kept, x, 0.0)
    bad = ~np.isfinite(x)
    if logp:
        bad |= x > 1e-3
    if bad.any():
        at = tuple(int(i[0]) for i in np.nonzero(bad))
        what = "a positive log-probability" if np.isfinite(x[at]) else "not finite (or null)"
        raise InvalidInput(
            f"{where}: {x[at]} at position {at[0]} is {what}; {bad.sum()} such values"
        )
    return x


def _ids(value: Any, where: str, ndim: int = 1) -> np.ndarray:
    rows = _listed(value, where)
    empty = not rows or (ndim == 2 and not rows[0])
    x = np.zeros((len(rows), 0)[:ndim], dtype=np.int64) if empty else np.asarray(rows)
    if x.dtype.kind not in "iu" or x.ndim != ndim:
        raise InvalidInput(f"{where}: {_short(rows)} does not hold whole numbers alone")
    if (x < 0).any():
        at = tuple(int(i[0]) for i in np.nonzero(x < 0))
        raise InvalidInput(
            f"{where}: {x[at]} at position {at[0]} is no id; say in mask what is not supervised"
        )
    return x.astype(np.int64)


def _bools(value: Any, where: str, shape: tuple[int, ...]) -> np.ndarray:
    rows = _listed(value, where)
    _same_length(len(rows), shape[0], where)
    x = np.asarray(rows).reshape(shape) if rows else np.zeros(shape, dtype=bool)
    if x.dtype.kind not in "biuf" or not np.isin(x, (0, 1)).all():
        raise InvalidInput(f"{where}: {_short(rows)} holds other values than true, false, 0 and 1")
    return x.astype(bool)


def _same_length(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise InvalidInput(f"{where}: {found} values, tokens has {expected}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
