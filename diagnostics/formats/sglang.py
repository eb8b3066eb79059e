"""Answers of SGLang's `/generate`: text, output_ids and `meta_info`.

A list of log-probabilities has [logprob, token id, text or null] a position, a top list one list of
these a position; null where SGLang has none, as at the first token of a prompt.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.formats.dump_format import (
    DumpFormat,
    Field,
    ReadContext,
    Row,
    get_ids,
    get_length,
    get_list,
    get_object,
)
from diagnostics.formats.server_scores import GENERATED_NOTE, score_columns, support_columns
from diagnostics.io.files import has_type, short_repr


def convert(row: Mapping[str, Any], location: str, context: ReadContext) -> Iterator[Row]:
    """Yield the generated response, or the end of the prompt if SGLang scored a given response.

    Args:
        row: One answer.
        location: File and row, the beginning of every message.
        context: Its `scores`.

    Yields:
        One row with our columns.

    Raises:
        InvalidInput: Ids that contradict each other, or lists of different lengths.
    """
    meta = get_object(row["meta_info"], f"{location}, field meta_info")
    inputs = _parse_entries(meta.get("input_token_logprobs"), f"{location}, input_token_logprobs")
    if row.get("response_length") is not None:
        yield _scored_prompt(row, meta, inputs, location, context)
        return
    scores = context.scores or "sampler"
    outputs = _parse_entries(
        meta.get("output_token_logprobs"), f"{location}, output_token_logprobs"
    )
    if row.get("output_ids") is None and outputs is None:
        raise InvalidInput(
            f"{location} holds neither output_ids nor meta_info.output_token_logprobs, and so no "
            "token ids; generate with return_logprob=True"
        )
    scored_tokens = [token for _, token in outputs or ()]
    tokens = scored_tokens
    if row.get("output_ids") is not None:
        tokens = get_ids(row["output_ids"], f"{location}, field output_ids")
    if outputs is not None and scored_tokens != tokens:
        raise InvalidInput(
            f"{location}: output_ids {short_repr(tokens)} are not the ids of "
            f"output_token_logprobs, {short_repr(scored_tokens)}"
        )
    converted: Row = {"tokens": tokens}
    prompt = _prompt_ids(row, meta, inputs, location)
    if prompt is not None:
        converted["prompt_tokens"] = prompt
    if meta.get("finish_reason") is not None:
        converted["finish_reason"] = meta["finish_reason"]
    if outputs is not None:
        converted |= score_columns([logp for logp, _ in outputs], scores)
    tops = _top_ids(meta.get("output_top_logprobs"), f"{location}, output_top_logprobs")
    if tops is not None:
        _require_length(tops, tokens, f"{location}, output_top_logprobs")
        converted |= support_columns(tops, tokens, scores)
    yield converted


def _scored_prompt(
    row: Mapping[str, Any],
    meta: Mapping[str, Any],
    inputs: list[tuple[Any, Any]] | None,
    location: str,
    context: ReadContext,
) -> Row:
    """Return the last `response_length` ids of the prompt as a response that the model scored."""
    if inputs is None:
        raise InvalidInput(
            f"{location}: response_length needs meta_info.input_token_logprobs; ask SGLang for "
            "return_logprob=True and logprob_start_len=0"
        )
    scores = context.scores or "teacher"
    size = get_length(row["response_length"], len(inputs), f"{location}, field response_length")
    start = len(inputs) - size
    ids = [token for _, token in inputs]
    converted: Row = {"tokens": ids[start:]}
    prompt = _prompt_ids(row, meta, inputs, location)
    if prompt is not None:
        converted["prompt_tokens"] = prompt[: len(prompt) - size]
    converted |= score_columns([logp for logp, _ in inputs[start:]], scores)
    tops = _top_ids(meta.get("input_top_logprobs"), f"{location}, input_top_logprobs")
    if tops is not None:
        _require_length(tops, ids, f"{location}, input_top_logprobs")
        converted |= support_columns(tops[start:], ids[start:], scores)
    return converted


def _prompt_ids(
    row: Mapping[str, Any],
    meta: Mapping[str, Any],
    inputs: list[tuple[Any, Any]] | None,
    location: str,
) -> list[Any] | None:
    """Return the ids of the prompt: those of the request, or of its scores if they are complete."""
    if row.get("input_ids") is not None:
        return get_ids(row["input_ids"], f"{location}, field input_ids")
    is_complete = inputs is not None and len(inputs) == meta.get("prompt_tokens")
    return [token for _, token in inputs] if inputs is not None and is_complete else None


def _parse_entries(value: Any, location: str) -> list[tuple[Any, Any]] | None:
    """Parse [logprob, token id, text] of each position; the first of a prompt has no logprob."""
    if value is None:
        return None
    entries = []
    for t, entry in enumerate(get_list(value, location)):
        parts = get_list(entry, f"{location}[{t}]")
        is_entry = len(parts) > 1 and has_type(parts[1], int)
        if not is_entry or not (parts[0] is None or has_type(parts[0], float)):
            raise InvalidInput(
                f"{location}[{t}]: {short_repr(entry)}, expected [logprob, token id, text]"
            )
        entries.append((parts[0], parts[1]))
    return entries


def _top_ids(value: Any, location: str) -> list[dict[int, float]] | None:
    """Parse the top lists of all positions; an empty object where SGLang has none."""
    if value is None:
        return None
    tops = []
    for t, entries in enumerate(get_list(value, location)):
        parsed = _parse_entries(entries, f"{location}[{t}]") or []
        tops.append({token: logp for logp, token in parsed if logp is not None})
    return tops if any(tops) else None


def _require_length(tops: list[Any], tokens: list[Any], location: str) -> None:
    if len(tops) != len(tokens):
        raise InvalidInput(f"{location}: {len(tops)} positions, but {len(tokens)} token ids")


SGLANG = DumpFormat(
    name="sglang",
    title="SGLang /generate answer",
    source="answers of `/generate` or `Engine.generate`, one a line, with `return_logprob=True`",
    signatures=(frozenset({"meta_info", "text"}), frozenset({"meta_info", "output_ids"})),
    fields=(
        Field(name="output_ids", columns="tokens"),
        Field(
            name="meta_info.output_token_logprobs",
            columns="tokens, sampler_logp",
            remark="[logprob, token id, text] a position",
        ),
        Field(
            name="meta_info.output_top_logprobs",
            columns="support.ids, support.student_logp",
            remark="top_logprobs_num ids a position",
        ),
        Field(name="input_ids", columns="prompt_tokens", remark="of the request, if it was kept"),
        Field(
            name="meta_info.input_token_logprobs",
            columns="prompt_tokens",
            remark="its ids, if it has all prompt_tokens of them (logprob_start_len=0); with "
            "response_length its values are teacher_logp",
        ),
        Field(
            name="meta_info.input_top_logprobs",
            columns="support.ids, support.teacher_logp",
            remark="with response_length",
        ),
        Field(
            name="meta_info.prompt_tokens", remark="compared with the size of input_token_logprobs"
        ),
        Field(name="meta_info.finish_reason", columns="ended"),
        Field(
            name="response_length",
            columns="tokens",
            remark="to be added where the model scored a given response: the number of ids at the "
            "end of the prompt that are the response",
        ),
        Field(name="text"),
        *(
            Field(name=f"meta_info.{name}")
            for name in ("id", "completion_tokens", "cached_tokens", "weight_version")
        ),
        *(Field(name=name) for name in ("index",)),
    ),
    convert=convert,
    notes=GENERATED_NOTE,
)
