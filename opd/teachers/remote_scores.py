"""Scores of a remote teacher as tensors.

Shapes: B responses, P prompt positions, T response positions, N sampled tokens, K ids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.data.prompts import Prompts
from opd.models.forward import response_attention_mask
from opd.teachers.client import TeacherClient


@dataclass(frozen=True, eq=False)
class TeacherScores:
    """Log-probabilities of N sampled tokens, in row-major order over `Rollouts.sampled`."""

    ids: Tensor
    """(N, K) most probable token ids, in descending order."""
    logp: Tensor
    """(N, K) log-probabilities of `ids`."""
    sampled: Tensor
    """(N,) log-probabilities of the sampled tokens."""

    def select(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, logp and sampled of some of the tokens.

        Args:
            index: (n,) indices of tokens.

        Returns:
            (n, K) ids, (n, K) their log-probabilities, (n,) those of the sampled tokens.
        """
        return self.ids[index], self.logp[index], self.sampled[index]


def score_remote(client: TeacherClient, prompts: Prompts, batch: Rollouts, k: int) -> TeacherScores:
    """Score every sampled token with a teacher on a server, at temperature 1.

    The teacher's softmax is over its full vocabulary, including ids beyond the student's.

    Args:
        client: The server.
        prompts: B prompts.
        batch: B responses.
        k: Number of most probable ids per position.

    Returns:
        The scores, on the batch's device.

    Raises:
        InvalidInput: A prompt is empty, so that the first response token has no prefix.
    """
    sequences, positions = [], []
    response_mask, width = response_attention_mask(batch), prompts.tokens.shape[1]
    ids, attention_mask = (
        torch.cat([prompts.tokens, batch.tokens], 1),
        torch.cat([prompts.mask, response_mask], 1),
    )
    sampled = torch.cat([torch.zeros_like(prompts.mask), batch.sampled], 1)
    for row, row_mask, row_sampled in zip(
        ids.cpu(), attention_mask.cpu(), sampled.cpu(), strict=True
    ):
        if not row_mask[:width].any():
            raise InvalidInput(
                "a prompt is empty, so a remote teacher cannot score the first response token; "
                "remove empty prompts"
            )
        sequences.append(row[row_mask].tolist())
        positions.append(row_sampled[row_mask].nonzero()[:, 0].tolist())
    answers = client.query(sequences, positions, k)

    def concatenate(name: str) -> Tensor:
        parts = [torch.from_numpy(getattr(answer, name)) for answer in answers]
        return torch.cat(parts).to(batch.tokens.device)

    return TeacherScores(concatenate("ids"), concatenate("logp"), concatenate("sampled"))
