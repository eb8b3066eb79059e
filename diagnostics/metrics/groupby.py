"""One metric for parts of a batch: by task, turn or outcome, and without some token ids."""

from collections.abc import Callable, Collection, Mapping

import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Accumulator
from diagnostics.errors import InvalidInput

FIELDS = ("task", "turn", "prompt", "reward", "ended")
Metric = Callable[[ScoredRollouts], dict[str, Accumulator]]


def by(metric: Metric, field: str, groups: Mapping[float, str]) -> Metric:
    """The metric once for each group of responses, each name headed by the group's.

    `by(sign_shares, "task", {0: "math", 1: "code"})` makes "task=math/signal/negative_share";
    `by(repetition, "reward", {1: "right", 0: "wrong"})` splits by outcome. Responses of no named
    group are left out. The groups are named beforehand so that every micro-batch has the same
    totals, also one that holds nobody of a group.

    Args:
      field: one of FIELDS, (B,) in the batch.
      groups: value of the field to the group's name.

    Cost: selecting responses syncs with the host once a group. Raises ValueError for another field.
    """
    if field not in FIELDS:
        raise InvalidInput(f"cannot group by {field!r}; there are {', '.join(FIELDS)}")

    def measured(batch: ScoredRollouts) -> dict[str, Accumulator]:
        found: dict[str, Accumulator] = {}
        for value, label in groups.items():
            some = batch.rows((getattr(batch, field) == value).nonzero()[:, 0])
            found |= {f"{field}={label}/{name}": x for name, x in metric(some).items()}
        return found

    return measured


def without(metric: Metric, ids: Collection[int], name: str = "content") -> Metric:
    """The metric without the tokens of some ids, special ones say; names are headed by "name/".

    The tokens leave the mask and nothing else: they stay sampled tokens, with their
    log-probabilities, and positions and prefixes stay what they were. So a metric of what was
    sampled (`divergence/outside_topk`, `consistency/z_H`, lengths) reads the same; a concentration without
    special tokens shows what those hid (A-2).
    """
    unwanted = sorted(ids)

    def measured(batch: ScoredRollouts) -> dict[str, Accumulator]:
        known = torch.tensor(unwanted, dtype=torch.long, device=batch.tokens.device)
        rest = batch.supervise(~torch.isin(batch.tokens, known))
        return {f"{name}/{key}": x for key, x in metric(rest).items()}

    return measured
