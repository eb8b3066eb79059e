"""Which ids of a record are the response, and which of them count: splits, padding and masks.

Trainers write prompt and response apart or in one list, padded or not, and up to four masks. What
is not understood and could be a mask is refused: dropped, it would change every number in silence.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short
from diagnostics.records import values

SAMPLED = (
    "sampled_mask",
    "response_mask",
    "completion_mask",
    "action_mask",
    "tool_mask",
    "env_mask",
)
"""Masks of the tokens that the student wrote: no padding, no answers of tools."""
NUMBERS_BY_TOKEN = {
    *("advantages", "returns", "values", "rewards", "token_level_scores", "token_level_rewards"),
    *("position_ids", "token_type_ids", "multi_modal_data", "images"),
}
"""Columns of other trainers that may hold 0 and 1 alone and are no masks."""
IGNORED = -100
"""What transformers and TRL write in labels where a token is not in the loss."""


def split(given: dict[str, Any], where: str) -> None:
    """Replace a list of prompt and response by `prompt_tokens` and `tokens`, in place.

    With response_length (slime) `tokens` or `sequence` (OpenRLHF: sequences, NeMo-RL: input_ids)
    ends with so many ids of the response. A sequence beside the response's ids (verl), or beside
    the prompt's, gives the others.

    Raises:
      InvalidInput: a length that does not fit, or ids that contradict each other.
    """
    size = given.pop("response_length", None)
    sequence = given.pop("sequence", None)
    if size is not None and sequence is None:
        sequence = given.pop("tokens", None)
    if sequence is None:
        return
    ids = values.listed(sequence, f"{where}, field sequence")
    if size is None:
        if "tokens" in given:
            size = len(values.listed(given["tokens"], f"{where}, field tokens"))
        elif "prompt_tokens" in given:
            size = len(ids) - len(values.listed(given["prompt_tokens"], f"{where}, prompt_tokens"))
        else:
            raise InvalidInput(
                f"{where}: its ids are those of prompt and response ({len(ids)}), and no column "
                "says where the response begins; add response_length, or the response's ids"
            )
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(ids):
        raise InvalidInput(
            f"{where}, field response_length: {short(size)}, expected a whole number from 0 to "
            f"{len(ids)}, the ids of prompt and response"
        )
    parts = {"prompt_tokens": ids[: len(ids) - size], "tokens": ids[len(ids) - size :]}
    for name, part in parts.items():
        own = given.setdefault(name, part)
        if list(own) != part:
            raise InvalidInput(
                f"{where}, field {name}: {short(own)} is not what the ids of prompt and response "
                f"hold there, {short(part)}"
            )


def read_masks(
    given: dict[str, Any], tokens: np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The masks of a response, and its prompt without padding; takes their columns out of `given`.

    Args:
      given: columns by canonical name, those of SAMPLED by their own. tokens: (T,).

    Returns:
      supervised (T,) bool: sampled by the student and part of the loss; sampled (T,) bool: what
      the student wrote, supervised or not, or None where no two columns tell them apart.

    Raises:
      InvalidInput: a mask of another length or with other values; padding inside a prompt.
    """
    size = len(tokens)
    written = [name for name in SAMPLED if name in given]
    supervised = sampled = np.ones(size, dtype=bool)
    prompt = given.get("prompt_tokens")
    width = len(values.listed(prompt, f"{where}, field prompt_tokens")) if prompt is not None else 0
    if "attention_mask" in given:
        attended = _whole(
            given.pop("attention_mask"), width, size, f"{where}, field attention_mask"
        )
        sampled = sampled & attended[-size:] if size else sampled
        if prompt is not None and len(attended) > size:
            given.setdefault("prompt_mask", attended[: len(attended) - size].tolist())
    for name in written:
        sampled = sampled & values.bools(given.pop(name), f"{where}, field {name}", (size,))
    both = bool(written) and "mask" in given
    if "mask" in given:
        loss = _whole(given.pop("mask"), width, size, f"{where}, field mask")
        supervised = loss[len(loss) - size :]
    if given.pop("remove_sample", False) is True:  # slime's: no token of it is in the loss
        supervised = np.zeros(size, dtype=bool)
    if "prompt_mask" in given:
        real = given.pop("prompt_mask")
        if prompt is not None:
            given["prompt_tokens"] = _without_padding(prompt, real, where)
    return supervised & sampled, sampled if both else None


def _whole(value: Any, width: int, size: int, where: str) -> np.ndarray:
    """Truth values of the response (size), or of prompt and response (width + size)."""
    rows = values.listed(value, where)
    if width and len(rows) == width + size:
        return values.bools(rows, where, (width + size,))
    return values.bools(rows, where, (size,))


def _without_padding(prompt: Any, mask: Any, where: str) -> list[Any]:
    """The ids of a prompt at which its mask is True, which must follow each other."""
    ids = values.listed(prompt, f"{where}, field prompt_tokens")
    rows = values.listed(mask, f"{where}, field prompt_mask")
    if len(rows) != len(ids):
        raise InvalidInput(
            f"{where}, field prompt_mask: {len(rows)} values, prompt_tokens has {len(ids)}"
        )
    real = values.bools(rows, f"{where}, field prompt_mask", (len(ids),))
    places = np.flatnonzero(real)
    if len(ids) and not len(places):
        raise InvalidInput(
            f"{where}, field prompt_mask: no token of the prompt is real; where the column says "
            "which prompt tokens are trained on, take it out of the file"
        )
    if len(places) and places[-1] - places[0] + 1 != len(places):
        raise InvalidInput(
            f"{where}, field prompt_mask: 0 between two 1, expected padding at one side alone"
        )
    return [ids[i] for i in places]


def refuse_unknown_masks(unused: Mapping[str, Any], lengths: set[int], where: str) -> None:
    """Refuse a column that is not understood and may say which tokens count.

    Args:
      unused: the columns that are not understood. lengths: of prompt, response and both.

    Raises:
      InvalidInput: numbers or digits named as a mask; in a list of one of these lengths 0 and 1
        alone, labels of which IGNORED says "not in the loss", or numbers named as weights.
    """
    for name, value in unused.items():
        several = isinstance(value, list | tuple | np.ndarray)
        digits = isinstance(value, str) and set(value) <= {"0", "1"} and value != ""
        if name in NUMBERS_BY_TOKEN or not (several or digits or isinstance(value, int | float)):
            continue
        by_token = several and len(value) in lengths
        words = {
            "is named as a mask": "mask" in name.lower(),
            "holds 0 and 1 alone, one a token, as a mask": by_token and _is_binary(value),
            f"holds {IGNORED}, which marks labels that are not in the loss": (
                by_token and IGNORED in _plain(value)
            ),
            "is named as weights of the tokens": (
                by_token and any(part in name.lower() for part in ("weight", "loss_scale"))
            ),
        }
        if looks := next((text for text, holds in words.items() if holds), ""):
            raise InvalidInput(
                f"{where}: the column {name!r} {looks}, and is not known here; if it says which "
                "tokens count, rename it to mask, response_mask, prompt_mask or attention_mask, "
                "else take it out of the file"
            )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _is_binary(value: Any) -> bool:
    plain = _plain(value)
    return set(map(type, plain)) <= {bool, int, float} and set(plain) <= {0, 1}
