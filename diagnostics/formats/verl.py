"""verl's dumps: the tensors of a `DataProto` batch, and the text of `trainer.rollout_data_dir`.

Shapes: P prompt positions, padded on the left; T response positions, padded on the right; K ids.
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
    get_list,
    get_numbers,
    tokenize_row,
)
from diagnostics.io.files import short_repr

SAME_COLUMNS = {
    "response_mask": "response_mask",
    "attention_mask": "attention_mask",
    "old_log_probs": "student_logp",
    "rollout_log_probs": "sampler_logp",
    "uid": "prompt",
    "data_source": "task",
}
"""Fields that are columns as they are."""

REWARDS = ("token_level_scores", "rm_scores", "token_level_rewards")
"""Rewards by token, whose sum is the reward of the response; the first that a row has."""

TEXT_TITLE = "verl rollout_data_dir"


def convert_tensors(row: Mapping[str, Any], location: str, context: ReadContext) -> Iterator[Row]:
    """Yield a row of a batch's tensors.

    Args:
        row: Fields of one response as lists.
        location: File and row, the beginning of every message.
        context: Not used.

    Yields:
        One row with our columns.

    Raises:
        InvalidInput: A list of another length than the response, or teacher ids that are not the
            tokens'.
    """
    prompt = get_list(row["prompts"], f"{location}, field prompts")
    tokens = get_ids(row["responses"], f"{location}, field responses")
    converted: Row = {"prompt_tokens": prompt, "tokens": tokens}
    for name, column in SAME_COLUMNS.items():
        if row.get(name) is not None:
            converted[column] = row[name]
    if row.get("teacher_logprobs") is not None:
        converted |= _teacher_columns(row, len(prompt), tokens, location)
    elif row.get("ref_log_prob") is not None:
        converted["teacher_logp"] = row["ref_log_prob"]
    reward_name = next((name for name in REWARDS if row.get(name) is not None), None)
    if reward_name is not None:
        scores = get_numbers(row[reward_name], f"{location}, field {reward_name}")
        converted["reward"] = float(sum(score or 0.0 for score in scores))
    yield converted


def _teacher_columns(
    row: Mapping[str, Any], prompt_width: int, tokens: list[Any], location: str
) -> Row:
    """Return the teacher's columns.

    Over prompt and response the value at a position is of the next token, as in verl's model
    outputs; over the response alone it is of the token itself.
    """
    location = f"{location}, field teacher_logprobs"
    logps = get_list(row["teacher_logprobs"], location)
    size = len(tokens)
    if len(logps) not in (size, prompt_width + size):
        raise InvalidInput(
            f"{location}: {len(logps)} positions, expected {size} (response) or "
            f"{prompt_width + size} (prompt and response)"
        )
    is_shifted = len(logps) != size
    if is_shifted and not prompt_width:
        raise InvalidInput(f"{location}: the first token of a response needs a prompt before it")
    part = slice(prompt_width - 1, prompt_width + size - 1) if is_shifted else slice(None)
    logps = logps[part]
    if not logps or not isinstance(logps[0], list):
        return {"teacher_logp": logps}
    logps = [get_numbers(values, f"{location}[{t}]") for t, values in enumerate(logps)]
    if row.get("teacher_ids") is None:
        raise InvalidInput(f"{location}: teacher_ids, the ids of these values, are missing")
    all_ids = get_list(row["teacher_ids"], f"{location}, field teacher_ids")[part]
    ids = [get_ids(values, f"{location}, teacher_ids[{t}]") for t, values in enumerate(all_ids)]
    sizes = {*map(len, logps), *map(len, ids)}
    if len(ids) != size or len(sizes) > 1 or 0 in sizes:
        raise InvalidInput(f"{location}: its lists and those of teacher_ids have different lengths")
    if len(logps[0]) > 1:
        return {"support.ids": ids, "support.teacher_logp": logps, "support.source": "teacher"}
    mask = [1] * size
    if row.get("response_mask") is not None:
        mask = get_numbers(row["response_mask"], f"{location}, field response_mask")
    for t, (token, scored_ids) in enumerate(zip(tokens, ids, strict=True)):
        if t >= len(mask):
            break  # another length of the mask is refused where it is read
        if mask[t] and scored_ids != [token]:
            raise InvalidInput(
                f"{location}: position {t} of the response is of id {short_repr(scored_ids[0])}, "
                f"but its token is {short_repr(token)}; the values are shifted, or are the "
                "teacher's most probable id"
            )
    return {"teacher_logp": [values[0] for values in logps]}


def convert_text(row: Mapping[str, Any], location: str, context: ReadContext) -> Iterator[Row]:
    """Yield a row of decoded text as ids.

    Args:
        row: A row of the file.
        location: File and row, the beginning of every message.
        context: Its tokenizer.

    Yields:
        One row with our columns.
    """
    converted = tokenize_row(row["input"], row["output"], location, context, TEXT_TITLE)
    if "score" in row:
        converted["reward"] = row["score"]
    if row.get("data_source") is not None:
        converted["task"] = row["data_source"]
    yield converted


VERL = DumpFormat(
    name="verl",
    title="verl DataProto",
    source="`torch.save({**data.batch, **data.non_tensor_batch}, FILE)` or "
    "`DataProto.save_to_disk(FILE)`, as `.pt`",
    signatures=(frozenset({"prompts", "responses"}),),
    fields=(
        Field(name="prompts", columns="prompt_tokens", remark="padding removed by attention_mask"),
        Field(name="responses", columns="tokens"),
        Field(name="attention_mask", columns="attention_mask", remark="of prompt and response"),
        Field(name="response_mask", columns="sampled_mask"),
        Field(name="old_log_probs", columns="student_logp"),
        Field(name="rollout_log_probs", columns="sampler_logp"),
        Field(
            name="teacher_logprobs",
            columns="teacher_logp, support.teacher_logp",
            remark="over prompt and response the value at a position is of the next token; K > 1 "
            "values are the teacher's most probable ids",
        ),
        Field(
            name="teacher_ids",
            columns="support.ids",
            remark="with one id a position, compared with responses",
        ),
        Field(name="ref_log_prob", columns="teacher_logp", remark="without teacher_logprobs"),
        *(
            Field(name=name, columns="reward", remark="sum over tokens; the first that exists")
            for name in REWARDS
        ),
        Field(name="uid", columns="prompt"),
        Field(name="data_source", columns="task"),
        *(
            Field(name=name)
            for name in (
                *("input_ids", "position_ids", "advantages", "returns", "values", "entropys"),
                *("reward_model", "extra_info", "raw_prompt", "raw_prompt_ids", "index"),
                *("multi_modal_inputs", "multi_modal_data", "tools_kwargs", "ability"),
                *("agent_name", "request_id", "__num_turns__", "num_turns", "acc"),
                *("interaction_kwargs", "global_steps", "min_global_steps", "max_global_steps"),
            )
        ),
    ),
    convert=convert_tensors,
)

VERL_TEXT = DumpFormat(
    name="verl-text",
    title=TEXT_TITLE,
    source="`STEP.jsonl` in `trainer.rollout_data_dir` or `trainer.validation_data_dir`",
    signatures=(
        frozenset({"input", "output", "score"}),
        frozenset({"input", "output", "gts"}),
    ),
    fields=(
        Field(name="input", columns="prompt, prompt_tokens", remark="text without special tokens"),
        Field(name="output", columns="tokens", remark="text without special tokens"),
        Field(name="score", columns="reward"),
        Field(name="data_source", columns="task"),
        *(Field(name=name) for name in ("gts", "step", "uid", "acc", "request_id")),
    ),
    convert=convert_text,
    notes="the dump holds text without special tokens: ids are the tokenizer's, EOS and the chat "
    "template's tokens are lost, and tests of the sampler do not apply",
    is_text=True,
)
