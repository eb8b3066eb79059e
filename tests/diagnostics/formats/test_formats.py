"""Dumps that other tools' classes wrote from known arrays give the numbers of these arrays."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from diagnostics.formats.dump_format import ReadContext
from diagnostics.missing import missing_fields
from diagnostics.monitor import Monitor
from diagnostics.records.reader import Records
from tests.diagnostics.formats.dump_rows import (
    EXAMPLES,
    TOP_K,
    NumberTokenizer,
    check_support,
    example_lines,
    nemo_rows,
    openai_completions,
    pad,
    sglang_answers,
    write_lines,
)
from tests.helpers.dumps.dump_arrays import mean_cost, sampled_responses


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
