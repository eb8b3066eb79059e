"""Rollouts from vLLM servers, which load the student's weights from a shared folder.

Each row is a request of its own with its own seed, so that one server and several return the same
rows, up to the rounding of their arithmetic. Responses are accepted only from servers that hold the
weights of the last synchronisation, including the LM head and every other tensor
(`opd.rollouts.vllm_server`). Loading weights needs vLLM's development mode, which has no access
control: run the servers in a private network only.

With several processes, rank 0 loads the weights while the others wait; each samples its own rows.
"""

import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput, OperationFailed
from opd.data.prompts import Prompts
from opd.models.contexts import evaluation_mode
from opd.models.fsdp import gather_network, unsharded
from opd.models.model import CausalLM
from opd.rollouts.base import BatchSlice
from opd.rollouts.vllm_common import (
    PROBE_TOKENS,
    export_checkpoint,
    rollout_columns,
    row_seeds,
    unpad_prompts,
)
from opd.rollouts.vllm_server import (
    PROBE_TEMPERATURE,
    WEIGHTS_PREFIX,
    Response,
    RolloutServer,
    WeightSnapshot,
)
from opd.runtime import distributed
from opd.serving.fan_out import run_all
from opd.serving.fingerprint import WEIGHTS_TOLERANCE, probe_tokens

T = TypeVar("T")


