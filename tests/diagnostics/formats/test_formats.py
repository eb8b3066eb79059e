"""Dumps that other tools' classes wrote from known arrays give the numbers of these arrays."""

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diagnostics.errors import InvalidInput
from diagnostics.formats.dump_format import ID_FIELDS, ReadContext
from diagnostics.formats.registry import FORMATS, convert_rows, recognise
from diagnostics.missing import missing_fields
from diagnostics.monitor import Monitor
from diagnostics.records.columns import NAMES, parse_record
from diagnostics.records.reader import Records
from tests.helpers.dump_arrays import Sampled, mean_cost, sampled_responses

EXAMPLES = Path(__file__).parent / "examples"
TOP_K = 3


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def example_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text().splitlines()]


def pad(lists: list[list[float]]) -> torch.Tensor:
    width = max(map(len, lists))
    return torch.tensor([[*x, *[0] * (width - len(x))] for x in lists])


def check_support(batch: Any, responses: list[Sampled], role: str) -> None:
    """Compare the support with the K most probable ids of the arrays."""
    support = batch.support
    assert support.source == role
    for i, r in enumerate(responses):
        logp = r.teacher if role == "teacher" else r.student
        top = np.argsort(-logp, axis=1)[:, :TOP_K]
        assert support.ids[i, : len(top), :TOP_K].tolist() == top.tolist()
        expected = np.take_along_axis(logp, top, 1)
        actual = vars(support)[f"{role}_logp"][i, : len(top), :TOP_K]
        assert actual.numpy() == pytest.approx(expected, abs=1e-6)
        if support.present is not None:
            assert support.present[i, : len(top)].sum(-1).tolist() == [TOP_K] * len(top)


@pytest.mark.parametrize("name", ["slime.jsonl", "slime.pt"])
def test_slime_samples_give_the_numbers_of_the_arrays(name: str) -> None:
    responses = sampled_responses()
    records = Records(EXAMPLES / name)
    row = Monitor()(0, records)
    assert row["divergence/k1"] == pytest.approx(mean_cost(responses), abs=1e-6)
    assert row["response/length"] == pytest.approx(np.mean([sum(r.loss) for r in responses]))
    assert row["response/truncated_share"] == 0.5
    assert row["response/reward"] == pytest.approx(0.5)
    (batch,) = records
    assert batch.tokens.tolist() == pad([r.tokens for r in responses]).tolist()
    assert batch.mask.tolist() == pad([r.loss for r in responses]).bool().tolist()
    assert [*map(len, map(set, (batch.prompt.tolist(), [0, 0])))] == [3, 1]
    prompts = [r["prompt_tokens"].tolist() for r in records.rows()]
    assert prompts == [r.prompt for r in responses]
    assert records.unused == ()


@pytest.mark.parametrize("name", ["verl_tensors.pt", "verl_dataproto.pt", "verl_torch_save.pt"])
def test_verl_tensors_give_the_numbers_of_the_arrays(name: str) -> None:
    """The padded values are -7 and the teacher's are one position early, as verl has them."""
    responses = sampled_responses()
    records = Records(EXAMPLES / name)
    row = Monitor()(0, records)
    assert row["divergence/k1"] == pytest.approx(mean_cost(responses), abs=1e-6)
    assert row["consistency/sampler_log_ratio"] == 0
    assert row["response/reward"] == pytest.approx(0.5)
    assert [r["prompt_tokens"].tolist() for r in records.rows()] == [r.prompt for r in responses]
    (batch,) = records
    assert batch.mask.sum(1).tolist() == [sum(r.loss) for r in responses]
    assert len(batch.prompt.unique()) == 3
    assert records.unused == ()


def test_a_teacher_top_k_of_verl_is_a_support(tmp_path: Path) -> None:
    responses = sampled_responses(tools=False)
    data = torch.load(EXAMPLES / "verl_tensors.pt", weights_only=False)
    p = data["prompts"].shape[1]
    logp = torch.full((6, data["attention_mask"].shape[1], TOP_K), -7.0)
    ids = torch.zeros_like(logp, dtype=torch.int32)
    for i, r in enumerate(responses):
        top = torch.tensor(r.teacher).topk(TOP_K)
        logp[i, p - 1 : p + len(r.tokens) - 1] = top.values
        ids[i, p - 1 : p + len(r.tokens) - 1] = top.indices
    mask = {"response_mask": pad([r.loss for r in responses])}
    torch.save({**data, **mask, "teacher_logprobs": logp, "teacher_ids": ids}, tmp_path / "k.pt")
    (batch,) = Records(tmp_path / "k.pt")
    check_support(batch, responses, "teacher")
    assert "teacher_logp" in missing_fields(batch)


