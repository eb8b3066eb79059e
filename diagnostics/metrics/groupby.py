"""Metrics of parts of a batch: by task, turn or reward, and without some token ids."""

from collections.abc import Callable, Collection, Mapping

import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Accumulator
from diagnostics.errors import InvalidInput

FIELDS = ("task", "turn", "prompt", "reward", "ended", "origin")
"""Fields of a batch by which responses can be grouped."""
Metric = Callable[[ScoredRollouts], dict[str, Accumulator]]


def by(metric: Metric, field: str, groups: Mapping[float, str]) -> Metric:
    """Compute a metric once for each group of responses, prefixing each name with the group's.

    `by(sign_shares, "task", {0: "math", 1: "code"})` gives "task=math/signal/negative_share";
    `by(repetition, "reward", {1: "right", 0: "wrong"})` splits by reward. Responses of no named
    group are left out. The groups are named in advance so that every micro-batch has the same
    accumulators, even one without a response of some group.

    Cost: selecting responses synchronises with the host once a group.

    Args:
        metric: Metric to compute.
        field: One of FIELDS, (B,) in the batch.
        groups: Value of the field to the group's name.

    Returns:
        A metric with names "FIELD=GROUP/NAME".

    Raises:
        InvalidInput: The field is not one of FIELDS.
    """
    if field not in FIELDS:
        raise InvalidInput(f"cannot group by {field!r}; choose one of {', '.join(FIELDS)}")

    def grouped_metric(batch: ScoredRollouts) -> dict[str, Accumulator]:
        accumulators: dict[str, Accumulator] = {}
        for value, label in groups.items():
            group_batch = batch.rows((getattr(batch, field) == value).nonzero()[:, 0])
            accumulators |= {
                f"{field}={label}/{name}": accumulator
                for name, accumulator in metric(group_batch).items()
            }
        return accumulators

    return grouped_metric


def without(metric: Metric, ids: Collection[int], name: str = "content") -> Metric:
    """Compute a metric without the tokens of some ids, for example special tokens.

    The tokens leave the mask only: they stay sampled tokens with their log-probabilities, and
    positions and prefixes do not change. So a metric over the sampled tokens
    (`divergence/outside_topk`, `consistency/z_H`, lengths) reads the same; a concentration without
    special tokens shows what those tokens hid (A-2).

    Args:
        metric: Metric to compute.
        ids: Token ids to leave out.
        name: Prefix of the names.

    Returns:
        A metric with names "name/NAME".
    """
    excluded_ids = sorted(ids)

    def filtered_metric(batch: ScoredRollouts) -> dict[str, Accumulator]:
        excluded = torch.tensor(excluded_ids, dtype=torch.long, device=batch.tokens.device)
        filtered_batch = batch.restrict_mask(~torch.isin(batch.tokens, excluded))
        return {f"{name}/{key}": accumulator for key, accumulator in metric(filtered_batch).items()}

    return filtered_metric
