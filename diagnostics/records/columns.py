"""Columns of a record: canonical names, aliases in other frameworks, and checks of one row.

A row is one response. Shapes: T response positions, K support ids.

| column | value | also read as |
|---|---|---|
| tokens | T ids | response_ids, response_tokens, completion_ids, output_ids, responses |
| mask | T bools, part of the loss; all true if absent | loss_mask, token_loss_mask |
| sampled_mask | T bools, sampled by the student | response_mask, completion_mask, |
| | | action_mask, tool_mask, env_mask |
| attention_mask | T bools, or those of prompt and response; false is padding | |
| prompt_mask | bools of prompt_tokens, false is padding | |
| sequence | ids of prompt and response, instead of tokens or with them | sequences, input_ids |
| response_length | number of response ids at the end of tokens or sequence | |
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
| | | status (completed, truncated) with response_length; not truncated |
| reward | number, bool or null | score |
| task, turn | number or name; number | data_source, dataset; turn_index |
| origin | 0 the student, 1 the teacher, 2 a dataset wrote the response | |
| support.ids | T lists of K ids | topk_ids, teacher_topk_ids, teacher_ids |
| support.student_logp | T x K | topk_student_logp, student_topk_logp, student_topk_logprobs |
| support.teacher_logp | T x K | topk_teacher_logp, teacher_topk_logp, teacher_topk_logprobs |
| support.present | T x K bools | |
| support.source | "teacher" if absent | topk_source |
| prefix.NAME | T, the fields of `diagnostics.batch.DistributionStats` | |
| temperature, top_p, score_temperature, mask_rule, teacher_reads | one value per file | |

`support` and `prefix` may also be objects. A list may hold null where the mask is false. A token
counts where every mask is true. A file may have several of the masks in the row of sampled_mask.
An unknown column with one 0 or 1 per token is an error, and so are labels with -100 and token
weights. A teacher's or student's list is sorted on reading, by that model's log-probability,
descending.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from diagnostics.batch import DistributionStats
from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr
from diagnostics.records.masks import (
    SAMPLED_MASKS,
    read_masks,
    refuse_padding,
    refuse_unknown_masks,
    split_prompt_response,
)
from diagnostics.records.values import (
    check_support,
    parse_bools,
    parse_floats,
    parse_ids,
    parse_number,
    parse_topk_lists,
    sort_support,
)

Record = dict[str, Any]
"""A checked row: canonical column names to numpy arrays (T,), (T, K) or plain values."""

STATS_COLUMNS = tuple(f"prefix.{f.name}" for f in fields(DistributionStats))
REQUIRED_STATS_COLUMNS = tuple(
    f"prefix.{f.name}" for f in fields(DistributionStats) if f.default is MISSING
)
LOGPS = ("student_logp", "teacher_logp", "sampler_logp", "softmax_logp")
SUPPORT = ("support.student_logp", "support.teacher_logp")
CONSTANTS = (
    *("temperature", "top_p", "score_temperature", "mask_rule", "teacher_reads"),
    "support.source",
)
"""Columns that hold one value in the whole file."""

_ALIASES = {
    "tokens": "response_ids response_tokens completion_ids output_ids responses",
    "mask": "loss_mask token_loss_mask",
    **dict.fromkeys(SAMPLED_MASKS, ""),
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
    "origin": "",
    "support.ids": "topk_ids teacher_topk_ids teacher_ids",
    "support.student_logp": "topk_student_logp student_topk_logp student_topk_logprobs",
    "support.teacher_logp": "topk_teacher_logp teacher_topk_logp teacher_topk_logprobs",
    "support.present": "",
    "support.source": "topk_source",
    **dict.fromkeys((*STATS_COLUMNS, *CONSTANTS[:5]), ""),
}
NAMES = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases.split())}
"""Every known column name and its canonical name."""

_FINISH_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "tool_calls", "completed"), True),
    **dict.fromkeys(("length", "max_tokens", "truncated"), False),
}
"""Finish reason -> whether the response ended rather than was truncated."""
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("above 0", lambda x: x > 0),
    "score_temperature": ("above 0", lambda x: x > 0),
    "top_p": ("in (0, 1]", lambda x: 0 < x <= 1),
}
MAX_COLUMNS_SHOWN = 12


def parse_record(raw: Any, location: str) -> Record:
    """Check one row and return it with canonical column names.

    Per-token floats are set to 0 where the mask (or sampled_mask, if the row has both) is False.

    Args:
        raw: The row as read.
        location: File and row, the beginning of every message.

    Returns:
        The checked row.

    Raises:
        InvalidInput: A wrong value; names the location, the field, the value and its position.
    """
    if not isinstance(raw, Mapping):
        raise InvalidInput(f"{location}: {short_repr(raw)} is not an object with columns")
    columns, unused = _canonical_columns(raw, location)
    split_prompt_response(columns, location)
    if "tokens" not in columns:
        raise InvalidInput(f"{location}: no column tokens among {_names(raw)}; {_remedy(raw)}")
    tokens = parse_ids(columns["tokens"], f"{location}, field tokens")
    prompt = columns.get("prompt_tokens")
    prompt_length = len(prompt) if isinstance(prompt, list) else 0
    mask, sampled = read_masks(columns, tokens, location)
    refuse_unknown_masks(
        unused, {prompt_length, len(tokens), prompt_length + len(tokens)} - {0}, location
    )
    row: Record = {"tokens": tokens, "mask": mask}
    if sampled is not None:
        row["sampled_mask"] = mask = sampled  # unsupervised tokens have log-probabilities too
    if "support.present" in columns:  # parsed first: the other support columns depend on it
        field_location = f"{location}, field support.present"
        rows = parse_topk_lists(columns["support.present"], field_location, mask, False)
        row["support.present"] = parse_bools(
            rows, field_location, (len(mask), len(rows[0]) if rows else 0)
        )
    for name, value in columns.items():
        if name not in row:
            row[name] = _parse_value(name, value, row, mask, f"{location}, field {name}")
    if sampled is None:
        refuse_padding(row, location)
    shapes = {row[n].shape for n in ("support.ids", "support.present", *SUPPORT) if n in row}
    if len(shapes) > 1:
        raise InvalidInput(
            f"{location}: the fields of the support have different shapes {sorted(shapes)}"
        )
    if "support.ids" in row:
        check_support(row, mask, location)
        sort_support(row, mask)
    return row


def _names(raw: Mapping[str, Any]) -> str:
    """Return the column names of a row, shortened for a message."""
    names = [str(name) for name in raw]
    suffix = f" and {len(names) - MAX_COLUMNS_SHOWN} more" if len(names) > MAX_COLUMNS_SHOWN else ""
    return (", ".join(names[:MAX_COLUMNS_SHOWN]) or "no columns") + suffix


def _remedy(raw: Mapping[str, Any]) -> str:
    """Return what to do with a row that has no ids."""
    if {"response", "position", "id"} <= raw.keys():
        return "read a token-level dump with diagnostics.records.token_dumps.load_dump"
    if "step" in raw:
        return "these are rows of a monitor or a run, one per step; see `opd report`"
    return (
        "the ids of the response are required, under this or another known name (README.md, "
        "diagnostics.records.columns)"
    )


def integer_id(value: Any) -> int:
    """Return a 64-bit id unchanged, anything else as a 62-bit hash of its content."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if is_integer and -(2**63) <= value < 2**63:
        return int(value)
    plain = value.tolist() if isinstance(value, np.ndarray) else value
    text = json.dumps(plain, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def _canonical_columns(
    raw: Mapping[str, Any], location: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the non-null columns by canonical name, and the unknown columns."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if key in ("support", "prefix") and isinstance(value, Mapping):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[str(key)] = value
    columns: dict[str, Any] = {}
    unused: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in flat.items():
        name = NAMES.get(key)
        if key == "status" and "response_length" not in flat:
            name = None  # slime's status is a finish reason; others' is not
        if name is None:
            unused[key] = value
            continue
        if value is None and name != "reward":
            continue
        if name in columns:
            raise InvalidInput(
                f"{location}: columns {origin[name]!r} and {key!r} both mean {name}; remove one"
            )
        columns[name], origin[name] = value, key
        if key in ("finish_reason", "truncated", "status"):
            columns[name] = _parse_ended(key, value, f"{location}, field {key}")
    return columns, unused


def _parse_value(name: str, value: Any, row: Record, mask: np.ndarray, location: str) -> Any:
    """Return the checked value of a column; per-token floats are 0 where `mask`, (T,), is False."""
    if name in LOGPS or name in STATS_COLUMNS or name == "baseline":
        return parse_floats(value, location, mask, logp=name in LOGPS)
    if name in SUPPORT:
        rows = parse_topk_lists(value, location, mask, 0.0)
        present = row.get("support.present")
        is_same_width = present is not None and len(rows) and present.shape[1] == len(rows[0])
        is_valid = present & mask[:, None] if is_same_width else mask
        return parse_floats(rows, location, is_valid, logp=True, wide=True)
    if name == "support.ids":
        return parse_ids(parse_topk_lists(value, location, mask, 0), location, 2)
    if name == "prompt_tokens":
        return parse_ids(value, location)
    if name == "ended":
        return bool(parse_bools([value], location, (1,))[0])
    if name in ("turn", "origin"):
        return int(parse_ids([value], location)[0])
    if name == "reward":
        return _parse_reward(value, location)
    if name in RANGES:
        expected_range, is_allowed = RANGES[name]
        if not is_allowed(x := parse_number(value, location)):
            raise InvalidInput(
                f"{location}: {short_repr(value)}, expected a number {expected_range}"
            )
        return x
    if name in ("mask_rule", "support.source") and not isinstance(value, str):
        raise InvalidInput(f"{location}: {short_repr(value)} is not text")
    if name == "task" and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise InvalidInput(f"{location}: {short_repr(value)} is neither a name nor a number")
    return (
        int(parse_ids([value], location)[0]) if name == "task" and isinstance(value, int) else value
    )


def _parse_reward(value: Any, location: str) -> float:
    """Return the reward: a number, true or false as 1 or 0, or NaN for null (not graded)."""
    if value is None or value != value:
        return float("nan")
    return float(value) if isinstance(value, bool) else parse_number(value, location)


def _parse_ended(key: str, value: Any, location: str) -> bool:
    """Return whether the response ended untruncated, from a server's or trainer's reason."""
    if key == "truncated":
        return not bool(parse_bools([value], location, (1,))[0])
    reason = value.get("type") if isinstance(value, Mapping) else value  # SGLang's is an object
    if not isinstance(reason, str) or reason not in _FINISH_REASONS:
        raise InvalidInput(
            f"{location}: {short_repr(value)} is none of {', '.join(_FINISH_REASONS)}; remove the "
            "rows of unfinished responses"
        )
    return _FINISH_REASONS[reason]
