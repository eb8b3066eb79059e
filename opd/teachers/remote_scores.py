"""Scores of a remote teacher as tensors.

Shapes: B responses, P prompt positions, T response positions, N sampled tokens, K most probable ids
and C chosen ids.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.data.prompts import Prompts
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
    chosen_logp: Tensor | None = None
    """(N, C) log-probabilities of the ids that were chosen, 0 where there was none; None if none
    were asked for."""

    def select(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, logp and sampled of some of the tokens.

        Args:
            index: (n,) indices of tokens.

        Returns:
            (n, K) ids, (n, K) their log-probabilities, (n,) those of the sampled tokens.
        """
        return self.ids[index], self.logp[index], self.sampled[index]


def score_remote(
    client: TeacherClient,
    prompts: Prompts,
    batch: Rollouts,
    k: int,
    chosen_ids: Tensor | None = None,
) -> TeacherScores:
    """Score every sampled token with a teacher on a server, at temperature 1.

    The teacher's softmax is over its full vocabulary, including ids beyond the student's.

    Args:
        client: The server.
        prompts: B prompts.
        batch: B responses.
        k: Number of most probable ids per position.
        chosen_ids: (N, C) further ids to score, -1 where there is none; None for none.

    Returns:
        The scores, on the batch's device.

    Raises:
        InvalidInput: A prompt is empty, so that the first response token has no prefix; or the
            server does not score chosen ids.
    """
    sequences, positions = [], []
    width = prompts.tokens.shape[1]
    ids, attention_mask = (
        torch.cat([prompts.tokens, batch.tokens], 1),
        torch.cat([prompts.mask, batch.attention_mask], 1),
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
    answers = client.query(sequences, positions, k, split_rows(chosen_ids, positions))

    def concatenate(name: str) -> Tensor:
        parts = [torch.from_numpy(getattr(answer, name)) for answer in answers]
        return torch.cat(parts).to(batch.tokens.device)

    return TeacherScores(
        concatenate("ids"),
        concatenate("logp"),
        concatenate("sampled"),
        None if chosen_ids is None else concatenate("chosen_logp"),
    )


def split_rows(
    chosen_ids: Tensor | None, positions: list[list[int]]
) -> list[NDArray[np.int64]] | None:
    """Split (N, C) chosen ids into those of each row, given the rows' positions."""
    if chosen_ids is None:
        return None
    counts = [len(row) for row in positions]
    return [part.numpy() for part in chosen_ids.cpu().split(counts)]
