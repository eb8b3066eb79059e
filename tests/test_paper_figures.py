"""The paper's figures and tables: their statistics by hand, and their tables from run folders."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics import rows
from figures import claims, comparison, gap, loop, paired, scatter, segmentation, steps, style
from figures.__main__ import DATA, PAPER, read, render
from tests.test_instruments import everything
from tests.test_instruments import made as made

OUTCOMES = {
    ("a", 0): "1100",
    ("a", 1): "1101",
    ("b", 0): "1000",
    ("b", 1): "0001",
    ("b", 2): "1111",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run folders of two methods, evaluated twice; the second task of one has a name."""
    folder, found = tmp_path_factory.mktemp("paper") / "single", []
    for (method, seed), last in OUTCOMES.items():
        run = folder / f"{method}-{seed}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"seed": seed, "objective": method}))
        for step in range(4):
            rows.append(run / "rows.jsonl", {"step": step, "grad_norm": 10.0 ** (step - seed)})
        for step, outcomes in ((0, "0000"), (4, last)):
            share = sum(map(int, outcomes)) / 4
            about = {"step": step, "accuracy": share, "length": 3.0, "truncated": 0.25}
            rows.append(run / "evals.jsonl", about | {"outcomes": outcomes})
        found.append(run)
    return found


def test_run_folders_become_two_tables(runs: list[Path]) -> None:
    table = steps.steps(runs)
    assert set(table["group"]) == {"single"}
    assert len(table) == 4 * len(runs)
    assert table["reward"].isna().all()
    evaluations = steps.evaluations(runs)
    final = paired.last(evaluations)
    assert len(final) == len(runs)
    got = {(r.method, r.seed): r.outcomes for r in final.itertuples()}
    assert got == OUTCOMES
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        steps.steps([runs[0].parent])


def test_means_over_seeds_have_students_interval(runs: list[Path]) -> None:
    table = steps.steps(runs)
    mine = table[table["method"] == "b"]
    at = steps.over_seeds(mine, "grad_norm").set_index("step").loc[2]
    values = [10.0 ** (2 - seed) for seed in range(3)]
    half = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)
    assert at["value"] == pytest.approx(np.mean(values))
    assert [at["low"], at["high"]] == pytest.approx([at["value"] - half, at["value"] + half])
    log = steps.over_seeds(mine, "grad_norm", log=True).set_index("step").loc[2]
    assert log["value"] == pytest.approx(10.0)
    assert log["high"] == pytest.approx(10 * math.exp(4.302653 * math.log(10) / math.sqrt(3)))
    cut = mine[~((mine["seed"] == 1) & (mine["step"] == 3))]
    assert steps.over_seeds(cut, "grad_norm")["step"].tolist() == [0, 1, 2]
    assert math.isnan(steps.over_seeds(mine[mine["seed"] == 0], "grad_norm")["low"][0])


def test_differences_are_paired_by_seed_and_problem(runs: list[Path]) -> None:
    final = paired.last(steps.evaluations(runs))
    ours, theirs = (paired.outcomes(final, method) for method in "ab")
    away = paired.difference(ours, theirs)
    by_hand = [
        int(x) - int(y)
        for seed in (0, 1)
        for x, y in zip(OUTCOMES["a", seed], OUTCOMES["b", seed], strict=True)
    ]
    assert away["value"] == pytest.approx(np.mean(by_hand))
    assert away["seeds"] == 2
    assert away["low"] <= away["value"] <= away["high"]
    back = paired.difference(theirs, ours)
    assert back["value"] == -away["value"]


def test_the_sign_flip_test_counts_patterns() -> None:
    values = np.array([0.5, -0.25, 1.0, 0.75, 0.1])
    exact = np.mean(
        [
            abs(np.dot(s, values)) >= abs(values.sum()) - 1e-12
            for s in itertools.product((1, -1), repeat=5)
        ]
    )
    p = paired.sign_flip(values, np.random.default_rng(0), draws=40_000)
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact / 40_000))
    assert paired.sign_flip(np.zeros(4), np.random.default_rng(0)) == 1
    sure = paired.sign_flip(np.ones(60), np.random.default_rng(0))
    assert sure == pytest.approx(1e-4)


def test_holm_adjusts_step_by_step() -> None:
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert paired.holm([]) == []


def test_the_markdown_table_holds_the_numbers(runs: list[Path]) -> None:
    table = steps.evaluations(runs)
    text = comparison.one_table("T", "", table.fillna({"task": ""}), ("a", "b"))
    lines = text.splitlines()
    assert "Student before training: 0.000." in lines
    values = np.array([[int(x) for x in OUTCOMES["b", seed]] for seed in range(3)], float)
    cell = "{:.3f} [{:.3f}, {:.3f}]".format(*paired.accuracy(values))
    (line,) = [line for line in lines if line.startswith("| b |")]
    assert f"| 3 | {cell} |" in line
    assert "-0.375" in line  # seeds 0 and 1 of b minus a: (-1 - 2) / 8


