"""Test the map of batch size and KL: worlds at a given KL, the map, and the point of a run."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from diagnostics.records import rows
from figures import __main__ as cli
from figures.registry import DATA
from figures.study import phase as figure
from synthetic.exact import moments
from synthetic.experiments import phase
from synthetic.worlds.mdp import random_chain, random_pair
from tests.figures.test_study_figures import lines

TABLE = cli.load_figure_table("phase", DATA / "phase.csv")


def test_a_teacher_is_moved_to_the_wanted_kl() -> None:
    g = torch.Generator().manual_seed(3)
    mdp = random_chain(4, 3, 12, g, 0.1)
    student, teacher = random_pair(mdp, g, 1.0, 0.5)
    scales = []
    for cost in (0.03, 1.0, 10.0):
        x = phase.teacher_scale(mdp, student, teacher - student, cost)
        scaled_teacher = student + x * (teacher - student)
        assert float(moments.sequence_kl(mdp, student, scaled_teacher).total) == pytest.approx(
            cost, rel=1e-9
        )
        scales.append(x)
    assert scales == sorted(scales)
    with pytest.raises(ValueError, match="no teacher along this offset"):
        phase.teacher_scale(mdp, student, 0 * student, 1.0)


def world(horizon: int, seed: int, unbiased: dict[float, float]) -> list[dict[str, float | str]]:
    """Build rows with bias 1 and variance 1 at gamma = 0, no bias and `unbiased` at gamma = 1."""
    labels = {"horizon": horizon, "seed": seed, "estimator": "plain"}
    return [
        {**labels, "cost": cost, "gamma": g, "bias2": b, "variance": v}
        for cost, last in unbiased.items()
        for g, b, v in ((0.0, 1.0, 1.0), (1.0, 0.0, last))
    ]


def test_summaries_of_worlds_made_by_hand() -> None:
    table = phase.summarize(
        pd.DataFrame(
            [
                row
                for seed in (0, 1)
                for horizon, times in ((8, 1.0), (64, 4.0))
                for row in world(horizon, seed, {0.3: 1 + 64 * times, 30.0: 1 + 16 * times})
            ]
        )
    )

    def value(quantity: str, **selection: float) -> float:
        selected = table[table["quantity"] == quantity]
        for column, x in selection.items():
            selected = selected[selected[column] == x]
        (number,) = selected["value"]
        return float(number)

    assert value("overtaking_batch", horizon=64, cost=0.3) == 256
    assert [value("best_gamma", horizon=8, cost=30.0, n=n) for n in (1, 4, 64)] == [0, 0, 1]
    assert value("longer", cost=30.0) == 4
    assert value("nearer") == 0.25
    # for an estimator that is never worse the crossover batch size is one trajectory
    free = phase.summarize(
        pd.DataFrame([row for s in (0, 1) for row in world(8, s, {0.3: 0.5, 30.0: 0.5})])
    )
    assert (free.loc[free["quantity"] == "overtaking_batch", "value"] == 1).all()


def test_the_recorded_map_says_what_is_claimed() -> None:
    plain = TABLE[(TABLE["quantity"] == "longer") & (TABLE["estimator"] == "plain")]
    assert (plain["low"] > 2).all()
    reduced = TABLE[(TABLE["quantity"] == "nearer") & (TABLE["estimator"] == "rb_all_value")]
    assert float(reduced["low"].iloc[0]) > 0.9
    assert float(reduced["high"].iloc[0]) < 1.1


def test_cells_have_the_tables_colours_and_edges() -> None:
    drawing = figure.draw(TABLE)
    mesh = drawing.axes[1].collections[0]
    best = TABLE[(TABLE["quantity"] == "best_gamma") & (TABLE["estimator"] == "plain")]
    want = best[best["horizon"] == 256].sort_values(["cost", "n"])["value"]
    assert [*mesh.get_array().flatten()] == [*want]
    assert figure.cell_edges([0, 1, 3]).tolist() == [-0.5, 0.5, 2, 4]
    assert mesh.get_coordinates()[0, :2, 0].tolist() == pytest.approx([0.5, 2.0])
    crossovers = TABLE[(TABLE["quantity"] == "overtaking_batch") & (TABLE["horizon"] == 256)]
    line = lines(drawing.axes[1])[0]
    assert line[0] == [*crossovers[crossovers["estimator"] == "plain"]["value"]]


def test_a_run_stands_at_its_own_numbers(tmp_path: Path) -> None:
    run = tmp_path / "mine-0"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 0}))
    probe = {
        "gradient/cost_of_response": 2.0,
        "gradient/cost_of_response_low": 1.5,
        "gradient/cost_of_response_high": 2.5,
        "gradient/sequences": 64.0,
        "gradient/best_gamma": 0.5,
        "gradient/chosen/plain": 0.2,
        "gradient/chosen/rb_all": 0.8,
        "gradient/chosen@0": 0.3,
        "gradient/chosen@0.5": 0.7,
        "response/length": 40.0,
    }
    for step, row in enumerate(({}, probe)):
        rows.append_row(run / "rows.jsonl", {"step": step, **row})
    table = figure.collect([run])
    (point,) = table[table["quantity"] == "run"].to_dict("records")
    assert (point["n"], point["cost"], point["low"], point["high"]) == (64, 2, 1.5, 2.5)
    assert (point["chosen"], point["value"], point["share"]) == ("rb_all", 0.5, 0.7)
    drawing = figure.draw(table)
    for axes in drawing.axes[:4]:
        assert ([64, 64], [1.5, 2.5]) in lines(axes)
        assert ([64], [2]) in lines(axes)
    title = drawing.get_suptitle()
    assert "mean costs at γ = 0.5" in title
    assert "64 sequences of 40 tokens and 2 nats" in title
    (run / "rows.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match="train with --probe-every"):
        figure.collect([run])
    with pytest.raises(ValueError, match="cannot be used with phase"):
        cli.main(["phase", "--run", str(run), "--update-data"])
    assert not math.isnan(float(TABLE["worlds"].min()))
