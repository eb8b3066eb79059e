"""Figures of the study and of training draw the values of their tables."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.records import rows
from diagnostics.records.run_tables import accuracy_gains, training_table
from diagnostics.stats import bootstrap_interval, gain_interval
from figures import __main__ as cli
from figures import style
from figures.registry import DATA, figure_names
from figures.runs import training
from figures.study import bias_variance
from opd.cli.report import main


def write_run(folder: Path, objective: str, seed: int, steps: int = 12) -> Path:
    """Write a run folder as the trainer does, with invented numbers."""
    g = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {"objective": objective, "seed": seed, "steps": 12, "out": str(folder), "top_p": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.txt").write_text("commit abc <think>\n")
    with open(folder / "rows.jsonl", "w") as file:
        for step in range(steps):
            row = {"step": step, "grad_norm": 1 / (step + 1), "divergence/reverse_kl": 0.5**step}
            row |= {"response/truncated_share": 0.4, "consistency/z_H": float(g.normal())}
            file.write(json.dumps(row | {"seconds/rollout": 6.0, "loss": None}) + "\n")
        file.write('{"step": 99, "gr')  # killed while writing
    with open(folder / "evals.jsonl", "w") as file:
        for step in (0, steps):
            right = g.random(40) < (0.3 if step == 0 else 0.8)
            share = float(right.mean())
            evaluation = {"step": step, "accuracy": share, "low": share - 0.1, "high": share + 0.1}
            evaluation |= {"length": 50.0, "truncated": 0.1, "problems": 40}
            evaluation["outcomes"] = "".join("01"[int(x)] for x in right)
            file.write(json.dumps(evaluation) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    cells = [(o, s) for o in ("sampled_token", "teacher_topk") for s in (0, 1)]
    return [write_run(folder / f"{o}-{s}", o, s) for o, s in cells]


def lines(axes) -> list[tuple[list[float], list[float]]]:
    return [([*map(float, x.get_xdata())], [*map(float, x.get_ydata())]) for x in axes.lines]


def test_recorded_tables_draw_without_torch(tmp_path: Path) -> None:
    """One figure of each kind is written; every figure is drawn in `test_print.py`."""
    program = (
        "import sys; from figures.__main__ import main\n"
        "from figures.registry import figure_module, figure_names\n"
        "for name in ('improvement', 'comparison', 'lorenz'): main([name, '--out', sys.argv[1]])\n"
        "main(['improvement', '--out', sys.argv[1], '--width', 'column'])\n"
        "for name in figure_names(): figure_module(name)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    assert {"training", "toy", "horizon"} < set(figure_names())
    names = {Path(line).name for line in completed.stdout.split()}
    written = ("improvement", "improvement-column", "comparison", "lorenz")
    pictures = {f"{n}.{s}" for n in written for s in ("png", "pdf")}
    assert names == pictures | {"comparison.md", "comparison.csv"}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in pictures)


def test_study_lines_are_the_tables_numbers() -> None:
    table = cli.load_figure_table("bias_variance", DATA / "bias_variance.csv")
    figure = bias_variance.draw(table)
    expected = table[(table["quantity"] == "bias2") & (table["estimator"] == "plain")]
    for line, (_, horizon_rows) in zip(
        lines(figure.axes[1]), expected.groupby("horizon"), strict=True
    ):
        horizon_rows = horizon_rows.sort_values("gamma")
        assert line == (horizon_rows["gamma"].tolist(), horizon_rows["value"].tolist())
    bands = [c.get_datalim(figure.axes[1].transData) for c in figure.axes[1].collections]
    assert max(b.y1 for b in bands) == pytest.approx(expected["high"].max())
    cross = table[(table["quantity"] == "overtaking_batch") & (table["estimator"] == "plain")]
    assert f"{cross['value'].iloc[0]:,.0f}" in figure.axes[2].texts[0].get_text()


def test_training_lines_are_the_runs_numbers(runs: list[Path]) -> None:
    table = training_table(runs)
    figure = training.draw(table)
    curves = lines(figure.axes[0])
    for line, objective in zip(curves, ("sampled_token", "teacher_topk"), strict=True):
        evaluations = [
            x for r in runs if objective in r.name for x in rows.read_rows(r / "evals.jsonl")
        ]
        for step, y in zip(*line, strict=True):
            assert y == pytest.approx(
                np.mean([m["accuracy"] for m in evaluations if m["step"] == step]), abs=1e-9
            )
    kl = lines(figure.axes[1])
    assert ([*map(float, range(12))], [float(f"{0.5**i:.6g}") for i in range(12)]) in kl
    assert "not recorded" in figure.axes[3].texts[0].get_text()
    with style.style_context():
        assert len(training.draw(table[table["run"] == runs[0].name]).axes) == 6


def test_the_same_table_gives_the_same_files(runs: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        cli.main(["training", "--run", *map(str, runs), "--out", str(tmp_path / name)])
    for suffix in ("png", "pdf"):
        files = [(tmp_path / name / f"training.{suffix}").read_bytes() for name in ("a", "b")]
        assert files[0] == files[1]


def test_gains_are_paired(runs: list[Path]) -> None:
    gains = accuracy_gains(training_table(runs)).set_index("objective")
    for objective in ("sampled_token", "teacher_topk"):
        differences = []
        for run in runs:
            if objective in run.name:
                first, last = (x["outcomes"] for x in rows.read_rows(run / "evals.jsonl"))
                differences += [int(b) - int(a) for a, b in zip(first, last, strict=True)]
        row = gains.loc[objective]
        assert row["gain"] == pytest.approx(np.mean(differences))
        assert row["low"] < row["gain"] < row["high"]
        assert (row["seeds"], row["problems"]) == (2, 40)


def test_wrong_requests_name_the_value(tmp_path: Path, runs: list[Path]) -> None:
    table = tmp_path / "t.csv"
    pd.DataFrame({"quantity": ["mse"]}).to_csv(table, index=False)
    for words, error, message in (
        (
            ["pie"],
            ValueError,
            "unknown figure 'pie'; known: ablations, agents, anatomy, batch_size",
        ),
        (["training", "--table", str(tmp_path / "no.csv")], FileNotFoundError, "make it with"),
        (["bias_variance", "--table", str(table)], ValueError, "lacks the columns estimator"),
        (["all", "--table", str(table)], ValueError, "needs the name of a single figure"),
        (["bias_variance", "--run", str(runs[0])], ValueError, "--run needs the name"),
        (["training", "--update-data"], ValueError, "add --run"),
        (
            ["training", "--run", str(tmp_path)],
            FileNotFoundError,
            "neither config.json nor rows",
        ),
    ):
        with pytest.raises(error, match=message):
            cli.main([*words, "--out", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        main([str(tmp_path)])


def test_intervals_cover_at_their_level() -> None:
    """95 % intervals cover the mean about 95 % of the time, two-way ones at least that."""
    g = np.random.default_rng(0)
    plain = crossed = 0
    for _ in range(300):
        values = g.normal(size=30)
        low, high = bootstrap_interval(values, lambda x: x.mean(0), g, resamples=400)
        plain += low < 0 < high
        table = g.normal(size=(6, 1)) + g.normal(size=(1, 40)) + g.normal(size=(6, 40))
        low, high = gain_interval(table / 16)
        crossed += low < 0 < high
    assert 0.89 < plain / 300 < 0.98
    assert 0.9 < crossed / 300 <= 1
    pair = g.normal(size=(20, 1)) * 5 + np.array([0.0, 1.0])
    low, high = bootstrap_interval(pair, lambda x: (x[:, 1] - x[:, 0]).mean(0), g)
    assert (low, high) == pytest.approx((1, 1)), "a paired difference without noise"
    for bad, words in (
        (lambda: bootstrap_interval(np.ones(1), np.mean, g), "1 repetitions"),
        (lambda: bootstrap_interval(np.ones(3), np.mean, g, level=1.5), r"level is 1\.5"),
        (lambda: bootstrap_interval(np.ones(3), np.mean, g, strata=np.ones(2)), "strata has"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()


def test_estimators_print_words_at_seven_points_and_hide_no_value() -> None:
    from figures.study import estimators

    table = pd.read_csv(DATA / "estimators.csv")
    figure = estimators.draw(table)
    bias = figure.axes[0]
    ticks = bias.get_yticklabels()
    labels = [tick.get_text() for tick in ticks]
    assert len(set(labels)) == len(labels)
    assert not [x for x in labels if "_" in x]
    assert min(tick.get_fontsize() for tick in ticks) >= 7
    assert bias.get_xlim()[1] > table[table["quantity"] == "bias"]["high"].max()
    assert len(figure.legends[0].get_texts()) == 2
