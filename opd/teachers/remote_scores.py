"""What a teacher on a server says of a batch, as tensors beside it, and what it cannot say.

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
from opd.models.forward import response_real
from opd.objectives.factory import Objective
from opd.teachers.client import TeacherClient
from opd.teachers.pair import ModelPair


@dataclass(frozen=True, eq=False)
class TeacherScores:
    """What a teacher elsewhere says of N sampled tokens, row-major over `Rollouts.sampled`.

    ids, logp: (N, K) its most probable, in descending order; sampled: (N,) log-probabilities of
    the tokens.
    """

    ids: Tensor
    logp: Tensor
    sampled: Tensor

    def at(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids[place], self.logp[place], self.sampled[place]


def asked(remote: TeacherClient, prompts: Prompts, batch: Rollouts, k: int) -> TeacherScores:
    """Ask a teacher on a server about every sampled token, at temperature 1.

    The teacher's softmax is over all its ids, also over those beyond the student's.
    """
    rows, places = [], []
    real, width = response_real(batch), prompts.tokens.shape[1]
    ids, there = torch.cat([prompts.tokens, batch.tokens], 1), torch.cat([prompts.mask, real], 1)
    wanted = torch.cat([torch.zeros_like(prompts.mask), batch.sampled], 1)
    for row, kept, of in zip(ids.cpu(), there.cpu(), wanted.cpu(), strict=True):
        if not kept[:width].any():
            raise InvalidInput(
                "a prompt has no token, and no teacher tells the first of a response"
            )
        rows.append(row[kept].tolist())
        places.append(of[kept].nonzero()[:, 0].tolist())
    answers = remote.tell(rows, places, k)

    def joined(name: str) -> Tensor:
        parts = [torch.from_numpy(getattr(answer, name)) for answer in answers]
        return torch.cat(parts).to(batch.tokens.device)

    return TeacherScores(joined("ids"), joined("logp"), joined("sampled"))


def keep_probes(path: Path, pairs: Sequence[ModelPair], first: int) -> None:
    """Keep in a run's record what its servers are known by; a resumed run must find them again.

    Raises:
      RuntimeError: another model is at an address by now.
    """
    if first == 0:
        path.unlink(missing_ok=True)
    for pair in pairs:
        if pair.remote is not None:
            pair.remote.remember(path)


def check_tellable(config: Config, objective: Objective) -> None:
    """Refuse a run for which a teacher on a server would have to say what it cannot.

    Raises:
      ValueError: names the setting, and what to choose instead.
    """
    own = "teacher_topk or sampled_token, or one of their forms"
    for wrong, what, remedy in (
        (
            objective.support in ("student", "union"),
            f"objective {config.objective}, which needs its log-probabilities of the student's ids",
            own,
        ),
        (
            objective.support == "full" or objective.distributions,
            f"objective {config.objective} with baseline {config.baseline}, which needs its whole "
            "distribution",
            own,
        ),
        (
            config.temperature != 1,
            f"temperature {config.temperature}, since servers tell that of 1",
            "temperature 1",
        ),
        (config.map_eos, "map_eos, which reads ids that were not sampled", "map_eos off"),
        (
            config.entropy_top_fraction < 1,
            "entropy_top_fraction, which comes with whole distributions",
            "entropy_top_fraction 1",
        ),
        (config.probe_every, "probe_every, which needs its hidden states", "probe_every 0"),
    ):
        if wrong:
            raise InvalidInput(
                f"the teacher {config.teacher} is on a server and cannot serve {what}; take "
                f"{remedy}, or a teacher in this process"
            )
