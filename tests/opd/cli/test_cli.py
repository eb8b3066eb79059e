"""The sub-commands on the tiny pair."""

import json
import re
from pathlib import Path

import pytest

from diagnostics.batch import Rollouts
from diagnostics.monitor import Monitor
from diagnostics.records.batch_files import load_batch
from diagnostics.records.renamed import EVALUATION_SETTINGS, present_evaluation_settings
from opd.cli import evaluate
from opd.cli.diagnose import main
from opd.cli.train import parse_arguments
from opd.config.files import read_config
from opd.config.groups import EvalConfig, GamesConfig
from opd.config.recipes import RECIPES
from opd.training.train import train
from tests.helpers.runs import rows, settings


@pytest.fixture(scope="module")
def run(tiny_pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(tiny_pair, tmp_path_factory.mktemp("cli") / "run")).folder


def test_diagnose_repeats_the_row_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), "--json"])
    diagnosed = json.loads(capsys.readouterr().out)
    run_row = rows(run)[2]
    assert diagnosed.pop("batch").endswith("batches/step_000002.safetensors")
    verdict = diagnosed.pop("verdict")
    assert {"sampler_mismatch", "budget"} <= {*verdict["applied"]}
    assert not {*verdict["alarms"]} - {*verdict["applied"]}
    assert set(verdict["applied"]).isdisjoint(verdict["not_applied"])
    assert len(diagnosed) > 100
    for name, value in diagnosed.items():
        expected = run_row[name]
        assert value == (None if expected is None else pytest.approx(expected, rel=1e-9)), name
    main([str(run), "--all"])
    output = capsys.readouterr().out
    assert "step_000000" in output
    assert f"{run_row['divergence/k1']:.4g}" in output


def test_diagnose_refuses_what_it_cannot_read(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run folder: it has neither"):
        main([str(tmp_path)])
    scored = load_batch(next((run / "batches").iterdir()))
    names = {"tokens", "mask", "sampler_logp", "prompt", "ended"}
    Rollouts(**{name: getattr(scored, name) for name in names}).save(tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match="without teacher log-probabilities"):
        main([str(tmp_path / "r.safetensors")])


def test_missing_parts_of_a_batch_are_reported(run: Path) -> None:
    from dataclasses import replace

    scored = load_batch(next((run / "batches").iterdir()))
    monitor = Monitor()
    row = monitor(0, [replace(scored, support=None, prefix=None)])
    assert row["divergence/k1"] == Monitor()(0, [scored])["divergence/k1"]
    assert "divergence/reverse_kl" not in row
    assert set(monitor.missing) >= {"sign_null", "exact_divergence", "support_mass", "martingales"}


def test_eval_prints_one_json_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(run / "final"),
        "--eval-problems",
        "6",
        "--max-response",
        "8",
        "--device",
        "cpu",
    ]
    evaluate.main(arguments)
    first_output = capsys.readouterr().out
    evaluate.main(arguments)
    assert capsys.readouterr().out == first_output
    result = json.loads(first_output)
    assert result["problems"] == 6
    assert 0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1


def test_a_task_file_trains_and_evaluates(tiny_pair, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{i}+1", "answer": str(i + 1)}) for i in range(20)]
    (tmp_path / "task.jsonl").write_text("\n".join(lines) + "\n")
    changes = {"task": str(tmp_path / "task.jsonl"), "steps": 2}
    folder = train(settings(tiny_pair, tmp_path / "run", **changes)).folder
    assert len(rows(folder)) == 2
    with pytest.raises(FileNotFoundError, match=re.escape(f"run is {folder / 'final'}")):
        evaluate.main([str(folder)])
    assert json.loads((folder / "evals.jsonl").read_text().splitlines()[-1])["problems"] == 2


def test_recipes_take_overrides_and_round_trip(tmp_path: Path) -> None:
    for name in RECIPES:
        config = parse_arguments(
            [name, "--lr", "0.5", "--objective", "sampled_token", "--gamma", "1.0"]
        ).settings
        assert (config.optimizer.lr, config.objective.gamma) == (0.5, 1.0)
    with pytest.raises(SystemExit, match="unknown recipe 'nope'; known: smoke, lab, pair"):
        parse_arguments(["nope"])
    with pytest.raises(FileNotFoundError, match="build it with `opd lab --tiny`"):
        train(
            parse_arguments(
                ["smoke", "--out", str(tmp_path / "run"), "--student", "lab-tiny/none"]
            ).settings
        )
    (tmp_path / "c.json").write_text(json.dumps({"student": "a", "speed": 3}))
    with pytest.raises(ValueError, match="unknown setting speed; the closest is seed"):
        read_config(tmp_path / "c.json")


@pytest.mark.parametrize("option", [*EVALUATION_SETTINGS, "whole"])
def test_a_former_option_of_eval_is_refused_with_its_present_name(option: str) -> None:
    present = EVALUATION_SETTINGS.get(option, "eval_task").replace("_", "-")
    with pytest.raises(ValueError, match=f"--{present}"):
        evaluate.parse_arguments(["model", f"--{option.replace('_', '-')}", "1"])


def test_the_flags_of_eval_are_settings_of_a_run_and_checked_together() -> None:
    words = ["model", "--eval-top-p", "0.5", "--max-turns", "3", "--eval-task", "x.jsonl"]
    options = evaluate.parse_arguments(words)
    assert options.evaluation == EvalConfig(eval_top_p=0.5, eval_task="x.jsonl")
    assert options.games == GamesConfig(max_turns=3)
    with pytest.raises(ValueError, match=r"2 settings are invalid: eval_top_p is 2.0.*max_turns"):
        evaluate.parse_arguments(["model", "--eval-top-p", "2", "--max-turns", "0"])
    for text in ("[]", "{"):
        with pytest.raises(ValueError, match="--template"):
            evaluate.main(["model", "--template", text])


def test_options_of_recorded_evaluations_are_read_under_their_present_names() -> None:
    former = {"task": "f.jsonl", "whole": True, "problems": 3, "temperature": 0.5, "drop": False}
    assert present_evaluation_settings(former) == {
        "eval_task": "f.jsonl",
        "eval_problems": 3,
        "eval_temperature": 0.5,
        "skip_long_prompts": False,
    }
    assert present_evaluation_settings({"task": "lab", "whole": False}) == {"task": "lab"}
