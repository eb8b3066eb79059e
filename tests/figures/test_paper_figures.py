"""The paper's figures and tables: their statistics by hand, and their tables from run folders."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.records import rows
from figures import style
from figures.__main__ import by_line, portable, read, render
from figures.claims import claims, gallery, measures
from figures.collect import paired, steps
from figures.paper import comparison, gap, loop, scatter, segmentation
from figures.registry import DATA, PAPER, figure_module, made_by, recorded
from tests.figures.test_run_figures import everything
from tests.figures.test_run_figures import made as made

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
            about["problem_set"] = "p"
            rows.append(run / "evals.jsonl", about | {"outcomes": outcomes})
        found.append(run)
    return found


def test_run_folders_become_two_tables(runs: list[Path]) -> None:
    table = steps.steps(runs)
    assert set(table["group"]) == {"single"}
    assert len(table) == 5 * len(runs)  # four steps and the evaluation after them
    assert table["reward"].isna().all()
    accuracy = {
        (r.method, r.seed, r.step): r.accuracy
        for r in table.dropna(subset=["accuracy"]).itertuples()
    }
    assert accuracy == {
        (*cell, step): value
        for cell, last in OUTCOMES.items()
        for step, value in ((0, 0.0), (4, last.count("1") / 4))
    }
    assert table[table["step"] == 4]["grad_norm"].isna().all()
    evaluations = steps.evaluations(runs)
    final = paired.last(evaluations)
    assert len(final) == len(runs)
    got = {(r.method, r.seed): r.outcomes for r in final.itertuples()}
    assert got == OUTCOMES
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        steps.steps([runs[0].parent])


def test_runs_that_were_judged_on_other_problems_are_refused(
    runs: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "single" / "c-0"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"seed": 0}')
    row = {"step": 0, "accuracy": 1.0, "length": 1.0, "truncated": 0.0, "outcomes": "1"}
    rows.append(other / "evals.jsonl", row | {"problem_set": "q"})
    with pytest.raises(ValueError, match="judged on the problems q, others of single on p"):
        steps.evaluations([*runs, other])


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
    assert paired.sign_flip(values, np.random.default_rng(0)) == exact
    drawn = paired.sign_flip(values, np.random.default_rng(0), draws=31)
    assert drawn == pytest.approx(exact, abs=0.25)
    assert drawn * 32 == round(drawn * 32)  # 31 drawn patterns and the observed one
    assert paired.sign_flip(np.ones(5), np.random.default_rng(0)) == 2 / 2**5
    assert paired.sign_flip(np.zeros(4), np.random.default_rng(0)) == 1
    sure = paired.sign_flip(np.ones(60), np.random.default_rng(0))
    assert sure == pytest.approx(1e-4)


def test_holm_adjusts_step_by_step() -> None:
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert paired.holm([]) == []


def test_the_summary_holds_the_numbers(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "TABLES", {"t": ("T", "single", ("b", "a"))})
    table = steps.evaluations(runs)
    base, ours = comparison.summary(table).itertuples()
    values = np.array([[int(x) for x in OUTCOMES["b", seed]] for seed in range(3)], float)
    assert [base.accuracy, base.low, base.high] == [*paired.accuracy(values)]
    assert (base.method, base.seeds, base.before) == ("b", 3, 0.0)
    assert math.isnan(base.away)
    assert (ours.method, ours.seeds, ours.pairs, ours.accuracy) == ("a", 2, 2, 5 / 8)
    assert ours.away == 3 / 8  # seeds 0 and 1: (1 + 2) / 8
    assert ours.p_seeds == 2 / 2**2
    by_problem = np.array([0, 1, 0.5, 0])  # its mean over both seeds
    assert ours.p == paired.sign_flip(by_problem, np.random.default_rng(0)) == 0.5
    lines = comparison.markdown(table).splitlines()
    assert "Student before training: 0.000." in lines
    (line,) = [line for line in lines if line.startswith("| a |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == "2"
    assert cells[1].startswith("0.625 [")
    assert cells[2] == f"+0.375 [{ours.away_low:+.3f}, {ours.away_high:+.3f}]"
    assert cells[3:] == ["0.5", "0.5"]
    assert "(0.5 at most seeds)" in lines[0]


def test_holm_is_taken_within_a_table(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "TABLES", {"t": ("T", "single", ("a", "b", "c"))})
    table = steps.evaluations(runs)
    other = table[table["method"] == "b"].assign(method="c")
    found = comparison.summary(pd.concat([table, other]))["p"].tolist()
    assert found[1:] == [1.0, 1.0]  # twice 0.5


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
    from opd.lab.build import make_tokenizer

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
    assert measures.sign(0.1, 0.2) == measures.AGREES
    assert measures.sign(-0.2, -0.1) == measures.DIFFERS
    assert measures.sign(-0.1, 0.1) == measures.OPEN
    assert measures.likeness(-0.04, 0.04) == measures.AGREES
    assert measures.likeness(-0.04, 0.06) == measures.OPEN
    assert measures.likeness(0.06, 0.1) == measures.likeness(-0.1, -0.06) == measures.DIFFERS


class Given(measures.Tables):
    """Tables made by hand."""

    def __init__(self, **tables: pd.DataFrame) -> None:
        self._read = tables


def evaluated(**outcomes: tuple[str, str]) -> Given:
    """Five seeds of each method with outcomes before and after training."""
    cells = [
        {"group": "single", "method": m, "seed": s, "step": t, "task": None, "outcomes": o}
        for m, both in outcomes.items()
        for s in range(5)
        for t, o in zip((0, 9), both, strict=True)
    ]
    return Given(paper_evaluations=pd.DataFrame(cells))


@pytest.mark.parametrize(
    ("ours", "verdicts"),
    [
        ("1" * 200, (measures.AGREES, measures.DIFFERS)),
        ("0" * 200, (measures.DIFFERS, measures.DIFFERS)),
        ("10" * 100, (measures.OPEN, measures.AGREES)),
    ],
)
def test_better_alike_and_gain(ours: str, verdicts: tuple[str, str]) -> None:
    half = "10" * 100
    tables = evaluated(x=(half, ours), y=("0" * 200, half))
    assert measures.better("x", "y")(tables).verdict == verdicts[0]
    assert measures.alike("x", "y")(tables).verdict == verdicts[1]
    assert measures.gain("x", up=True)(tables).verdict == verdicts[0]
    opposite = {measures.AGREES: measures.DIFFERS, measures.DIFFERS: measures.AGREES}
    assert measures.gain("x", up=False)(tables).verdict == opposite.get(verdicts[0], measures.OPEN)


def stepped(columns: dict[str, dict[str, list[float]]]) -> Given:
    """Five seeds of each {method: {column: value a step}}, with 0.01 of the seed added."""
    table = [
        {"group": "single", "method": m, "seed": s, "step": t, "task": None}
        | {name: values[t] + 0.01 * s for name, values in mine.items()}
        for m, mine in columns.items()
        for s in range(5)
        for t in range(20)
    ]
    return Given(paper_steps=pd.DataFrame(table))


def test_smaller_looks_at_the_last_ten_steps_and_larger_at_all() -> None:
    early, late = [9.0] * 10 + [1.0] * 10, [0.0] * 10 + [2.0] * 10
    tables = stepped({"x": {"cut": early}, "y": {"cut": late}})
    found = measures.smaller("cut", "x", "y")(tables)
    assert found.verdict == measures.AGREES
    assert found.measured == "1.02 against 2.02: smaller by 1 [1, 1], 5 seeds"
    assert measures.smaller("cut", "y", "x")(tables).verdict == measures.DIFFERS
    found = measures.larger("cut", "x", "y")(tables)
    assert found.measured == "5.02 against 1.02: larger by 4 [4, 4], 5 seeds"
    assert found.verdict == measures.AGREES
    assert measures.larger("cut", "y", "x")(tables).verdict == measures.DIFFERS


def test_collapse_is_growth_of_entropy_and_a_score_that_vanishes() -> None:
    rising, falling = [1.0 + t for t in range(20)], [0.9 - 0.05 * t for t in range(20)]
    shrinking = [2.0 - 0.05 * t for t in range(20)]
    for entropy, reward, verdict in (
        (rising, falling, measures.AGREES),
        (shrinking, rising, measures.DIFFERS),
    ):
        tables = stepped({"lsm_unnormalised": {"entropy": entropy, "reward": reward}})
        table = tables["paper_steps"]
        tables["paper_steps"].loc[table["seed"] > 0, "reward"] = table["reward"]
        assert measures.explosion(tables).verdict == verdict
        assert measures.vanishing(tables).verdict == verdict
    ratios = [(20 + 0.01 * s) / (1 + 0.01 * s) for s in range(5)]
    tables = stepped({"lsm_unnormalised": {"entropy": rising, "reward": falling}})
    mean = math.exp(np.mean(np.log(ratios)))
    assert measures.explosion(tables).measured.startswith(f"entropy grows {mean:.3g} [")


def test_a_loop_goes_unpunished_where_its_tokens_cost_less() -> None:
    for inside, verdict in ((0.1, measures.AGREES), (0.5, measures.DIFFERS)):
        costs = {"repeated_cost": [inside] * 20, "regular_cost": [0.3] * 20}
        tables = stepped({"sampled": costs, "lsm": {}})
        assert measures.unpunished(tables).verdict == verdict


@pytest.mark.parametrize(
    ("end", "verdict"), [(-3.0, "agrees"), (-1.0, "undecided"), (0, "differs")]
)
def test_the_tail_widens_where_its_interval_falls(end: float, verdict: str) -> None:
    bins = [(0, -9.0), (16, -1.0), (32, -1.5), (48, end)]
    rows = [
        {"method": "x", "step": step, "first": first, "last": first + 15, "quantile": q}
        | {"value": value, "low": value - 0.2, "high": value + 0.2}
        for step in (0, 20)
        for q in (0.01, 0.5)
        for first, at in bins
        for value in [at if step == 20 and q == 0.01 else 5.0]
    ]
    tables = Given(gap=pd.DataFrame(rows))
    assert measures.widening("x")(tables).verdict == verdict


@pytest.mark.parametrize(
    ("path", "module"),
    [("docs/claims.md", claims), ("figures/shown/README.md", gallery)],
)
def test_what_is_written_of_the_tables_is_up_to_date(path: str, module: object) -> None:
    written = (DATA.parents[1] / path).read_text()
    command = f"opd figures {Path(module.__file__).stem} --out {Path(path).parent}"
    assert written == module.written(DATA), command


def test_the_tables_shown_are_up_to_date() -> None:
    table = read("comparison", recorded("comparison"))
    shown = DATA.parent / "shown" / "comparison.md"
    assert shown.read_text() == comparison.markdown(table), "opd figures comparison"


def test_every_claim_names_a_figure_that_exists() -> None:
    for claim in claims.CLAIMS:
        assert not claim.figure or (DATA.parent / "shown" / f"{claim.figure}.png").exists()
    texts = [claim.text for claim in claims.CLAIMS]
    assert len(set(texts)) == len(texts)


def test_records_name_no_place_of_their_machine(tmp_path: Path) -> None:
    run = tmp_path / "results" / "paper" / "single" / "a-0"
    config = {"teacher": f"{tmp_path}/lab/teacher", "tasks": [{"t": str(run.parent), "u": None}]}
    assert portable(config, run) == {"teacher": "lab/teacher", "tasks": [{"t": "."}]}
    about = {"command": ["a", "b"], "runs": {"x": {"k": [1, None]}, "y": {}}, "seconds": 1.5}
    assert json.loads(by_line(about)) == about
    for name in ("paper_steps", "paper_evaluations"):
        known = json.loads((DATA / f"{name}.json").read_text())
        paths = json.dumps([known["settings"], known["runs"]])
        assert '"/' not in paths
        assert len(known["runs"]) == 135


def test_commands_name_methods() -> None:
    update = made_by("gap", ["single/a_b-0", "single/a_b-1", "multi/c-0"])[1]
    assert "--run results/paper/single/a_b-* results/paper/multi/c-* --update-data" in update
    assert (
        "--run results/paper/single/* results/paper/multi/* "
        in made_by("dynamics", ["single/a-0"])[1]
    )
    assert made_by("toy") == ["opd study run toy --update-figures"]


@pytest.mark.parametrize("name", PAPER)
def test_every_figure_of_the_paper_has_a_caption_and_draws(name: str, tmp_path: Path) -> None:
    module = figure_module(name)
    if name != "toy":
        assert len(module.CAPTION) > 100
    made = render(name, read(name, recorded(name)), tmp_path)
    assert all(p.stat().st_size > 5000 for p in made if p.suffix in (".png", ".pdf"))
    assert style.WIDTH == 7.0
