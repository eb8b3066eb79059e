"""Training, evaluation and checks on text games."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.records.batch_files import load_batch
from opd.analysis import doctor
from opd.config.groups import EvalConfig, GamesConfig
from opd.config.settings import Config, TaskSettings
from opd.data.chain_task import Problem
from opd.data.prompts import encode_prompt
from opd.envs.task import GameTask
from opd.evaluation.folder import evaluate_folder
from opd.lab.build import make_tokenizer
from opd.models.loading import load_model
from opd.training.train import train
from tests.helpers.games import ECHO, Echo
from tests.helpers.runs import rows, settings


def game_config(tiny_pair, out: Path, **changes: object) -> Config:
    defaults = {"task": ECHO, "max_prompt": 200, "max_response": 6, "layout": "trajectory"}
    defaults |= {"eval_problems": 1}
    return settings(tiny_pair, out, **(defaults | changes))


@pytest.mark.parametrize("layout", ["turns", "trajectory"])
def test_a_run_on_games_resumes_to_the_same_bits(tiny_pair, tmp_path: Path, layout: str) -> None:
    options = {"layout": layout, "save_every": 1, "eval_every": 0, "objective": "sampled_token"}
    complete_folder = train(game_config(tiny_pair, tmp_path / "whole", steps=2, **options)).folder
    train(game_config(tiny_pair, tmp_path / "cut", steps=1, **options))
    resumed_folder = train(game_config(tiny_pair, tmp_path / "cut", steps=2, **options)).folder
    assert rows(resumed_folder) == rows(complete_folder)
    weights = [
        (x / "final" / "model.safetensors").read_bytes() for x in (resumed_folder, complete_folder)
    ]
    assert weights[0] == weights[1]
    batch = load_batch(complete_folder / "batches" / "step_000000.safetensors")
    row = rows(complete_folder)[0]
    mean_reward = float(batch.reward[~batch.reward.isnan()].double().mean())
    assert row["episodes/success"] == row["response/reward"] == pytest.approx(mean_reward)
    assert mean_reward > 0
    turns = len(batch) if layout == "turns" else row["episodes/turns"] * len(batch)
    assert row["episodes/turns"] * 6 == pytest.approx(turns)
    assert row["episodes/failed_share"] == row["episodes/full_share"] == 0
    if layout == "turns":
        second_turns = batch.rows((batch.turn == 1).nonzero()[:, 0])
        assert 0 < len(second_turns) < 6
        mean_cost = float(second_turns.log_ratio[second_turns.mask].double().mean())
        assert row["turn=2/divergence/k1"] == pytest.approx(mean_cost, rel=1e-6)
        assert "turn=3/divergence/k1" not in row, "turns 1, 2, 4, 8 and 16 of 30"


def test_one_turn_games_train_alike_in_both_layouts(tiny_pair, tmp_path: Path) -> None:
    options = {"max_turns": 1, "steps": 2, "eval_every": 0}
    folders = [
        train(game_config(tiny_pair, tmp_path / layout, layout=layout, **options)).folder
        for layout in ("turns", "trajectory")
    ]
    weights = [load_model(str(x / "final"), "cpu", "float32")[1].parameters() for x in folders]
    for turn_weights, trajectory_weights in zip(*weights, strict=True):
        assert torch.equal(turn_weights, trajectory_weights)
    losses = [[row["loss"] for row in rows(x)] for x in folders]
    assert losses[0] == losses[1]


def test_games_take_turns_and_mix_with_problems(tiny_pair, tmp_path: Path) -> None:
    tasks = (
        TaskSettings(name="sums", task="lab", max_response=9),
        TaskSettings(name="echo", task=ECHO, max_turns=2, layout="turns"),
    )
    options = {"task": "lab", "layout": "trajectory", "tasks": tasks, "steps": 2, "eval_every": 0}
    folder = train(game_config(tiny_pair, tmp_path / "alternate", **options)).folder
    first, second = rows(folder)
    assert "episodes/turns" not in first
    assert second["task"] == "echo"
    assert 1 <= second["episodes/turns"] <= 2
    evals = [json.loads(x) for x in (folder / "evals.jsonl").read_text().splitlines()]
    assert [("episodes/success" in x, x["task"]) for x in evals[:2]] == [
        (False, "sums"),
        (True, "echo"),
    ]
    assert evals[1]["accuracy"] == evals[1]["episodes/success"]
    options |= {"task_order": "mixed", "prompts_per_step": 4, "save_batch_every": 1}
    folder = train(game_config(tiny_pair, tmp_path / "mixed", **options)).folder
    row = rows(folder)[0]
    batch = load_batch(folder / "batches" / "step_000000.safetensors")
    game_rows = batch.rows((batch.task == 1).nonzero()[:, 0])
    mean_reward = float(game_rows.reward[~game_rows.reward.isnan()].mean())
    assert row["task=echo/episodes/success"] == mean_reward
    assert row["task=echo/episodes/turns"] * 4 == pytest.approx(len(game_rows))
    assert "episodes/success" not in row
    assert len(batch) == 4 + len(game_rows)


def test_held_out_games_are_evaluated(tiny_pair) -> None:
    options = {"device": "cpu", "max_prompt": 200, "max_response": 6, "seed": 0}
    evaluation = EvalConfig(eval_problems=9, eval_samples=2)
    result = evaluate_folder(str(tiny_pair[0]), ECHO, evaluation=evaluation, **options)
    outcomes = [int(x) for x in result["outcomes"].replace(" ", "")]
    assert len(outcomes) == 18
    assert result["accuracy"] == pytest.approx(sum(outcomes) / 18) == result["episodes/success"]
    assert result["low"] < result["accuracy"] < result["high"]
    assert result["truncated"] == 0
    shortened_result = evaluate_folder(
        str(tiny_pair[0]),
        ECHO,
        evaluation=EvalConfig(eval_problems=9),
        games=GamesConfig(max_turns=2),
        **options,
    )
    assert shortened_result["truncated"] == pytest.approx(1 / 3), (
        "games of three turns are cut at two"
    )
    assert shortened_result["problem_set"] == result["problem_set"]


def test_the_doctor_reads_the_openings_of_games(tiny_pair) -> None:
    results = doctor.check_pair(
        *map(str, tiny_pair), task=ECHO, prompts=3, group=1, max_response=4, device="cpu"
    )
    games = GameTask(source="", make=Echo, seed=0)
    texts = [problem.prompt for problem in games.openings(games.train(0, 3))]
    assert {len(text) for text in texts} == {len("Task: 1 words\nSay it.")}
    longest = max(len(encode_prompt(make_tokenizer(), Problem(text, ""))) for text in texts)
    numbers = {finding.item: finding.numbers for finding in results}
    assert numbers["positions"]["prompt"] == longest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grader": "exact"}, "grades its own episodes"),
        ({"eval_task": "lab"}, "remove eval_task='lab'"),
        (
            {"reward_weight": 1.0, "layout": "turns"},
            "reward_weight 1.0 compares .* set layout to trajectory",
        ),
        ({"baseline": "leave_one_out", "layout": "turns", "objective": "sampled_token"}, "layout"),
        ({"task": "env:castle"}, "unknown environment"),
    ],
)
def test_what_games_cannot_have_is_refused(
    tiny_pair, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(game_config(tiny_pair, tmp_path / "run", **changes))


def test_a_reward_of_games_trains_with_whole_episodes(tiny_pair, tmp_path: Path) -> None:
    options = {"reward_weight": 0.5, "objective": "sampled_token", "steps": 1, "eval_every": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(
            rows(train(game_config(tiny_pair, tmp_path / "run", **options)).folder)[0]["loss"]
        )
