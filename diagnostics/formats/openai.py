"""Answers of OpenAI-style servers: chat completions and completions with `logprobs`.

They hold the text of tokens, not their ids, unless a server adds them (vLLM: return_token_ids,
return_tokens_as_token_ids). Without ids the tokens are looked up in the tokenizer of the given
models, else numbered by their bytes in order of appearance.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.formats.dump_format import (
    DumpFormat,
    Field,
    ReadContext,
    Row,
    encode_prompt,
    get_ids,
    get_list,
    get_numbers,
    get_object,
    tokenize_row,
)
from diagnostics.formats.server_scores import GENERATED_NOTE, score_columns, support_columns
from diagnostics.io.files import has_type, short_repr

ID_PREFIX = "token_id:"
"""Before the id of a token, where vLLM was asked for return_tokens_as_token_ids."""


def convert(row: Mapping[str, Any], location: str, context: ReadContext) -> Iterator[Row]:
    """Yield one row for each choice.

    Args:
        row: An answer, or a line of a batch's output file.
        location: File and row, the beginning of every message.
        context: Its `scores`, `tokenizer` and `token_numbers`.

    Yields:
        Rows with our columns.

    Raises:
        InvalidInput: No answer, an echoed prompt whose length is not known, text without a
            tokenizer, or lists of different lengths.
    """
    answer = _answer(row, location)
    prompt = next((row[k] for k in ("messages", "prompt") if row.get(k) is not None), None)
    choices = get_list(answer.get("choices"), f"{location}, field choices")
    if not choices:
        raise InvalidInput(f"{location}: choices is empty; remove the row")
    for i, value in enumerate(choices):
        place = f"{location}, choices[{i}]"
        choice = get_object(value, place)
        converted: Row = {}
        if choice.get("finish_reason") is not None:
            converted["finish_reason"] = choice["finish_reason"]
        logprobs = choice.get("logprobs")
        if logprobs is None and choice.get("token_ids") is None:
            text = _text(choice)
            converted |= tokenize_row(prompt, text, place, context, "an answer without logprobs")
            yield converted
            continue
        prompt_ids = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
        if prompt_ids is not None:
            converted["prompt_tokens"] = prompt_ids
        elif prompt is not None:
            converted["prompt"] = prompt
            if context.tokenizer is not None:
                converted["prompt_tokens"] = encode_prompt(prompt, place, context.tokenizer)
        else:
            converted["prompt"] = str(row.get("custom_id") or answer.get("id") or location)
        yield converted | _scored_tokens(choice, answer, place, context)


def _answer(row: Mapping[str, Any], location: str) -> Mapping[str, Any]:
    """Return the answer; that of a batch's output line is in `response.body`."""
    if "choices" in row:
        return row
    response = row.get("response")
    if not isinstance(response, Mapping) or response.get("body") is None:
        raise InvalidInput(
            f"{location}: the request has no answer (response {short_repr(response)}, error "
            f"{short_repr(row.get('error'))}); remove the row"
        )
    return get_object(response["body"], f"{location}, field response.body")


def _text(choice: Mapping[str, Any]) -> Any:
    message = choice.get("message")
    return message.get("content") if isinstance(message, Mapping) else choice.get("text")


def _scored_tokens(
    choice: Mapping[str, Any], answer: Mapping[str, Any], location: str, context: ReadContext
) -> Row:
    """Return the ids of a choice, their log-probabilities and the top lists."""
    if choice.get("logprobs") is None:
        return {"tokens": get_ids(choice["token_ids"], f"{location}.token_ids")}
    scores = context.scores or "sampler"
    logprobs = get_object(choice["logprobs"], f"{location}.logprobs")
    if logprobs.get("content") is not None:
        pieces, logps, tops = _chat_entries(logprobs["content"], f"{location}.logprobs.content")
    else:
        pieces, logps, tops = _completion_entries(logprobs, f"{location}.logprobs")
    start = _echoed_tokens(logps, answer, location)
    pieces, logps, tops = pieces[start:], logps[start:], tops[start:]
    columns = score_columns(get_numbers(logps, f"{location}.logprobs"), scores)
    if choice.get("token_ids") is None:
        ids = [_token_id(piece, location, context) for piece in pieces]
    else:
        ids = get_ids(choice["token_ids"], f"{location}.token_ids")
        if len(ids) != len(pieces):
            raise InvalidInput(
                f"{location}: {len(ids)} token_ids, but {len(pieces)} tokens with log-probabilities"
            )
        has_top_ids = all(k.startswith(ID_PREFIX.encode()) for top in tops for k in top)
        if context.tokenizer is None and not has_top_ids:
            return {"tokens": ids} | columns  # the ids of the top lists are not known
    top_ids = [
        # a chosen token's id may be given although those of the top list are not
        {ids[t] if k == pieces[t] else _token_id(k, location, context): v for k, v in top.items()}
        for t, top in enumerate(tops)
    ]
    return {"tokens": ids} | columns | support_columns(top_ids, ids, scores)


def _chat_entries(
    content: Any, location: str
) -> tuple[list[bytes], list[Any], list[dict[bytes, float]]]:
    """Return bytes, log-probability and top list of each token of a chat completion."""
    pieces, logps, tops = [], [], []
    for t, value in enumerate(get_list(content, location)):
        entry = get_object(value, f"{location}[{t}]")
        pieces.append(_token_bytes(entry, f"{location}[{t}]"))
        logps.append(entry.get("logprob"))
        top_entries = get_list(entry.get("top_logprobs") or [], f"{location}[{t}].top_logprobs")
        top_pieces = [_token_bytes(x, f"{location}[{t}].top_logprobs") for x in top_entries]
        tops.append(_top_list(top_pieces, [x.get("logprob") for x in top_entries], location))
    return pieces, logps, tops