@pytest.mark.parametrize("name", ["vllm.jsonl", "vllm_flat.jsonl"])
def test_vllm_outputs_have_tokens_scores_and_top_k(name: str) -> None:
    responses = sampled_responses(tools=False)
    records = Records(EXAMPLES / name)
    (batch,) = records
    assert batch.tokens.tolist() == pad([r.tokens for r in responses]).tolist()
    expected = pad([r.student_logp for r in responses])
    assert torch.allclose(batch.student_logp.double(), expected.double(), atol=1e-6)
    check_support(batch, responses, "student")
    assert batch.ended.tolist() == [r.ended for r in responses]
    assert [r["prompt_tokens"].tolist() for r in records.rows()] == [r.prompt for r in responses]
    assert len(batch.prompt.unique()) == 3
    assert "no log-probabilities of the scored student" in records.notes["sampler"]
    assert records.unused == ()
    (sampler,) = Records(EXAMPLES / name, context=ReadContext(scores="sampler"))
    assert torch.equal(sampler.sampler_logp, batch.student_logp)


def test_tokens_outside_the_top_k_of_vllm_are_no_part_of_it(tmp_path: Path) -> None:
    """All tokens of rank 9 beside the first 3; with logprobs=0, the token alone."""
    logprobs = [
        {
            "7": {"logprob": -5.0, "rank": 9},
            **{f"{k}": {"logprob": -k, "rank": k} for k in (1, 2, 3)},
        }
        for _ in range(2)
    ]
    alone = [{"7": {"logprob": -5.0, "rank": 9}}, {"8": {"logprob": -0.1, "rank": 1}}]
    rows = [
        {"prompt_token_ids": [1], "outputs": [{"token_ids": ids, "logprobs": values}]}
        for ids, values in (([7, 7], logprobs), ([7, 8], alone))
    ]
    (batch,) = Records(write_lines(tmp_path / "k.jsonl", rows[:1]))
    assert batch.support.ids.tolist() == [[[1, 2, 3]] * 2]
    assert batch.student_logp.tolist() == [[-5.0, -5.0]]
    (batch,) = Records(write_lines(tmp_path / "a.jsonl", rows[1:]))
    assert batch.support is None
    assert batch.student_logp[0].tolist() == pytest.approx([-5.0, -0.1])


def test_a_response_that_vllm_scored_is_the_end_of_its_prompt() -> None:
    responses = sampled_responses(tools=False)
    records = Records(EXAMPLES / "vllm_scored.jsonl")
    (batch,) = records
    expected = pad([r.teacher_logp for r in responses])
    assert batch.tokens.tolist() == pad([r.tokens for r in responses]).tolist()
    assert torch.allclose(batch.teacher_logp.double(), expected.double(), atol=1e-6)
    check_support(batch, responses, "teacher")
    assert [r["prompt_tokens"].tolist() for r in records.rows()] == [r.prompt for r in responses]


def sglang_answers(responses: list[Sampled]) -> list[dict]:
    """Write answers of SGLang's /generate; top lists hold K ids and not the token."""

    def entries(logp: np.ndarray, tokens: list[int]) -> list[list]:
        return [[float(p[y]), y, None] for p, y in zip(logp, tokens, strict=True)]

    def tops(logp: np.ndarray) -> list[list[list]]:
        return [[[float(p[k]), int(k), None] for k in np.argsort(-p)[:TOP_K]] for p in logp]

    rows = []
    for r in responses:
        inputs = entries(r.prompt_student, r.prompt)
        reason = {"type": "stop", "matched": 2} if r.ended else {"type": "length", "length": 9}
        meta = {
            "id": "x",
            "finish_reason": reason,
            "prompt_tokens": len(r.prompt),
            "completion_tokens": len(r.tokens),
            "input_token_logprobs": [[None, *inputs[0][1:]], *inputs[1:]],
            "input_top_logprobs": [None, *tops(r.prompt_student)[1:]],
            "output_token_logprobs": entries(r.student, r.tokens),
            "output_top_logprobs": tops(r.student),
        }
        rows.append({"text": "text", "output_ids": r.tokens, "meta_info": meta})
    return rows


