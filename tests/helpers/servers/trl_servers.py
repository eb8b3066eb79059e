"""TRL's trainers with a teacher on a server: the server, and rollouts of this process."""

import copy
import json
import queue
import urllib.request
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.servers.teacher_server import FakeTeacher
from tests.helpers.trl_trainers import ENDS, SETTINGS, questions


class TrlTeacherServer(FakeTeacher):
    """What TRL's clients ask of a vLLM server: health, and log-probabilities at a temperature."""

    def handle(self, path: str, payload: Any) -> tuple[int, dict[str, Any]]:
        return (200, {}) if path == "/health" else super().handle(path, payload)

    def completions(self, payload: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.network.lm_head.weight.data = self.head / payload["temperature"]
        return super().completions(payload)

    @cached_property
    def head(self) -> torch.Tensor:
        return self.network.lm_head.weight.detach().clone()


def server_distillation(pair: Any, folder: Path, *, url: str, **changes: Any) -> Any:
    """TRL's client demands vLLM, which it needs only to send weights; the check is turned off."""
    from trl.experimental.server_distillation import (
        ServerDistillationConfig,
        ServerDistillationTrainer,
    )
    from trl.generation import vllm_client

    student, _, tokenizer = pair
    arguments = {"max_completion_length": 12, "temperature": 0.8, "beta": 0.0, "loss_top_k": 5}
    arguments |= {"teacher_model_server_url": url}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_client, "is_vllm_available", lambda *_, **__: True)
        return ServerDistillationTrainer(
            model=copy.deepcopy(student),
            args=ServerDistillationConfig(str(folder), **SETTINGS | arguments | changes),
            train_dataset=questions("prompt"),
            processing_class=tokenizer,
        )


class RolloutsOnDemand:
    """TRL's rollout worker in this process: its queue samples from the student and asks the server.

    Every sample is made when the trainer takes it, from the weights of that moment.
    """

    def __init__(self, pair: Any, url: str, top_k: int, temperature: float) -> None:
        self.pair, self.url, self.top_k, self.temperature = pair, url, top_k, temperature
        self.trainer: Any = None
        self.version = 0
        self.rollout_buffer, self.metrics_queue = self, queue.Queue()
        self.users = [row["prompt"] for row in questions("prompt")]
        self.samples: list[dict[str, Any]] = []

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None:
        self.version = model_version

    def check_health(self, stale_after_s: float) -> None: ...
    def qsize(self) -> int:
        return 0

    def get(self, timeout: float | None = None) -> Any:
        from trl.experimental.async_distillation.async_rollout_worker import (
            RolloutSample,
            _parse_teacher_logprobs_at_position,
        )

        index = len(self.samples)
        user = self.users[index % len(self.users)]
        prompt = self.pair[2].apply_chat_template(user, add_generation_prompt=True)["input_ids"]
        model = copy.deepcopy(self.pair[0])
        model.load_state_dict(self.trainer.model.state_dict())
        generator = torch.Generator().manual_seed(index)
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            if ids[-1] in ENDS:
                break
        payload = {"model": "teacher", "prompt": [ids], "prompt_logprobs": self.top_k}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(payload | {"temperature": self.temperature}).encode(),
        )
        answer = json.loads(urllib.request.urlopen(request).read())
        topk_ids = np.full((len(ids), self.top_k + 1), -1)
        topk_logprobs = np.full((len(ids), self.top_k + 1), -np.inf, dtype=np.float32)
        for i, position in enumerate(answer["choices"][0]["prompt_logprobs"]):
            entry_ids, entry_logps = _parse_teacher_logprobs_at_position(position)
            topk_ids[i, : len(entry_ids)] = entry_ids
            topk_logprobs[i, : len(entry_ids)] = entry_logps
        mask = torch.tensor([0] * len(prompt) + [1] * (len(ids) - len(prompt)))
        self.samples.append(
            {"prompt": torch.tensor(prompt), "tokens": torch.tensor(ids[len(prompt) :])}
        )
        return RolloutSample(
            prompt=user,
            completion=[],
            input_ids=np.array(ids),
            completion_mask=mask.numpy(),
            teacher_topk_ids=topk_ids,
            teacher_topk_logprobs=topk_logprobs,
            model_version=self.version,
            metrics={},
            teacher_id="default",
            prompt_id=index,
        )


class NoTransfer:
    """TRL's transfer of weights to a server, which the rollouts of this process do not need."""

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


def async_distillation(
    pair: Any, folder: Path, *, url: str, student_folder: Path, **changes: Any
) -> Any:
    from trl.experimental.async_distillation import (
        AsyncDistillationConfig,
        AsyncDistillationTrainer,
        async_distillation_trainer,
    )

    arguments = {"max_completion_length": 12, "temperature": 1.0, "teacher_temperature": 0.8}
    arguments |= {"teacher_top_k": 5, "token_budget": 0, "beta": 0.0}
    arguments |= {"model_init_kwargs": {"attn_implementation": "sdpa", "dtype": "float32"}}
    args = AsyncDistillationConfig(str(folder), **SETTINGS | arguments | changes)
    worker = RolloutsOnDemand(pair, url, args.teacher_top_k, args.teacher_temperature)
    with pytest.MonkeyPatch.context() as patch:  # TRL asks CUDA for the name of the device
        patch.setattr(async_distillation_trainer, "get_peak_flops_per_device", lambda *_: None)
        trainer = AsyncDistillationTrainer(
            model=str(student_folder),
            args=args,
            train_dataset=questions("prompt"),
            processing_class=pair[2],
            rollout_worker=worker,
            weight_transfer=NoTransfer(),
        )
    trainer.eos_token_ids = ENDS
    worker.trainer = trainer
    return trainer
