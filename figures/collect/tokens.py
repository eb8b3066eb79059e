"""Saved batches as one row a supervised token: what the tables of token-level figures are made of.

Needs torch, so collectors import it when they are called; drawing never does.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.metrics.repetition import repeated
from diagnostics.metrics.signal import score_norm
from diagnostics.metrics.token_attribution import impossible
from diagnostics.records.batch_files import load
from diagnostics.records.run_folders import batch_path

PREFIX = (
    "reverse_kl",
    "ratio_square",
    "student_entropy",
    "teacher_entropy",
    "teacher_max",
    "surprise_square",
)


def scored(path: Path) -> ScoredRollouts:
    """A saved batch with both models' scores and prefix functionals.

    Raises:
      ValueError: the batch lacks them; says what makes a batch that has them.
    """
    batch = load(path)
    if not isinstance(batch, ScoredRollouts) or batch.prefix is None:
        raise InvalidInput(
            f"{path} has no whole distributions; save it at a step of full_metrics_every"
        )
    return batch


def tokens(runs: list[Path], step: int, *, unsupervised: bool = False) -> pd.DataFrame:
    """Supervised tokens of the batches that these runs saved at a step, row by row.

    With `unsupervised` also those that were sampled and that a mask takes out: a test of sampling
    needs all of them. Columns: cluster (int, one a run and prompt: the sampling unit), response
    (int, distinct over runs), position, id, ended (of the response), student_logp, teacher_logp,
    cost (their difference, nats), energy (cost^2 |one_hot(y) - p|^2), repeated and impossible (as
    in `diagnostics`), and the functionals in PREFIX.
    """
    frames, clusters, responses = [], 0, 0
    for run in runs:
        batch = scored(batch_path(run, step))
        assert batch.prefix is not None  # `scored` refuses others
        mask = batch.sampled if unsupervised else batch.mask
        response, position = mask.nonzero(as_tuple=True)
        prompt = np.unique(batch.prompt.numpy(), return_inverse=True)[1]
        energy = (batch.log_ratio.double() * score_norm(batch).double()).square()
        columns = {
            "student_logp": batch.student_logp,
            "teacher_logp": batch.teacher_logp,
            "cost": batch.log_ratio,
            "energy": energy,
            "repeated": repeated(batch.tokens, batch.sampled),
            "impossible": impossible(batch),
            **{name: getattr(batch.prefix, name) for name in PREFIX},
        }
        frame = pd.DataFrame({name: x[mask].numpy() for name, x in columns.items()})
        frame.insert(0, "cluster", clusters + prompt[response.numpy()])
        frame.insert(1, "response", responses + response.numpy())
        frame.insert(2, "position", position.numpy())
        frame.insert(3, "id", batch.tokens[mask].numpy())
        frame.insert(4, "ended", batch.ended.numpy()[response.numpy()])
        frames.append(frame)
        clusters, responses = clusters + int(prompt.max()) + 1, responses + len(batch)
    return pd.concat(frames, ignore_index=True)


def shares(
    data: pd.DataFrame, kinds: pd.Series, weight: pd.Series, generator: np.random.Generator
) -> dict[str, tuple[float, float, float]]:
    """{kind: (share, low, high)} of the weight that each kind of token holds.

    sum_t w_t 1[kind] / sum_t w_t, with a 95 % bootstrap interval over clusters.
    """
    from diagnostics.stats import bootstrap_interval

    sums = weight.groupby([data["cluster"], kinds]).sum().unstack(fill_value=0.0)
    values = sums.to_numpy(dtype=float)
    ratio = lambda x: x.sum(0) / x.sum()  # noqa: E731
    low, high = bootstrap_interval(values, ratio, generator, resamples=1000)
    return {
        str(kind): (float(v), float(a), float(b))
        for kind, v, a, b in zip(sums.columns, ratio(values), low, high, strict=True)
    }
