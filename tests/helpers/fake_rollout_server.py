"""A rollout server for tests: a real Hugging Face model behind vLLM's JSON, which takes weights.

It can be told to have the faults that servers have: to be restarted with its first weights, to keep
a tied head, to keep its cache, to tell log-probabilities before temperature.
"""

import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.helpers.fake_teacher_server import Teacher

LOADING = threading.Lock()
"""Loading patches `tie_weights` of all models meanwhile: two threads at it can leave it patched."""


class SamplingServer(Teacher):
    """loads: folders it was given; version: the name of its weights; obeys: has development mode.

    cached: the model whose keys and values are in the cache, and which therefore samples.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self.folder = folder
        self.loads: list[str] = []
        self.obeys, self.tied, self.forgets, self.raw = True, False, True, False
        self.busy = 0
        self.restart()

    def restart(self) -> None:
        with LOADING:
            self.network = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.cached, self.version = self.network, "default"

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "student", "max_model_len": self.limit}]}

    def order(self, path: str, question: Any) -> tuple[int, dict[str, Any]]:
        if path == "/v1/models" or not self.obeys:
            return super().order(path, question)
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = question["new_version"]
            return 200, {"success": True}
        if path == "/reset_prefix_cache":
            self.busy -= 1
            if self.busy < 0 and self.forgets:
                self.cached = self.network
            return 200, {"success": self.busy < 0}
        if question.get("method") == "reload_weights":
            return self.reload(question["kwargs"]["weights_path"])
        return 200, {"results": [None]}

    def reload(self, path: str) -> tuple[int, dict[str, Any]]:
        self.loads.append(path)
        try:
            with LOADING:
                network = AutoModelForCausalLM.from_pretrained(path).eval()
        except OSError as error:
            return 500, {"error": {"message": str(error)}}
        if self.tied:
            network.lm_head.weight = torch.nn.Parameter(self.network.lm_head.weight.detach())
        self.network = network
        return 200, {"results": [None]}

    def completions(self, question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids = question["prompt"]
        told = self.row(ids, 0) if question.get("prompt_logprobs") == 0 else None
        generator = torch.Generator().manual_seed(question.get("seed", 0))
        drawn: list[int] = []
        logp: list[float] = []
        reason = "length"
        while len(drawn) < question["max_tokens"]:
            token, at = self.draw(ids + drawn, question, generator)
            drawn.append(token)
            logp.append(at)
            if token in question.get("stop_token_ids", []):
                reason = "stop"
                break
        choice = {
            "index": 0,
            "text": "",
            "token_ids": drawn,
            "prompt_token_ids": ids,
            "prompt_logprobs": told,
            "finish_reason": reason,
            "logprobs": {"token_logprobs": logp, "tokens": [f"token_id:{v}" for v in drawn]},
        }
        return 200, {"model": question["model"], "choices": [choice]}

    def draw(
        self, ids: list[int], question: dict[str, Any], generator: torch.Generator
    ) -> tuple[int, float]:
        """A token and its log-probability, by sorting; settings left out are the model's own."""
        with torch.no_grad(), self.lock:
            logits = self.cached(torch.tensor([ids])).logits[0, -1].double()
        for v, bias in question.get("logit_bias", {}).items():
            logits[int(v)] += bias
        own = self.network.generation_config
        if question.get("repetition_penalty", own.repetition_penalty) != 1:
            logits[ids] /= 2
        kept = int(question.get("top_k", own.top_k)) or len(logits)
        raw = logits.log_softmax(-1)
        ordered, order = (
            (logits / question.get("temperature", 1.0)).softmax(-1).sort(descending=True)
        )
        before = ordered.cumsum(-1) - ordered
        outside = (before >= question.get("top_p", 1.0)) | (torch.arange(len(order)) >= kept)
        ordered = ordered.masked_fill(outside, 0.0)
        ordered = ordered / ordered.sum()
        place = int(torch.multinomial(ordered, 1, generator=generator))
        token = int(order[place])
        return token, float(raw[token] if self.raw else ordered[place].log())
