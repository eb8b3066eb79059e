"""Configurations in files: TOML and JSON, in groups or flat, with the keys of every problem."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from diagnostics.errors import InvalidInput
from diagnostics.records.renamed import SETTING_GROUPS, SETTINGS, present_settings
from opd.cli.train import parse_arguments
from opd.config.files import read_config, to_flat, to_groups, to_toml
from opd.config.recipes import RECIPES
from opd.config.settings import (
    GROUPS,
    Config,
    TaskSettings,
    setting_fields,
    setting_values,
    with_settings,
)

TASKS = (
    TaskSettings(name='say "a"', task="lab", weight=2.0, mask=("string:\\x7f\x7f\n", "role:eos")),
    TaskSettings(name="字", task="env:household", teacher="http://h:1/v1", max_turns=3),
)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_show_and_each_form_of_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES[name]()
    assert parse_arguments([name]).settings == recipe
    several = with_settings(
        recipe, tasks=TASKS, lr=3, beta=0.25, ppo_clip=(0.1, 0.2, 4), task_order="weighted"
    )
    for config in (recipe, several):
        texts = {
            "shown.toml": to_toml(config),
            "config.json": json.dumps(to_groups(config)),
            "flat.json": json.dumps(to_flat(config)),
        }
        for file, text in texts.items():
            (tmp_path / file).write_text(text, encoding="utf-8")
            assert read_config(tmp_path / file) == config, file
            assert parse_arguments(["--config", str(tmp_path / file)]).settings == config, file
        assert present_settings(tomllib.loads(texts["shown.toml"])).keys() <= to_flat(config).keys()


def test_show_prints_what_config_reads_and_flags_go_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from opd.cli.train import main

    main(["lab", "--lr", "0.5", "--show"])
    path = tmp_path / "shown.toml"
    path.write_text(capsys.readouterr().out)
    expected = with_settings(RECIPES["lab"](), lr=0.5)
    assert read_config(path) == expected
    options = parse_arguments([f"--config={path}", "--group-size", "3", "--anew"])
    assert options.settings == with_settings(expected, group_size=3)
    assert options.anew
    (tmp_path / "tasks.toml").write_text('[[tasks]]\nname = "a"\ntask = "lab"\n')
    words = ["--config", str(path), "--tasks", str(tmp_path / "tasks.toml")]
    assert parse_arguments(words).settings.tasks == (TaskSettings(name="a", task="lab"),)
    for words in (["lab", "--config", str(path)], ["--lr", "1"]):
        with pytest.raises(InvalidInput, match="either a recipe or --config FILE"):
            parse_arguments(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optimizer]\nlrr = 1", "unknown setting optimizer.lrr; the closest is optimizer.lr"),
        ("[data]\nlr = 1", "unknown setting data.lr; it is called optimizer.lr"),
        ("learning = 1", "unknown setting learning"),
        (
            "[optimiser]\nlr = 1",
            "unknown group of settings [optimiser]; the closest is [optimizer]",
        ),
        ("lr = 1\n[optimizer]\nlr = 2", "lr is given twice, as lr and as optimizer.lr"),
        ("[optimizer]\nlr = 'x'", "lr is 'x'; it must be a number"),
        ("[optimizer]\nlr = -1\n[data]\ngroup_size = 0", "2 settings are invalid"),
        ("data = 3", "unknown setting data"),
        ("objective = []", "objective is (); it must be text"),
        ("[[tasks]]\nname = 'a'\ntask = 'lab'\nmax_turns = 0", "task 'a': max_turns is 0"),
        ("[[tasks]]\nname = 'a'\ntask = 'lab'\nlr = 3", "task 'a' has unknown settings ['lr']"),
    ],
)
def test_a_file_is_refused_with_its_name_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f"student = 's'\nteacher = 't'\nout = 'o'\n{text}\n")
    with pytest.raises(InvalidInput) as raised:
        read_config(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert words in str(raised.value)


def test_former_names_are_read_flat_and_in_groups(tmp_path: Path) -> None:
    former = {"student": "s", "teacher": "t", "out": "o", "clip": 0.5, "task": "env:rooms"}
    grouped = {
        "student": "s",
        "teacher": "t",
        "out": "o",
        "optimizer": {"clip": 0.5},
        "data": {"task": "env:rooms"},
    }
    for raw in (former, grouped):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config = read_config(tmp_path / "config.json")
        assert (config.optimizer.max_grad_norm, config.data.task) == (0.5, "env:household")


def test_names_of_settings_are_unique_and_the_groups_are_known_to_readers() -> None:
    fields = setting_fields()
    assert len(fields) == sum(len(g.__dataclass_fields__) for g in GROUPS.values()) + 6
    assert tuple(GROUPS) == SETTING_GROUPS
    assert set(SETTINGS.values()) <= fields.keys()
    flags = [name.replace("_", "-") for name in fields]
    assert len(set(flags)) == len(flags)


def test_settings_of_a_task_are_those_that_may_differ_by_task() -> None:
    per_task = {name for name, setting in setting_fields().items() if setting.rules.per_task}
    own = TaskSettings.__dataclass_fields__.keys() - {"name", "weight"}
    assert own == per_task


def test_settings_are_replaced_over_the_groups_by_name() -> None:
    config = Config(student="s", teacher="t", out="o")
    changed = with_settings(config, lr=2.0, group_size=1, steps=3, objective="sampled_token")
    assert (changed.optimizer.lr, changed.data.group_size, changed.steps) == (2.0, 1, 3)
    assert changed.objective.objective == "sampled_token"
    assert replace(changed, steps=100) == with_settings(
        config, lr=2.0, group_size=1, objective="sampled_token"
    )
    assert setting_values(changed)["lr"] == 2.0
    with pytest.raises(InvalidInput, match="no setting 'learning_rat'"):
        with_settings(config, learning_rat=1)
    with pytest.raises(
        InvalidInput, match=r"no setting 'max_promt'; the closest is data.max_promp"
    ):
        with_settings(config, max_promt=1)
