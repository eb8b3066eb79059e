"""Rows of NeMo-RL's `train_data_stepN.jsonl`.

Every field is a list of one value, since the rows are micro-batches of size 1. Sequences are prompt
and response, padded on the right; a log-probability is at the position of its token.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.formats.dump_format import (
    DumpFormat,
    Field,
    ReadContext,
    Row,
    get_length,
    get_list,
)
from diagnostics.io.files import short_repr

LOGPS = {
    "generation_logprobs": "sampler_logp",
    "prev_logprobs": "student_logp",
    "teacher_logprobs": "teacher_logp",
}
BY_TOKEN = ("token_ids", "token_loss_mask", *LOGPS)


def convert(row: Mapping[str, Any], location: str, context: ReadContext) -> Iterator[Row]:
    """Yield the row with its response apart from prompt and padding.

    Args:
        row: A row of the file.
        location: File and row, the beginning of every message.
        context: Not used.

    Yields:
        One row with our columns.

    Raises:
        InvalidInput: The row has no ids, or lists of different lengths.
    """
    values = {name: _only_value(row[name], name in BY_TOKEN) for name in row}
    if values.get("token_ids") is None or values.get("token_loss_mask") is None:
        raise InvalidInput(
            f"{location}: content is one text of prompt and response, and token_ids and "
            "token_loss_mask, which say where the response begins, are missing; GRPO runs of "
            "present NeMo-RL write them"
        )
    lists = {
        name: get_list(values[name], f"{location}, field {name}")
        for name in BY_TOKEN
        if values.get(name) is not None
    }
    width = len(lists["token_ids"])
    for name, x in lists.items():
        if len(x) != width:
            raise InvalidInput(f"{location}, field {name}: {len(x)} values, token_ids has {width}")
    length = get_length(values.get("input_lengths", width), width, f"{location}, input_lengths")
    mask = lists["token_loss_mask"][:length]
    start = next((t for t, x in enumerate(mask) if x), length)
    converted: Row = {
        "prompt_tokens": lists["token_ids"][:start],
        "tokens": lists["token_ids"][start:length],
        "response_mask": mask[start:],
    }
    for name, column in LOGPS.items():
        # zeros throughout: NeMo-RL did not compute them (force_on_policy_ratio)
        if name in lists and any(lists[name][start:length]):
            converted[column] = lists[name][start:length]
    if values.get("sample_loss_mask") is not None:
        is_used = values["sample_loss_mask"]
        if isinstance(is_used, bool) or not isinstance(is_used, int | float):
            raise InvalidInput(
                f"{location}, field sample_loss_mask: {short_repr(is_used)} is not a number"
            )
        converted["mask"] = [1 if x and is_used else 0 for x in mask[start:]]
    if "rewards" in values:
        converted["reward"] = values["rewards"]
    agent = values.get("agent_ref")
    if isinstance(agent, Mapping) and isinstance(agent.get("name"), str):
        converted["task"] = agent["name"]
    yield converted


def _only_value(value: Any, is_list: bool) -> Any:
    """Return the value of a micro-batch of size 1; a value that is not wrapped is unchanged."""
    is_wrapped = isinstance(value, list) and len(value) == 1
    if is_list:
        is_wrapped = is_wrapped and isinstance(value[0], list)
    return value[0] if is_wrapped else value


NEMO_RL = DumpFormat(
    name="nemo-rl",
    title="NeMo-RL train_data row",
    source="`train_data_stepN.jsonl` in the log folder of a GRPO run",
    signatures=(
        frozenset({"token_ids", "token_loss_mask"}),
        frozenset({"content", "input_lengths"}),
    ),
    fields=(
        Field(
            name="token_ids",
            columns="prompt_tokens, tokens",
            remark="the response begins at the first token of token_loss_mask",
        ),
        Field(name="input_lengths", remark="the ids after it are padding"),
        Field(
            name="token_loss_mask",
            columns="sampled_mask",
            remark="0 in the prompt, and for text of tools and environments",
        ),
        Field(name="sample_loss_mask", columns="mask", remark="0: no token is in the loss"),
        Field(
            name="prev_logprobs",
            columns="student_logp",
            remark="missing where all are 0, which NeMo-RL writes if it does not compute them",
        ),
        Field(name="generation_logprobs", columns="sampler_logp"),
        Field(name="teacher_logprobs", columns="teacher_logp", remark="if a run adds them"),
        Field(name="rewards", columns="reward"),
        Field(name="agent_ref", columns="task", remark="its name"),
        *(Field(name=name) for name in ("content", "advantages", "filtered_rewards", "idx")),
    ),
    convert=convert,
)
