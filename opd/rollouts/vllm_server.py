"""A vLLM server that samples: weights loaded into it and checked, its responses read strictly.

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model STUDENT \\
        --logprobs-mode processed_logprobs

A server that was restarted holds the weights that its command line names, and answers as if nothing
had been. So weights have a name, which the server is told *before* it loads them and forgets when
it ends: one that still knows the name after a batch sampled all of it from weights that were
loaded, and checked, under that name.

Shapes: P ids of the probe, V ids that may be drawn.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.files import has_type, short
from opd.serving.json_endpoint import PASSING, JsonEndpoint
from opd.serving.vllm_protocol import (
    CLAMPED,
    ENTRY_BYTES,
    SPARE_BYTES,
    chosen,
    described,
    field,
    read_row,
)

PROBE_TEMPERATURE = 2.0
"""At which tokens are drawn in a check: a server that tells log-probabilities before temperature
is found out."""
PROBE_DRAWS = 8
RESTARTS = 3
"""Most restarts of a server that one batch, or one load, outlives."""
NAMED = "opdlab-"
"""How the names of weights begin."""
NEVER = -100.0
"""Bias of the logits of ids that a head has beyond the vocabulary; vLLM takes no lower one."""
SAMPLING = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
    "logprobs": 0,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
"""Of every question: nothing is left to the model's own generation settings."""

Response = tuple[list[int], list[float]]
"""Token ids, and the log-probability of each under the distribution that it was drawn from."""


@dataclass(frozen=True, eq=False)
class WeightSnapshot:
    """A checkpoint, and what the student says that a server with these weights must say.

    folder: where servers find it. probe: P ids. prompt_logp: (P - 1,) log-probabilities of
    probe[1:]. next_logp: (V,) of what comes after the probe, at PROBE_TEMPERATURE. tolerance: mean
    nats that are arithmetic.
    """

    name: str
    folder: Path
    probe: list[int]
    prompt_logp: Tensor
    next_logp: Tensor
    tolerance: float


