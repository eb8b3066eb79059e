"""The `opd cache` command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from diagnostics.errors import InvalidInput
from diagnostics.io.command import parse_options


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Score the responses of a run in advance, so that it needs no teacher in memory.

    make: write the scores of every step of a run to FOLDER. After FOLDER follow a recipe or
    --config FILE, and settings, as for `opd train`, with --prefixes dataset. A run with the same
    settings and --teacher cache:FOLDER then has the losses and weights of the run with the teacher.
    The same command continues a cache that was interrupted.

    check: read all files of a cache, and say what it holds. With the settings of a run after it,
    also check that it suits them: tokenizer, temperature, K, every response and, if they name a
    model, the teacher.
    """

    action: Annotated[Positional[Literal["make", "check"]], tyro.conf.arg(metavar="make|check")]
    """what to do"""
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """folder of the cache"""


def main(argv: list[str]) -> None:
    """Run `opd cache make|check FOLDER [RECIPE | --config FILE] [--setting value ...]`.

    Args:
        argv: Command-line arguments.

    Raises:
        InvalidInput: The settings are missing, or they or the cache cannot be used.
    """
    options = parse_options(CacheOptions, argv[:2], "opd cache")
    folder, arguments = options.folder, argv[2:]
    if options.action == "check" and not arguments:
        from opd.teachers.score_cache.files import check_shards, read_index

        index = read_index(folder)
        check_shards(folder, index)
    elif not arguments:
        raise InvalidInput(
            f"opd cache make {folder} needs the settings of the run: a recipe or --config FILE, as "
            "`opd train`"
        )
    else:
        from opd.cli.train import parse_arguments

        settings = parse_arguments(arguments).settings
        from opd.training.score_cache import check_cache, make_cache

        run = make_cache if options.action == "make" else check_cache
        index = run(settings, folder)
    header = index.header
    print(
        f"{folder}: {index.num_done} of {index.num_steps} steps, {index.num_tokens} tokens with "
        f"the {header.support_k} most probable ids of {header.teacher} at temperature "
        f"{header.temperature:g} (weights {header.teacher_fingerprint})"
    )
