"""The paper's figures and tables: statistics against hand-computed values, and collection."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.records import rows
from figures import style
from figures.__main__ import format_json, load_figure_table, make_portable
from figures.claims import claims, failure_measures, gallery, measures
from figures.collect import paired, steps
from figures.paper import comparison, gap, loop, scatter, segmentation
from figures.registry import DATA, PAPER_FIGURES, commands_for_table, figure_module, table_path
from tests.figures.in_memory_tables import InMemoryTables
from tests.helpers.records.saved_runs import expected_tokens

OUTCOMES = {
    ("a", 0): "1100",
    ("a", 1): "1101",
    ("b", 0): "1000",
    ("b", 1): "0001",
    ("b", 2): "1111",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write run folders of two methods, evaluated twice."""
    folder, run_folders = tmp_path_factory.mktemp("paper") / "single", []
    for (method, seed), last in OUTCOMES.items():
        run = folder / f"{method}-{seed}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"seed": seed, "objective": method}))
        for step in range(4):
            rows.append_row(run / "rows.jsonl", {"step": step, "grad_norm": 10.0 ** (step - seed)})
        for step, outcomes in ((0, "0000"), (4, last)):
            share = sum(map(int, outcomes)) / 4
            evaluation = {"step": step, "accuracy": share, "length": 3.0, "truncated": 0.25}
            evaluation["problem_set"] = "p"
            rows.append_row(run / "evals.jsonl", evaluation | {"outcomes": outcomes})
        run_folders.append(run)
    return run_folders


def test_run_folders_become_two_tables(runs: list[Path]) -> None:
    table = steps.steps_table(runs)
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
    evaluations = steps.evaluations_table(runs)
    final = paired.last_evaluations(evaluations)
    assert len(final) == len(runs)
    outcomes_by_run = {(r.method, r.seed): r.outcomes for r in final.itertuples()}
    assert outcomes_by_run == OUTCOMES
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor rows\.jsonl"):
        steps.steps_table([runs[0].parent])


def test_runs_that_were_judged_on_other_problems_are_refused(
    runs: list[Path], tmp_path: Path
) -> None:
    other_run = tmp_path / "single" / "c-0"
    other_run.mkdir(parents=True)
    (other_run / "config.json").write_text('{"seed": 0}')
    row = {"step": 0, "accuracy": 1.0, "length": 1.0, "truncated": 0.0, "outcomes": "1"}
    rows.append_row(other_run / "evals.jsonl", row | {"problem_set": "q"})
    with pytest.raises(ValueError, match="evaluated on the problems q, others of single on p"):
        steps.evaluations_table([*runs, other_run])


def test_means_over_seeds_have_students_interval(runs: list[Path]) -> None:
    table = steps.steps_table(runs)
    method_rows = table[table["method"] == "b"]
    interval = steps.seed_means(method_rows, "grad_norm").set_index("step").loc[2]
    values = [10.0 ** (2 - seed) for seed in range(3)]
    half = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)
    assert interval["value"] == pytest.approx(np.mean(values))
    assert [interval["low"], interval["high"]] == pytest.approx(
        [interval["value"] - half, interval["value"] + half]
    )
    geometric = steps.seed_means(method_rows, "grad_norm", log=True).set_index("step").loc[2]
    assert geometric["value"] == pytest.approx(10.0)
    assert geometric["high"] == pytest.approx(10 * math.exp(4.302653 * math.log(10) / math.sqrt(3)))
    incomplete = method_rows[~((method_rows["seed"] == 1) & (method_rows["step"] == 3))]
    assert steps.seed_means(incomplete, "grad_norm")["step"].tolist() == [0, 1, 2]
    assert math.isnan(
        steps.seed_means(method_rows[method_rows["seed"] == 0], "grad_norm")["low"][0]
    )


def test_differences_are_paired_by_seed_and_problem(runs: list[Path]) -> None:
    final = paired.last_evaluations(steps.evaluations_table(runs))
    outcomes, baseline_outcomes = (paired.outcome_matrix(final, method) for method in "ab")
    gain = paired.paired_difference(outcomes, baseline_outcomes)
    expected = [
        int(x) - int(y)
        for seed in (0, 1)
        for x, y in zip(OUTCOMES["a", seed], OUTCOMES["b", seed], strict=True)
    ]
    assert gain["value"] == pytest.approx(np.mean(expected))
    assert gain["seeds"] == 2
    assert gain["low"] <= gain["value"] <= gain["high"]
    reverse = paired.paired_difference(baseline_outcomes, outcomes)
    assert reverse["value"] == -gain["value"]


