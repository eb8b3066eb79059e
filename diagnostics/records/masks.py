"""Splitting of prompt and response, padding, and loss masks of a record.

Trainers write prompt and response separately or in one list, padded or not, with up to four masks.
An unknown column that could be a mask is an error: ignoring it would silently change every number.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr
from diagnostics.records import values

SAMPLED_MASKS = (
    "sampled_mask",
    "response_mask",
    "completion_mask",
    "action_mask",
    "tool_mask",
    "env_mask",
)
"""Masks of the tokens that the student sampled: no padding, no tool outputs."""
NUMBERS_BY_TOKEN = {
    *("advantages", "returns", "values", "rewards", "token_level_scores", "token_level_rewards"),
    *("position_ids", "token_type_ids", "multi_modal_data", "images"),
}
"""Columns of other trainers that may hold only 0 and 1 and are not masks."""
IGNORED_LABEL = -100
"""What transformers and TRL write in labels where a token is not in the loss."""


def split_prompt_response(columns: dict[str, Any], location: str) -> None:
    """Split a list of prompt and response ids into `prompt_tokens` and `tokens`, in place.

    With response_length (slime), `tokens` or `sequence` (OpenRLHF: sequences, NeMo-RL: input_ids)
    ends with that many ids of the response. With a sequence and either the response's ids (verl) or
    the prompt's, the other is derived.

    Args:
        columns: Columns by canonical name.
        location: File and row, the beginning of every message.

    Raises:
        InvalidInput: A length that does not fit, or ids that contradict each other.
    """
    size = columns.pop("response_length", None)
    sequence = columns.pop("sequence", None)
    if size is not None and sequence is None:
        sequence = columns.pop("tokens", None)
    if sequence is None:
        return
    ids = values.to_list(sequence, f"{location}, field sequence")
    if size is None:
        if "tokens" in columns:
            size = len(values.to_list(columns["tokens"], f"{location}, field tokens"))
        elif "prompt_tokens" in columns:
            size = len(ids) - len(
                values.to_list(columns["prompt_tokens"], f"{location}, prompt_tokens")
            )
        else:
            raise InvalidInput(
                f"{location}: the {len(ids)} ids are prompt and response, and no column says where "
                "the response begins; add response_length, or the ids of the response"
            )
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(ids):
        raise InvalidInput(
            f"{location}, field response_length: {short_repr(size)}, expected an integer from 0 "
            f"to {len(ids)}, the number of ids of prompt and response"
        )
    parts = {"prompt_tokens": ids[: len(ids) - size], "tokens": ids[len(ids) - size :]}
    for name, part in parts.items():
        column_value = columns.setdefault(name, part)
        if list(column_value) != part:
            raise InvalidInput(
                f"{location}, field {name}: {short_repr(column_value)} differs from that part of "
                f"the ids of prompt and response, {short_repr(part)}"
            )


def read_masks(
    columns: dict[str, Any], tokens: np.ndarray, location: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the masks of a response; remove the mask columns and the padding of the prompt.

    Args:
        columns: Columns by canonical name, those of SAMPLED_MASKS by their own; changed in place.
        tokens: (T,) ids of the response.
        location: File and row, the beginning of every message.

    Returns:
        supervised (T,) bool: sampled by the student and part of the loss; and sampled (T,) bool:
        what the student sampled, supervised or not, or None if no two columns distinguish them.

    Raises:
        InvalidInput: A mask of another length or with other values; padding inside a prompt.
    """
    response_length = len(tokens)
    mask_names = [name for name in SAMPLED_MASKS if name in columns]
    supervised = sampled = np.ones(response_length, dtype=bool)
    prompt = columns.get("prompt_tokens")
    prompt_length = (
        len(values.to_list(prompt, f"{location}, field prompt_tokens")) if prompt is not None else 0
    )
    if "attention_mask" in columns:
        attention_mask = _parse_mask(
            columns.pop("attention_mask"),
            prompt_length,
            response_length,
            f"{location}, field attention_mask",
        )
        sampled = sampled & attention_mask[-response_length:] if response_length else sampled
        if prompt is not None and len(attention_mask) > response_length:
            columns.setdefault(
                "prompt_mask", attention_mask[: len(attention_mask) - response_length].tolist()
            )
    for name in mask_names:
        sampled = sampled & values.parse_bools(
            columns.pop(name), f"{location}, field {name}", (response_length,)
        )
    has_both_masks = bool(mask_names) and "mask" in columns
    if "mask" in columns:
        loss = _parse_mask(
            columns.pop("mask"), prompt_length, response_length, f"{location}, field mask"
        )
        supervised = loss[len(loss) - response_length :]
    if columns.pop("remove_sample", False) is True:
        # slime: the whole response is excluded from the loss
        supervised = np.zeros(response_length, dtype=bool)
    if "prompt_mask" in columns:
        not_padding = columns.pop("prompt_mask")
        if prompt is not None:
            columns["prompt_tokens"] = _without_padding(prompt, not_padding, location)
    return supervised & sampled, sampled if has_both_masks else None


