"""Requests to score a batch for metrics, or for a loss that reads logits only."""

from dataclasses import replace

from opd.scoring.request import METRICS_ONLY, ScoreRequest

LIMITS = {"max_tokens_per_microbatch": 90, "max_logits_per_chunk": 700}
"""Memory limits that split the small batches of tests."""


def full_request(k: int, support: str = "teacher", **changes: object) -> ScoreRequest:
    """A request with full statistics."""
    requirements = replace(METRICS_ONLY, support=support, support_k=k)
    return ScoreRequest(requirements=requirements, **(LIMITS | changes))  # type: ignore[arg-type]


def lean_request(k: int, **changes: object) -> ScoreRequest:
    """A request that the sampler's softmax and the teacher's top-K satisfy."""
    request = full_request(k, **changes)
    needs = replace(request.requirements, normalised=False, distributions=False)
    return replace(request, requirements=needs, full_statistics=False)
