"""Recipes: functions that return a configuration, to be overridden on the command line."""

import json
from collections.abc import Callable

from opd.config import Config, to_json


def pair() -> Config:
    """Any two models with one tokenizer: give --student, --teacher and --task FILE."""
    return Config(student="", teacher="", out="runs/pair", task="")


RECIPES: dict[str, Callable[[], Config]] = {"pair": pair}


def parse(argv: list[str]) -> Config:
    """`RECIPE [--field value ...]`; `--show` prints the settings and ends."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: opd train RECIPE [--show] [--field value ...]\n\nrecipes:")
        for name, recipe in RECIPES.items():
            print(f"  {name:8} {(recipe.__doc__ or '').splitlines()[0]}")
        print("\n`opd train RECIPE --help` lists every setting of a recipe.")
        raise SystemExit(0)
    name, rest = argv[0], argv[1:]
    if name not in RECIPES:
        raise SystemExit(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    import tyro

    shown = [word for word in rest if word != "--show"]
    config = tyro.cli(Config, default=RECIPES[name](), args=shown, prog=f"opd train {name}")
    if shown != rest:
        print(json.dumps(to_json(config), indent=1))
        raise SystemExit(0)
    return config
