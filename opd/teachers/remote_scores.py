"""Scores of a remote teacher as tensors, and the settings that a remote teacher cannot support.

Shapes: B responses, P prompt positions, T response positions, N sampled tokens, K ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.config.settings import Config
from opd.data.prompts import Prompts
from opd.objectives.factory import Objective
from opd.teachers.client import TeacherClient
from opd.teachers.pair import ModelPair


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
    answers = client.query(sequences, positions, k)

    def concatenate(name: str) -> Tensor:
        parts = [torch.from_numpy(getattr(answer, name)) for answer in answers]
        return torch.cat(parts).to(batch.tokens.device)

    return TeacherScores(concatenate("ids"), concatenate("logp"), concatenate("sampled"))


def verify_fingerprints(path: Path, pairs: Sequence[ModelPair], first_step: int) -> None:
    """Store a fingerprint of each teacher server in the run folder; verify it on resume.

    Args:
        path: File with the fingerprints.
        pairs: The pairs of the run.
        first_step: The first step of this process; at 0 an existing file is deleted.

    Raises:
        OperationFailed: An address now serves another model.
    """
    if first_step == 0:
        path.unlink(missing_ok=True)
    for pair in pairs:
        if pair.remote_teacher is not None:
            pair.remote_teacher.verify_fingerprint(path)


def check_remote_support(config: Config, objective: Objective) -> None:
    """Reject settings that need more than a remote teacher provides.

    Args:
        config: Settings of a run or task whose teacher is a server.
        objective: Its objective.

    Raises:
        InvalidInput: Names the setting and an alternative.
    """
    supported_objectives = "teacher_topk, sampled_token or one of their variants"
    for unsupported, feature, remedy in (
        (
            objective.support in ("student", "union"),
            f"objective {config.objective}, which needs its log-probabilities of the student's ids",
            supported_objectives,
        ),
        (
            objective.support == "full" or objective.distributions,
            f"objective {config.objective} with baseline {config.baseline}, which needs its full "
            "distribution",
            supported_objectives,
        ),
        (
            config.temperature != 1,
            f"temperature {config.temperature}, because servers return log-probabilities at 1",
            "temperature 1",
        ),
        (config.map_eos, "map_eos, which needs scores of unsampled ids", "map_eos off"),
        (
            config.entropy_top_fraction < 1,
            "entropy_top_fraction, which needs full distributions",
            "entropy_top_fraction 1",
        ),
        (config.probe_every, "probe_every, which needs its hidden states", "probe_every 0"),
    ):
        if unsupported:
            raise InvalidInput(
                f"the teacher {config.teacher} is a server and does not support {feature}; use "
                f"{remedy}, or a teacher in this process"
            )
