"""Answers of vLLM's engine: `RequestOutput` objects as dictionaries.

One row has one prompt and one or more outputs. A list of log-probabilities has an object for each
position, token id -> {logprob, rank, decoded_token}, or is vLLM's flat form. It holds the K most
probable ids and the token itself, which may be the K+1st.
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
    get_numbers,
    get_object,
)
from diagnostics.formats.server_scores import (
    GENERATED_NOTE,
    require_token,
    score_columns,
    support_columns,
)
from diagnostics.io.files import has_type, short_repr

FLAT_KEYS = ("start_indices", "end_indices", "token_ids", "logprobs")


def convert(row: Mapping[str, Any], location: str, context: ReadContext) -> Iterator[Row]:
    """Yield one row for each output; for the response at the end of the prompt if it was scored.

    Args:
        row: A request's output as a dictionary.
        location: File and row, the beginning of every message.
        context: Its `scores`.

    Yields:
        Rows with our columns.

    Raises:
        InvalidInput: Lists of different lengths, or a position without its token.
    """
    prompt = get_ids(row["prompt_token_ids"], f"{location}, field prompt_token_ids")
    if row.get("response_length") is not None:
        yield _scored_prompt(row, prompt, location, context)
        return
    outputs = get_list(row["outputs"], f"{location}, field outputs")
    if not outputs:
        raise InvalidInput(f"{location}: outputs is empty; remove the row")
    scores = context.scores or "sampler"
    for i, value in enumerate(outputs):
        place = f"{location}, outputs[{i}]"
        output = get_object(value, place)
        tokens = get_ids(output.get("token_ids"), f"{place}.token_ids")
        converted: Row = {"prompt_tokens": prompt, "tokens": tokens}
        if output.get("finish_reason") is not None:
            converted["finish_reason"] = output["finish_reason"]
        if output.get("logprobs") is not None:
            positions = parse_logprobs(output["logprobs"], f"{place}.logprobs")
            converted |= _aligned_columns(positions, tokens, f"{place}.logprobs", scores)
        yield converted


def _scored_prompt(
    row: Mapping[str, Any], sequence: list[Any], location: str, context: ReadContext
) -> Row:
    """Return the last `response_length` ids of the prompt as a response that the model scored."""
    size = get_length(row["response_length"], len(sequence), f"{location}, field response_length")
    if row.get("prompt_logprobs") is None:
        raise InvalidInput(
            f"{location}: response_length is {size}, but there are no prompt_logprobs of that part "
            "of the prompt; ask vLLM for prompt_logprobs, or remove response_length"
        )
    place = f"{location}, field prompt_logprobs"
    positions = parse_logprobs(row["prompt_logprobs"], place)
    if len(positions) != len(sequence):
        raise InvalidInput(f"{place}: {len(positions)} positions, the prompt has {len(sequence)}")
    start = len(sequence) - size
    columns = _aligned_columns(
        positions[start:], sequence[start:], place, context.scores or "teacher"
    )
    return {"prompt_tokens": sequence[:start], "tokens": sequence[start:]} | columns


def _aligned_columns(
    positions: list[dict[int, tuple[float, int | None]]],
    tokens: list[Any],
    location: str,
    scores: Any,
) -> Row:
    """Return the columns of the tokens' log-probabilities and of the top-K ids."""
    if len(positions) != len(tokens):
        raise InvalidInput(f"{location}: {len(positions)} positions, but {len(tokens)} token ids")
    logps, tops = [], []
    for t, (entries, token) in enumerate(zip(positions, tokens, strict=True)):
        ids = {i: logp for i, (logp, _) in entries.items()}
        logps.append(require_token(ids, token, t, location))
        # beyond the most probable ids vLLM adds the token itself, whose rank is then too large
        is_extra = (entries[token][1] or 0) > len(entries)
        tops.append({i: logp for i, logp in ids.items() if not (is_extra and i == token)})
    return score_columns(logps, scores) | support_columns(tops, tokens, scores)


