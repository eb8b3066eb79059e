"""Columns of a record: their names, the names that others use, and the checks of one row.

A row is one response. Shapes: T response positions, K support ids.

| column | value | also read as |
|---|---|---|
| tokens | T ids | response_ids, response_tokens, completion_ids, output_ids, responses |
| mask | T bools, part of the loss; all true if absent | loss_mask, token_loss_mask |
| sampled_mask | T bools, written by the student | response_mask, completion_mask, |
| | | action_mask, tool_mask, env_mask |
| attention_mask | T bools, or those of prompt and response; false is padding | |
| prompt_mask | bools of prompt_tokens, false is padding | |
| sequence | ids of prompt and response, in place of tokens or beside them | sequences, input_ids |
| response_length | how many ids at the end of tokens or sequence are the response's | |
| remove_sample | bool, true: no token of the row is part of the loss | |
| student_logp | T | student_logprobs, student_log_probs, old_log_probs, old_per_token_logps, |
| | | action_log_probs |
| teacher_logp | T | teacher_logprobs, teacher_log_probs, ref_log_prob, ref_per_token_logps, |
| | | base_action_log_probs |
| sampler_logp | T | rollout_log_probs, rollout_logprobs, sampling_per_token_logps, |
| | | sampler_logprobs, completion_logprobs |
| softmax_logp | T, before top-p | |
| baseline | T | |
| prompt | id or text of the prompt | prompt_id, prompt_index, uid, group_id |
| prompt_tokens | ids, only for scoring | prompt_ids, prompt_token_ids |
| ended | bool | finished, terminated; finish_reason (stop, length, or an object with type); |
| | | status (completed, truncated) beside response_length; not truncated |
| reward | number, bool or null | score |
| task, turn | number or name; number | data_source, dataset; turn_index |
| support.ids | T lists of K ids | topk_ids, teacher_topk_ids, teacher_ids |
| support.student_logp | T x K | topk_student_logp, student_topk_logp, student_topk_logprobs |
| support.teacher_logp | T x K | topk_teacher_logp, teacher_topk_logp, teacher_topk_logprobs |
| support.present | T x K bools | |
| support.source | "teacher" if absent | topk_source |
| prefix.NAME | T, the fields of `diagnostics.batch.DistributionStats` | |
| temperature, top_p, score_temperature, mask_rule | one value a file | |

`support` and `prefix` may also be objects. A list may hold null where the mask is false. A token
counts where every mask is true. Several of the masks in the row of sampled_mask may stand in one
file. A list of 0 and 1 with a name that is not in this table, one a token, is refused, and so
are labels with -100 and weights by token. A teacher's or student's list is read in descending order
of its model, whatever order it has in the file.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from diagnostics.batch import DistributionStats
from diagnostics.errors import InvalidInput
from diagnostics.io.files import short
from diagnostics.records.masks import SAMPLED, read_masks, refuse_unknown_masks, split
from diagnostics.records.values import (
    bools,
    check_support,
    floats,
    ids,
    number,
    order_support,
    wide_rows,
)

Record = dict[str, Any]
"""A checked row: canonical column names to numpy arrays (T,), (T, K) or plain values."""

PREFIX = tuple(f"prefix.{f.name}" for f in fields(DistributionStats))
PREFIX_NEEDED = tuple(f"prefix.{f.name}" for f in fields(DistributionStats) if f.default is MISSING)
LOGPS = ("student_logp", "teacher_logp", "sampler_logp", "softmax_logp")
SUPPORT = ("support.student_logp", "support.teacher_logp")
CONSTANTS = ("temperature", "top_p", "score_temperature", "mask_rule", "support.source")
"""Columns that hold one value in the whole file."""

_ALSO = {
    "tokens": "response_ids response_tokens completion_ids output_ids responses",
    "mask": "loss_mask token_loss_mask",
    **dict.fromkeys(SAMPLED, ""),
    "prompt_mask": "",
    "attention_mask": "",
    "sequence": "sequences input_ids",
    "response_length": "",
    "remove_sample": "",
    "student_logp": "student_logprobs student_log_probs old_log_probs old_per_token_logps "
    "action_log_probs",
    "teacher_logp": "teacher_logprobs teacher_log_probs ref_log_prob ref_per_token_logps "
    "base_action_log_probs",
    "sampler_logp": "rollout_log_probs sampling_per_token_logps sampler_logprobs rollout_logprobs "
    "completion_logprobs",
    "softmax_logp": "",
    "baseline": "",
    "prompt": "prompt_id prompt_index uid group_id",
    "prompt_tokens": "prompt_ids prompt_token_ids",
    "ended": "finished terminated finish_reason truncated status",
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

_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "tool_calls", "completed"), True),
    **dict.fromkeys(("length", "max_tokens", "truncated"), False),
}
"""Words for the end of a response: whether it stopped by itself."""
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("above 0", lambda x: x > 0),
    "score_temperature": ("above 0", lambda x: x > 0),
    "top_p": ("in (0, 1]", lambda x: 0 < x <= 1),
}
SHOWN_COLUMNS = 12


def read_row(raw: Any, where: str, rename: Mapping[str, str]) -> Record:
    """One row, checked; `where` (file and row) opens every message.

    Per-token floats become 0 where the mask (or sampled_mask, where the row has both) is False,
    whatever stood there.

    Raises:
      ValueError: with `where`, the field, the value and its position.
    """
    if not isinstance(raw, Mapping):
        raise InvalidInput(f"{where}: {short(raw)} is not an object with columns")
    given, unused = _named(raw, where, rename)
    split(given, where)
    if "tokens" not in given:
        raise InvalidInput(f"{where}: no field tokens among {_names(raw)}; {_remedy(raw)}")
    tokens = ids(given["tokens"], f"{where}, field tokens")
    prompt = given.get("prompt_tokens")
    width = len(prompt) if isinstance(prompt, list) else 0
    mask, sampled = read_masks(given, tokens, where)
    refuse_unknown_masks(unused, {width, len(tokens), width + len(tokens)} - {0}, where)
    row: Record = {"tokens": tokens, "mask": mask}
    if sampled is not None:
        row["sampled_mask"] = mask = sampled  # its tokens have log-probabilities too
    if "support.present" in given:  # says which values of the support are looked at
        field = f"{where}, field support.present"
        rows = wide_rows(given["support.present"], field, mask, False)
        row["support.present"] = bools(rows, field, (len(mask), len(rows[0]) if rows else 0))
    for name, value in given.items():
        if name not in row:
            row[name] = _value(name, value, row, mask, f"{where}, field {name}")
    wide = {row[n].shape for n in ("support.ids", "support.present", *SUPPORT) if n in row}
    if len(wide) > 1:
        raise InvalidInput(f"{where}: the support's fields have shapes {sorted(wide)}")
    if "support.ids" in row:
        check_support(row, mask, where)
        order_support(row, mask)
    return row


def _names(raw: Mapping[str, Any]) -> str:
    """The columns of a row, as many as a message can show."""
    names = [str(name) for name in raw]
    more = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return (", ".join(names[:SHOWN_COLUMNS]) or "no columns") + more


def _remedy(raw: Mapping[str, Any]) -> str:
    """What a file without ids is, or needs."""
    if {"response", "position", "id"} <= raw.keys():
        return "a dump of a row a token is read by diagnostics.records.token_dumps.load_dump"
    if "step" in raw:
        return "rows of a monitor or a run, one a step, are shown by `opd report`"
    return (
        "ids of the response are needed, under this or another known name (README.md, "
        "diagnostics.records.columns)"
    )


def number_of(value: Any) -> int:
    """An id of 64 bits as it is, anything else by a 62-bit hash of its content."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if whole and -(2**63) <= value < 2**63:
        return int(value)
    plain = value.tolist() if isinstance(value, np.ndarray) else value
    text = json.dumps(plain, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def _named(
    raw: Mapping[str, Any], where: str, rename: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns by canonical name, without those that are null, and the columns not understood."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if key in ("support", "prefix") and isinstance(value, Mapping):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[str(key)] = value
    given: dict[str, Any] = {}
    unused: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in flat.items():
        name = rename.get(key, NAMES.get(key))
        if key == "status" and "response_length" not in flat:
            name = None  # only slime's says how the response ended
        if name is None:
            unused[key] = value
            continue
        if value is None and name != "reward":
            continue
        if name in given:
            raise InvalidInput(
                f"{where}: columns {origin[name]!r} and {key!r} both mean {name}; rename one"
            )
        given[name], origin[name] = value, key
        if key in ("finish_reason", "truncated", "status"):
            given[name] = _ended(key, value, f"{where}, field {key}")
    return given, unused


def _value(name: str, value: Any, row: Record, mask: np.ndarray, where: str) -> Any:
    """The checked value of a column; per-token floats are 0 where `mask`, (T,), is False."""
    if name in LOGPS or name in PREFIX or name == "baseline":
        return floats(value, where, mask, logp=name in LOGPS)
    if name in SUPPORT:
        rows = wide_rows(value, where, mask, 0.0)
        counted = row.get("support.present")
        same = counted is not None and len(rows) and counted.shape[1] == len(rows[0])
        places = counted & mask[:, None] if same else mask
        return floats(rows, where, places, logp=True, wide=True)
    if name == "support.ids":
        return ids(wide_rows(value, where, mask, 0), where, 2)
    if name == "prompt_tokens":
        return ids(value, where)
    if name == "ended":
        return bool(bools([value], where, (1,))[0])
    if name == "turn":
        return int(ids([value], where)[0])
    if name == "reward":
        return _reward(value, where)
    if name in RANGES:
        words, allows = RANGES[name]
        if not allows(x := number(value, where)):
            raise InvalidInput(f"{where}: {short(value)}, expected a number {words}")
        return x
    if name in ("mask_rule", "support.source") and not isinstance(value, str):
        raise InvalidInput(f"{where}: {short(value)} is not text")
    if name == "task" and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise InvalidInput(f"{where}: {short(value)} is neither a name nor a number")
    return int(ids([value], where)[0]) if name == "task" and isinstance(value, int) else value


def _reward(value: Any, where: str) -> float:
    """A number, true or false as 1 or 0, or NaN for null: nothing graded it."""
    if value is None or value != value:
        return float("nan")
    return float(value) if isinstance(value, bool) else number(value, where)


def _ended(key: str, value: Any, where: str) -> bool:
    """Whether the response stopped by itself, from the words of servers and trainers."""
    if key == "truncated":
        return not bool(bools([value], where, (1,))[0])
    reason = value.get("type") if isinstance(value, Mapping) else value  # SGLang's is an object
    if not isinstance(reason, str) or reason not in _REASONS:
        raise InvalidInput(
            f"{where}: {short(value)} is none of {', '.join(_REASONS)}; leave out the rows of "
            "responses that were never finished"
        )
    return _REASONS[reason]