def test_the_sign_flip_test_counts_patterns() -> None:
    values = np.array([0.5, -0.25, 1.0, 0.75, 0.1])
    exact = np.mean(
        [
            abs(np.dot(s, values)) >= abs(values.sum()) - 1e-12
            for s in itertools.product((1, -1), repeat=5)
        ]
    )
    assert paired.sign_flip_test(values, np.random.default_rng(0)) == exact
    sampled = paired.sign_flip_test(values, np.random.default_rng(0), num_draws=31)
    assert sampled == pytest.approx(exact, abs=0.25)
    assert sampled * 32 == round(sampled * 32)  # 31 drawn patterns and the observed one
    assert paired.sign_flip_test(np.ones(5), np.random.default_rng(0)) == 2 / 2**5
    assert paired.sign_flip_test(np.zeros(4), np.random.default_rng(0)) == 1
    certain = paired.sign_flip_test(np.ones(60), np.random.default_rng(0))
    assert certain == pytest.approx(1e-4)


def test_holm_adjusts_step_by_step() -> None:
    assert paired.holm_adjust([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm_adjust([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert paired.holm_adjust([]) == []


def test_the_summary_holds_the_numbers(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        comparison, "TABLES", {"t": comparison.PaperTable("T", "single", ("b", "a"))}
    )
    table = steps.evaluations_table(runs)
    base, result = comparison.summary(table).itertuples()
    values = np.array([[int(x) for x in OUTCOMES["b", seed]] for seed in range(3)], float)
    assert [base.accuracy, base.low, base.high] == [*paired.accuracy_interval(values)]
    assert (base.method, base.seeds, base.before) == ("b", 3, 0.0)
    assert math.isnan(base.away)
    assert (result.method, result.seeds, result.pairs, result.accuracy) == ("a", 2, 2, 5 / 8)
    assert result.away == 3 / 8  # seeds 0 and 1: (1 + 2) / 8
    assert result.p_seeds == 2 / 2**2
    by_problem = np.array([0, 1, 0.5, 0])  # mean over both seeds
    assert result.p == paired.sign_flip_test(by_problem, np.random.default_rng(0)) == 0.5
    lines = comparison.markdown(comparison.summary(table)).splitlines()
    assert "Student before training: 0.000." in lines
    (line,) = [line for line in lines if line.startswith("| a |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == "2"
    assert cells[1].startswith("0.625 [")
    assert cells[2] == f"+0.375 [{result.away_low:+.3f}, {result.away_high:+.3f}]"
    assert cells[3:] == ["0.5", "0.5"]
    assert "(0.5 with the most seeds)" in lines[0]


def test_holm_is_taken_within_a_table(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        comparison, "TABLES", {"t": comparison.PaperTable("T", "single", ("a", "b", "c"))}
    )
    table = steps.evaluations_table(runs)
    third_method = table[table["method"] == "b"].assign(method="c")
    p_values = comparison.summary(pd.concat([table, third_method]))["p"].tolist()
    assert p_values[1:] == [1.0, 1.0]  # twice 0.5


def test_the_scatters_shares_are_counts(saved_runs: list[Path]) -> None:
    table = scatter.collect(saved_runs[:2]).set_index("kind")
    tokens = expected_tokens(saved_runs[:2], 0)
    below_line = np.mean([x["cost"] > 0 for x in tokens])
    assert table.loc["below the line", "share"] == pytest.approx(below_line, rel=1e-3)
    upward_signal = np.array([max(-x["cost"], 0) for x in tokens])
    largest = upward_signal >= np.quantile(upward_signal, 0.99)
    top_share = table.loc["top 1 %, of the upward signal", "share"]
    assert top_share == pytest.approx(upward_signal[largest].sum() / upward_signal.sum(), rel=1e-3)
    signal = np.array([abs(x["cost"]) for x in tokens])
    bad = np.array([x["impossible"] for x in tokens])
    part = table.loc["impossible, of the signal", "share"]
    assert part == pytest.approx((signal * bad).sum() / signal.sum(), rel=1e-3, abs=1e-6)
    points = table[table["share"].isna()]
    assert len(points) == min(len(tokens), scatter.NUM_POINTS)
    kinds = {"repeated" if x["repeated"] and not x["impossible"] else "" for x in tokens}
    assert ("repeated" in points.index) == ("repeated" in kinds)


def test_the_gaps_quantiles_are_those_of_plain_tokens(
    saved_runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gap, "MIN_TOKENS", 20)
    monkeypatch.setattr(gap, "without_special_tokens", lambda data, run: data)
    table = gap.collect(saved_runs[:2])
    assert set(table["step"]) == {0, 3}
    for (first, last), bin_rows in table[table["step"] == 3].groupby(["first", "last"]):
        signal = [
            -x["cost"] for x in expected_tokens(saved_runs[:2], 3) if first <= x["position"] <= last
        ]
        for row in bin_rows.itertuples():
            assert row.tokens == len(signal)
            assert row.value == pytest.approx(np.quantile(signal, row.quantile), rel=1e-4)
            if row.quantile == 0.01:
                assert row.low <= row.value <= row.high


def test_special_tokens_and_spelled_tags_are_not_plain(saved_runs: list[Path]) -> None:
    from opd.lab.build import make_tokenizer

    tokenizer = make_tokenizer()
    ids = tokenizer.encode("<think>7 2</think>9<|im_end|>") + tokenizer.encode("<") + [200]
    data = gap.without_special_tokens(pd.DataFrame({"id": ids}), saved_runs[0])
    assert [tokenizer.decode([i]) for i in data["id"][:4]] == ["7", " ", "2", "9"]
    assert 200 in data["id"].tolist()


def test_the_loop_is_the_response_that_repeats_most(saved_runs: list[Path]) -> None:
    table = loop.collect(saved_runs[:2])
    num_repeated = 0
    for step in (0, 3):
        counts: dict[tuple[int, int, int], int] = {}
        for x in expected_tokens(saved_runs[:2], step):
            counts[x["cluster"]] = counts.get(x["cluster"], 0) + x["repeated"]
        num_repeated = max(num_repeated, *counts.values())
    assert int(table["repeated"].sum()) <= num_repeated
    assert len(set(table["step"])) == 1
    assert table["position"].is_monotonic_increasing


def test_a_run_without_spelled_tags_has_no_segmentation_to_show(saved_runs: list[Path]) -> None:
    with pytest.raises(ValueError, match="no response that spells both tags"):
        segmentation.collect(saved_runs[:1])


def test_verdicts_go_by_intervals() -> None:
    assert measures.verdict_positive(0.1, 0.2) == measures.AGREES
    assert measures.verdict_positive(-0.2, -0.1) == measures.DIFFERS
    assert measures.verdict_positive(-0.1, 0.1) == measures.UNDECIDED
    assert measures.verdict_equal(-0.04, 0.04) == measures.AGREES
    assert measures.verdict_equal(-0.04, 0.06) == measures.UNDECIDED
    assert (
        measures.verdict_equal(0.06, 0.1) == measures.verdict_equal(-0.1, -0.06) == measures.DIFFERS
    )


def evaluation_tables(**outcomes: tuple[str, str]) -> InMemoryTables:
    """Return five seeds of each method with outcomes before and after training."""
    cells = [
        {"group": "single", "method": m, "seed": s, "step": t, "task": None, "outcomes": o}
        for m, digits in outcomes.items()
        for s in range(5)
        for t, o in zip((0, 9), digits, strict=True)
    ]
    return InMemoryTables(paper_evaluations=pd.DataFrame(cells))


@pytest.mark.parametrize(
    ("outcomes", "verdicts"),
    [
        ("1" * 200, (measures.AGREES, measures.DIFFERS)),
        ("0" * 200, (measures.DIFFERS, measures.DIFFERS)),
        ("10" * 100, (measures.UNDECIDED, measures.AGREES)),
    ],
)
def test_better_alike_and_gain(outcomes: str, verdicts: tuple[str, str]) -> None:
    half_right = "10" * 100
    tables = evaluation_tables(x=(half_right, outcomes), y=("0" * 200, half_right))
    assert measures.higher_accuracy("x", "y")(tables).verdict == verdicts[0]
    assert measures.equal_accuracy("x", "y")(tables).verdict == verdicts[1]
    assert measures.accuracy_change("x", improves=True)(tables).verdict == verdicts[0]
    opposite = {measures.AGREES: measures.DIFFERS, measures.DIFFERS: measures.AGREES}
    assert measures.accuracy_change("x", improves=False)(tables).verdict == opposite.get(
        verdicts[0], measures.UNDECIDED
    )


def step_tables(columns: dict[str, dict[str, list[float]]]) -> InMemoryTables:
    """Return five seeds of each {method: {column: value a step}}, with 0.01 * seed added."""
    table = [
        {"group": "single", "method": m, "seed": s, "step": t, "task": None}
        | {name: column_values[t] + 0.01 * s for name, column_values in values_by_column.items()}
        for m, values_by_column in columns.items()
        for s in range(5)
        for t in range(20)
    ]
    return InMemoryTables(paper_steps=pd.DataFrame(table))


def test_smaller_looks_at_the_last_ten_steps_and_larger_at_all() -> None:
    early, late = [9.0] * 10 + [1.0] * 10, [0.0] * 10 + [2.0] * 10
    tables = step_tables({"x": {"cut": early}, "y": {"cut": late}})
    result = measures.smaller_mean("cut", "x", "y")(tables)
    assert result.verdict == measures.AGREES
    assert result.measurement == "1.02 against 2.02: smaller by 1 [1, 1], 5 seeds"
    assert measures.smaller_mean("cut", "y", "x")(tables).verdict == measures.DIFFERS
    result = measures.larger_mean("cut", "x", "y")(tables)
    assert result.measurement == "5.02 against 1.02: larger by 4 [4, 4], 5 seeds"
    assert result.verdict == measures.AGREES
    assert measures.larger_mean("cut", "y", "x")(tables).verdict == measures.DIFFERS


def test_collapse_is_growth_of_entropy_and_a_score_that_vanishes() -> None:
    rising, falling = [1.0 + t for t in range(20)], [0.9 - 0.05 * t for t in range(20)]
    shrinking = [2.0 - 0.05 * t for t in range(20)]
    for entropy, reward, verdict in (
        (rising, falling, measures.AGREES),
        (shrinking, rising, measures.DIFFERS),
    ):
        tables = step_tables({"lsm_unnormalised": {"entropy": entropy, "reward": reward}})
        table = tables["paper_steps"]
        tables["paper_steps"].loc[table["seed"] > 0, "reward"] = table["reward"]
        assert failure_measures.entropy_grows(tables).verdict == verdict
        assert failure_measures.score_vanishes(tables).verdict == verdict
    ratios = [(20 + 0.01 * s) / (1 + 0.01 * s) for s in range(5)]
    tables = step_tables({"lsm_unnormalised": {"entropy": rising, "reward": falling}})
    mean = math.exp(np.mean(np.log(ratios)))
    assert failure_measures.entropy_grows(tables).measurement.startswith(
        f"entropy grows {mean:.3g} ["
    )


def test_a_loop_goes_unpunished_where_its_tokens_cost_less() -> None:
    for inside, verdict in ((0.1, measures.AGREES), (0.5, measures.DIFFERS)):
        costs = {"repeated_cost": [inside] * 20, "regular_cost": [0.3] * 20}
        tables = step_tables({"sampled": costs, "lsm": {}})
        assert failure_measures.repeated_tokens_cost_less(tables).verdict == verdict


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
        for first, last_value in bins
        for value in [last_value if step == 20 and q == 0.01 else 5.0]
    ]
    tables = InMemoryTables(gap=pd.DataFrame(rows))
    assert failure_measures.gap_tail_widens("x")(tables).verdict == verdict


@pytest.mark.parametrize(
    ("path", "module"),
    [("docs/claims.md", claims), ("figures/shown/README.md", gallery)],
)
def test_what_is_written_of_the_tables_is_up_to_date(path: str, module: object) -> None:
    text = (DATA.parents[1] / path).read_text()
    command = f"opd figures {Path(module.__file__).stem} --out {Path(path).parent}"
    assert text == module.render_markdown(DATA), command


@pytest.mark.parametrize("name", ["comparison", "views", "controls"])
def test_the_tables_shown_are_up_to_date(name: str) -> None:
    module, path = figure_module(name), DATA.parent / "shown" / f"{name}.md"
    table = load_figure_table(name, table_path(name))
    assert path.read_text() == module.markdown(module.summary(table)), f"opd figures {name}"


def test_every_claim_names_a_figure_that_exists() -> None:
    for claim in claims.CLAIMS:
        assert not claim.figure or (DATA.parent / "shown" / f"{claim.figure}.png").exists()
    texts = [claim.text for claim in claims.CLAIMS]
    assert len(set(texts)) == len(texts)


def test_records_name_no_place_of_their_machine(tmp_path: Path) -> None:
    run = tmp_path / "results" / "paper" / "single" / "a-0"
    config = {"teacher": f"{tmp_path}/lab/teacher", "tasks": [{"t": str(run.parent), "u": None}]}
    assert make_portable(config, run) == {"teacher": "lab/teacher", "tasks": [{"t": "."}]}
    example = {"command": ["a", "b"], "runs": {"x": {"k": [1, None]}, "y": {}}, "seconds": 1.5}
    assert json.loads(format_json(example)) == example
    for name in ("paper_steps", "paper_evaluations"):
        record = json.loads((DATA / f"{name}.json").read_text())
        paths = json.dumps([record["settings"], record["runs"]])
        assert '"/' not in paths
        assert len(record["runs"]) == 135


def test_commands_name_methods() -> None:
    update = commands_for_table("gap", ["single/a_b-0", "single/a_b-1", "multi/c-0"])[1]
    assert "--run results/paper/single/a_b-* results/paper/multi/c-* --update-data" in update
    assert (
        "--run results/paper/single/* results/paper/multi/* "
        in commands_for_table("dynamics", ["single/a-0"])[1]
    )
    assert commands_for_table("toy") == ["opd study run toy --update-figures"]


@pytest.mark.parametrize("name", PAPER_FIGURES)
def test_every_figure_of_the_paper_has_a_caption(name: str) -> None:
    """That each is drawn is tested in test_study_figures, with all the others."""
    module = figure_module(name)
    assert len(module.CAPTION) > 100
    assert style.PAGE_WIDTH == 7.0
