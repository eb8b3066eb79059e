"""Completions that TRL writes with `log_completions=True`: parquet files of text."""

from collections.abc import Iterator, Mapping
from typing import Any

from diagnostics.formats.dump_format import DumpFormat, Field, ReadContext, Row, tokenize_row
from diagnostics.io.files import has_type

TITLE = "TRL log_completions"
OTHER_FIELDS = ("step", "prompt", "completion", "advantage")


def convert(row: Mapping[str, Any], location: str, context: ReadContext) -> Iterator[Row]:
    """Yield the row with its text as ids; a single column of rewards becomes the reward.

    Args:
        row: A row of the file.
        location: File and row, the beginning of every message.
        context: Its tokenizer.

    Yields:
        One row with our columns.
    """
    converted = tokenize_row(row["prompt"], row["completion"], location, context, TITLE)
    # a reward function may return None for a response
    numbers = [
        k for k, v in row.items() if k not in OTHER_FIELDS and (v is None or has_type(v, float))
    ]
    if len(numbers) == 1 and "reward" not in row:
        converted["reward"] = row[numbers[0]]
    yield converted


TRL = DumpFormat(
    name="trl",
    title=TITLE,
    source="`completions/completions_STEP.parquet` in the output folder of a run with "
    "`log_completions=True`",
    signatures=(frozenset({"step", "prompt", "completion"}),),
    fields=(
        Field(
            name="prompt",
            columns="prompt, prompt_tokens",
            remark="text, or messages to which the chat template is applied",
        ),
        Field(name="completion", columns="tokens", remark="text, or the assistant's message"),
        Field(
            name="NAME of a reward function",
            columns="reward",
            remark="if there is one such column; else name it: --rename NAME=reward",
        ),
        *(Field(name=name) for name in ("step", "advantage")),
    ),
    convert=convert,
    notes="the dump holds text: ids are the tokenizer's, EOS and other special tokens are lost, "
    "and tests of the sampler do not apply",
    is_text=True,
)