def _parse_mask(value: Any, prompt_length: int, response_length: int, location: str) -> np.ndarray:
    """Return the mask of the response, or of prompt and response."""
    rows = values.to_list(value, location)
    if prompt_length and len(rows) == prompt_length + response_length:
        return values.parse_bools(rows, location, (prompt_length + response_length,))
    return values.parse_bools(rows, location, (response_length,))


def _without_padding(prompt: Any, mask: Any, location: str) -> list[Any]:
    """Return the ids of a prompt at which its mask is True, which must be contiguous."""
    ids = values.to_list(prompt, f"{location}, field prompt_tokens")
    rows = values.to_list(mask, f"{location}, field prompt_mask")
    if len(rows) != len(ids):
        raise InvalidInput(
            f"{location}, field prompt_mask: {len(rows)} values, prompt_tokens has {len(ids)}"
        )
    not_padding = values.parse_bools(rows, f"{location}, field prompt_mask", (len(ids),))
    positions = np.flatnonzero(not_padding)
    if len(ids) and not len(positions):
        raise InvalidInput(
            f"{location}, field prompt_mask: all tokens of the prompt are padding; if the column "
            "says which prompt tokens are in the loss, remove it"
        )
    if len(positions) and positions[-1] - positions[0] + 1 != len(positions):
        raise InvalidInput(
            f"{location}, field prompt_mask: 0 between two 1, expected padding on the sides only"
        )
    return [ids[i] for i in positions]


def refuse_unknown_masks(unused: Mapping[str, Any], lengths: set[int], location: str) -> None:
    """Raise if an unknown column, or a field of an object in one, could be a mask.

    Args:
        unused: The unknown columns.
        lengths: Lengths of prompt, response and both.
        location: File and row, the beginning of every message.

    Raises:
        InvalidInput: Numbers or digits whose name contains "mask"; a list of one of these lengths
            that holds only 0 and 1, labels with IGNORED_LABEL, or numbers named as weights.
    """
    for name, value in _with_nested(unused):
        is_sequence = isinstance(value, list | tuple | np.ndarray)
        digits = isinstance(value, str) and set(value) <= {"0", "1"} and value != ""
        if name.rpartition(".")[2] in NUMBERS_BY_TOKEN or not (
            is_sequence or digits or isinstance(value, int | float)
        ):
            continue
        is_per_token = is_sequence and len(value) in lengths
        reasons = {
            "has a name like a mask": "mask" in name.lower(),
            "holds only 0 and 1, one per token, as a mask does": is_per_token and _is_binary(value),
            f"holds {IGNORED_LABEL}, which marks labels that are not in the loss": (
                is_per_token and IGNORED_LABEL in _to_list(value)
            ),
            "has a name like token weights": (
                is_per_token and any(part in name.lower() for part in ("weight", "loss_scale"))
            ),
        }
        if reason := next((text for text, applies in reasons.items() if applies), ""):
            raise InvalidInput(
                f"{location}: the unknown column {name!r} {reason}; if it says which tokens count, "
                "rename it to mask, response_mask, prompt_mask or attention_mask, else remove it"
            )


def _with_nested(columns: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield columns, and lists and texts within objects as OBJECT.FIELD."""
    for name, value in columns.items():
        yield name, value
        if isinstance(value, Mapping):
            for field, nested_value in _with_nested(value):
                if isinstance(nested_value, list | tuple | np.ndarray | str):
                    yield f"{name}.{field}", nested_value


def refuse_padding(row: Mapping[str, Any], location: str) -> None:
    """Raise if a response ends in padding that no mask excludes.

    Trainers that write tensors pad ids with one id and log-probabilities with 0. Two equal tokens
    at the end of which both models are exactly certain are taken for padding, unless the response
    is known to be truncated, as one that loops is.

    Args:
        row: The checked row, without sampled_mask.
        location: File and row, the beginning of the message.

    Raises:
        InvalidInput: Names the id and the number of such tokens.
    """
    models = [row[name] for name in ("student_logp", "teacher_logp") if name in row]
    tokens = row["tokens"]
    if len(models) < 2 or row.get("ended") is False or not len(tokens) or not row["mask"].all():
        return
    is_padding = (tokens == tokens[-1]) & (models[0] == 0) & (models[1] == 0)
    count = int(is_padding[::-1].argmin()) if not is_padding.all() else len(tokens)
    if count > 1:
        raise InvalidInput(
            f"{location}: the last {count} tokens have id {int(tokens[-1])} and log-probability 0 "
            "of both models, as padding has; add a column response_mask that is 0 there, or "
            "remove them"
        )


def _to_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _is_binary(value: Any) -> bool:
    plain = _to_list(value)
    return set(map(type, plain)) <= {bool, int, float} and set(plain) <= {0, 1}