class RolloutServer:
    """The server at `url`, http://HOST:PORT/v1, with #MODEL behind it where it has several.

    Args:
      patience: seconds to wait for a server that does not answer.
      in_flight: questions, of one response each, that it has at once.
      extra: ids that the head has beyond the vocabulary; they are never drawn.

    Raises:
      ValueError: another kind of address, or the server has no such model.
    """

    def __init__(self, url: str, *, patience: float, in_flight: int, extra: range) -> None:
        url, _, name = url.partition("#")
        self._endpoint = JsonEndpoint(url, patience=patience, role="rollout")
        root = self._endpoint.url.removesuffix("/v1")
        self._side = JsonEndpoint(root, patience=patience, role="rollout")
        entry = chosen(self._endpoint, name)
        self.url, self.model = self._endpoint.url, entry["id"]
        self.limit: int | None = entry.get("max_model_len")
        self._in_flight, self._vocabulary = in_flight, extra.start
        self._bias = {"logit_bias": {str(v): NEVER for v in extra}} if extra else {}

    def check_length(self, longest: int) -> None:
        """Refuse prompts and responses of together `longest` ids, if the server has no room.

        Raises:
          ValueError: it has none.
        """
        if self.limit is not None and self.limit < longest:
            raise InvalidInput(
                f"{self.url} has room for {self.limit} ids, and a prompt with its response may "
                f"have {longest}; start it with --max-model-len {longest}, or lower max_prompt or "
                "max_response"
            )

    def load(self, weights: WeightSnapshot) -> None:
        """Load a checkpoint, drop what was cached, and check that the server became the student.

        Raises:
          ValueError: the server cannot load it. RuntimeError: it does not sample from it, does not
            answer, or is restarted again and again.
        """
        for _ in range(RESTARTS + 1):
            self._order("/update_weight_version", {"new_version": weights.name})
            plain = {"overrides": {"load_config": {"load_format": "auto"}}}
            self._order("/collective_rpc", {"method": "update_config", "kwargs": plain})
            where = {"weights_path": str(weights.folder)}
            self._order("/collective_rpc", {"method": "reload_weights", "kwargs": where})
            self._drop_cache()
            gaps = self._gaps(weights)
            if self.held() == weights.name:  # one process all the while
                return self._judge(gaps, weights.tolerance)
        raise OperationFailed(
            f"{self.url} was restarted {RESTARTS + 1} times while it loaded weights"
        )

    def held(self) -> str:
        """The name of the weights that the server holds; "default" if nobody named them."""
        version: str = self._field("/weight_info", None, "weight_version", str)
        return version

    def respond(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        settings: Mapping[str, Any],
        name: str,
        again: Callable[[], None],
    ) -> list[Response]:
        """A response to each prompt, in order, all from the weights of that name; or an error.

        Responses of a server that was restarted meanwhile are thrown away; `again` gives it the
        weights, and it is asked again.

        Args:
          settings: max_tokens, temperature, top_p and stop_token_ids.

        Raises:
          ValueError: an answer is not one to its question; names the row. RuntimeError: no answer;
            another run has loaded weights into the server; or it is restarted again and again.
        """
        for _ in range(RESTARTS + 1):
            found = self._all(prompts, seeds, settings)
            held = self.held()
            if held == name:
                return found
            if held.startswith(NAMED):
                raise OperationFailed(
                    f"{self.url} holds the weights {held!r} instead of {name!r}: another run loads "
                    "weights into it; give each run servers of its own"
                )
            again()
        raise OperationFailed(f"{self.url} was restarted {RESTARTS + 1} times during one batch")

    def start(self) -> None:
        self._endpoint.start()
        self._side.start()

    def stop(self) -> None:
        """End all questions under way, in other threads; each raises. Until `start`."""
        self._endpoint.stop()
        self._side.stop()

    def close(self) -> None:
        self._endpoint.close()
        self._side.close()

    def _order(self, path: str, question: Any) -> Any:
        """Ask one of the addresses that vLLM has in its development mode."""
        try:
            return self._side.ask(
                path, question, most=SPARE_BYTES, passing=[x for x in PASSING if x != 500]
            )
        except ValueError as error:
            raise InvalidInput(
                f"{error}. Weights are loaded by vLLM 0.32 or later, started with "
                "VLLM_SERVER_DEV_MODE=1, from a folder that it can read (weights_folder)"
            ) from error

    def _field(self, path: str, question: Any, name: str, kind: type) -> Any:
        return field(self._side, self._order(path, question), name, kind, path)

    def _drop_cache(self) -> None:
        """Forget keys and values of the old weights; requests that were given up may hold some."""
        until = time.monotonic() + self._side.patience
        while not self._field("/reset_prefix_cache", {}, "success", bool):
            if time.monotonic() > until:
                raise OperationFailed(
                    f"{self.url} does not drop its cache; who else does it serve?"
                )
            time.sleep(0.2)

    def _gaps(self, weights: WeightSnapshot) -> tuple[float, float]:
        """Mean |server - student| of log-probabilities: the probe's, and of tokens drawn after."""
        probe, about = weights.probe, "the probe"
        size = len(probe)
        question = {"prompt": probe, "max_tokens": 1, "prompt_logprobs": 0}
        read = partial(read_row, row=probe, places=range(1, size), k=0, vocabulary=self._vocabulary)
        told = self._read(self._ask(question, size, about), read, about)
        settings = {
            "max_tokens": 1,
            "temperature": PROBE_TEMPERATURE,
            "top_p": 1.0,
            "stop_token_ids": [],
        }
        drawn = self._all([probe] * PROBE_DRAWS, range(PROBE_DRAWS), settings)
        far = [abs(logp - float(weights.next_logp[v])) for (v,), (logp,) in drawn]
        near = (weights.prompt_logp - weights.prompt_logp.new_tensor(told.sampled)).abs()
        return float(near.mean()), sum(far) / len(far)

    def _judge(self, gaps: tuple[float, float], tolerance: float) -> None:
        what = f"{tolerance:.0e} is arithmetic"
        if not gaps[0] <= tolerance:
            raise OperationFailed(
                f"{self.url} did not become the student: after loading the weights, its "
                f"log-probabilities of fixed tokens differ by {gaps[0]:.2g} on average, {what}. "
                "Start it with the student's --dtype and, as a tied head may keep old weights, "
                "with --load-format dummy --hf-overrides '{\"tie_word_embeddings\": false}'"
            )
        if not gaps[1] <= tolerance:
            raise OperationFailed(
                f"{self.url} tells other log-probabilities than those of the distribution that it "
                f"draws from: at temperature {PROBE_TEMPERATURE:g} they differ by {gaps[1]:.2g} on "
                f"average, {what}. Start it with --logprobs-mode processed_logprobs"
            )

    def _all(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], settings: Mapping[str, Any]
    ) -> list[Response]:
        """The responses, `in_flight` questions at a time."""
        with ThreadPoolExecutor(self._in_flight) as pool:
            asked = [
                pool.submit(self._one, ids, seed, settings, f"row {i} of {len(prompts)}")
                for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
            ]
            try:
                for done in as_completed(asked):
                    done.result()
            except BaseException:
                for one in asked:
                    one.cancel()
                self.stop()
                raise
        return [done.result() for done in asked]

    def _one(self, ids: list[int], seed: int, settings: Mapping[str, Any], about: str) -> Response:
        budget, eos = settings["max_tokens"], settings["stop_token_ids"]
        said = self._ask({"prompt": ids, "seed": seed, **settings}, budget, about)
        read = partial(
            read_response, prompt=ids, eos=eos, budget=budget, vocabulary=self._vocabulary
        )
        return self._read(said, read, about)

    def _ask(self, question: Mapping[str, Any], size: int, about: str) -> Any:
        whole = {"model": self.model, **SAMPLING, **self._bias, **question}
        most = (len(question["prompt"]) + size) * ENTRY_BYTES + SPARE_BYTES
        return self._endpoint.ask("/completions", whole, most=most, about=about)

    def _read(self, said: Any, reader: Any, about: str) -> Any:
        try:
            if lacking := sorted({"model", "choices"} - set(said)):
                raise InvalidInput(f"it lacks {lacking[0]!r}: {described(said)}")
            (choice,) = said["choices"]
            if said["model"] != self.model:
                raise InvalidInput(f"model {said['model']!r} answers, asked was {self.model!r}")
            return reader(choice)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidInput(  # from nothing that may quote the server, and with it the key
            self._endpoint.redacted(
                f"{self.url} ({about}): the answer is not the one to the question: {problem}"
            )
        )


