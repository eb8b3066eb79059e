r"""Client of one vLLM rollout server: loading and checking weights, and parsing responses.

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model STUDENT \
        --logprobs-mode processed_logprobs

A restarted server serves the weights of its command line again, without any error. Therefore each
version of the weights has a name, which is set in the server before it loads them and which it
forgets when it exits. A server that still has the name after a batch has sampled the whole batch
from weights that were loaded and checked under that name.

Shapes: P probe tokens, V ids that may be sampled.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.files import has_type, short_repr
from opd.serving.fan_out import run_all
from opd.serving.fingerprint import check_same_model
from opd.serving.json_endpoint import RETRYABLE_STATUSES, JsonEndpoint
from opd.serving.position_logprobs import MIN_LOGPROB
from opd.serving.vllm_protocol import (
    OVERHEAD_BYTES,
    answer_field,
    check_is_vllm,
    read_row,
    request_completions,
    require_fields,
    select_model,
)

T = TypeVar("T")
PROBE_TEMPERATURE = 2.0
"""Temperature of the tokens that the weight check samples: not 1, so that the check detects a
server that returns log-probabilities before temperature."""
NUM_PROBE_DRAWS = 8
MAX_RESTARTS = 3
"""Maximum number of server restarts during one batch or one load."""
WEIGHTS_PREFIX = "opdlab-"
"""Prefix of the names of weights."""
EXCLUDED_BIAS = -100.0
"""Logit bias of ids that the head has beyond the vocabulary; the lowest that vLLM accepts."""
SAMPLING_DEFAULTS = {
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
"""Parameters of every request, so that the model's own generation settings have no effect."""

Response = tuple[list[int], list[float]]
"""Token ids, and the log-probability of each under the distribution that was sampled from."""


@dataclass(frozen=True, eq=False)
class WeightSnapshot:
    """A checkpoint, and the student's log-probabilities for checking a server that loads it."""

    name: str
    folder: Path
    """The checkpoint; servers read it under the same path."""
    probe: list[int]
    """P token ids."""
    prompt_logp: Tensor
    """(P - 1,) log-probabilities of probe[1:]."""
    next_logp: Tensor
    """(V,) log-probabilities of the token after the probe, at PROBE_TEMPERATURE."""
    tolerance: float
    """Mean difference of log-probabilities, in nats, that is numerical noise."""


