"""Construction of rollout engines by name.

An engine holds a copy of, or a reference to, the student's weights. The trainer calls `sync` after
each update and `sample` before the next.
"""

from collections.abc import Callable
from typing import Any

from diagnostics.errors import InvalidInput
from opd.models.model import CausalLM
from opd.rollouts.base import Engine
from opd.rollouts.hf_engine import HfEngine


def _vllm(model: CausalLM, **settings: Any) -> Engine:
    from opd.rollouts.vllm_engine import VllmEngine

    return VllmEngine(model, **settings)


def _vllm_servers(model: CausalLM, **settings: Any) -> Engine:
    from opd.rollouts.vllm_server_engine import VllmServerEngine

    return VllmServerEngine(model, **settings)


ENGINES: dict[str, Callable[..., Engine]] = {
    "hf": HfEngine,
    "vllm": _vllm,
    "servers": _vllm_servers,
}


def make_engine(name: str, model: CausalLM, **settings: Any) -> Engine:
    """Build a rollout engine and load the model's weights into it.

    Args:
        name: "hf", Hugging Face `generate` in this process; "vllm", vLLM on the same machine
            (`pip install 'opdlab[vllm]'`); or "servers", vLLM servers.
        model: The student.
        **settings: Arguments of the engine's constructor: `HfEngine`,
            `opd.rollouts.vllm_engine.VllmEngine` or
            `opd.rollouts.vllm_server_engine.VllmServerEngine`.

    Returns:
        The engine.

    Raises:
        InvalidInput: The name is unknown.
        ImportError: vLLM is not installed.
    """
    if name not in ENGINES:
        raise InvalidInput(f"unknown rollout engine {name!r}; known: {', '.join(ENGINES)}")
    return ENGINES[name](model, **settings)
