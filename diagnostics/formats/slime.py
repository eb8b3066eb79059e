"""Samples of slime: `Sample.to_dict()`, one a line or in the file of save_debug_rollout_data."""

from collections.abc import Iterator, Mapping
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.formats.dump_format import DumpFormat, Field, ReadContext, Row, get_list
from diagnostics.io.files import short_repr

SAME_COLUMNS = {
    "rollout_log_probs": "sampler_logp",
    "teacher_log_probs": "teacher_logp",
    "loss_mask": "mask",
    "remove_sample": "remove_sample",
    "status": "status",
}
"""Fields of the response that are columns as they are."""


def convert(row: Mapping[str, Any], location: str, context: ReadContext) -> Iterator[Row]:
    """Yield the sample with its response apart from the prompt.

    Args:
        row: A sample.
        location: File and row, the beginning of every message.
        context: Not used.

    Yields:
        One row with our columns.

    Raises:
        InvalidInput: A reward with several numbers, or a list of another length than the response.
    """
    size = row["response_length"]
    converted: Row = {"sequence": row["tokens"], "response_length": size}
    for name, column in SAME_COLUMNS.items():
        if row.get(name) is not None:
            converted[column] = row[name]
    for name in ("rollout_log_probs", "teacher_log_probs", "loss_mask"):
        if row.get(name) is not None and len(get_list(row[name], f"{location}, {name}")) != size:
            raise InvalidInput(
                f"{location}, field {name}: {len(row[name])} values, response_length is "
                f"{short_repr(size)}"
            )
    prompt = row.get("group_index")
    if prompt is None:
        prompt = row.get("prompt") or None
    if prompt is not None:
        converted["prompt"] = prompt
    reward = row.get("reward")
    if isinstance(reward, Mapping):
        if len(reward) != 1:
            raise InvalidInput(
                f"{location}, field reward: {short_repr(dict(reward))} holds several numbers; "
                f"choose one, such as --rename reward.{next(iter(reward), 'KEY')}=reward"
            )
        reward = next(iter(reward.values()))
    yield converted | {"reward": reward}


SLIME = DumpFormat(
    name="slime",
    title="slime Sample",
    source="`Sample.to_dict()`, one a line, or the `.pt` file of `--save-debug-rollout-data`",
    signatures=(frozenset({"tokens", "response_length", "status"}),),
    fields=(
        Field(
            name="tokens",
            columns="prompt_tokens, tokens",
            remark="prompt and response; the response is the last response_length ids",
        ),
        Field(name="response_length", remark="where tokens is divided"),
        Field(name="loss_mask", columns="mask", remark="of the response"),
        Field(name="rollout_log_probs", columns="sampler_logp", remark="of the response"),
        Field(name="teacher_log_probs", columns="teacher_logp", remark="of the response"),
        Field(name="status", columns="ended", remark="completed or truncated"),
        Field(name="remove_sample", columns="mask", remark="true: no token is in the loss"),
        Field(
            name="reward", columns="reward", remark="a number, or an object with a single number"
        ),
        Field(name="group_index", columns="prompt"),
        Field(name="prompt", columns="prompt", remark="where group_index is null"),
        *(
            Field(name=name)
            for name in (
                *("index", "response", "label", "metadata", "train_metadata", "session_id"),
                *("multimodal_inputs", "multimodal_train_inputs", "weight_versions"),
                *("rollout_routed_experts", "mopd_teacher_log_probs", "generate_function_path"),
                *("non_generation_time", "spec_info", "prefix_cache_info", "rollout_id"),
                *("multimodal_train_input_id", "apply_chat_template_kwargs", "custom_rm_path"),
                *("rollout_top_p_token_ids", "rollout_top_p_token_offsets"),
            )
        ),
    ),
    convert=convert,
)