def _completion_entries(
    logprobs: Mapping[str, Any], location: str
) -> tuple[list[bytes], list[Any], list[dict[bytes, float]]]:
    """Return bytes, log-probability and top list of each token of a completion."""
    pieces = [str(x).encode() for x in get_list(logprobs.get("tokens"), f"{location}.tokens")]
    logps = get_list(logprobs.get("token_logprobs"), f"{location}.token_logprobs")
    tops = get_list(
        logprobs.get("top_logprobs") or [None] * len(pieces), f"{location}.top_logprobs"
    )
    if not len(pieces) == len(logps) == len(tops):
        raise InvalidInput(
            f"{location}: {len(pieces)} tokens, {len(logps)} token_logprobs and {len(tops)} "
            "top_logprobs"
        )
    top_lists = []
    for t, top in enumerate(tops):
        place = f"{location}.top_logprobs[{t}]"
        entries = {} if top is None else get_object(top, place)
        top_lists.append(_top_list([k.encode() for k in entries], [*entries.values()], place))
    return pieces, logps, top_lists


def _top_list(pieces: list[bytes], logps: list[Any], location: str) -> dict[bytes, float]:
    """Return a top list as an object; entries without a log-probability are left out."""
    numbers = get_numbers(logps, location)
    return {k: float(v) for k, v in zip(pieces, numbers, strict=True) if v is not None}


def _token_bytes(entry: Any, location: str) -> bytes:
    """Return the bytes of a token; its text where a server gives no bytes, or the token's id."""
    entry = get_object(entry, location)
    token, values = entry.get("token"), entry.get("bytes")
    if not isinstance(token, str):
        raise InvalidInput(f"{location}: the token {short_repr(token)} is not text")
    if token.startswith(ID_PREFIX) or not values:
        return token.encode()
    numbers = get_ids(values, f"{location}.bytes")
    if not all(0 <= number < 256 for number in numbers):
        raise InvalidInput(f"{location}.bytes: {short_repr(numbers)} are no bytes")
    return bytes(numbers)


def _token_id(piece: bytes, location: str, context: ReadContext) -> int:
    """Return the id of a token: its own, that of the tokenizer, or its number in the file."""
    text = piece.decode(errors="replace")
    if text.startswith(ID_PREFIX) and text.removeprefix(ID_PREFIX).isdecimal():
        return int(text.removeprefix(ID_PREFIX))
    if context.tokenizer is None:
        return context.token_numbers.setdefault(piece, len(context.token_numbers))
    token = context.tokenizer.token_id(piece)
    if token is None:
        raise InvalidInput(
            f"{location}: no id of the tokenizer stands for the token {short_repr(text)}; the "
            "answers are of a model with another vocabulary"
        )
    return token


def _echoed_tokens(logps: Sequence[Any], answer: Mapping[str, Any], location: str) -> int:
    """Return how many of the tokens are the prompt's, which a completion with echo repeats."""
    usage = get_object(answer.get("usage") or {}, f"{location}, usage")
    sizes: list[Any] = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    has_sizes = all(has_type(size, int) for size in sizes) and len(answer["choices"]) == 1
    if has_sizes and len(logps) == sum(sizes):
        return int(sizes[0])
    if logps and logps[0] is None:
        raise InvalidInput(
            f"{location}: the first token has no log-probability, so the prompt is repeated "
            "(echo); keep usage with prompt_tokens and completion_tokens of one choice, which says "
            "where the response begins"
        )
    return 0


OPENAI = DumpFormat(
    name="openai",
    title="OpenAI-style answer",
    source="the answers of a chat completions or completions server with `logprobs`, one a line, "
    "or the output file of a batch; `messages` or `prompt` of the request may be added",
    signatures=(frozenset({"choices"}), frozenset({"custom_id", "response"})),
    fields=(
        Field(
            name="choices.logprobs.content",
            columns="tokens, sampler_logp, support.ids, support.student_logp",
            remark="token or bytes, logprob and top_logprobs of each token of a chat completion",
        ),
        Field(
            name="choices.logprobs.tokens, token_logprobs, top_logprobs",
            columns="tokens, sampler_logp, support.ids, support.student_logp",
            remark="of a completion; a repeated prompt (echo) is removed",
        ),
        Field(name="choices.token_ids", columns="tokens", remark="vLLM: return_token_ids"),
        Field(name="choices.prompt_token_ids", columns="prompt_tokens"),
        Field(name="prompt_token_ids", columns="prompt_tokens"),
        Field(name="choices.finish_reason", columns="ended"),
        Field(
            name="choices.message.content",
            columns="tokens",
            remark="tokenised where there are no logprobs and models are given",
        ),
        Field(name="choices.text", columns="tokens", remark="as above"),
        Field(
            name="messages",
            columns="prompt, prompt_tokens",
            remark="of the request, if it was kept; tokenised where models are given",
        ),
        Field(name="prompt", columns="prompt, prompt_tokens", remark="as above"),
        Field(name="id", columns="prompt", remark="without messages, prompt and custom_id"),
        Field(name="custom_id", columns="prompt", remark="without messages and prompt"),
        Field(name="usage", remark="says where the response begins after a repeated prompt"),
        Field(name="response.body", remark="the answer, in a batch's output file"),
        *(
            Field(name=name)
            for name in (
                *(
                    "created",
                    "ec_transfer_params",
                    "error",
                    "kv_transfer_params",
                    "metrics",
                    "model",
                ),
                "object",
                *("prompt_logprobs", "prompt_text", "service_tier", "system_fingerprint"),
            )
        ),
    ),
    convert=convert,
    notes=GENERATED_NOTE,
)
