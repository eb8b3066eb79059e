"""The `opd train` command."""

import json
import os
from dataclasses import replace
from pathlib import Path

from diagnostics.errors import InvalidInput
from diagnostics.records.renamed import SETTINGS
from opd.config.recipes import RECIPES, RENAMED_RECIPES
from opd.config.settings import Config, TaskSettings, to_json


def parse(argv: list[str]) -> Config:
    """`RECIPE [--field value ...]`; `--show` prints the settings and ends."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: opd train RECIPE [--show] [--anew] [--tasks FILE.toml] [--field value ...]\n")
        print("--show prints the settings; --anew begins at step 0 and moves what the run folder")
        print("holds to earlier/ in it; without it, a run goes on from its last checkpoint.")
        print(
            "--tasks names a file of several tasks, each with its own teacher (opd/training/multitask.py)."
        )
        print("\nrecipes:")
        for name, recipe in RECIPES.items():
            print(f"  {name:11} {(recipe.__doc__ or '').splitlines()[0]}")
        print("\n`opd train RECIPE --help` lists every setting of a recipe.")
        raise SystemExit(0)
    name, rest = argv[0], argv[1:]
    if name in RENAMED_RECIPES:
        raise SystemExit(f"opd train: the recipe {name} is now called {RENAMED_RECIPES[name]}")
    if name not in RECIPES:
        raise SystemExit(f"opd train: unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    refuse_renamed_options(rest)
    import tyro

    given, tasks = with_tasks([word for word in rest if word != "--show"])
    default = replace(RECIPES[name](), tasks=tasks)
    config = tyro.cli(Config, default=default, args=given, prog=f"opd train {name}")
    if "--show" in rest:
        print(json.dumps(to_json(config), indent=1))
        raise SystemExit(0)
    return config


def refuse_renamed_options(words: list[str]) -> None:
    """Refuse an option by its former name.

    Raises:
      InvalidInput: With the present name.
    """
    for word in words:
        option = word.partition("=")[0]
        former = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        if option.startswith("--") and former in SETTINGS:
            present = SETTINGS[former].replace("_", "-")
            raise InvalidInput(f"{option} is now called --{present}; see `opd train RECIPE --help`")


def with_tasks(words: list[str]) -> tuple[list[str], tuple[TaskSettings, ...]]:
    """The words without `--tasks FILE`, and the tasks of that file."""
    if "--tasks" not in words:
        return words, ()
    from opd.training.multitask import read_tasks

    at = words.index("--tasks")
    if at + 1 == len(words):
        raise InvalidInput("--tasks needs a file: [[tasks]] in TOML, see opd.training.multitask")
    return words[:at] + words[at + 2 :], read_tasks(Path(words[at + 1]))


def main(argv: list[str]) -> None:
    """`opd train RECIPE [--anew] [--field value ...]`."""
    anew = "--anew" in argv
    config = parse([word for word in argv if word != "--anew"])
    from opd.training.train import train

    folder = train(config, anew)
    if os.environ.get("RANK", "0") == "0":  # of several processes one tells
        from diagnostics.records.rows import read
        from opd.runs.result import verdict

        judged = verdict(read(folder / "rows.jsonl"), read(folder / "evals.jsonl"))
        for change in judged["changes"]:
            print(change["sentence"])
        print(f"{judged['text']}\nrun folder: {folder}\ntrained model: {folder / 'final'}")
