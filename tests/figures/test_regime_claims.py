"""Claims across regimes: where they hold, together, and what decides them."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.stats import gain_interval
from figures.claims.measures import verdict_equal, verdict_positive
from figures.claims.regime_measures import (
    higher_gain,
    nearest_to_paper,
    regimes_by_share,
    summarize_verdicts,
)
from tests.figures.in_memory_tables import InMemoryTables


def differences(mean: float, num_pairs: int = 5, num_problems: int = 200) -> pd.DataFrame:
    """Return (pairs, problems) differences of -1, 0 and 1 with this mean in every pair."""
    row = np.zeros(num_problems)
    row[: round(abs(mean) * num_problems)] = np.sign(mean)
    return pd.DataFrame([row] * num_pairs)


def test_a_claim_agrees_where_some_regime_does() -> None:
    result = summarize_verdicts(
        {"a": differences(0.2), "b": differences(-0.2), "c": differences(0.0)},
        verdict_positive,
        "b",
    )
    assert result.verdict == "agrees"
    assert result.measurement.startswith(
        "agrees in a +0.20; differs in b -0.20; undecided in c +0.00; b, nearest to the paper: "
        "-0.200 ["
    )


def test_a_claim_differs_only_where_no_regime_agrees() -> None:
    regimes = {"a": differences(-0.2), "b": differences(0.0)}
    assert summarize_verdicts(regimes, verdict_positive, "").verdict == "differs"
    assert summarize_verdicts({"b": differences(0.0)}, verdict_positive, "").verdict == "undecided"
    assert summarize_verdicts(regimes, verdict_equal, "").verdict == "agrees"
    assert summarize_verdicts({}, verdict_positive, "").verdict == "undecided"


def test_regimes_are_judged_together() -> None:
    # the interval of one regime excludes 0, that of one of twenty does not
    edge = differences(0.04)
    low, _ = gain_interval(edge.to_numpy())
    low_of_many, _ = gain_interval(edge.to_numpy(), comparisons=20)
    assert low > 0 > low_of_many
    assert summarize_verdicts({"a": edge}, verdict_positive, "").verdict == "agrees"
    regimes = {"a": edge, **{str(i): differences(0.0) for i in range(19)}}
    assert summarize_verdicts(regimes, verdict_positive, "").verdict == "undecided"


@pytest.fixture
def table() -> pd.DataFrame:
    records = [
        {"group": group, "family": family, "foreign_share": share, "method": method, "seed": pair}
        | {"step": step, "task": "", "outcomes": outcomes}
        for group, family, share, last, num_pairs in (
            ("density-5", "density", 0.1, "0000", 5),
            ("density-1", "density", 0.02, "1111", 5),
            ("ends-1", "ends", 0.01, "1111", 4),
            ("density-0", "density", 0.0, "1111", 5),
        )
        for pair in range(num_pairs)
        for method in ("sampled",)
        for step, outcomes in ((0, "0011" * 25), (4, last * 25))
    ]
    return pd.DataFrame(records)


def test_regimes_are_listed_by_foreign_tokens_and_need_five_pairs(table: pd.DataFrame) -> None:
    assert regimes_by_share(table) == ["density-0", "ends-1", "density-1", "density-5"]
    assert nearest_to_paper(table) == "density-1"
    result = higher_gain("sampled")(InMemoryTables(regimes=table))
    assert "agrees in density-0 +0.50, density-1 +0.50" in result.measurement
    assert "density-5 -0.50" in result.measurement
    assert "ends-1" not in result.measurement
    reverse = higher_gain("sampled", direction=-1)(InMemoryTables(regimes=table))
    assert "density-1 -0.50" in reverse.measurement
    nothing = higher_gain("lsm", "sampled")(InMemoryTables(regimes=table))
    assert nothing.verdict == "undecided"
    assert nothing.measurement == "no regime has 5 pairs of models with both methods"
