"""Batches of the audit in the layout that verl's trainer sends to its workers.

A sequence is a prompt of one token and a response, which ends at its last supervised token, as an
attention mask ends it; masked tokens before that are a tool's text. A row without supervised tokens
is a response of one masked token.

Shapes: B responses, T positions of the audit, L positions of the longest response, N tokens of all
sequences, V vocabulary, K ids.
"""

from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import BrokenPackage, MissingPackage
from diagnostics.io.packages import load_package

PROMPT = 1
"""Tokens of a prompt."""


def package(module: str) -> Any:
    """Import a module of verl or of what it needs.

    Args:
        module: Full name.

    Returns:
        The module.

    Raises:
        MissingPackage: verl is not installed; says how to install it.
        BrokenPackage: It cannot be imported, or is too old.
    """
    try:
        return load_package(module, "auditing a loss of verl", "all", package="verl")
    except MissingPackage as error:
        raise MissingPackage(
            "auditing a loss of verl needs verl 0.9, which pins versions of other packages: "
            "`make .venv-verl/ready` installs it into .venv-verl, whose bin/opd runs the audit; or "
            "pip install 'verl==0.9.1' in an environment of your own (docs/verl.md)"
        ) from error
    except BrokenPackage as error:
        raise BrokenPackage(
            f"auditing a loss of verl needs verl 0.9, which cannot be imported here: "
            f"{error.__cause__}; see docs/verl.md"
        ) from error


class Rows:
    """The rows of a batch of the audit as prompts and responses of verl."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Find where the responses end.

        Args:
            values: Values of the audit; `tokens` and `mask` at least.
        """
        self.values = values
        mask = values["mask"]
        ends = (torch.arange(mask.shape[1]) + 1) * mask
        self.lengths = ends.amax(1).clamp(min=1)
        self.width = int(self.lengths.max())
        self.inside = torch.arange(self.width) < self.lengths[:, None]

    def __len__(self) -> int:
        """Return B."""
        return len(self.lengths)

    def padded(self, values: Tensor) -> Tensor:
        """Return (B, L, ...) values of the responses, 0 behind the end."""
        values = values[:, : self.width]
        return torch.where(_like(self.inside, values), values, values.new_zeros(()))

    def responses(self, values: Tensor) -> Tensor:
        """Return values of the responses as a nested (B, j, ...) tensor.

        Args:
            values: (B, at least L, ...).

        Returns:
            The nested tensor.
        """
        return _nested(values[:, : self.width][self.inside], self.lengths)

    def sequences(self, values: Tensor) -> Tensor:
        """Return values at the tokens that predict the responses' as a nested (B, j, ...) tensor.

        The last token of a sequence, which predicts nothing, has values 0.

        Args:
            values: (B, at least L, ...).

        Returns:
            The nested tensor.
        """
        values = values[:, : self.width]
        values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
        lengths = self.lengths + PROMPT
        inside = torch.arange(values.shape[1]) < lengths[:, None]
        is_last = torch.arange(values.shape[1]) == lengths[:, None] - 1
        values = torch.where(_like(is_last, values), values.new_zeros(()), values)
        return _nested(values[inside], lengths)

    def token_fields(self) -> dict[str, Tensor]:
        """Return the fields of a batch that hold tokens and masks."""
        tokens, mask = self.values["tokens"], self.values["mask"].long()
        prompt = torch.zeros_like(tokens[:, :PROMPT])
        ids = torch.cat([prompt, tokens[:, : self.width]], 1)
        lengths = self.lengths + PROMPT
        is_token = torch.arange(ids.shape[1]) < lengths[:, None]
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return {
            "prompts": _nested(prompt.flatten(), torch.full_like(self.lengths, PROMPT)),
            "responses": self.responses(tokens),
            "response_mask": self.responses(mask),
            "loss_mask": self.responses(mask),
            "input_ids": _nested(ids[is_token], lengths),
            "position_ids": _nested(positions[is_token], lengths),
        }

    def rewards(self) -> Tensor:
        """Return (B, L) the rewards, each at the last token of its response."""
        reward = self.values["reward"]
        at_end = torch.arange(self.width) == self.lengths[:, None] - 1
        return torch.where(at_end, reward[:, None], reward.new_zeros(()))


def _like(positions: Tensor, values: Tensor) -> Tensor:
    """Return (B, L) booleans with the dimensions of (B, L, ...) values."""
    return positions.reshape(*positions.shape, *(1,) * (values.dim() - 2))


def _nested(values: Tensor, lengths: Tensor) -> Tensor:
    """Return a nested tensor of packed values and the lengths of its rows."""
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    shortest, longest = int(lengths.min()), int(lengths.max())
    nested: Tensor = torch.nested.nested_tensor_from_jagged(
        values, offsets, min_seqlen=shortest, max_seqlen=longest
    )
    return nested


def token_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return (B, T) log-probabilities of the tokens."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
