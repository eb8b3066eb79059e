"""Records of before the renaming of settings, row keys and types stay readable and resumable."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diagnostics.batch import ScoredRollouts
from diagnostics.monitor import Monitor
from diagnostics.records.batch_files import load_batch
from diagnostics.records.renamed import KEYS, PREFIXES, SETTINGS, present_key, present_settings
from diagnostics.records.rows import read_rows
from diagnostics.records.run_folder import RunFolder
from diagnostics.records.run_tables import training_table
from figures.registry import DATA, read_table
from opd.cli.lab import main as lab
from opd.cli.main import main as command_line
from opd.cli.train import parse_arguments
from opd.config.files import read_config, task_from_data, to_flat
from opd.config.settings import Config
from opd.data.chain_task import Problem
from opd.envs.task import environment_factory
from opd.evaluation.evaluate import problem_fingerprint
from opd.experiments.paper import main as paper
from opd.lab.build import build, recorded_settings
from opd.lab.configs import household_config
from opd.report.build import report_data
from opd.training.train import train
from tests.helpers.runs import rows, settings

FLAT_CONFIG = Path(__file__).parent / "flat_run" / "config.json"
"""Settings of a run as recorded before they were grouped, under their present names."""
OLDER_RUN = Path(__file__).parent / "older_run"
"""A run of the recipe smoke, recorded before the renaming."""


NEWER = {
    *("allow_faulty_loss", "chat_template", "logger_columns", "loss_divisor", "metrics"),
    *("template", "ema_resync_every", "max_teacher_prompt", "teacher_system", "teacher_template"),
    *("teacher_eos", "teacher_thinking", "teacher_view", "view_control", "view_metrics_every"),
    *("prefixes", "response_column", "share_forward_pass"),
}
"""Settings that are newer than the recorded runs, which have their defaults."""


def without_newer(flat: dict[str, Any]) -> dict[str, Any]:
    """Return settings without those that the recorded runs cannot have."""
    defaults = to_flat(Config(student="", teacher="", out=""))
    assert all(flat[name] == defaults[name] for name in NEWER)
    return {name: value for name, value in flat.items() if name not in NEWER}


def former_key(key: str) -> str:
    """Return the name that a row key had before it was renamed."""
    for former, present in KEYS.items():
        if key.startswith(present):
            return former + key.removeprefix(present)
    for former, present in PREFIXES.items():
        if key.startswith(f"{present}/"):
            return f"{former}/{key.removeprefix(f'{present}/')}"
    return key


def test_settings_are_read_under_their_present_names() -> None:
    former = json.loads((OLDER_RUN / "config.json").read_text())
    assert SETTINGS.keys() <= former.keys()
    config = read_config(OLDER_RUN / "config.json")
    present = to_flat(config)
    for name, value in former.items():
        assert present[SETTINGS.get(name, name)] == value, name
    assert RunFolder(OLDER_RUN).settings() == without_newer(present)


def test_rows_are_read_under_their_present_keys() -> None:
    lines = (OLDER_RUN / "rows.jsonl").read_text().splitlines()
    for line, row in zip(lines, read_rows(OLDER_RUN / "rows.jsonl"), strict=True):
        former = json.loads(line)
        assert len(former) == len(row) > 300
        assert {present_key(key): value for key, value in former.items()} == row
        assert not any(key.startswith(("drift/", "collapse/", "validity/")) for key in row)
        assert {former_key(key) for key in row} == set(former)
        assert {present_key(key) for key in row} == set(row), "a present key stays as it is"


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("drift/k1@0-1", "divergence/k1@0-1"),
        ("task=math/drift/k1_se", "task=math/divergence/k1_se"),
        ("actor/validity/sampler_log_ratio", "actor/consistency/sampler_log_ratio"),
        ("supervision/negative_share", "signal/negative_share"),
        ("collapse/lengths_q50", "response/lengths_q50"),
        ("reward=right/collapse/length", "reward=right/response/length"),
        ("collapse/repeated_share_se", "repetition/repeated_share_se"),
        ("collapse/pass_2", "diversity/pass_2"),
        ("drifting", "drifting"),
        ("noise/share", "noise/share"),
    ],
)
def test_keys_of_groups_and_suffixes(former: str, present: str) -> None:
    assert present_key(former) == present


def test_a_saved_batch_opens_and_gives_the_numbers_of_its_row() -> None:
    batch = load_batch(OLDER_RUN / "batches" / "step_000002.safetensors")
    assert isinstance(batch, ScoredRollouts)
    row = next(row for row in read_rows(OLDER_RUN / "rows.jsonl") if row["step"] == 2)
    metrics = Monitor()(2, [batch])
    compared = 0
    for name, value in metrics.items():
        if isinstance(value, float) and isinstance(row.get(name), float) and "/" in name:
            assert value == pytest.approx(row[name], rel=1e-6, abs=1e-9), name
            compared += 1
    assert compared > 100


def test_tables_and_the_report_read_the_folder() -> None:
    table = training_table([OLDER_RUN])
    assert {"divergence/reverse_kl", "response/length", "signal/negative_share"} <= set(
        table["metric"]
    )
    assert not any(metric.startswith(("drift/", "collapse/")) for metric in table["metric"])
    page = json.dumps(report_data([OLDER_RUN]))
    assert "divergence/k1" in page
    assert "drift/k1" not in page


def test_recorded_tables_of_figures_are_read_under_the_present_names() -> None:
    text = (DATA / "early_warning.csv").read_text()
    assert "drift/reverse_kl" in text, "recorded before the renaming; choose another table"
    indicators = set(read_table(DATA / "early_warning.csv")["indicator"])
    assert "divergence/reverse_kl" in indicators
    assert not any(name.startswith(("drift/", "collapse/", "validity/")) for name in indicators)


def test_a_flat_record_is_read_as_what_it_says() -> None:
    flat = json.loads(FLAT_CONFIG.read_text())
    config = read_config(FLAT_CONFIG)
    words = ["smoke", "--lr", "0.002", "--ppo-clip", "0.1", "0.2", "3"]
    assert config == parse_arguments(words).settings
    assert without_newer(to_flat(config)) == RunFolder(FLAT_CONFIG.parent).settings() == flat


@pytest.mark.parametrize("form", ["flat", "flat under former names"])
def test_a_run_of_a_former_form_resumes_to_the_same_bits(
    form: str, tiny_pair, tmp_path: Path
) -> None:
    expected = train(settings(tiny_pair, tmp_path / "undisturbed", steps=4)).folder
    folder = train(settings(tiny_pair, tmp_path / "run", steps=2)).folder
    grouped = json.loads((folder / "config.json").read_text())
    assert grouped["record"]["save_batch_every"] == 2
    values = to_flat(read_config(folder / "config.json"))
    former = {name: values[name] for name in json.loads(FLAT_CONFIG.read_text())}
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    if form != "flat":
        former_names = {present: former for former, present in SETTINGS.items()}
        former = {former_names.get(name, name): value for name, value in former.items()}
        assert former["batch_every"] == 2
        text = "".join(
            json.dumps({former_key(key): value for key, value in line.items()}) + "\n"
            for line in lines
        )
        assert "drift/k1" in text
        (folder / "rows.jsonl").write_text(text)
    (folder / "config.json").write_text(json.dumps(former))

    with pytest.raises(ValueError, match=r"with other settings \(lr: 0.001 -> 0.5\)"):
        train(settings(tiny_pair, tmp_path / "run", steps=4, lr=0.5))
    resumed = train(settings(tiny_pair, tmp_path / "run", steps=4)).folder
    assert read_rows(resumed / "rows.jsonl")[0]["divergence/k1"] == lines[0]["divergence/k1"]
    assert rows(resumed)[2:] == rows(expected)[2:]
    weights = [(path / "final" / "model.safetensors").read_bytes() for path in (resumed, expected)]
    assert weights[0] == weights[1]
    assert read_config(resumed / "config.json").steps == 4
    assert "data" in json.loads((resumed / "config.json").read_text())


def test_a_copy_of_the_older_run_is_not_overwritten_by_other_settings(
    tiny_pair, tmp_path: Path
) -> None:
    folder = shutil.copytree(OLDER_RUN, tmp_path / "run")
    rows_before = (folder / "rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train(settings(tiny_pair, folder))
    assert (folder / "rows.jsonl").read_bytes() == rows_before


@pytest.mark.parametrize("former", sorted(SETTINGS))
def test_a_former_option_is_refused_with_its_present_name(former: str) -> None:
    option, present = (name.replace("_", "-") for name in (former, SETTINGS[former]))
    with pytest.raises(ValueError, match=rf"--{option} is now called --{present}"):
        parse_arguments(["smoke", f"--{option}", "1"])
    with pytest.raises(ValueError, match=rf"--{option}=1? ?is now called|--{option} is now called"):
        parse_arguments(["smoke", f"--{option}=1"])


def test_a_former_recipe_command_or_task_setting_is_refused_with_its_present_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit, match="rooms is now called household"):
        parse_arguments(["rooms"])
    monkeypatch.setattr("sys.argv", ["opd", "control", "runs/x"])
    with pytest.raises(SystemExit, match="'control' is now called 'probe-own-prefix'"):
        command_line()
    with pytest.raises(ValueError, match="history has been renamed to history_turns"):
        task_from_data({"name": "a", "task": "lab", "history": 2})


def test_settings_of_tasks_and_sources_are_renamed_too() -> None:
    tasks = [{"name": "a", "task": "env:rooms", "history": 3}]
    present = present_settings({"task": "env:rooms", "tasks": tasks, "clip": 1.0})
    assert present == {
        "task": "env:household",
        "tasks": [{"name": "a", "task": "env:household", "history_turns": 3}],
        "max_grad_norm": 1.0,
    }


def test_games_keep_the_fingerprint_of_their_former_name() -> None:
    """It pairs evaluations of before the renaming with those of after it."""
    text = json.dumps([["env:rooms 3", "goal"], ["2 + 3", "5"]])
    problems = [Problem("env:household 3", "goal"), Problem("2 + 3", "5")]
    assert problem_fingerprint(problems) == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_toy_models_of_a_former_kind_are_reused(tmp_path: Path) -> None:
    settings_before = json.dumps(recorded_settings(household_config()))
    former = json.loads(settings_before.replace('"household"', '"rooms"'))
    assert former["student"]["tasks"] == ["rooms", "rooms", "sort"]
    (tmp_path / "lab.json").write_text(json.dumps({"settings": former}))
    assert build(tmp_path, household_config()) == (tmp_path / "student", tmp_path / "teacher")
    with pytest.raises(ValueError, match="holds models with other settings"):
        build(tmp_path, dataclasses.replace(household_config(), seed=1))


@pytest.mark.parametrize("option", ["--rooms", "--strangers", "--rooms=lab-rooms"])
def test_a_former_kind_of_toy_models_is_refused_with_its_present_name(option: str) -> None:
    present = "household" if "rooms" in option else "mismatched"
    for command in (lab, paper):
        with pytest.raises(ValueError, match=f"is now called --{present}"):
            command([option])


def test_the_former_default_folder_of_toy_models_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab-rooms").mkdir()
    with pytest.raises(ValueError, match=r"lab-rooms of an older version.*--household lab-rooms"):
        paper(["--groups", "games"])


def test_a_former_environment_is_refused_with_its_present_name() -> None:
    with pytest.raises(ValueError, match="env:rooms is now called env:household"):
        environment_factory("rooms")