def test_the_scatters_shares_are_counts(made: list[Path]) -> None:
    table = scatter.collect(made[:2]).set_index("kind")
    tokens = everything(made[:2], 0)
    below = np.mean([x["cost"] > 0 for x in tokens])
    assert table.loc["below the line", "share"] == pytest.approx(below, rel=1e-3)
    up = np.array([max(-x["cost"], 0) for x in tokens])
    largest = up >= np.quantile(up, 0.99)
    top = table.loc["top 1 %, of the upward signal", "share"]
    assert top == pytest.approx(up[largest].sum() / up.sum(), rel=1e-3)
    signal = np.array([abs(x["cost"]) for x in tokens])
    bad = np.array([x["impossible"] for x in tokens])
    part = table.loc["impossible, of the signal", "share"]
    assert part == pytest.approx((signal * bad).sum() / signal.sum(), rel=1e-3, abs=1e-6)
    points = table[table["share"].isna()]
    assert len(points) == min(len(tokens), scatter.SHOWN)
    kinds = {"repeated" if x["repeated"] and not x["impossible"] else "" for x in tokens}
    assert ("repeated" in points.index) == ("repeated" in kinds)


def test_the_gaps_quantiles_are_those_of_plain_tokens(
    made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gap, "FEWEST", 20)
    monkeypatch.setattr(gap, "plain", lambda data, run: data)
    table = gap.collect(made[:2])
    assert set(table["step"]) == {0, 3}
    for (first, last), some in table[table["step"] == 3].groupby(["first", "last"]):
        signal = [-x["cost"] for x in everything(made[:2], 3) if first <= x["position"] <= last]
        for row in some.itertuples():
            assert row.tokens == len(signal)
            assert row.value == pytest.approx(np.quantile(signal, row.quantile), rel=1e-4)
            if row.quantile == 0.01:
                assert row.low <= row.value <= row.high


def test_special_tokens_and_spelled_tags_are_not_plain(made: list[Path]) -> None:
    from opd.lab import make_tokenizer

    tokenizer = make_tokenizer()
    ids = tokenizer.encode("<think>7 2</think>9<|im_end|>") + tokenizer.encode("<") + [200]
    data = gap.plain(pd.DataFrame({"id": ids}), made[0])
    assert [tokenizer.decode([i]) for i in data["id"][:4]] == ["7", " ", "2", "9"]
    assert 200 in data["id"].tolist()


def test_the_loop_is_the_response_that_repeats_most(made: list[Path]) -> None:
    table = loop.collect(made[:2])
    most = 0
    for step in (0, 3):
        counts: dict[tuple[int, int, int], int] = {}
        for x in everything(made[:2], step):
            counts[x["cluster"]] = counts.get(x["cluster"], 0) + x["repeated"]
        most = max(most, *counts.values())
    assert int(table["repeated"].sum()) <= most
    assert len(set(table["step"])) == 1
    assert table["position"].is_monotonic_increasing


def test_a_run_without_spelled_tags_has_no_segmentation_to_show(made: list[Path]) -> None:
    with pytest.raises(ValueError, match="no response with spelled tags"):
        segmentation.collect(made[:1])


def test_verdicts_go_by_intervals() -> None:
    assert claims.sign(0.1, 0.2) == claims.AGREES
    assert claims.sign(-0.2, -0.1) == claims.DIFFERS
    assert claims.sign(-0.1, 0.1) == claims.OPEN


class Given(claims.Tables):
    """Tables made by hand."""

    def __init__(self, **tables: pd.DataFrame) -> None:
        self._read = tables


@pytest.mark.parametrize(
    ("ours", "verdicts"),
    [
        ("1" * 200, (claims.AGREES, claims.DIFFERS)),
        ("0" * 200, (claims.DIFFERS, claims.DIFFERS)),
        ("10" * 100, (claims.OPEN, claims.AGREES)),
    ],
)
def test_better_and_alike(ours: str, verdicts: tuple[str, str]) -> None:
    half = "10" * 100
    table = pd.DataFrame(
        [
            {"group": "single", "method": m, "seed": s, "step": 9, "task": "", "outcomes": o}
            for m, o in (("x", ours), ("y", half))
            for s in range(5)
        ]
    )
    tables = Given(paper_evaluations=table)
    assert claims.better("x", "y")(tables).verdict == verdicts[0]
    assert claims.alike("x", "y")(tables).verdict == verdicts[1]


def test_smaller_looks_at_the_last_ten_steps() -> None:
    table = pd.DataFrame(
        [
            {"group": "single", "method": m, "seed": s, "step": t, "cut": level + 0.01 * s}
            for m, early, late in (("x", 9.0, 1.0), ("y", 0.0, 2.0))
            for s in range(5)
            for t in range(20)
            for level in [late if t >= 10 else early]
        ]
    )
    tables = Given(paper_steps=table)
    found = claims.smaller("cut", "x", "y")(tables)
    assert found.verdict == claims.AGREES
    assert "smaller by 1 [1, 1]" in found.measured
    assert claims.smaller("cut", "y", "x")(tables).verdict == claims.DIFFERS


def test_the_recorded_claims_are_up_to_date() -> None:
    written = (DATA.parents[1] / "docs" / "claims.md").read_text()
    assert written == claims.written(DATA), "opd figures claims --out docs"


@pytest.mark.parametrize("name", PAPER)
def test_every_figure_of_the_paper_has_a_caption_and_draws(name: str, tmp_path: Path) -> None:
    from importlib import import_module

    from figures.__main__ import recorded

    module = import_module(f"figures.{name}")
    if name != "toy":
        assert len(module.CAPTION) > 100
    made = render(name, read(name, recorded(name)), tmp_path)
    assert all(path.stat().st_size > 5000 for path in made)
    assert style.WIDTH == 7.0
