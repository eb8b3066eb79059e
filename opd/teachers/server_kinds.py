"""Kinds of teacher servers: which routes score what, and how they name things.

Does not import torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.position_logprobs import PositionLogprobs, ScoreQuery
from opd.serving.sglang_generate import score_sglang
from opd.serving.vllm_completions import MAX_WHOLE_VOCABULARY, score_top_k, score_whole
from opd.serving.vllm_generate import score_generate

ScoreFunction = Callable[
    [JsonEndpoint, str, Sequence[ScoreQuery], int, str], list[PositionLogprobs]
]
"""Endpoint, model, queries, vocabulary of the student and description -> log-probabilities."""


@dataclass(frozen=True)
class ScoreRoute:
    """A route of a server that returns log-probabilities of input tokens."""

    name: str
    """Its name in messages."""
    score: ScoreFunction
    """Sends one request."""
    has_version_prefix: bool
    """Whether its path is below /v1."""
    max_rows: int
    """Maximum number of sequences of one request."""
    max_vocabulary: int | None = None
    """Largest vocabulary for which it is used; None for any."""


@dataclass(frozen=True)
class ServerKind:
    """A kind of server."""

    name: str
    """Its name in messages."""
    top_k: ScoreRoute
    """Returns the most probable ids."""
    chosen_routes: tuple[ScoreRoute, ...]
    """Return log-probabilities of chosen ids too; the first that a server accepts is used."""
    text_field: str
    """Field of the text in the response to /detokenize."""
    length_option: str
    """Option of the server for the longest sequence."""
    detokenize_options: Mapping[str, object] = field(default_factory=dict)
    """Further fields of a request to /detokenize that decodes every id."""


SGLANG_ROUTE = ScoreRoute("/generate", score_sglang, has_version_prefix=False, max_rows=1)
VLLM = ServerKind(
    "vLLM",
    ScoreRoute("/v1/completions", score_top_k, has_version_prefix=True, max_rows=4),
    (
        ScoreRoute("/inference/v1/generate", score_generate, has_version_prefix=False, max_rows=1),
        ScoreRoute(
            "/v1/completions with whole distributions",
            score_whole,
            has_version_prefix=True,
            max_rows=1,
            max_vocabulary=MAX_WHOLE_VOCABULARY,
        ),
    ),
    text_field="prompt",
    length_option="--max-model-len",
)
SGLANG = ServerKind(
    "SGLang",
    SGLANG_ROUTE,
    (SGLANG_ROUTE,),
    text_field="text",
    length_option="--context-length",
    detokenize_options={"skip_special_tokens": False},
)


def server_kind(model: Mapping[str, object]) -> ServerKind:
    """Return the kind of a server from its entry of a model in /v1/models; vLLM if unknown."""
    return SGLANG if model.get("owned_by") == "sglang" else VLLM
