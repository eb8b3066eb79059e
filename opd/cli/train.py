"""The `opd train` command."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from diagnostics.errors import InvalidInput
from diagnostics.records.renamed import SETTINGS, refuse_renamed_options
from opd.config.files import read_config, read_tasks, to_toml
from opd.config.problems import check_settings
from opd.config.recipes import RECIPES, RENAMED_RECIPES
from opd.config.recorded_code import without_unreviewed_code
from opd.config.settings import Config


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Distil a teacher into a student."""

    settings: Config
    config: Path | None = None
    """file of settings, as --show prints them, or config.json of a run; in the place of RECIPE"""
    tasks: Path | None = None
    """TOML file of several tasks, each with its own teacher"""
    show: Annotated[bool, FlagCreatePairsOff] = False
    """print the settings as TOML and stop"""
    anew: Annotated[bool, FlagCreatePairsOff] = False
    """restart at step 0 and move the contents of the run folder to its folder earlier/; without it,
    a run resumes from its checkpoint"""
    push: str = ""
    """repository on the Hugging Face hub, OWNER/MODEL, to which final/ is uploaded after the run,
    or now if the run is finished; a new repository is private"""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The options that are needed to know the defaults of the others."""

    config: Path | None = None
    trust_remote_code: bool = False


def usage() -> str:
    """Return the help text with all recipes."""
    recipes = [
        f"  {name:11} {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items()
    ]
    return "\n".join(
        [
            "usage: opd train RECIPE [--show] [--anew] [--push NAME] [--tasks FILE.toml]",
            "                        [--setting value ...]",
            "       opd train --config FILE [...]\n",
            "--show prints the settings; --anew restarts at step 0 and moves the contents of the",
            "run folder to its folder earlier/; without it, a run resumes from its checkpoint.",
            "--push uploads the trained model to the Hugging Face hub, of a finished run too.",
            "--config starts from a file of settings, as --show prints them or a run folder holds",
            "them; --tasks reads several tasks, each with its own teacher, from a TOML file.",
            "\nrecipes:",
            *recipes,
            "\n`opd train RECIPE --help` lists every setting of a recipe.",
        ]
    )


def parse_arguments(argv: list[str]) -> TrainOptions:
    """Parse `RECIPE [--setting value ...]` or `--config FILE [--setting value ...]`.

    Args:
        argv: The arguments; --help prints the help and exits.

    Returns:
        The options; the settings are those of the recipe or file, changed by the flags.

    Raises:
        InvalidInput: A setting is invalid; neither a recipe nor a file is given, or both; or a
            record names code that --trust-remote-code does not allow.
        SystemExit: The recipe is unknown, or help was asked for.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0)
    name, flags = ("", argv) if argv[0].startswith("-") else (argv[0], argv[1:])
    refuse_renamed_options(flags, SETTINGS, "opd train RECIPE")
    source, _ = tyro.cli(SourceOptions, args=flags, add_help=False, return_unknown_args=True)
    if bool(name) == (source.config is not None):
        raise InvalidInput("give either a recipe or --config FILE; see `opd train --help`")
    base = recipe(name) if source.config is None else read_config(source.config)
    if source.config is not None and source.config.suffix == ".json":
        base = without_unreviewed_code(
            base, source.config, source.trust_remote_code, setting_names(flags)
        )
    options = tyro.cli(
        TrainOptions,
        default=TrainOptions(settings=replace(base, tasks=())),
        args=flags,
        prog=f"opd train {name or '--config FILE'}",
        config=(OmitArgPrefixes,),
    )
    tasks = base.tasks if options.tasks is None else read_tasks(options.tasks)
    return replace(options, settings=check_settings(replace(options.settings, tasks=tasks)))


def setting_names(flags: list[str]) -> set[str]:
    """Return the settings that the flags set: "--grader=exact" sets grader."""
    options = (flag.partition("=")[0] for flag in flags if flag.startswith("--"))
    return {option.removeprefix("--").replace("-", "_") for option in options}


def recipe(name: str) -> Config:
    """Return the settings of a recipe; exit with a message if there is none of this name."""
    if name in RENAMED_RECIPES:
        raise SystemExit(f"opd train: the recipe {name} is now called {RENAMED_RECIPES[name]}")
    if name not in RECIPES:
        raise SystemExit(f"opd train: unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]()


def main(argv: list[str]) -> None:
    """Run `opd train RECIPE [--anew] [--setting value ...]`."""
    options = parse_arguments(argv)
    if options.show:
        print(to_toml(options.settings), end="")
        return
    from opd.analysis.plan.start import print_prediction
    from opd.runs.hub import check_push
    from opd.training.train import train

    if options.push:
        check_push(options.push)
    print_prediction(options.settings)
    result = train(options.settings, options.anew)
    if os.environ.get("RANK", "0") == "0":  # print once in a distributed run
        from diagnostics.records.run_folder import RunFolder
        from opd.runs.result import run_verdict

        folder = result.folder
        outcome = run_verdict(RunFolder(folder))
        for change in outcome["changes"]:
            print(change["sentence"])
        print(f"{outcome['text']}\nrun folder: {folder}\ntrained model: {folder / 'final'}")
        if options.push:
            print(f"uploaded: {result.push(options.push)}")
