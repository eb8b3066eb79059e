"""What a trainer of TRL needs beside its loss: models that are tables of logits, and bookkeeping.

Shapes: B responses, T positions, P prompt positions (1 here), L = P + T, V vocabulary, K ids.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.io.packages import load_package

IGNORED = -100
"""Label of positions without loss."""

LOWEST = -1e4
"""Hidden state in place of -inf."""


def package(module: str) -> Any:
    """Import a module of TRL or of what it needs.

    Args:
        module: Full name.

    Returns:
        The module.

    Raises:
        MissingPackage: TRL is not installed.
        BrokenPackage: It cannot be imported.
    """
    return load_package(module, "auditing a loss of TRL", "trl")


def with_prompt(values: Tensor, fill: float) -> Tensor:
    """Put a prompt of one token before (B, T) values.

    Args:
        values: (B, T) or (B, T, K).
        fill: Value of the prompt's position.

    Returns:
        (B, L) or (B, L, K).
    """
    return torch.cat([torch.full_like(values[:, :1], fill), values], 1)


def labelled_batch(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return a batch of the trainers that read `labels`.

    Args:
        tokens: (B, T) ids.
        mask: (B, T) bool.

    Returns:
        `input_ids`, `attention_mask` and `labels`, (B, L) each.
    """
    return {
        "input_ids": with_prompt(tokens, 0),
        "attention_mask": with_prompt(mask.long(), 1),
        "labels": with_prompt(torch.where(mask, tokens, IGNORED), IGNORED),
    }


def generated_batch(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return a batch of the trainers that generate completions.

    Args:
        tokens: (B, T) ids.
        mask: (B, T) bool.

    Returns:
        `prompt_ids` and `prompt_mask`, (B, P), `completion_ids` and `completion_mask`, (B, T).
    """
    return {
        "prompt_ids": torch.zeros_like(tokens[:, :1]),
        "prompt_mask": torch.ones_like(tokens[:, :1]),
        "completion_ids": tokens,
        "completion_mask": mask.long(),
    }


class LogitsModel(nn.Module):
    """A causal language model whose hidden states are given logits, with the identity as head.

    Nothing of the logits' graph is left in what it answers under `torch.no_grad`.
    """

    is_gradient_checkpointing = False
    """Asked for by TRL."""

    def __init__(self, logits: Tensor, *, is_packed: bool = False) -> None:
        """Keep logits; the last position, which predicts beyond the end, has none.

        Args:
            logits: (B, T, V); position t predicts the response's token t.
            is_packed: Whether all rows are one.
        """
        super().__init__()
        states = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
        self.states = states.flatten(0, 1)[None] if is_packed else states
        head = torch.eye(logits.shape[-1], dtype=logits.dtype)
        self.head = SimpleNamespace(weight=head, bias=None)
        self.config = package("transformers").PretrainedConfig()

    def base_model(self, **inputs: Any) -> SimpleNamespace:
        """Return the hidden states, (B, L, V), also where TRL has replaced `forward`.

        They are finite, since a head multiplies them; a logit of LOWEST has probability 0.
        """
        states = LogitsModel.forward(self, **inputs).last_hidden_state
        return SimpleNamespace(last_hidden_state=states.clamp(min=LOWEST))

    def get_output_embeddings(self) -> SimpleNamespace:
        """Return the head."""
        return self.head

    def forward(self, input_ids: Tensor, **_inputs: Any) -> SimpleNamespace:
        """Return the logits, (B, L, V), of the positions of the input."""
        states = self.states[:, : input_ids.shape[1]].clone()
        return SimpleNamespace(logits=states, last_hidden_state=states)


def fused_model(logits: Tensor, temperature: float = 1.0) -> LogitsModel:
    """Return a model with TRL's head that computes log-probabilities and entropies.

    Args:
        logits: (B, T, V).
        temperature: Of the head.

    Returns:
        The model.
    """
    model = LogitsModel(logits)
    outputs = ("log_probs", "entropy")
    package("trl.trainer.utils").add_fused_lm_head(model, temperature, outputs=outputs)
    return model


def bare_trainer(kind: type, args: Any, **attributes: Any) -> Any:
    """Return a trainer that was not initialised, with what its loss reads.

    Args:
        kind: Its class.
        args: Its configuration.
        **attributes: Attributes beside the usual ones.

    Returns:
        The trainer.
    """
    trainer = kind.__new__(kind)  # type: ignore[call-overload]
    metrics: dict[str, dict[str, list[float]]] = {
        "train": defaultdict(list),
        "eval": defaultdict(list),
    }
    usual = {
        "args": args,
        "accelerator": package("accelerate").Accelerator(cpu=True),
        "state": package("transformers").TrainerState(),
        "model": nn.Module(),  # read for `training`
        "model_kwarg_keys": set(),
        "current_gradient_accumulation_steps": 1,
        "_forward_redirection": package("trl.models.utils")._ForwardRedirection(),
        "_metrics": metrics,
        "_is_vlm": False,
    }
    for name, value in (usual | attributes).items():
        object.__setattr__(trainer, name, value)
    return trainer


class TeacherClient:
    """The client of a teacher on a server, which answers from logits."""

    def __init__(self, logits: Tensor, mask: Tensor) -> None:
        """Keep the teacher's log-probabilities of the supervised positions.

        Args:
            logits: (B, T, V).
            mask: (B, T) bool.
        """
        logp = logits.detach().log_softmax(-1)
        self.logp = [row[inside] for row, inside in zip(logp, mask, strict=True)]

    def get_sequence_logprobs(
        self,
        sequences: list[list[int]],
        prompt_lengths: list[int],
        top_logprobs: int,
        temperature: float,
    ) -> dict[str, list[list[list[float]]]]:
        """Score sequences as TRL's client does; the temperature is part of the logits.

        Args:
            sequences: Tokens of each prompt and response.
            prompt_lengths: Tokens of each prompt.
            top_logprobs: K.
            temperature: Unused.

        Returns:
            For each sequence and response token the log-probability of the token, and those of the
            K most probable ids with these ids.
        """
        del temperature
        answer: dict[str, list[list[list[float]]]] = defaultdict(list)
        for logp, sequence, length in zip(self.logp, sequences, prompt_lengths, strict=True):
            tokens = torch.tensor(sequence[length:], dtype=torch.long)
            top = logp.topk(top_logprobs, -1)
            answer["actual_logprobs"].append(logp.gather(-1, tokens[:, None]).tolist())
            answer["logprobs"].append(top.values.tolist())
            answer["logprob_token_ids"].append(top.indices.tolist())
        return answer
