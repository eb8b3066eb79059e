"""The tables of the formats are what their conversions read."""

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch

from diagnostics.errors import InvalidInput
from diagnostics.formats.dump_format import ID_FIELDS, ReadContext
from diagnostics.formats.registry import FORMATS, convert_rows, recognise
from diagnostics.records.columns import NAMES, parse_record
from tests.diagnostics.formats.dump_rows import (
    EXAMPLES,
    example_lines,
    nemo_rows,
    openai_completions,
    sglang_answers,
)
from tests.helpers.dumps.dump_arrays import sampled_responses


class RecordedRow(dict):
    """A row that records the dotted names of the fields that are read."""

    def __init__(self, row: dict, names: set[str], owner: str = "") -> None:
        super().__init__({k: self._wrap(v, names, f"{owner}{k}.") for k, v in row.items()})
        self.names, self.owner = names, owner

    def _wrap(self, value: Any, names: set[str], owner: str) -> Any:
        if isinstance(value, dict):
            return RecordedRow(value, names, owner)
        return [self._wrap(v, names, owner) for v in value] if isinstance(value, list) else value

    def __getitem__(self, name: str) -> Any:
        self.names.add(f"{self.owner}{name}")
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(f"{self.owner}{name}")
        return super().get(name, default)


class LetterTokenizer:
    def prompt_ids(self, prompt: Any) -> list[int]:
        return [1, 2]

    def response_ids(self, text: str) -> list[int]:
        return [3]

    def token_id(self, token: bytes) -> int:
        return sum(token)


def table_rows() -> dict[str, list[dict]]:
    """Return rows of each format that together hold all fields it reads."""
    responses = sampled_responses(tools=False)
    chat, completion = example_lines("openai_chat.jsonl")[0], openai_completions(responses, True)[0]
    unscored = copy.deepcopy(chat)
    unscored["choices"][0]["logprobs"] = None
    unscored_text = {"prompt": "a", "choices": [{"index": 0, "text": "b"}]}
    with_ids = copy.deepcopy(chat)
    with_ids["choices"][0]["token_ids"] = responses[0].tokens
    with_ids["prompt_token_ids"] = [1]
    sglang = sglang_answers(responses)[0]
    tensors = torch.load(EXAMPLES / "verl_tensors.pt", weights_only=False)
    verl = {name: x[0].tolist() if x.ndim > 1 else x[0] for name, x in tensors.items()}
    verl |= {"data_source": "a", "ref_log_prob": verl["old_log_probs"]}
    return {
        "vllm": [example_lines("vllm.jsonl")[0], example_lines("vllm_scored.jsonl")[0]],
        "sglang": [sglang, sglang | {"response_length": 1, "input_ids": responses[0].prompt}],
        "verl": [
            *(verl, verl | {"teacher_logprobs": None, "token_level_scores": None}),
            verl | {"token_level_scores": None, "rm_scores": None, "token_level_rewards": [1.0]},
        ],
        "verl-text": [row | {"data_source": "a"} for row in example_lines("verl_text.jsonl")],
        "slime": [row | {"group_index": None} for row in example_lines("slime.jsonl")[:1]],
        "nemo-rl": [nemo_rows(responses)[0] | {"agent_ref": {"name": "a"}}],
        "trl": [{"step": 1, "prompt": "a", "completion": "b", "even": 1.0}],
        "openai": [
            *(chat, completion, unscored, with_ids, completion | {"messages": None, "prompt": "a"}),
            *({"custom_id": "1", "response": {"body": completion}}, unscored_text),
        ],
    }


@pytest.mark.parametrize("dump_format", FORMATS, ids=lambda f: f.name)
def test_the_table_of_a_format_is_what_its_conversion_reads(dump_format: Any) -> None:
    names: set[str] = set()
    columns: set[str] = set()
    for row in table_rows()[dump_format.name]:
        context = ReadContext(tokenizer=LetterTokenizer())
        for converted in dump_format.convert(RecordedRow(row, names), "here", context):
            columns |= {*converted}
    declared = {name for f in dump_format.fields for name in f.name.split(", ")}
    used = {
        name
        for f in dump_format.fields
        if (f.columns or f.remark) and not f.name.startswith("NAME of")
        for name in f.name.split(", ")
    }
    read_names = {*names, *(name.rpartition(".")[2] for name in names)}
    assert not used - read_names, "declared and never read"
    undeclared = {name.partition(".")[0] for name in names} - dump_format.top_level_fields
    if dump_format.name != "nemo-rl":  # it reads all fields, to unwrap them
        ignored = {f.name for f in dump_format.fields} - used
        assert not ignored & names, "declared as not used"
        assert undeclared <= {"choices", "even"}, "read and not declared"
    assert declared
    made = {NAMES[column] for column in columns if column in NAMES}
    promised = {c for f in dump_format.fields for c in f.columns.split(", ") if c}
    assert made - {"support.present", "support.source", "attention_mask"} <= {
        *(NAMES[column] for column in promised),
        *("sequence", "response_length", "remove_sample", "teacher_logp", "response_mask"),
    }


ODD_VALUES = (None, 3, -1.5, "x", True, [], [3], [[]], [[None]], {}, {"a": 1}, [{"a": []}])


def edited(value: Any) -> list[Any]:
    """Return copies of a row with each field, at every depth, removed or given an odd value."""
    if isinstance(value, dict):
        copies = [{k: v for k, v in value.items() if k != name} for name in value]
        for name, old in value.items():
            copies += [value | {name: odd} for odd in (*ODD_VALUES, *edited(old))]
        return copies
    if isinstance(value, list) and value:
        return [[new, *value[1:]] for new in (*ODD_VALUES, *edited(value[0]))] + [value[1:]]
    return []


@pytest.mark.parametrize("name", [f.name for f in FORMATS])
def test_an_odd_value_is_read_or_refused(name: str) -> None:
    context = ReadContext(tokenizer=LetterTokenizer())
    for row in table_rows()[name]:
        for odd_row in edited(row):
            rows = convert_rows([("row 1", odd_row)], None, {}, context)
            with suppress(InvalidInput):
                for location, converted in rows:
                    parse_record(converted, location)


def test_signatures_and_columns_of_the_tables() -> None:
    """Each format recognises its own signatures alone, and makes columns that exist."""
    for dump_format in FORMATS:
        for signature in dump_format.signatures:
            assert recognise(dict.fromkeys(signature, 1)) is dump_format
            assert signature <= dump_format.top_level_fields
        for field in dump_format.fields:
            for column in filter(None, field.columns.split(", ")):
                assert column in NAMES, (dump_format.name, field.name)
    assert recognise({"tokens": [1], "response_length": 1}) is None
    assert {name for name, column in NAMES.items() if column in ("tokens", "sequence")} == ID_FIELDS
    with_ids = {"step": 1, "prompt": "a", "completion": "b", "completion_ids": [1]}
    assert recognise(with_ids) is None
