"""A fake vLLM rollout server: a Hugging Face model behind vLLM's JSON API, which loads weights.

It can simulate faults of real servers: a restart with the initial weights, a tied head that keeps
its old weights, a prefix cache that is not reset, log-probabilities before temperature.
"""

import copy
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.servers.teacher_server import FakeTeacher

KNOWN_LOGITS: WeakKeyDictionary[Any, dict[tuple[int, ...], Tensor]] = WeakKeyDictionary()
"""Network -> token ids -> logits of the next token."""


class FakeRolloutServer(FakeTeacher):
    """A model that serves sampled responses and loads checkpoints.

    loaded_folders: folders of the checkpoints that were loaded. weights_name: name of the current
    weights. dev_mode: whether the routes of vLLM's development mode exist. cached_network: the
    model whose keys and values are in the prefix cache, and which therefore samples. A network is
    never changed after it was assigned.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self.loaded_folders: list[str] = []
        self.dev_mode, self.keeps_old_head, self.resets_cache, self.raw_logprobs = (
            True,
            False,
            True,
            False,
        )
        self.busy_requests = 0
        self.first_network = self.network
        self.restart()

    def restart(self) -> None:
        """Serve the first weights again; they are kept, because threads must not load models."""
        self.network = self.cached_network = self.first_network
        self.weights_name = "default"

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "student", "max_model_len": self.limit}]}

    def handle(self, path: str, payload: Any) -> tuple[int, dict[str, Any]]:
        if path == "/v1/models" or not self.dev_mode:
            return super().handle(path, payload)
        if path == "/weight_info":
            return 200, {"weight_version": self.weights_name}
        if path == "/update_weight_version":
            self.weights_name = payload["new_version"]
            return 200, {"success": True}
        if path == "/reset_prefix_cache":
            self.busy_requests -= 1
            if self.busy_requests < 0 and self.resets_cache:
                self.cached_network = self.network
            return 200, {"success": self.busy_requests < 0}
        if payload.get("method") == "reload_weights":
            return self.reload(payload["kwargs"]["weights_path"])
        return 200, {"results": [None]}

    def reload(self, path: str) -> tuple[int, dict[str, Any]]:
        """Load the weights of a checkpoint into the same architecture, as vLLM does."""
        self.loaded_folders.append(path)
        weights: dict[str, Tensor] = {}
        for file in Path(path).glob("*.safetensors"):
            weights |= load_file(file)
        network = copy.deepcopy(self.network)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            return 500, {"error": {"message": str(error)}}
        if self.keeps_old_head:
            network.lm_head.weight = torch.nn.Parameter(self.network.lm_head.weight.detach())
        self.network = network
        return 200, {"results": [None]}

    def completions(self, payload: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids = payload["prompt"]
        prompt_logprobs = (
            self.prompt_logprobs(ids, 0) if payload.get("prompt_logprobs") == 0 else None
        )
        generator = torch.Generator().manual_seed(payload.get("seed", 0))
        response: list[int] = []
        logp: list[float] = []
        reason = "length"
        while len(response) < payload["max_tokens"]:
            token, token_logp = self.sample_token(ids + response, payload, generator)
            response.append(token)
            logp.append(token_logp)
            if token in payload.get("stop_token_ids", []):
                reason = "stop"
                break
        choice = {
            "index": 0,
            "text": "",
            "token_ids": response,
            "prompt_token_ids": ids,
            "prompt_logprobs": prompt_logprobs,
            "finish_reason": reason,
            "logprobs": {"token_logprobs": logp, "tokens": [f"token_id:{v}" for v in response]},
        }
        return 200, {"model": payload["model"], "choices": [choice]}

    def sample_token(
        self, ids: list[int], payload: dict[str, Any], generator: torch.Generator
    ) -> tuple[int, float]:
        """Sample a token and its log-probability; unset options are the model's own."""
        logits = self.next_logits(ids).clone()
        for v, bias in payload.get("logit_bias", {}).items():
            logits[int(v)] += bias
        defaults = self.network.generation_config
        if payload.get("repetition_penalty", defaults.repetition_penalty) != 1:
            logits[ids] /= 2
        top_k = int(payload.get("top_k", defaults.top_k)) or len(logits)
        raw_logp = logits.log_softmax(-1)
        probs, order = (logits / payload.get("temperature", 1.0)).softmax(-1).sort(descending=True)
        mass_above = probs.cumsum(-1) - probs
        outside = (mass_above >= payload.get("top_p", 1.0)) | (torch.arange(len(order)) >= top_k)
        probs = probs.masked_fill(outside, 0.0)
        probs = probs / probs.sum()
        place = int(torch.multinomial(probs, 1, generator=generator))
        token = int(order[place])
        return token, float(raw_logp[token] if self.raw_logprobs else probs[place].log())

    def next_logits(self, ids: list[int]) -> Tensor:
        """(V,) logits after `ids`, computed once for each network."""
        with torch.no_grad(), self.lock:
            known_logits = KNOWN_LOGITS.setdefault(self.cached_network, {})
            if tuple(ids) not in known_logits:
                logits = self.cached_network(torch.tensor([ids])).logits[0, -1].double()
                known_logits[tuple(ids)] = logits
            return known_logits[tuple(ids)]
