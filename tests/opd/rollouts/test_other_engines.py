"""Servers of other engines are refused by what they lack, not assumed to be vLLM."""

from pathlib import Path
from typing import Any

import pytest

from opd.rollouts.vllm_server import RolloutServer, read_response
from tests.helpers.servers.rollout_server import FakeRolloutServer
from tests.helpers.servers.teacher_server import serve

# the choice of a response to /v1/completions of SGLang, and of llama.cpp
SGLANG_CHOICE = {
    "index": 0,
    "text": "4",
    "logprobs": {"text_offset": [], "token_logprobs": [-0.1], "tokens": ["4"], "top_logprobs": []},
    "finish_reason": "length",
    "matched_stop": None,
}
LLAMA_CHOICE = {
    "index": 0,
    "text": "4",
    "logprobs": {"content": [{"id": 4, "token": "4", "logprob": -0.1}]},
    "finish_reason": "length",
}
VLLM_CHOICE = {
    "index": 0,
    "text": "4",
    "logprobs": {"token_logprobs": [-0.1], "tokens": ["token_id:4"]},
    "finish_reason": "length",
    "token_ids": [4],
    "prompt_token_ids": [1, 2],
}


def read(choice: Any) -> Any:
    return read_response(choice, [1, 2], [9], max_tokens=1, vocabulary=10)


def test_a_response_of_vllm_is_read() -> None:
    assert read(VLLM_CHOICE) == ([4], [-0.1])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (SGLANG_CHOICE, "its response lacks token_ids, prompt_token_ids.*has index, text"),
        (LLAMA_CHOICE, "its response lacks token_ids, prompt_token_ids, which vLLM returns"),
        (
            VLLM_CHOICE | {"logprobs": LLAMA_CHOICE["logprobs"]},
            "its logprobs lacks token_logprobs, tokens, which vLLM returns, and has content",
        ),
        (VLLM_CHOICE | {"logprobs": [1]}, r"its logprobs lacks token_logprobs, tokens.*has \[1\]"),
        ({}, "lacks token_ids, prompt_token_ids, logprobs, finish_reason"),
    ],
    ids=["sglang", "llama.cpp", "other logprobs", "a list", "nothing"],
)
def test_absent_fields_are_named(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(choice)


@pytest.mark.parametrize(("owner", "name"), [("sglang", "SGLang"), ("llamacpp", "llama.cpp")])
def test_an_engine_that_names_itself_is_refused_before_it_loads_weights(
    two_layer_pair: tuple[Path, Path], owner: str, name: str
) -> None:
    class OtherServer(FakeRolloutServer):
        def models(self) -> dict[str, Any]:
            return {"data": [super().models()["data"][0] | {"owned_by": owner}]}

    options = {"timeout": 9.0, "concurrency": 1, "excluded_ids": range(5, 5)}
    other = OtherServer(two_layer_pair[0])
    with serve(other) as url, pytest.raises(ValueError, match=f"is {name}, but a rollout server"):
        RolloutServer(url, **options)
    assert other.weights_name == "default"
    with serve(FakeRolloutServer(two_layer_pair[0])) as url:
        assert RolloutServer(url, **options).model == "student"
