"""Saved batches as a table with one row a token, from which token-level figures are made.

Needs torch: functions that collect tables import this module when they run, drawing never does.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.metrics.repetition import repeated_ngram_mask
from diagnostics.metrics.signal import score_norm
from diagnostics.metrics.token_attribution import confident_impossible_mask
from diagnostics.records.batch_files import load_batch
from diagnostics.records.run_folder import RunFolder

PREFIX_STATISTICS = (
    "reverse_kl",
    "ratio_square",
    "student_entropy",
    "teacher_entropy",
    "teacher_max",
    "surprise_square",
)


def load_scored_batch(path: Path) -> ScoredRollouts:
    """Load a saved batch with the scores and full-vocabulary statistics of both models.

    Args:
        path: File of the batch.

    Returns:
        The batch.

    Raises:
        InvalidInput: The batch lacks them; the message names the setting that saves them.
    """
    batch = load_batch(path)
    if not isinstance(batch, ScoredRollouts) or batch.prefix is None:
        raise InvalidInput(
            f"{path} has no full-vocabulary statistics; save batches at steps of full_metrics_every"
        )
    return batch


def token_table(runs: list[Path], step: int, *, sampled_now: bool = False) -> pd.DataFrame:
    """Build a table of the supervised tokens in the batches that runs saved at one step.

    Args:
        runs: Run folders.
        step: A step whose batch every run saved.
        sampled_now: Take the tokens that the student sampled with its weights of the step instead,
            also those that are masked out of the loss, which a test of sampling needs; not those
            of other writers or of older weights.

    Returns:
        A table with one row a token and the columns cluster (int, one a run and prompt: the
        sampling unit), response (int, unique over runs), position, id, ended (of the response),
        student_logp, teacher_logp, cost (their difference, nats), energy
        (cost^2 |one_hot(y) - p|^2), repeated and impossible (as in `diagnostics`), and
        PREFIX_STATISTICS.
    """
    frames, num_clusters, num_responses = [], 0, 0
    for run in runs:
        batch = load_scored_batch(RunFolder(run).batch_path(step))
        assert batch.prefix is not None  # load_scored_batch checks it
        fresh = batch.own_tokens & (batch.age == 0)[:, None]
        mask = fresh if sampled_now else batch.mask
        response, position = mask.nonzero(as_tuple=True)
        prompt = np.unique(batch.prompt.numpy(), return_inverse=True)[1]
        energy = (batch.log_ratio.double() * score_norm(batch).double()).square()
        columns = {
            "student_logp": batch.student_logp,
            "teacher_logp": batch.teacher_logp,
            "cost": batch.log_ratio,
            "energy": energy,
            "repeated": repeated_ngram_mask(batch.tokens, batch.sampled),
            "impossible": confident_impossible_mask(batch),
            **{name: getattr(batch.prefix, name) for name in PREFIX_STATISTICS},
        }
        frame = pd.DataFrame({name: x[mask].numpy() for name, x in columns.items()})
        frame.insert(0, "cluster", num_clusters + prompt[response.numpy()])
        frame.insert(1, "response", num_responses + response.numpy())
        frame.insert(2, "position", position.numpy())
        frame.insert(3, "id", batch.tokens[mask].numpy())
        frame.insert(4, "ended", batch.ended.numpy()[response.numpy()])
        frames.append(frame)
        num_clusters, num_responses = (
            num_clusters + int(prompt.max()) + 1,
            num_responses + len(batch),
        )
    return pd.concat(frames, ignore_index=True)


def shares_by_kind(
    data: pd.DataFrame, kinds: pd.Series, weight: pd.Series, generator: np.random.Generator
) -> dict[str, tuple[float, float, float]]:
    """Compute the share of the weight that each kind of token has: sum_t w_t 1[kind] / sum_t w_t.

    Args:
        data: A table of tokens.
        kinds: (N,) kind of each token.
        weight: (N,) weight of each token.
        generator: Random generator of the bootstrap.

    Returns:
        {kind: (share, low, high)} with 95 % bootstrap intervals over clusters.
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