def parse_logprobs(value: Any, location: str) -> list[dict[int, tuple[float, int | None]]]:
    """Parse vLLM's log-probabilities of a prompt or of an output.

    Args:
        value: A list with an object or null a position, or the flat form.
        location: Beginning of every message.

    Returns:
        For each position, id -> (log-probability, rank or None); empty where vLLM has none.

    Raises:
        InvalidInput: Another structure, or a key that is not a token id.
    """
    if isinstance(value, Mapping):
        return _flat_logprobs(value, location)
    positions = []
    for t, entries in enumerate(get_list(value, location)):
        place = f"{location}[{t}]"
        position: dict[int, tuple[float, int | None]] = {}
        for key, entry in () if entries is None else get_object(entries, place).items():
            if not str(key).isdecimal():
                raise InvalidInput(f"{place}: the key {short_repr(key)} is not a token id")
            logp: Any = entry.get("logprob") if isinstance(entry, Mapping) else entry
            rank: Any = entry.get("rank") if isinstance(entry, Mapping) else None
            if not has_type(logp, float):
                raise InvalidInput(f"{place}[{key}]: {short_repr(logp)} is not a number")
            if rank is not None and not has_type(rank, int):
                raise InvalidInput(f"{place}[{key}]: the rank {short_repr(rank)} is no integer")
            position[int(key)] = (float(logp), rank)
        positions.append(position)
    return positions


def _flat_logprobs(
    value: Mapping[str, Any], location: str
) -> list[dict[int, tuple[float, int | None]]]:
    """Parse `FlatLogprobs` as a dictionary: positions are slices of common lists."""
    starts, ends, ids = (get_ids(value.get(name), f"{location}.{name}") for name in FLAT_KEYS[:3])
    logps = get_numbers(value.get(FLAT_KEYS[3]), f"{location}.{FLAT_KEYS[3]}")
    ranks = get_numbers(value.get("ranks") or [None] * len(ids), f"{location}.ranks")
    if not len(ids) == len(logps) == len(ranks) or len(starts) != len(ends) or None in logps:
        raise InvalidInput(f"{location}: its lists have different lengths, or a null logprob")
    if any(not 0 <= a <= b <= len(ids) for a, b in zip(starts, ends, strict=True)):
        raise InvalidInput(f"{location}: an index is outside its lists of {len(ids)} values")
    return [
        {ids[i]: (logps[i], ranks[i]) for i in range(start, end)}
        for start, end in zip(starts, ends, strict=True)
    ]


VLLM = DumpFormat(
    name="vllm",
    title="vLLM RequestOutput",
    source="`json.dumps` of the engine's `RequestOutput` objects as dictionaries "
    "(`vars`, `dataclasses.asdict`), one a line",
    signatures=(frozenset({"prompt_token_ids", "outputs"}),),
    fields=(
        Field(name="prompt_token_ids", columns="prompt_tokens"),
        Field(name="outputs.token_ids", columns="tokens", remark="one row for each output"),
        Field(
            name="outputs.logprobs",
            columns="sampler_logp, support.ids, support.student_logp, support.present",
            remark="of the position's token; the K most probable ids",
        ),
        Field(name="outputs.finish_reason", columns="ended"),
        Field(
            name="response_length",
            columns="tokens",
            remark="to be added where the model scored a given response: the number of ids at the "
            "end of the prompt that are the response",
        ),
        Field(
            name="prompt_logprobs",
            columns="teacher_logp, support.ids, support.teacher_logp",
            remark="with response_length",
        ),
        *(
            Field(name=name)
            for name in (
                *("prompt", "request_id", "outputs.text", "outputs.cumulative_logprob"),
                *("outputs.index", "outputs.stop_reason", "finished", "metrics", "lora_request"),
                *("encoder_prompt", "encoder_prompt_token_ids", "num_cached_tokens"),
                *("num_cache_creation_tokens", "kv_transfer_params", "ec_transfer_params"),
                "prompt_token_id_logprobs",
            )
        ),
    ),
    convert=convert,
    notes=GENERATED_NOTE,
)
