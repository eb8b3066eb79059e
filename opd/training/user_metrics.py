"""Metrics of the user's own in a run: functions from scored rollouts to accumulators."""

from collections.abc import Mapping, Sequence

import torch

from diagnostics.adapters.from_logits import score_logits
from diagnostics.batch import ScoredRollouts
from diagnostics.catalogue import Metric
from diagnostics.core.totals import Accumulator
from diagnostics.errors import InvalidInput
from diagnostics.io.user_functions import check_arguments, load_function
from diagnostics.missing import MissingField
from diagnostics.monitor import Monitor


def load_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Import metrics.

    Args:
        names: MODULE:FUNCTION or FILE.py:FUNCTION of each.

    Returns:
        Name -> function.

    Raises:
        InvalidInput: A function cannot be imported, or does not take one argument.
        MissingFile: FILE.py does not exist.
    """
    metrics: dict[str, Metric] = {}
    for name in names:
        metrics[name] = load_function(name, "metric")
        check_arguments(metrics[name], name, "metric", "batch")
    return metrics


def try_metrics(metrics: Mapping[str, Metric], panel: Mapping[str, Metric], k: int) -> None:
    """Call metrics once on a random batch, so that a run does not begin with one that fails.

    Args:
        metrics: The user's metrics.
        panel: The other metrics of the run, whose columns they must not repeat.
        k: K of the run.

    Raises:
        InvalidInput: A metric fails, returns something else than accumulators by name, or repeats
            a column.
    """
    if not metrics:
        return
    batch = random_batch(k)
    for name, metric in metrics.items():
        try:
            values = metric(batch)
        except MissingField:  # a run whose batches lack it has no such columns
            continue
        except Exception as error:  # a user's function can raise anything
            raise InvalidInput(
                f"the metric {name} failed with {type(error).__name__}: {error} on a random batch; "
                "correct it before the run"
            ) from error
        if not isinstance(values, Mapping) or not all(
            isinstance(key, str) and isinstance(value, Accumulator) for key, value in values.items()
        ):
            raise InvalidInput(
                f"the metric {name} returned {describe(values)}; it must return accumulators by "
                "column, such as {'mine/share': Mean.from_values(x, batch.mask, batch.prompt)}"
            )
    Monitor({**panel, **metrics}).measure(batch)


def describe(values: object) -> str:
    """Return the type of a value, and of the values of a mapping."""
    if not isinstance(values, Mapping):
        return f"a {type(values).__name__}"
    kinds = sorted({type(value).__name__ for value in values.values()})
    return f"a mapping to {', '.join(kinds)}"


def random_batch(k: int) -> ScoredRollouts:
    """Return a small scored batch with every field that batches of a run have."""
    generator = torch.Generator().manual_seed(0)
    rows, positions, vocabulary = 4, 3, max(8, k)
    logits = torch.randn(2, rows * positions, vocabulary, generator=generator)
    tokens = torch.randint(vocabulary, (rows, positions), generator=generator)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    scores = score_logits(
        tokens, mask, lambda i: (logits[0, i], logits[1, i]), vocabulary, k, 1 << 20
    )
    return ScoredRollouts(
        tokens=tokens * mask,
        mask=mask,
        sampler_logp=scores["student_logp"],
        prompt=torch.tensor([0, 0, 1, 1]),
        ended=torch.tensor([True, True, False, True]),
        reward=torch.tensor([0.0, 1.0, 1.0, 0.0]),
        **scores,
    )
