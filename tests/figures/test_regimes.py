"""The map of methods: gains in a regime by plain numbers, and what its figures draw."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.errors import InvalidInput
from diagnostics.stats import gain_interval
from figures import style
from figures.collect.regimes import (
    gains,
    paired_gains,
    regimes_of,
    regimes_table,
    summarize_regimes,
)
from figures.regimes import (
    dose,
    mask_gain,
    regime_curves,
    regime_gains,
    regime_map,
    support_variants,
)
from tests.helpers.records.written_runs import write_run

SHARES = {"density-0": 0.0, "density-1": 0.02, "density-8": 0.15}
OUTCOMES = {
    ("density-0", "sampled", 0): {0: "0001", 2: "0111"},
    ("density-0", "sampled", 1): {0: "0011", 2: "1111"},
    ("density-0", "sampled_mask", 0): {0: "0001", 2: "0111"},
    ("density-8", "sampled", 0): {0: "1001", 1: "1000", 2: "0000"},
    ("density-8", "sampled", 1): {0: "0011", 1: "0001", 2: "0001"},
    ("density-8", "sampled_mask", 0): {0: "1001", 1: "1001", 2: "1101"},
    ("density-8", "sampled_mask", 1): {0: "0011", 1: "0011", 2: "0011"},
    ("density-8", "lsm", 1): {0: "0011", 1: "0111", 2: "0111"},
    ("density-8", "v2_student_and_sampled", 1): {0: "0011", 1: "0011", 2: "0001"},
    ("density-1", "sampled", 0): {0: "0001", 2: "0011"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("map")
    folders = []
    for (regime, method, pair), outcomes in OUTCOMES.items():
        models = root / "pairs" / f"{regime}-{pair}"
        models.mkdir(parents=True, exist_ok=True)
        knobs = {"foreign_tags": 100 * SHARES[regime], "tag_log_probability": -12.0}
        # mean cost of three tags and one end: 11 + pair
        tags = {"cost": {"mean": 10.0 + pair, "count": 3}}
        ends = {"cost": {"mean": 14.0 + pair, "count": 1}}
        facts = {
            "foreign": {"token_share": SHARES[regime], "tags": tags, "ends": ends},
            "rollouts": {"divergence/reverse_kl": 0.5},
            "accuracy": {"teacher": {"accuracy": 0.9}},
        }
        (models / "pair.json").write_text(json.dumps({"knobs": knobs, "facts": facts}))
        folder = root / "runs" / regime / f"{method}-{pair}"
        student = str(models / "student")
        folders.append(write_run(folder, outcomes, seed=pair, seconds=1.0, student=student))
    return folders


@pytest.fixture(scope="module")
def table(runs: list[Path]) -> pd.DataFrame:
    return regimes_table(runs)


def test_every_run_has_the_columns_of_its_own_pair(table: pd.DataFrame) -> None:
    for row in table.itertuples():
        assert row.family == "density"
        assert row.foreign_share == SHARES[row.group]
        assert row.foreign_gap == 11.0 + row.seed
        assert row.foreign_tags == 100 * SHARES[row.group]
    assert len(table) == sum(map(len, OUTCOMES.values()))


def test_a_gain_is_the_last_outcome_minus_the_first_of_the_same_problem(
    table: pd.DataFrame,
) -> None:
    expected = [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert gains(table, "density-0", "sampled").to_numpy().tolist() == expected
    row = summarize_regimes(table, ["density-0"], ["sampled"]).iloc[0]
    assert row["value"] == pytest.approx(0.5)
    assert (row["low"], row["high"]) == pytest.approx(gain_interval(np.array(expected)))
    assert (row["start"], row["final"]) == pytest.approx((3 / 8, 7 / 8))


def test_differences_are_paired_by_pair_of_models_and_problem(table: pd.DataFrame) -> None:
    masked, plain = (gains(table, "density-8", x) for x in ("sampled_mask", "sampled"))
    differences = paired_gains(masked, plain)
    # gains of the mask: 0100 and 0000; without: -1 00 -1 and 00 -1 0
    assert differences.to_numpy().tolist() == [[1, 1, 0, 1], [0, 0, 1, 0]]
    # only pair 0 has both in density-0
    row = summarize_regimes(table, ["density-0"], ["sampled_mask"], "sampled").iloc[0]
    assert (row["pairs"], row["value"]) == (1, 0.0)
    absent, plain = (gains(table, "density-1", x) for x in ("lsm", "sampled"))
    assert paired_gains(absent, plain).empty


def test_collapses_are_counted(table: pd.DataFrame) -> None:
    rows = summarize_regimes(table, ["density-8"], ["sampled", "sampled_mask"])
    # pair 0 falls from 2 to 1 (half is no collapse) and then to 0; pair 1 from 2 to 1
    assert rows["collapsed"].tolist() == [1, 0]


def test_regimes_are_ordered_by_their_tags(table: pd.DataFrame) -> None:
    assert regimes_of(table, "density") == ["density-0", "density-1", "density-8"]
    assert regimes_of(table, "length") == []


def test_the_dose_is_drawn_at_the_measured_share(table: pd.DataFrame) -> None:
    with style.style_context():
        axes = dose.draw(table).axes[0]
    line = axes.containers[0].lines[0]
    assert axes.containers[0].get_label() == "sampled token"
    assert line.get_xdata().tolist() == [0.0, 0.02, 0.15]
    assert line.get_ydata().tolist() == pytest.approx([0.5, 0.25, -0.375])
    text = dose.markdown(dose.summary(table))
    assert "| density-8 | 15.00% | 11.5 | 0.500 | 0.900 | -0.375 [" in text
    assert "(1 of 2)" in text


def test_the_worth_of_a_mask_and_of_variants(table: pd.DataFrame) -> None:
    with style.style_context():
        with pytest.raises(InvalidInput, match="lsm_mask"):
            mask_gain.draw(table)
        variants = support_variants.draw(table).axes[0]
    (container,) = variants.containers
    assert container.lines[0].get_ydata().tolist() == [pytest.approx(-0.5)]


def test_gains_are_drawn_where_a_regime_has_five_pairs(table: pd.DataFrame) -> None:
    second = table[(table["group"] == "density-8") & (table["seed"] == 1)]
    copies = [second.assign(seed=seed) for seed in (2, 3, 4)]
    other = pd.concat([second, *copies, second.assign(seed=0)]).assign(
        group="teacher-terse", family="teacher", teacher_accuracy=0.2
    )
    with style.style_context():
        ax = regime_gains.draw(pd.concat([table, *copies, other])).axes[0]
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["density-8", "teacher is terse"], "regimes of the density come first"
    sampled = ax.containers[2]
    # pair 0 loses both of its two solved problems of four, the others one of two
    assert sampled.lines[0].get_xdata().tolist() == pytest.approx([-0.3, -0.25])
    assert sampled.get_label() == "sampled token"
    leads = [bar.get_width() for group in ax.containers[:2] for bar in group]
    assert leads == pytest.approx([0.9 - 0.5, 0.2 - 0.5])
    separators = [line for line in ax.lines if list(line.get_ydata()) == [-0.5, -0.5]]
    assert len(separators) == 1, "a line below the last regime of the density"
    with style.style_context(), pytest.raises(InvalidInput, match="at least 5 pairs"):
        regime_gains.draw(table)


def test_the_map_shows_every_regime_with_foreign_tokens(table: pd.DataFrame) -> None:
    with style.style_context():
        figure = regime_map.draw(table)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    texts = [text.get_text() for text in panels["sampled token"].texts]
    assert texts == ["+.25", "-.38"]
    assert [text.get_text() for text in panels["sampled token, mask"].texts] == ["+.12"]


def test_curves_are_those_of_the_sparsest_and_the_densest(table: pd.DataFrame) -> None:
    with style.style_context():
        axes = regime_curves.draw(table).axes
    titles = [panel.get_title(loc="left") for panel in axes]
    assert titles == ["2.00% foreign tokens", "15.00% foreign tokens"]
    lines = {line.get_label(): line for line in axes[1].lines}
    assert lines["sampled token"].get_ydata().tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert axes[1].lines[-1].get_ydata()[0] == pytest.approx(0.9)


def test_a_run_of_another_pair_of_models_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "density-1" / "sampled-0", {0: "01", 1: "11"}, seed=0, seconds=1.0)
    with pytest.raises(InvalidInput, match=r"sampled-0: its student .* of `opd lab --family`"):
        regimes_table([run])