class RolloutServer:
    """A vLLM server that samples from weights which are loaded into it.

    Args:
        url: http://HOST:PORT/v1, followed by #MODEL if the server has several models.
        timeout: Seconds to wait for a server that does not respond.
        concurrency: Number of concurrent requests, each for one response.
        excluded_ids: Ids that the head has beyond the vocabulary; they are never sampled.

    Raises:
        InvalidInput: The address is invalid, or the server has no such model or is another engine.
    """

    def __init__(self, url: str, *, timeout: float, concurrency: int, excluded_ids: range) -> None:
        url, _, name = url.partition("#")
        self._endpoint = JsonEndpoint(url, timeout=timeout, role="rollout")
        root = self._endpoint.url.removesuffix("/v1")
        self._dev_endpoint = JsonEndpoint(root, timeout=timeout, role="rollout")
        entry = select_model(self._endpoint, name)
        check_is_vllm(self._endpoint, entry)
        self.url, self.model = self._endpoint.url, entry["id"]
        self.limit: int | None = entry.get("max_model_len")
        self._concurrency, self._vocabulary = concurrency, excluded_ids.start
        self._bias = (
            {"logit_bias": {str(v): EXCLUDED_BIAS for v in excluded_ids}} if excluded_ids else {}
        )

    def check_length(self, max_length: int) -> None:
        """Check that the server supports a sequence length.

        Args:
            max_length: Maximum length of prompt and response together, in tokens.

        Raises:
            InvalidInput: The server's maximum is lower.
        """
        if self.limit is not None and self.limit < max_length:
            raise InvalidInput(
                f"{self.url} supports at most {self.limit} tokens, but a prompt with its response "
                f"may have {max_length}; start it with --max-model-len {max_length}, or lower "
                "max_prompt or max_response"
            )

    def load(self, weights: WeightSnapshot) -> None:
        """Load a checkpoint, reset the prefix cache, and check the server's log-probabilities.

        Args:
            weights: The checkpoint and the student's log-probabilities.

        Raises:
            InvalidInput: The server cannot load the checkpoint.
            OperationFailed: The server does not sample from it, does not respond, or is restarted
                more than MAX_RESTARTS times.
        """
        for _ in range(MAX_RESTARTS + 1):
            self._dev_request("/update_weight_version", {"new_version": weights.name})
            load_format = {"overrides": {"load_config": {"load_format": "auto"}}}
            self._dev_request("/collective_rpc", {"method": "update_config", "kwargs": load_format})
            location = {"weights_path": str(weights.folder)}
            self._dev_request("/collective_rpc", {"method": "reload_weights", "kwargs": location})
            self._reset_cache()
            probe_logp, responses = self._query_probe(weights.probe)
            if self.loaded_weights() == weights.name:  # the server was not restarted meanwhile
                return self._check_weights(weights, probe_logp, responses)
        raise OperationFailed(
            f"{self.url} was restarted {MAX_RESTARTS + 1} times while it loaded weights"
        )

    def loaded_weights(self) -> str:
        """Return the name of the server's weights; "default" if no name was set."""
        version: str = self._field("/weight_info", None, "weight_version", str)
        return version

    def respond(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        settings: Mapping[str, Any],
        name: str,
        reload_weights: Callable[[], None],
    ) -> list[Response]:
        """Sample a response to each prompt, in order, all from the weights of one name.

        When the server was restarted meanwhile, the responses are discarded, the weights are loaded
        again and the batch is repeated.

        Args:
            prompts: Token ids of each prompt.
            seeds: Seed of each response.
            settings: max_tokens, temperature, top_p and stop_token_ids.
            name: Name of the weights.
            reload_weights: Loads the weights into the server again.

        Returns:
            The responses.

        Raises:
            InvalidInput: A response does not match its request; names the row.
            OperationFailed: No response; another run has loaded weights into the server; or it is
                restarted more than MAX_RESTARTS times.
        """
        for _ in range(MAX_RESTARTS + 1):
            responses = self._complete_all(prompts, seeds, settings)
            loaded_name = self.loaded_weights()
            if loaded_name == name:
                return responses
            if loaded_name.startswith(WEIGHTS_PREFIX):
                raise OperationFailed(
                    f"{self.url} has the weights {loaded_name!r} instead of {name!r}: another run "
                    "loads weights into it; use separate servers for each run"
                )
            reload_weights()
        raise OperationFailed(f"{self.url} was restarted {MAX_RESTARTS + 1} times during one batch")

    def start(self) -> None:
        """Accept requests again after `stop`."""
        self._endpoint.start()
        self._dev_endpoint.start()

    def stop(self) -> None:
        """Cancel the running requests of all threads, each of which raises, until `start`."""
        self._endpoint.stop()
        self._dev_endpoint.stop()

    def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        self._endpoint.close()
        self._dev_endpoint.close()

    def _dev_request(self, path: str, payload: Any) -> Any:
        """Send a request to one of the routes of vLLM's development mode."""
        try:
            return self._dev_endpoint.request(
                path,
                payload,
                max_bytes=OVERHEAD_BYTES,
                retryable_statuses=[x for x in RETRYABLE_STATUSES if x != 500],
            )
        except ValueError as error:
            raise InvalidInput(
                f"{error}. Loading weights needs vLLM 0.32 or later, started with "
                "VLLM_SERVER_DEV_MODE=1, and a folder that the server can read (weights_folder)"
            ) from error

    def _field(self, path: str, payload: Any, name: str, kind: type) -> Any:
        return answer_field(self._dev_endpoint, self._dev_request(path, payload), name, kind, path)

    def _reset_cache(self) -> None:
        """Drop keys and values of the old weights; cancelled requests may still hold some."""
        deadline = time.monotonic() + self._dev_endpoint.timeout
        while not self._field("/reset_prefix_cache", {}, "success", bool):
            if time.monotonic() > deadline:
                raise OperationFailed(
                    f"{self.url} does not reset its prefix cache; does another client use it?"
                )
            time.sleep(0.2)

    def _query_probe(self, probe: list[int]) -> tuple[NDArray[np.float32], list[Response]]:
        """Request the log-probabilities of the probe tokens, and tokens sampled after them."""
        size = len(probe)
        payload = {"prompt": probe, "max_tokens": 1, "prompt_logprobs": 0}
        parse = partial(
            read_row, row=probe, positions=range(1, size), k=0, vocabulary=self._vocabulary
        )
        answer = self._request(payload, parse, size, "the probe")
        settings = {
            "max_tokens": 1,
            "temperature": PROBE_TEMPERATURE,
            "top_p": 1.0,
            "stop_token_ids": [],
        }
        responses = self._complete_all([probe] * NUM_PROBE_DRAWS, range(NUM_PROBE_DRAWS), settings)
        return answer.sampled, responses

    def _check_weights(
        self, weights: WeightSnapshot, probe_logp: NDArray[np.float32], responses: list[Response]
    ) -> None:
        """Compare the answer of `_query_probe` with the student's log-probabilities."""
        check_same_model(
            probe_logp,
            weights.prompt_logp,
            tolerance=weights.tolerance,
            problem=f"{self.url} does not have the student's weights after loading them",
            remedy=(
                "Start it with the student's --dtype and, because a tied head may keep its old "
                "weights, --load-format dummy --hf-overrides '{\"tie_word_embeddings\": false}'"
            ),
        )
        check_same_model(
            [logp for _, (logp,) in responses],
            weights.next_logp[[v for (v,), _ in responses]],
            tolerance=weights.tolerance,
            problem=(
                f"{self.url} returns log-probabilities of another distribution than it samples "
                f"from: at temperature {PROBE_TEMPERATURE:g}"
            ),
            remedy="Start it with --logprobs-mode processed_logprobs",
        )

    def _complete_all(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], settings: Mapping[str, Any]
    ) -> list[Response]:
        """Request a response to each prompt, `concurrency` at a time."""
        calls = [
            partial(self._complete, ids, seed, settings, f"row {i} of {len(prompts)}")
            for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        return run_all(calls, concurrency=self._concurrency, stop=self.stop)

    def _complete(
        self, ids: list[int], seed: int, settings: Mapping[str, Any], description: str
    ) -> Response:
        max_tokens, eos = settings["max_tokens"], settings["stop_token_ids"]
        parse = partial(
            read_response, prompt=ids, eos=eos, max_tokens=max_tokens, vocabulary=self._vocabulary
        )
        return self._request(
            {"prompt": ids, "seed": seed, **settings}, parse, max_tokens, description
        )

    def _request(
        self,
        payload: Mapping[str, Any],
        parse: Callable[[Mapping[str, Any]], T],
        size: int,
        description: str,
    ) -> T:
        """Send one prompt to /completions; `size` log-probabilities are added to the prompt's."""
        (result,) = request_completions(
            self._endpoint,
            {"model": self.model, **SAMPLING_DEFAULTS, **self._bias, **payload},
            [parse],
            num_entries=len(payload["prompt"]) + size,
            description=description,
        )
        return result


def read_response(
    choice: Mapping[str, Any],
    prompt: Sequence[int],
    eos: Sequence[int],
    *,
    max_tokens: int,
    vocabulary: int,
) -> Response:
    """Parse one sampled response.

    Args:
        choice: The element of "choices" in the server's response.
        prompt: Token ids of the prompt that was sent.
        eos: Ids that end a response.
        max_tokens: Maximum response length in tokens.
        vocabulary: Number of ids that may be sampled.

    Returns:
        The ids of the response and their log-probabilities.

    Raises:
        InvalidInput: The response lacks a field, is to another prompt, ends before an EOS or the
            maximum length, has ids that may not be sampled, or values that are not
            log-probabilities of its ids.
    """
    require_fields(
        choice, ("token_ids", "prompt_token_ids", "logprobs", "finish_reason"), "response"
    )
    ids, logprobs = choice["token_ids"], choice["logprobs"]
    require_fields(logprobs, ("token_logprobs", "tokens"), "logprobs")
    if choice["prompt_token_ids"] != list(prompt):
        raise InvalidInput("its prompt_token_ids differ from the ids that were sent")
    logp, names = logprobs["token_logprobs"], logprobs["tokens"]
    if names != [f"token_id:{v}" for v in ids] or len(logp) != len(ids):
        raise InvalidInput(
            f"{len(logp)} log-probabilities that do not belong to the {len(ids)} ids"
        )
    is_eos = [v in eos for v in ids]
    complete = bool(ids) and not any(is_eos[:-1]) and (is_eos[-1] or len(ids) == max_tokens)
    if not complete or len(ids) > max_tokens:
        raise InvalidInput(
            f"{len(ids)} ids ending with {ids[-1:]}, finish_reason {choice['finish_reason']!r}; "
            f"expected {max_tokens} ids, or fewer up to the first of {list(eos)}. Start the server "
            "with --generation-config vllm"
        )
    if not all(0 <= v < vocabulary for v in ids):
        raise InvalidInput(f"ids up to {max(ids)}, but the vocabulary has {vocabulary}")
    for v, x in zip(ids, logp, strict=True):
        if not has_type(x, float) or math.isnan(x) or not MIN_LOGPROB < x < 1e-3:
            raise InvalidInput(f"the id {v} has the log-probability {short_repr(x)}")
    return ids, logp