def read_response(
    choice: Mapping[str, Any],
    prompt: Sequence[int],
    eos: Sequence[int],
    *,
    budget: int,
    vocabulary: int,
) -> Response:
    """The ids of a response and their log-probabilities.

    Raises:
      ValueError: of another prompt; cut elsewhere than at an end or the budget; ids that were not
        to be drawn; or numbers that are no log-probabilities of these ids.
    """
    ids, told = choice["token_ids"], choice["logprobs"]
    if ids is None or told is None:
        raise InvalidInput("no token ids or log-probabilities; the server must be vLLM's")
    if choice["prompt_token_ids"] != list(prompt):
        raise InvalidInput("the prompt's token ids are not those that were sent")
    logp, names = told["token_logprobs"], told["tokens"]
    if names != [f"token_id:{v}" for v in ids] or len(logp) != len(ids):
        raise InvalidInput(f"{len(logp)} log-probabilities of other tokens than the {len(ids)} ids")
    ends = [v in eos for v in ids]
    whole = bool(ids) and not any(ends[:-1]) and (ends[-1] or len(ids) == budget)
    if not whole or len(ids) > budget:
        raise InvalidInput(
            f"{len(ids)} ids that end with {ids[-1:]}, by {choice['finish_reason']!r}; expected "
            f"were {budget}, or fewer up to the first of {list(eos)}. Start the server with "
            "--generation-config vllm"
        )
    if not all(0 <= v < vocabulary for v in ids):
        raise InvalidInput(f"ids up to {max(ids)}, the vocabulary has {vocabulary}")
    for v, x in zip(ids, logp, strict=True):
        if not has_type(x, float) or math.isnan(x) or not CLAMPED < x < 1e-3:
            raise InvalidInput(f"the id {v} has the log-probability {short(x)}")
    return ids, logp