def test_sglang_answers_have_tokens_scores_and_top_k(tmp_path: Path) -> None:
    responses = sampled_responses(tools=False)
    rows = sglang_answers(responses)
    # a request with n > 1 is answered by a list
    path = write_lines(tmp_path / "s.jsonl", [rows[:2], rows[2:4], rows[4], rows[5]])
    records = Records(path)
    (batch,) = records
    assert batch.tokens.tolist() == pad([r.tokens for r in responses]).tolist()
    expected = pad([r.student_logp for r in responses])
    assert torch.allclose(batch.student_logp.double(), expected.double(), atol=1e-6)
    check_support(batch, responses, "student")
    assert batch.ended.tolist() == [r.ended for r in responses]
    assert [r["prompt_tokens"].tolist() for r in records.rows()] == [r.prompt for r in responses]
    scored = []
    for r, row in zip(responses, rows, strict=True):
        meta = copy.deepcopy(row["meta_info"])
        teacher = sglang_answers([r])[0]["meta_info"]
        teacher_entries = [[float(p[y]), y, None] for p, y in zip(r.teacher, r.tokens, strict=True)]
        meta["input_token_logprobs"] = teacher["input_token_logprobs"] + teacher_entries
        meta["prompt_tokens"] += len(r.tokens)
        meta["input_top_logprobs"] = None
        scored.append(row | {"meta_info": meta, "response_length": len(r.tokens)})
    (batch,) = Records(write_lines(tmp_path / "t.jsonl", scored))
    expected = pad([r.teacher_logp for r in responses])
    assert torch.allclose(batch.teacher_logp.double(), expected.double(), atol=1e-6)


def nemo_rows(responses: list[Sampled]) -> list[dict]:
    """Write rows of train_data: lists of one value, padded to the longest sequence of the step."""
    width = max(len(r.prompt) + len(r.tokens) for r in responses) + 2
    rows = []
    for i, r in enumerate(responses):
        n, size = len(r.prompt), len(r.tokens)

        def sequence(values: list, fill: float, before: int = n) -> list[list]:
            return [[fill] * before + values + [fill] * (width - before - len(values))]

        rows.append(
            {
                "content": ["text"],
                "rewards": [r.reward],
                "input_lengths": [n + size],
                "token_ids": sequence(r.prompt + r.tokens, 0, 0),
                "token_loss_mask": sequence(r.loss, 0),
                "sample_loss_mask": [1.0],
                "advantages": sequence([0.5] * size, 0.0),
                "generation_logprobs": sequence(r.student_logp, 0.0),
                "prev_logprobs": sequence(r.student_logp, 0.0),
                "teacher_logprobs": sequence(r.teacher_logp, 0.0),
                "idx": i,
            }
        )
    return rows


def test_nemo_rl_rows_give_the_numbers_of_the_arrays(tmp_path: Path) -> None:
    responses = sampled_responses()
    rows = nemo_rows(responses)
    records = Records(write_lines(tmp_path / "train_data_step1.jsonl", rows))
    row = Monitor()(0, records)
    # text of a tool at the second and third token does not hide where the response begins
    assert row["divergence/k1"] == pytest.approx(mean_cost(responses), abs=1e-6)
    assert row["divergence/tokens"] == sum(sum(r.loss) for r in responses)
    (batch,) = records
    assert batch.lengths.tolist() == [sum(r.loss) for r in responses]
    assert [r["prompt_tokens"].tolist() for r in records.rows()] == [r.prompt for r in responses]
    assert records.unused == ()
    excluded = [x | {"sample_loss_mask": [float(i > 0)]} for i, x in enumerate(rows)]
    row = Monitor()(0, Records(write_lines(tmp_path / "e.jsonl", excluded)))
    assert row["divergence/k1"] == pytest.approx(mean_cost(responses[1:]), abs=1e-6)
    # NeMo-RL writes zeros where it did not compute them, which are no log-probabilities
    zeros = [x | {"prev_logprobs": [[0.0] * len(x["token_ids"][0])]} for x in rows]
    records = Records(write_lines(tmp_path / "z.jsonl", zeros))
    row = Monitor()(0, records)
    assert row["divergence/k1"] == pytest.approx(mean_cost(responses), abs=1e-6)
    assert "no log-probabilities of the scored student" in records.notes["sampler"]


