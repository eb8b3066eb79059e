"""Fake teacher servers that score chosen ids: vLLM's token-in-token-out route, and SGLang.

They keep to what the routes' sources state, vLLM 0.32's `vllm/entrypoints/scale_out` and
`vllm/sampling_params.py`, and SGLang's `srt/managers`, and compute with a plain model.
"""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers.servers.teacher_server import FakeTeacher

V1_RUNNER = (
    "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1). "
    "(parameter=prompt_logprob_token_ids)"
)
NO_SCALE_OUT = (
    "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
)


class GenerateTeacher(FakeTeacher):
    """vLLM 0.32 with --enable-scale-out and the model runner V2, unless it is told otherwise."""

    def __init__(
        self,
        folder: Path,
        *,
        max_logprobs: int = 20,
        limit: int = 256,
        has_v2_runner: bool = True,
        has_scale_out: bool = True,
    ) -> None:
        super().__init__(folder, max_logprobs=max_logprobs, limit=limit)
        self.has_v2_runner, self.has_scale_out = has_v2_runner, has_scale_out
        self.routes["/inference/v1/generate"] = self.generate

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "teacher", "max_model_len": self.limit, "owned_by": "vllm"}]}

    def generate(self, payload: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not self.has_scale_out:
            return 403, {"error": {"message": NO_SCALE_OUT, "type": "PermissionDeniedError"}}
        ids, parameters = payload["token_ids"], payload["sampling_params"]
        rows = parameters.get("prompt_logprob_token_ids")
        start = parameters.get("prompt_logprob_start")
        if problem := self.problem(ids, rows, start):
            return 400, {"error": {"message": problem, "type": "BadRequestError"}}
        top = None
        if "prompt_logprobs" in parameters:
            top = self.prompt_logprobs(ids, parameters["prompt_logprobs"])
        return 200, {
            "request_id": "generate-tokens-0",
            "model": payload["model"],
            "prompt_logprobs": top,
            "prompt_token_id_logprobs": None
            if rows is None
            else self.scores(ids, rows, start or 0),
            "prompt_token_ids": ids if payload.get("return_token_ids") else None,
            "choices": [{"index": 0, "finish_reason": "length", "token_ids": [0]}],
        }

    def problem(self, ids: list[int], rows: list[list[int]] | None, start: int | None) -> str:
        """Why vLLM refuses the parameters, in the order of its checks; "" if it does not."""
        if rows is None:
            return "" if start is None else "prompt_logprob_start requires prompt_logprob_token_ids"
        width = max(map(len, rows), default=0)
        vocabulary = self.network.config.vocab_size
        if not width:
            return "prompt_logprob_token_ids must be a non-empty integer array"
        if width > (vocabulary if self.max_logprobs == -1 else self.max_logprobs):
            return (
                f"Requested {width} token ids per row in prompt_logprob_token_ids, which is "
                f"greater than max allowed: {self.max_logprobs}"
            )
        present = [v for row in rows for v in row]
        if min(present) < -1 or max(present) >= vocabulary:
            return "prompt_logprob_token_ids contain out-of-vocab token ids (-1 pads a row)"
        if not self.has_v2_runner:
            return V1_RUNNER
        num_rows = max(len(ids) - 1 - (start or 0), 0)
        if len(rows) != num_rows:
            return (
                f"prompt_logprob_token_ids has {len(rows)} rows, but the prompt has {num_rows} "
                "scored rows (prompt_len - 1 - prompt_logprob_start)."
            )
        return ""

    @torch.no_grad()
    def scores(self, ids: list[int], rows: list[list[int]], start: int) -> str:
        logp = self.network(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores = np.full((len(rows), max(map(len, rows))), -np.inf, np.float32)
        for i, row in enumerate(rows):
            for j, v in enumerate(row):
                if v >= 0:
                    scores[i, j] = logp[start + i, v]
        return encode_array(scores)


class SglangTeacher(FakeTeacher):
    """SGLang."""

    def __init__(self, folder: Path, *, limit: int = 256) -> None:
        super().__init__(folder, limit=limit)
        self.routes = {"/generate": self.generate}

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "teacher", "max_model_len": self.limit, "owned_by": "sglang"}]}

    def handle(self, path: str, payload: Any) -> tuple[int, dict[str, Any]]:
        if path == "/detokenize":
            skip = payload.get("skip_special_tokens", True)
            return 200, {"text": self.tokenizer.decode(payload["tokens"], skip_special_tokens=skip)}
        return super().handle(path, payload)

    @torch.no_grad()
    def generate(self, payload: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids, start = payload["input_ids"], payload["logprob_start_len"]
        k, chosen = payload["top_logprobs_num"], payload["token_ids_logprob"]
        vocabulary = self.network.config.vocab_size
        if max(ids) >= vocabulary:
            return 400, {"error": {"message": "a token id is out of vocabulary"}}
        logp = self.network(torch.tensor([ids])).logits[0].log_softmax(-1)
        tokens: list[Any] = [[None, reported_id(ids[start], vocabulary), None]]
        top: list[Any] = [None]
        chosen_entries: list[Any] = [None]
        for token, row in zip(ids[start + 1 :], logp[start:], strict=False):
            tokens.append([float(row[token]), reported_id(token, vocabulary), None])
            values, best_ids = (part.tolist() for part in row.topk(k))
            top.append([[x, v, None] for x, v in zip(values, best_ids, strict=True)])
            chosen_entries.append([[float(row[v]), v, None] for v in chosen])
        fields = {
            "id": "0",
            "prompt_tokens": len(ids),
            "input_token_logprobs": tokens,
            "input_token_ids_logprobs": chosen_entries,
        }
        if k:
            fields["input_top_logprobs"] = top
        return 200, {"text": "", "output_ids": [], "meta_info": fields}


def reported_id(token: int, vocabulary: int) -> int:
    """SGLang clips ids of images: the last id of the vocabulary is reported as 0."""
    return token if token < vocabulary - 1 else 0


def encode_array(scores: np.ndarray) -> str:
    """An array as vLLM sends it."""
    with io.BytesIO() as buffer:
        np.save(buffer, scores, allow_pickle=False)
        return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_array(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)))
