"""Test the study runner on the smoke preset: resume, repeatability, provenance, errors."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from synthetic.experiments import bias_variance
from synthetic.runner import run as study
from synthetic.seeds import derive
from synthetic.worlds.mdp import random_chain, random_pair

NAME = "bias_variance"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    study.run(NAME, "smoke", out=out)
    return out / NAME


@pytest.mark.parametrize("damage", ["missing", "cut short", "not text", "no rows"])
def test_finished_cells_are_kept_and_broken_ones_measured_again(folder: Path, damage: str) -> None:
    table = (folder / "smoke" / "summary.csv").read_bytes()
    cells = sorted((folder / "cells").iterdir())
    assert len(cells) == 3
    stamps = [cell.stat().st_mtime_ns for cell in cells]
    rows = json.loads(cells[1].read_text())["rows"]
    if damage == "missing":
        cells[1].unlink()
    else:
        contents = cells[1].read_bytes()
        damaged = {"cut short": contents[:100], "not text": b"\xff" + contents, "no rows": b"{}"}
        cells[1].write_bytes(damaged[damage])
    study.run(NAME, "smoke", out=folder.parent)
    unchanged = [c.stat().st_mtime_ns == s for c, s in zip(cells, stamps, strict=True)]
    assert unchanged == [True, False, True]
    assert json.loads(cells[1].read_text())["rows"] == rows
    assert (folder / "smoke" / "summary.csv").read_bytes() == table


def test_refresh_measures_every_cell_again(folder: Path) -> None:
    cells = sorted((folder / "cells").iterdir())
    stamps = [cell.stat().st_mtime_ns for cell in cells]
    study.run(NAME, "smoke", out=folder.parent, refresh=True)
    assert all(c.stat().st_mtime_ns != s for c, s in zip(cells, stamps, strict=True))
    assert sorted((folder / "cells").iterdir()) == cells


def test_two_processes_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    study.run(NAME, "smoke", jobs=2, out=tmp_path)
    for name in ("rows.csv", "summary.csv"):
        assert (tmp_path / NAME / "smoke" / name).read_bytes() == (
            folder / "smoke" / name
        ).read_bytes()


def test_the_summary_is_what_its_rows_say(folder: Path) -> None:
    rows = pd.read_csv(folder / "smoke" / "rows.csv")
    summary = pd.read_csv(folder / "smoke" / "summary.csv")

    def value(quantity: str, **selection: object) -> float:
        selected = summary[summary["quantity"] == quantity]
        for column, x in selection.items():
            selected = selected[selected[column] == x]
        assert len(selected) == 1
        assert selected["low"].iloc[0] <= selected["value"].iloc[0] <= selected["high"].iloc[0]
        return selected["value"].iloc[0]

    plain = rows[(rows["estimator"] == "plain") & (rows["horizon"] == 8)]
    by_gamma = {g: plain[plain["gamma"] == g].set_index("seed") for g in (0.0, 1.0)}
    selection = {"estimator": "plain", "horizon": 8}
    assert value("variance", gamma=1.0, **selection) == pytest.approx(
        by_gamma[1.0]["variance"].median()
    )
    relative = by_gamma[0.0]["bias2"] / by_gamma[0.0]["gradient2"]
    assert value("bias2", gamma=0.0, **selection) == pytest.approx(relative.median(), rel=1e-5)
    assert by_gamma[1.0]["bias2"].max() < 1e-20
    batch = (by_gamma[1.0]["variance"] - by_gamma[0.0]["variance"]) / by_gamma[0.0]["bias2"]
    assert value("overtaking_batch", **selection) == pytest.approx(batch.median(), rel=1e-5)
    for n in (1, 4096):
        error = plain.assign(mse=plain["bias2"] + plain["variance"] / n)
        best = [part.loc[part["mse"].idxmin(), "gamma"] for _, part in error.groupby("seed")]
        assert value("best_gamma", n=n, **selection) == sorted(best)[1]
    wide = rows[rows["gamma"] == 1].pivot(
        index="seed", columns=["estimator", "horizon"], values="variance"
    )
    slope = np.log2(wide["rb_all"][8] / wide["rb_all"][4]).mean()
    exponent = value("exponent", estimator="rb_all", horizon=8, gamma=1.0)
    assert exponent == pytest.approx(slope, rel=1e-5)
    z = (plain["variance"] - plain["sampled_variance"]) / plain["sampled_variance_se"]
    assert z.abs().max() < 4
    assert value("sampled_z", gamma=1.0, **selection) == pytest.approx(
        z[plain["gamma"] == 1].mean(), rel=1e-5
    )
    assert np.isfinite(summary[["value", "low", "high"]].to_numpy()).all()


def test_bounds_hold_and_come_from_the_largest_cost_and_score(folder: Path) -> None:
    rows = pd.read_csv(folder / "smoke" / "rows.csv").dropna(subset=["bound_tight"])
    assert (rows["variance"] <= rows["bound_tight"]).all()
    for setting in bias_variance.SETTINGS["smoke"]:
        generator = derive(NAME, setting)
        mdp = random_chain(3, 2, 8, generator, setting["mixing"])
        pair = random_pair(mdp, generator, setting["distance"], setting["heterogeneity"])
        student, teacher = (x.log_softmax(-1) for x in pair)
        cost2 = (student - teacher).square().max().item()
        score2 = 2 * (1 - student.exp().min().item()) ** 2  # |e_y - p|^2 of two tokens
        for row in rows[rows["seed"] == setting["seed"]].itertuples():
            t, unit = row.horizon, cost2 * score2
            # the sum over steps u of sum_{j < u} gamma^(2 j), from which the bound follows
            scores = sum(row.gamma ** (2 * j) for u in range(1, t + 1) for j in range(u))
            assert row.bound_quartic == pytest.approx(unit * t**4)
            assert row.bound_tight >= 0.999999 * unit * t * scores
            if row.gamma in (0, 1):
                assert row.bound_tight == pytest.approx(unit * t * scores)


def test_errors_of_the_mean_are_bias_plus_a_share_of_the_variance() -> None:
    """Two equal constructed worlds, whose summary can be calculated by hand."""
    rows = pd.DataFrame(
        {
            "seed": seed,
            "horizon": horizon,
            "gradient2": 4.0,
            "estimator": "plain",
            "gamma": gamma,
            "bias2": 8.0 * (1 - gamma),
            "variance": (1 + 15 * gamma) * horizon,
            "bound_tight": 1e3,
            "bound_quartic": 1e4,
            "sampled_variance": 0.0,
            "sampled_variance_se": 16.0 * horizon,
        }
        for seed in (0, 1)
        for horizon in (1, 8)
        for gamma in (0.0, 1.0)
    )
    table = bias_variance.summarize(rows).set_index(["quantity", "horizon"])
    assert table.loc[("overtaking_batch", 8), "value"] == 15  # (128 - 8) / 8
    best = table.loc[("best_gamma", 8)].set_index("n")["value"]
    assert best.loc[[1, 4, 16, 64]].tolist() == [0, 0, 1, 1]
    error = table.loc[("mse", 8)].set_index(["gamma", "n"])["value"]
    assert error[0.0, 4] == 2 + 2 / 4
    assert error[1.0, 4] == 32 / 4
    assert table.loc[("exponent", 8), "value"].tolist() == [1, 1]
    assert table.loc[("sampled_z", 8), "value"].tolist() == [1 / 16, 1]
    assert (table["low"] == table["value"]).all(), "worlds that agree leave no interval"
    assert (table["high"] == table["value"]).all()
    with pytest.raises(ValueError, match="duplicate"):
        bias_variance.summarize(pd.concat([rows, rows.head(1)]))


def test_provenance_names_command_code_and_versions(folder: Path) -> None:
    record = json.loads((folder / "smoke" / "summary.json").read_text())
    assert record["command"] == "opd study run bias_variance --preset smoke"
    assert record["source"] == study.fingerprint(NAME)
    assert set(record["versions"]) == {"torch", "numpy", "pandas", "scipy"}


def test_the_recorded_figure_data_come_from_this_experiment() -> None:
    data = Path(study.ROOT) / "figures" / "data"
    record = json.loads((data / f"{NAME}.json").read_text())
    table = pd.read_csv(data / f"{NAME}.csv")
    assert set(table["gamma"].dropna()) == set(bias_variance.GAMMAS)
    assert table["worlds"].unique().tolist() == [len(bias_variance.SETTINGS[record["preset"]])]


@pytest.mark.parametrize("name", study.list_experiments())
def test_every_headline_is_one_row_of_the_recorded_table(name: str) -> None:
    table, preset = study.load_recorded_table(name)
    assert preset in set(study.load_experiment(name).SETTINGS) - {"smoke"}
    lines = study.format_headlines(name, table)
    assert len(lines) == len(study.load_experiment(name).HEADLINES) >= 1
    assert not any("nan" in line for line in lines)
    with pytest.raises(ValueError, match="selects 0 rows"):
        study.format_headlines(name, table.head(0))


def test_a_setting_decides_its_numbers_alone() -> None:
    settings = bias_variance.SETTINGS["smoke"]
    draws = [derive(NAME, s).initial_seed() for s in settings]
    assert len(set(draws)) == len(settings)
    assert draws[0] == derive(NAME, dict(reversed(settings[0].items()))).initial_seed()


def test_the_command_line_lists_runs_and_updates_figures(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study.main(["list"])
    assert f"{NAME}\n  {bias_variance.CLAIM}\n" in capsys.readouterr().out
    arguments = ["run", NAME, "--preset", "smoke", "--jobs", "1", "--out", str(folder.parent)]
    study.main(arguments)
    assert str(folder / "smoke" / "summary.csv") in capsys.readouterr().out
    study.main([*arguments, "--update-figures", "--data-folder", str(tmp_path)])
    for suffix in ("csv", "json"):
        copy, original = tmp_path / f"{NAME}.{suffix}", folder / "smoke" / f"summary.{suffix}"
        assert copy.read_bytes() == original.read_bytes()


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown experiment 'magic'; known: "):
        study.run("magic", out=tmp_path)
    with pytest.raises(ValueError, match="no preset 'huge'; known: smoke, quick, paper"):
        study.run(NAME, "huge", out=tmp_path)
    assert not list(tmp_path.iterdir())
