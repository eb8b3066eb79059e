"""Rollouts from vLLM servers, which get the student's weights through a folder that they can read.

Each row is a question of its own, with its own seed, so that one server or several give the same
rows, up to the rounding of their arithmetic. Nothing is taken from a server that does not hold the
weights that were last synchronised, and their head and every other tensor of them
(`opd.rollouts.vllm_server`). vLLM's development mode, in which servers take weights, obeys whoever
reaches them: on a network of one's own only.

Of several processes the first one loads the weights, while the others wait; each samples its rows.
"""

import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput, OperationFailed
from opd.data.prompts import Prompts
from opd.models.contexts import evaluating
from opd.models.fsdp import plain, whole
from opd.models.model import CausalLM
from opd.rollouts.base import BatchSlice
from opd.rollouts.vllm_common import (
    PROBE_TOKENS,
    TOLERANCE,
    columns_of,
    export,
    row_seeds,
    unpadded,
)
from opd.rollouts.vllm_server import (
    NAMED,
    PROBE_TEMPERATURE,
    Response,
    RolloutServer,
    WeightSnapshot,
)
from opd.runtime import distributed

T = TypeVar("T")


class VllmServerEngine:
    """Samples from servers that hold copies of the student's weights; an `Engine`.

    Before the first synchronisation every server is tried: it must become a student with all
    weights halved. A tensor that it does not load, such as a tied head, is far from that, while a
    step of training may move weights by less than arithmetic shows.

    Args:
      urls: http://HOST:PORT/v1 each. folder: for checkpoints, one at a time; servers must find it
        under the same name. max_length: longest prompt and response together, in tokens.
      patience: seconds to wait for a server that does not answer. in_flight: responses that each
        samples at once, for each process of the run.

    Raises:
      ValueError: no server, one twice, or one that cannot take weights or such long responses.
      RuntimeError: a server does not answer, or does not become the student.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        urls: Sequence[str],
        folder: Path,
        max_length: int,
        patience: float,
        in_flight: int,
    ) -> None:
        if not urls or len(set(urls)) < len(urls):
            raise InvalidInput(f"rollout_servers are {list(urls)}; name at least one, each once")
        self._model_device = model.device
        self._home, self._count = folder.resolve(), 0
        self._name = distributed.told(f"{NAMED}{uuid.uuid4().hex[:12]}")[0]
        if distributed.rank() == 0:
            self._home.mkdir(parents=True, exist_ok=True)
            remove(self._home.glob("weights_*"))  # by a run that was killed
        rows = model.network.get_output_embeddings().weight.shape[0]
        extra = range(model.vocabulary, rows)
        self.servers = [
            RolloutServer(url, patience=patience, in_flight=in_flight, extra=extra) for url in urls
        ]
        for server in self.servers:
            server.check_length(max_length)
        with halved(model.network):
            self.sync(model)
        self.sync(model)

    def sync(self, model: CausalLM) -> None:
        """Load the model's present weights into every server; a checkpoint, and a short prompt.

        Not while `sample` runs: a response would come from two models. Every process has to call.

        Raises:
          RuntimeError: afterwards a server is not the model.
        """
        network = plain(model)
        distributed.barrier()  # nobody samples any more
        with whole(model):
            if distributed.rank() == 0:
                weights = self._export(model, network)
                self._each(lambda server: server.load(weights))
                remove([self._folder(self._count)])
                self._weights = weights
        self._count += 1
        distributed.barrier()  # before anybody samples

    def sample(
        self,
        prompts: Prompts,
        eos: list[int],
        *,
        max_response: int,
        temperature: float,
        top_p: float,
        generator: torch.Generator,
        share: BatchSlice | None = None,
    ) -> Rollouts:
        """One response to every row of `prompts`, in their order, each with a seed of its own.

        Reads no weights, so that it may run in another thread while the student is updated.

        Raises:
          ValueError: a prompt and `max_response` are longer than a server has room for.
        """
        longest = int(prompts.mask.sum(1).max()) + max_response
        settings = {
            "max_tokens": max_response,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": list(eos),
        }
        ids, seeds = unpadded(prompts), row_seeds(len(prompts), generator, share)
        count = len(self.servers)
        parts = [
            slice(i * len(ids) // count, (i + 1) * len(ids) // count) for i in range(count)
        ]  # rows of one prompt stay together, and share its cache

        def some(server: RolloutServer) -> list[Response]:
            part = parts[self.servers.index(server)]
            server.check_length(longest)
            held = f"{self._name}-{self._count}"
            return server.respond(
                ids[part], seeds[part], settings, held, partial(self._again, server)
            )

        rows = [row for found in self._each(some) for row in found]
        return Rollouts(
            **columns_of(rows, eos, top_p),
            prompt=prompts.index.cpu(),
            temperature=temperature,
            top_p=top_p,
        ).to(self._model_device)

    def close(self) -> None:
        """End what is under way and remove the checkpoint; the servers stay as they are."""
        for server in self.servers:
            server.stop()
            server.close()
        if distributed.rank() == 0:
            remove(self._home.glob("weights_*"))

    def _again(self, server: RolloutServer) -> None:
        """Load the present weights into a server that has lost them.

        Raises:
          RuntimeError: other processes may be sampling from it.
        """
        if distributed.size() > 1:
            raise OperationFailed(
                f"{server.url} was restarted and has lost the student's weights, which one of "
                "several processes cannot load while others sample; the same command resumes"
            )
        server.load(self._weights)

    def _each(self, act: Callable[[RolloutServer], T]) -> list[T]:
        """What every server gives, all at once; the failure of one ends the others' work."""
        failures: list[BaseException] = []
        for server in self.servers:
            server.start()

        def careful(server: RolloutServer) -> T:
            try:
                return act(server)
            except BaseException as error:
                failures.append(error)
                for other in self.servers:
                    other.stop()
                raise

        with ThreadPoolExecutor(len(self.servers)) as pool:
            doing = [pool.submit(careful, server) for server in self.servers]
        if failures:
            raise failures[0]
        return [one.result() for one in doing]

    def _export(self, model: CausalLM, network: Any) -> WeightSnapshot:
        """Write a checkpoint of the network, and what the model says with these weights."""
        folder = self._folder(self._count + 1)
        export(network, folder)
        limits = [server.limit for server in self.servers if server.limit is not None]
        count = min([PROBE_TOKENS, *(limit - 1 for limit in limits)])
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(model.vocabulary, (count,), generator=generator)
        with torch.no_grad(), evaluating(model.network):
            logits = model.network(probe[None].to(model.device)).logits[0].float().cpu()
        return WeightSnapshot(
            name=f"{self._name}-{self._count + 1}",
            folder=folder,
            probe=probe.tolist(),
            prompt_logp=logits[:-1].log_softmax(-1).gather(-1, probe[1:, None])[:, 0],
            next_logp=(logits[-1, : model.vocabulary] / PROBE_TEMPERATURE).log_softmax(-1),
            tolerance=TOLERANCE[str(model.network.dtype).removeprefix("torch.")],
        )

    def _folder(self, count: int) -> Path:
        return self._home / f"weights_{count}"


def remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def halved(network: Any) -> Iterator[None]:
    """Every weight times 1/2 inside the block, and bit for bit what it was afterwards.

    Halving and doubling are exact in binary floating point, subnormal numbers (below 1e-38) aside.
    """
    weights = list(network.parameters())
    with torch.no_grad():
        torch._foreach_mul_(weights, 0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_mul_(weights, 2.0)
