"""Dumps that contradict themselves, mix formats or carry code are refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diagnostics.errors import InvalidInput
from diagnostics.monitor import Monitor
from diagnostics.records.reader import Records
from tests.diagnostics.formats.dump_rows import (
    EXAMPLES,
    example_lines,
    nemo_rows,
    openai_completions,
    sglang_answers,
    write_lines,
)
from tests.helpers.dumps.dump_arrays import mean_cost, sampled_responses


def shift(x: list) -> list:
    return [*x[1:], x[0]]


def edit_vllm(row: dict) -> dict:
    row["outputs"][0]["logprobs"] = shift(row["outputs"][0]["logprobs"])
    return row


def edit_sglang(row: dict) -> dict:
    row["output_ids"] = shift(row["output_ids"])
    return row


def edit_slime(row: dict) -> dict:
    row["teacher_log_probs"] = [-1.0] * len(row["tokens"])
    return row


def edit_nemo(row: dict) -> dict:
    row["token_loss_mask"] = [row["token_loss_mask"][0][3:]]
    return row


FAULTS: dict[str, tuple[Callable[[], list[dict]], Callable[[dict], dict], str]] = {
    "vllm, shifted by one": (
        lambda: example_lines("vllm.jsonl"),
        edit_vllm,
        r"row 1, outputs\[0\].logprobs: position 0 has log-probabilities .* shifted",
    ),
    "vllm, a list too short": (
        lambda: example_lines("vllm.jsonl"),
        lambda row: row["outputs"][0]["token_ids"].pop() and row,
        "4 positions, but 3 token ids",
    ),
    "vllm, scored without prompt_logprobs": (
        lambda: example_lines("vllm.jsonl"),
        lambda row: row | {"response_length": 1, "prompt_logprobs": None},
        "response_length is 1, but there are no prompt_logprobs",
    ),
    "vllm, no output": (
        lambda: example_lines("vllm.jsonl"),
        lambda row: row | {"outputs": []},
        "row 1: outputs is empty",
    ),
    "sglang, shifted by one": (
        lambda: sglang_answers(sampled_responses(tools=False)),
        edit_sglang,
        "are not the ids of output_token_logprobs",
    ),
    "sglang, no ids": (
        lambda: sglang_answers(sampled_responses(tools=False)),
        lambda row: {"text": "a", "meta_info": {}},
        "generate with return_logprob=True",
    ),
    "slime, log-probabilities of prompt and response": (
        lambda: example_lines("slime.jsonl"),
        edit_slime,
        "field teacher_log_probs: 6 values, response_length is 4",
    ),
    "slime, several rewards": (
        lambda: example_lines("slime.jsonl"),
        lambda row: row | {"reward": {"accuracy": 1.0, "format": 0.0}},
        "choose one, such as --rename reward.accuracy=reward",
    ),
    "slime, unfinished": (
        lambda: example_lines("slime.jsonl"),
        lambda row: row | {"status": "aborted"},
        "remove the rows of unfinished responses",
    ),
    "nemo, a mask of another length": (
        lambda: nemo_rows(sampled_responses()),
        edit_nemo,
        "field token_loss_mask: .* values, token_ids has",
    ),
    "nemo, text alone": (
        lambda: [{"content": ["a"], "input_lengths": [3], "idx": 0}],
        lambda row: row,
        "token_ids and token_loss_mask, which say where the response begins, are missing",
    ),
    "openai, echo without usage": (
        lambda: openai_completions(sampled_responses(tools=False), echo=True),
        lambda row: row | {"usage": None},
        r"the prompt is repeated \(echo\)",
    ),
    "openai, a failed request": (
        lambda: [{"custom_id": "1", "response": None, "error": {"message": "overloaded"}}],
        lambda row: row,
        "the request has no answer",
    ),
    "verl text without models": (
        lambda: example_lines("verl_text.jsonl"),
        lambda row: row,
        r"row 1 \(verl rollout_data_dir\) holds text and no token ids; give --student and",
    ),
    "an unknown mask beside the format's fields": (
        lambda: example_lines("slime.jsonl"),
        lambda row: row | {"tool_output_mask": [1] * row["response_length"]},
        "the unknown column 'tool_output_mask' has a name like a mask",
    ),
    "one of our columns that the format makes": (
        lambda: example_lines("vllm.jsonl"),
        lambda row: row | {"prompt_tokens": [1]},
        "'prompt_tokens' is no field of vLLM RequestOutput",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_contradictory_dump_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    rows, edit, message = FAULTS[fault]
    first, *others = rows()
    path = write_lines(tmp_path / "d.jsonl", [edit(first), *others])
    with pytest.raises(InvalidInput, match=message) as error:
        [*Records(path)]
    assert "\n" not in str(error.value)


def test_shifted_teacher_values_of_verl_are_refused(tmp_path: Path) -> None:
    data = torch.load(EXAMPLES / "verl_tensors.pt", weights_only=False)
    moved = {name: data[name].roll(1, 1) for name in ("teacher_logprobs", "teacher_ids")}
    torch.save(data | moved, tmp_path / "v.pt")
    with pytest.raises(InvalidInput, match=r"row 1, field teacher_logprobs: position 0 .* shifted"):
        [*Records(tmp_path / "v.pt")]


def test_a_file_that_mixes_formats_names_both_rows(tmp_path: Path) -> None:
    slime, vllm = example_lines("slime.jsonl"), example_lines("vllm.jsonl")
    path = write_lines(tmp_path / "m.jsonl", [*slime[:3], vllm[0], *slime[3:]])
    with pytest.raises(
        InvalidInput, match=r"row 4 is a vLLM RequestOutput, but .* row 1 is a slime Sample; split"
    ):
        [*Records(path)]
    with pytest.raises(InvalidInput, match=r"row 1 is no vLLM RequestOutput: it has no outputs"):
        Records(path, dump_format="vllm")
    path = write_lines(tmp_path / "o.jsonl", [{"tokens": [1]}, vllm[0]])
    with pytest.raises(
        InvalidInput, match=r"row 2 is a vLLM .* row 1 is of no other tool's format"
    ):
        [*Records(path)]
    with pytest.raises(InvalidInput, match="format 'trll' is none of records, vllm"):
        Records(path, dump_format="trll")


def test_renamed_fields_are_those_of_the_format(tmp_path: Path) -> None:
    responses = sampled_responses()
    rows = example_lines("slime.jsonl")
    for row in rows:
        row["kd_log_probs"] = row.pop("teacher_log_probs")
        row["reward"] = {"accuracy": row["reward"], "format": 9.0}
    rename = {"kd_log_probs": "teacher_log_probs", "reward.accuracy": "reward"}
    path = write_lines(tmp_path / "r.jsonl", rows)
    row = Monitor()(0, Records(path, rename=rename))
    assert row["divergence/k1"] == pytest.approx(mean_cost(responses), abs=1e-6)
    assert row["response/reward"] == pytest.approx(0.5)
    # directly to one of our columns
    rename["kd_log_probs"] = "teacher_logp"
    assert Monitor()(0, Records(path, rename=rename))["divergence/k1"] == row["divergence/k1"]
    with pytest.raises(InvalidInput, match="both 'kd_log_probs' and 'tokens', and --rename"):
        Records(path, rename=rename | {"kd_log_probs": "tokens"})


class EvilPickle:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code of the file was run')",)


def test_files_of_tensors_run_no_code(tmp_path: Path) -> None:
    import pickle

    for name, content in (("a.pt", None), ("b.pt", {"prompts": EvilPickle()})):
        path = tmp_path / name
        if content is None:
            path.write_bytes(pickle.dumps(EvilPickle()))
        else:
            torch.save(content, path)
        with pytest.raises(InvalidInput, match=r"save plain tensors: torch\.save"):
            Records(path)
    torch.save({"prompts": torch.ones(2, 3), "responses": torch.ones(3, 3)}, tmp_path / "c.pt")
    with pytest.raises(InvalidInput, match="different numbers of rows"):
        Records(tmp_path / "c.pt")
    (tmp_path / "d.pt").write_bytes((EXAMPLES / "verl_tensors.pt").read_bytes()[:900])
    with pytest.raises(InvalidInput, match="cannot be read as tensors"):
        Records(tmp_path / "d.pt")