def openai_completions(responses: list[Sampled], echo: bool) -> list[dict]:
    """Write completions with token ids as text (return_tokens_as_token_ids)."""
    rows = []
    for r in responses:
        tokens = [f"token_id:{y}" for y in (r.prompt if echo else []) + r.tokens]
        logps = ([None, *[-1.0] * (len(r.prompt) - 1)] if echo else []) + r.student_logp
        tops = [
            {f"token_id:{k}": float(p[k]) for k in {*np.argsort(-p)[:TOP_K].tolist(), y}}
            for p, y in zip(r.student, r.tokens, strict=True)
        ]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": logps,
            "top_logprobs": [None] * (len(tokens) - len(tops)) + tops,
            "text_offset": [0] * len(tokens),
        }
        reason = "stop" if r.ended else "length"
        usage = {"prompt_tokens": len(r.prompt), "completion_tokens": len(r.tokens)}
        choice = {"index": 0, "text": "text", "logprobs": logprobs, "finish_reason": reason}
        rows.append({"id": str(r.prompt), "choices": [choice], "usage": usage})
    return rows


@pytest.mark.parametrize("name", ["chat", "completions", "echo", "batch"])
def test_openai_answers_have_tokens_scores_and_top_k(name: str, tmp_path: Path) -> None:
    responses = sampled_responses(tools=False)
    if name == "chat":
        rows = example_lines("openai_chat.jsonl")
    else:
        rows = openai_completions(responses, echo=name == "echo")
    if name == "batch":
        rows = [
            {"id": "b", "custom_id": x["id"], "response": {"status_code": 200, "body": x}}
            for x in rows
        ]
    records = Records(write_lines(tmp_path / "o.jsonl", rows))
    (batch,) = records
    expected = pad([r.student_logp for r in responses])
    assert torch.allclose(batch.student_logp.double(), expected.double(), atol=1e-6)
    assert batch.mask.sum(1).tolist() == [len(r.tokens) for r in responses]
    assert batch.ended.tolist() == [r.ended for r in responses]
    assert len(batch.prompt.unique()) == 3
    assert records.unused == ()
    if name == "chat":
        # without ids, equal bytes have equal numbers
        tokens = [y for r in responses for y in r.tokens]
        numbers = batch.tokens[batch.mask].tolist()
        assert len({*zip(tokens, numbers, strict=True)}) == len({*tokens}) == len({*numbers})
    else:
        assert batch.tokens.tolist() == pad([r.tokens for r in responses]).tolist()
        check_support(batch, responses, "student")


def test_ids_beside_text_are_not_mixed_with_numbers_of_texts(tmp_path: Path) -> None:
    """A server that adds token_ids gives none of its top lists; a tokenizer does."""
    responses = sampled_responses(tools=False)
    rows = example_lines("openai_chat.jsonl")
    for row, r in zip(rows, responses, strict=True):
        row["choices"][0]["token_ids"] = r.tokens
        row["prompt_token_ids"] = r.prompt
    path = write_lines(tmp_path / "i.jsonl", rows)
    (batch,) = Records(path)
    assert batch.tokens.tolist() == pad([r.tokens for r in responses]).tolist()
    assert batch.support is None
    (batch,) = Records(path, context=ReadContext(tokenizer=NumberTokenizer()))
    check_support(batch, responses, "student")
    for row in rows:
        del row["choices"][0]["token_ids"], row["prompt_token_ids"]
    write_lines(path, rows)
    records = Records(path, context=ReadContext(tokenizer=NumberTokenizer()))
    (batch,) = records
    check_support(batch, responses, "student")
    assert [r["prompt_tokens"].tolist() for r in records.rows()] == [r.prompt for r in responses]


class NumberTokenizer:
    """Tokenizer of the example's texts, such as "t19 " for 19."""

    def prompt_ids(self, prompt: Any) -> list[int]:
        return json.loads(prompt[0]["content"])

    def response_ids(self, text: str) -> list[int]:
        return [0]

    def token_id(self, token: bytes) -> int | None:
        return int(token.strip(b"t "))


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
