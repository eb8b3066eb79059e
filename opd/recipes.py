"""Recipes: functions that return a configuration, to be overridden on the command line."""

import json
from collections.abc import Callable

from opd.config import Config, to_json


def smoke() -> Config:
    """Seconds on a CPU, on the tiny pair of `opd lab --tiny`: does it run?"""
    return Config(
        student="lab-tiny/student",
        teacher="lab-tiny/teacher",
        out="runs/smoke",
        steps=4,
        prompts_per_step=4,
        group_size=2,
        max_prompt=64,
        max_response=32,
        lr=1e-3,
        support_k=8,
        eval_every=2,
        eval_problems=8,
        save_every=2,
        batch_every=2,
    )


def lab() -> Config:
    """A real distillation in two minutes of one CPU core, on the pair of `opd lab`."""
    return Config(
        student="lab/student",
        teacher="lab/teacher",
        out="runs/lab",
        steps=60,
        prompts_per_step=64,
        group_size=1,
        max_prompt=64,
        max_response=176,
        lr=3e-4,
        betas=(0.9, 0.95),
        warmup=10,
        support_k=16,
        eval_every=20,
        eval_problems=256,
        save_every=20,
        batch_every=20,
    )


def pair() -> Config:
    """Any two models with one tokenizer: give --student, --teacher and --task FILE."""
    return Config(student="", teacher="", out="runs/pair", task="")


RECIPES: dict[str, Callable[[], Config]] = {"smoke": smoke, "lab": lab, "pair": pair}


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
