"""Rows of dumps as other tools write them, from sampled responses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.dumps.dump_arrays import Sampled

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


class NumberTokenizer:
    """Tokenizer of the example's texts, such as "t19 " for 19."""

    def prompt_ids(self, prompt: Any) -> list[int]:
        return json.loads(prompt[0]["content"])

    def response_ids(self, text: str) -> list[int]:
        return [0]

    def token_id(self, token: bytes) -> int | None:
        return int(token.strip(b"t "))
