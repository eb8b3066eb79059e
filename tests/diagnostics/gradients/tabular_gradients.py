"""Worlds, batches and exact table gradients that the tests of the probe share."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diagnostics.gradients.estimators import (
    estimator_weights,
)
from diagnostics.gradients.sketch import (
    identity_projection,
    sequence_sketches,
    token_energies,
    token_sketches,
)
from synthetic.sampling.trajectories import Trajectories, sample
from synthetic.worlds.mdp import TabularMDP, random_pair, token_chain, with_end_state

GAMMAS = (0.0, 0.5, 1.0)


N, REPETITIONS = 48, 200


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def world(horizon: int = 8) -> tuple[TabularMDP, Tensor, Tensor]:
    """Build a world of three states (the last token) and an end, so that lengths are random."""
    mdp = with_end_state(token_chain(3, horizon), torch.tensor(0.1))
    return mdp, *random_pair(mdp, seeded(8), distance=1.0, heterogeneity=0.5)


def sample_batch(mdp: TabularMDP, seed: int, count: int = N, group: int = 1) -> Trajectories:
    _, student, teacher = world()
    trajectories = sample(mdp, student, teacher, count, seeded(seed))
    return replace(
        trajectories, batch=replace(trajectories.batch, prompt=torch.arange(count) // group)
    )


def gradients(trajectories: Trajectories, names: tuple[str, ...]) -> tuple[Tensor, Tensor, object]:
    """Return (n, F, 1, S A) exact table gradients by the code of the probe, energies, weights."""
    _, student, teacher = world()
    batch, flat = trajectories.batch, trajectories.states[trajectories.batch.mask]
    tables = student.log_softmax(-1), teacher.log_softmax(-1)
    tokens = token_sketches(
        batch,
        one_hot(flat, 4).double(),
        lambda c: (tables[0][flat[c]], tables[1][flat[c]]),
        identity_projection(3, 4),
        chunk_tokens=100,
    )
    family = estimator_weights(batch, names, GAMMAS)
    x = sequence_sketches(tokens, batch.mask, family.values, family.local)
    return x, token_energies(tokens, batch.mask, family.values, family.local), family


def near(values: list[float], true: float, sigmas: float = 4) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std() / len(x) ** 0.5)
    assert abs(float(x.mean()) - true) < sigmas * error, (float(x.mean()), true, error)