class VllmServerEngine:
    """An `Engine` that samples from vLLM servers with copies of the student's weights.

    Before the first synchronisation every server is tested with a student whose weights are all
    halved. A tensor that the server does not load, such as a tied head, then differs clearly,
    whereas one training step may change weights by less than numerical noise.

    Args:
        model: The student.
        urls: Addresses http://HOST:PORT/v1.
        folder: Where checkpoints are written, one at a time; servers read it under the same path.
        max_length: Maximum length of prompt and response together, in tokens.
        timeout: Seconds to wait for a server that does not respond.
        concurrency: Concurrent requests to each server from each process of the run.

    Raises:
        InvalidInput: No server, a repeated server, or one that cannot load weights or does not
            support `max_length`.
        OperationFailed: A server does not respond, or does not sample from the student's weights.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        urls: Sequence[str],
        folder: Path,
        max_length: int,
        timeout: float,
        concurrency: int,
    ) -> None:
        if not urls or len(set(urls)) < len(urls):
            raise InvalidInput(
                f"rollout_servers is {list(urls)}; give at least one address, each only once"
            )
        self._model_device = model.device
        self._checkpoint_folder, self._version = folder.resolve(), 0
        self._name = distributed.all_gather_object(f"{WEIGHTS_PREFIX}{uuid.uuid4().hex[:12]}")[0]
        if distributed.rank() == 0:
            self._checkpoint_folder.mkdir(parents=True, exist_ok=True)
            remove_folders(self._checkpoint_folder.glob("weights_*"))  # left by a killed run
        num_head_rows = model.network.get_output_embeddings().weight.shape[0]
        excluded_ids = range(model.vocabulary, num_head_rows)
        self.servers = [
            RolloutServer(url, timeout=timeout, concurrency=concurrency, excluded_ids=excluded_ids)
            for url in urls
        ]
        for server in self.servers:
            server.check_length(max_length)
        with halved_weights(model.network):
            self.sync(model)
        self.sync(model)

    def sync(self, model: CausalLM) -> None:
        """Load the model's current weights into every server, through a checkpoint on disk.

        Must be called by every process, and not while `sample` runs: a response would come from two
        versions of the weights.

        Args:
            model: The student.

        Raises:
            OperationFailed: A server does not sample from the model's weights afterwards.
        """
        network = gather_network(model)
        distributed.barrier()  # no process samples any more
        with unsharded(model):
            if distributed.rank() == 0:
                weights = self._export(model, network)
                self._for_each_server(lambda server: server.load(weights))
                remove_folders([self._folder(self._version)])
                self._weights = weights
        self._version += 1
        distributed.barrier()  # no process samples before the weights are loaded

    def sample(
        self,
        prompts: Prompts,
        eos: list[int],
        *,
        max_response: int,
        temperature: float,
        top_p: float,
        generator: torch.Generator,
        batch_slice: BatchSlice | None = None,
    ) -> Rollouts:
        """Sample one response to every row of `prompts`, in order, each with its own seed.

        Does not read the student's weights, so it may run in another thread while the student is
        updated.

        Args:
            prompts: B encoded prompts.
            eos: Ids that end a response.
            max_response: Maximum response length in tokens.
            temperature: Softmax temperature.
            top_p: Probability mass of the nucleus.
            generator: Source of the seeds.
            batch_slice: Which rows of a larger batch `prompts` are; None: the whole batch.

        Returns:
            The rollouts, on the model's device.

        Raises:
            InvalidInput: A prompt and `max_response` together exceed a server's maximum length.
        """
        longest = int(prompts.mask.sum(1).max()) + max_response
        settings = {
            "max_tokens": max_response,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": list(eos),
        }
        ids, seeds = unpad_prompts(prompts), row_seeds(len(prompts), generator, batch_slice)
        num_servers = len(self.servers)
        slices = [
            slice(i * len(ids) // num_servers, (i + 1) * len(ids) // num_servers)
            for i in range(num_servers)
        ]  # contiguous, so that rows of one prompt share the server's prefix cache

        def sample_slice(server: RolloutServer) -> list[Response]:
            server_slice = slices[self.servers.index(server)]
            server.check_length(longest)
            name = f"{self._name}-{self._version}"
            return server.respond(
                ids[server_slice],
                seeds[server_slice],
                settings,
                name,
                partial(self._reload, server),
            )

        rows = [row for responses in self._for_each_server(sample_slice) for row in responses]
        return Rollouts(
            **rollout_columns(rows, eos, top_p),
            prompt=prompts.index.cpu(),
            temperature=temperature,
            top_p=top_p,
        ).to(self._model_device)

    def close(self) -> None:
        """Cancel running requests and delete the checkpoint; the servers keep running."""
        for server in self.servers:
            server.stop()
            server.close()
        if distributed.rank() == 0:
            remove_folders(self._checkpoint_folder.glob("weights_*"))

    def _reload(self, server: RolloutServer) -> None:
        """Load the current weights into a server that was restarted.

        Raises:
            OperationFailed: The run has several processes, which may be sampling from the server.
        """
        if distributed.world_size() > 1:
            raise OperationFailed(
                f"{server.url} was restarted and has lost the student's weights. They cannot be "
                "loaded while other processes sample from it; run the same command again to resume"
            )
        server.load(self._weights)

    def _for_each_server(self, action: Callable[[RolloutServer], T]) -> list[T]:
        """Run an action on all servers concurrently; a failure of one cancels the others."""
        for server in self.servers:
            server.start()

        def stop_all() -> None:
            for server in self.servers:
                server.stop()

        calls = [partial(action, server) for server in self.servers]
        return run_all(calls, concurrency=len(calls), stop=stop_all)

    def _export(self, model: CausalLM, network: Any) -> WeightSnapshot:
        """Write a checkpoint and compute the log-probabilities that servers are checked with."""
        folder = self._folder(self._version + 1)
        export_checkpoint(network, folder)
        limits = [server.limit for server in self.servers if server.limit is not None]
        count = min([PROBE_TOKENS, *(limit - 1 for limit in limits)])
        probe = torch.tensor(probe_tokens(model.vocabulary, count))
        with torch.no_grad(), evaluation_mode(model.network):
            logits = model.network(probe[None].to(model.device)).logits[0].float().cpu()
        return WeightSnapshot(
            name=f"{self._name}-{self._version + 1}",
            folder=folder,
            probe=probe.tolist(),
            prompt_logp=logits[:-1].log_softmax(-1).gather(-1, probe[1:, None])[:, 0],
            next_logp=(logits[-1, : model.vocabulary] / PROBE_TEMPERATURE).log_softmax(-1),
            tolerance=WEIGHTS_TOLERANCE[str(model.network.dtype).removeprefix("torch.")],
        )

    def _folder(self, version: int) -> Path:
        return self._checkpoint_folder / f"weights_{version}"


def remove_folders(folders: Iterable[Path]) -> None:
    """Delete folders with their content; missing ones are ignored."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def halved_weights(network: Any) -> Iterator[None]:
    """Halve all weights inside the block; afterwards they are bit-identical to before.

    Halving and doubling are exact in binary floating point, except for subnormal numbers (below
    1e-38).

    Args:
        network: The model.

    Yields:
        Nothing.
    """
    weights = list(network.parameters())
    with torch.no_grad():
        torch._foreach_mul_(weights, 0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_mul_(weights, 2.0)
