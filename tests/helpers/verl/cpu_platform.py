"""Run verl without an accelerator: a platform for its registry, and servers of transformers.

verl does not support CPUs, and takes rollouts and teachers from vLLM or SGLang. Load this module in
every process: VERL_USE_EXTERNAL_MODULES=tests.helpers.verl.cpu_platform, VERL_PLATFORM=cpu and
VERL_ENGINE_DEVICE=cuda. verl's trainer, agent loops, teacher routing and FSDP actors then run
unchanged; only the engine behind `rollout.name=vllm` is replaced. For tests and tiny models only.
"""

import contextlib
import os
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.workers.rollout import base
from verl.workers.rollout import replica as replicas


class Torch:
    """What verl asks of torch.cuda, of a CPU: counters are zero, and there is nothing to set."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name, lambda *_: 0)

    def get_device_name(self, *_: Any) -> str:
        return "CPU"

    def mem_get_info(self) -> tuple[int, int]:
        return 0, 0


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformCUDA):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = Torch()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def empty_cache(self) -> None:
        pass

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"

    def nvtx_range(self, msg: str) -> Any:
        return contextlib.nullcontext()

    def ray_noset_envvars(self) -> list[str]:
        return []


class Server:
    """Samples from the student's newest weights, or scores a sequence as verl asks a teacher to."""

    def __init__(self, path: str, response_length: int, newest: str | None) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path).float().eval()
        self.response_length, self.newest = response_length, newest
        self.read, self.step = 0.0, 0
        self.asked: Counter[tuple[int, ...]] = Counter()
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> Any:
        with torch.no_grad():
            if sampling_params.get("prompt_logprobs") is not None:
                extra = self.scored(list(prompt_ids), sampling_params["prompt_logprobs"])
                return replicas.TokenOutput(
                    token_ids=[0], stop_reason="completed", extra_fields=extra
                )
            tokens, logps = self.sampled(list(prompt_ids), sampling_params)
        return replicas.TokenOutput(
            token_ids=tokens,
            log_probs=logps,
            stop_reason="completed",
            extra_fields={"global_steps": self.step},
        )

    def scored(self, ids: list[int], k: int) -> dict[str, Any]:
        """As vLLM's prompt_logprobs reach verl: each position's next token, a dummy at the last."""
        logp = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        if k:
            values, ids_of_values = logp.topk(k, -1)
        else:
            ids_of_values = torch.tensor(ids[1:])[:, None]
            values = logp.gather(-1, ids_of_values)
        dummy = max(k, 1)
        return {
            "prompt_ids": [*ids_of_values.tolist(), [0] * dummy],
            "prompt_logprobs": [*values.tolist(), [0.0] * dummy],
        }

    def sampled(self, ids: list[int], sampling: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Tokens by top-p at a temperature, with the log-probabilities they were drawn with.

        The prompt and how often it was asked before are the seed, whatever the order of requests.
        """
        if self.newest is not None and Path(self.newest).exists():
            modified = Path(self.newest).stat().st_mtime
            if modified != self.read:
                checkpoint = torch.load(self.newest)
                self.model.load_state_dict(checkpoint["weights"])
                self.read, self.step = modified, checkpoint["step"]
        seed = zlib.crc32(repr((ids, self.asked[tuple(ids)])).encode())
        self.asked[tuple(ids)] += 1
        generator = torch.Generator().manual_seed(seed)
        tokens, logps = [], []
        for _ in range(sampling.get("max_tokens", self.response_length)):
            logits = self.model(torch.tensor([ids + tokens])).logits[0, -1]
            p = (logits / max(sampling.get("temperature", 1.0), 1e-4)).softmax(-1)
            ordered, token_ids = p.sort(descending=True)
            nucleus = ordered * (ordered.cumsum(-1) - ordered < sampling.get("top_p", 1.0))
            nucleus = nucleus / nucleus.sum()
            index = int(torch.multinomial(nucleus, 1, generator=generator))
            tokens.append(int(token_ids[index]))
            logps.append(float(nucleus[index].log()))
            if tokens[-1] in self.ends:
                break
        return tokens, logps

    async def sleep(self) -> None:
        pass

    wake_up = clear_kv_cache = release_kv_cache = resume_kv_cache = resume_generation = sleep

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        pass


def replica() -> type:
    class Replica(replicas.RolloutReplica):
        async def launch_servers(self) -> None:
            newest = None if self.is_teacher_model else os.environ["VERL_CPU_WEIGHTS"]
            path = self.model_config["path"]
            actor_class = ray.remote(Server).options(num_cpus=0, max_concurrency=1)
            self.servers = [actor_class.remote(path, self.config.response_length, newest)]
            self._server_handle, self._server_address = self.servers[0], f"cpu:{id(self)}"

    return Replica


def start_gloo(started: Any, backend: str | None = None, **words: Any) -> Any:
    """verl starts one backend for the CPU and one for the device, which are one here."""
    return started("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **words)


torch.distributed.init_process_group = partial(start_gloo, torch.distributed.init_process_group)
replicas.RolloutReplicaRegistry.register("vllm", replica)
base._ROLLOUT_REGISTRY["vllm", "async"] = "tests.helpers.verl.cpu_weights.Weights"
