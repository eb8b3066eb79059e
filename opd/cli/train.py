"""The `opd train` command."""

import json
import os
from dataclasses import replace
from pathlib import Path

from diagnostics.errors import InvalidInput
from diagnostics.records.renamed import SETTINGS, refuse_renamed_options
from opd.config.recipes import RECIPES, RENAMED_RECIPES
from opd.config.settings import Config, TaskSettings, to_json


def parse_config(argv: list[str]) -> Config:
    """Parse `RECIPE [--field value ...]`; `--show` prints the settings and exits."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: opd train RECIPE [--show] [--anew] [--tasks FILE.toml] [--field value ...]\n")
        print("--show prints the settings; --anew restarts at step 0 and moves the contents of the")
        print("run folder to its folder earlier/; without it, a run resumes from its checkpoint.")
        print("--tasks reads several tasks, each with its own teacher, from a TOML file.")
        print("\nrecipes:")
        for name, recipe in RECIPES.items():
            print(f"  {name:11} {(recipe.__doc__ or '').splitlines()[0]}")
        print("\n`opd train RECIPE --help` lists every setting of a recipe.")
        raise SystemExit(0)
    name, options = argv[0], argv[1:]
    if name in RENAMED_RECIPES:
        raise SystemExit(f"opd train: the recipe {name} is now called {RENAMED_RECIPES[name]}")
    if name not in RECIPES:
        raise SystemExit(f"opd train: unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    refuse_renamed_options(options, SETTINGS, "opd train RECIPE")
    import tyro

    args, tasks = extract_tasks([word for word in options if word != "--show"])
    default = replace(RECIPES[name](), tasks=tasks)
    config = tyro.cli(Config, default=default, args=args, prog=f"opd train {name}")
    if "--show" in options:
        print(json.dumps(to_json(config), indent=1))
        raise SystemExit(0)
    return config


def extract_tasks(arguments: list[str]) -> tuple[list[str], tuple[TaskSettings, ...]]:
    """Split `--tasks FILE` off the arguments and read the tasks of that file."""
    if "--tasks" not in arguments:
        return arguments, ()
    from opd.training.multitask import read_tasks

    index = arguments.index("--tasks")
    if index + 1 == len(arguments):
        raise InvalidInput("--tasks needs a file: [[tasks]] in TOML, see opd.training.multitask")
    return arguments[:index] + arguments[index + 2 :], read_tasks(Path(arguments[index + 1]))


def main(argv: list[str]) -> None:
    """Run `opd train RECIPE [--anew] [--field value ...]`."""
    restart = "--anew" in argv
    config = parse_config([word for word in argv if word != "--anew"])
    from opd.training.train import train

    result = train(config, restart)
    if os.environ.get("RANK", "0") == "0":  # print once in a distributed run
        from diagnostics.records.rows import read_rows
        from opd.runs.result import verdict

        folder = result.folder
        outcome = verdict(read_rows(folder / "rows.jsonl"), result.evaluations)
        for change in outcome["changes"]:
            print(change["sentence"])
        print(f"{outcome['text']}\nrun folder: {folder}\ntrained model: {folder / 'final'}")
