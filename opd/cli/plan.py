"""The `opd plan` command."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.records.renamed import SETTINGS, refuse_renamed_options
from opd.cli.train import SourceOptions, recipe, setting_names
from opd.config.files import read_config, read_tasks
from opd.config.problems import check_settings, raise_problems
from opd.config.recipes import RECIPES
from opd.config.recorded_code import without_unreviewed_code
from opd.config.settings import Config, with_settings

if TYPE_CHECKING:
    from opd.analysis.plan.machines import Machine


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Predict memory and time of a run."""

    settings: Config
    config: Path | None = None
    """file of settings, as `opd train RECIPE --show` prints them, or config.json of a run"""
    run: Path | None = None
    """run folder whose settings are planned, in the place of --config"""
    tasks: Path | None = None
    """TOML file of several tasks"""
    gpu: str = ""
    """H100, H200, B200, A100-80, A100-40, L40S, A10, L4, 5090, 4090, 3090, or cpu, whose rates are
    measured now (default: H100)"""
    gpu_memory: float = 0.0
    """memory of a GPU in GB, in the place of the known one"""
    gpu_flops: float = 0.0
    """peak Tflop/s of bfloat16 products, dense, in the place of the known one"""
    gpu_bandwidth: float = 0.0
    """peak GB/s of the GPU's memory, in the place of the known one"""
    gpus: int = 1
    """number of GPUs, each with a process of torchrun"""
    prompt_tokens: int = 0
    """length of a prompt in tokens (default: max_prompt)"""
    mean_response: int = 0
    """mean length of a response in tokens, for the time (default: max_response)"""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """print one JSON object"""


@dataclass(frozen=True, kw_only=True)
class PlanSource(SourceOptions):
    """The options that are needed to know the defaults of the others."""

    run: Path | None = None


def usage() -> str:
    """Return the help text with all options that are not settings."""
    return "\n".join(
        [
            "usage: opd plan [RECIPE] --student MODEL --teacher MODEL [--setting value ...]",
            "                [--gpu NAME] [--gpus N] [--json]",
            "       opd plan --run FOLDER [...]",
            "       opd plan --config FILE [...]\n",
            "Predict the peak memory and the time of a training step from the settings of",
            "`opd train` and config.json of both models, without weights; of what they consist;",
            "and, where the run does not fit, what to change.\n",
            "MODEL is a folder, a hub name on this machine, or a size such as qwen2.5-7b.",
            "--gpu is H100 (the default), H200, B200, A100-80, A100-40, L40S, A10, L4, 5090, 4090,",
            "3090, or cpu, whose rates are measured; --gpu-memory GB, --gpu-flops TFLOPS and",
            "--gpu-bandwidth GB/s describe another one. --prompt-tokens and --mean-response are",
            "lengths in tokens; without them the largest that the settings allow are planned.",
            "--json prints one JSON object.",
            "\n`opd train RECIPE --help` lists every setting of a recipe.",
        ]
    )


def parse_arguments(argv: list[str]) -> PlanOptions:
    """Parse the arguments, as `opd train` does.

    Args:
        argv: The arguments; --help prints the help and exits.

    Returns:
        The options; the settings are those of the recipe, file or run, changed by the flags.

    Raises:
        InvalidInput: A setting is invalid, or several sources of settings are given.
        MissingFile: The folder is no run.
        SystemExit: The recipe is unknown, or help was asked for.
    """
    if not argv or "-h" in argv or "--help" in argv:
        print(usage())
        raise SystemExit(0)
    name, flags = ("", argv) if argv[0].startswith("-") else (argv[0], argv[1:])
    refuse_renamed_options(flags, SETTINGS, "opd plan")
    source, _ = tyro.cli(PlanSource, args=flags, add_help=False, return_unknown_args=True)
    if sum((bool(name), source.config is not None, source.run is not None)) > 1:
        raise InvalidInput("give only one of RECIPE, --config FILE and --run FOLDER")
    path = source.config
    if source.run is not None:
        path = source.run / "config.json"
        if not path.is_file():
            raise MissingFile(f"{source.run} is no run folder: it has no config.json")
    if path is not None:
        base = read_config(path)
        if path.suffix == ".json":
            given = setting_names(flags)
            base = without_unreviewed_code(base, path, source.trust_remote_code, given)
    else:
        base = recipe(name) if name else with_settings(RECIPES["pair"](), task="lab")
    options = tyro.cli(
        PlanOptions,
        default=PlanOptions(settings=replace(base, tasks=())),
        args=flags,
        prog="opd plan",
        config=(OmitArgPrefixes,),
    )
    tasks = base.tasks if options.tasks is None else read_tasks(options.tasks)
    return replace(options, settings=check_settings(replace(options.settings, tasks=tasks)))


def main(argv: list[str]) -> None:
    """Run `opd plan --student MODEL --teacher MODEL [--setting value ...]`."""
    options = parse_arguments(argv)
    machine = choose_machine(options)
    from opd.analysis.plan.plan import make_plan
    from opd.analysis.plan.remedies import find_remedies
    from opd.analysis.plan.report import format_plan, plan_to_json

    config = options.settings
    check_plannable(config, options.gpus)
    replan = partial(
        make_plan,
        machine=machine,
        gpus=options.gpus,
        prompt_tokens=options.prompt_tokens,
        mean_response=options.mean_response,
    )
    plan = replan(config)
    remedies = [] if plan.fits else find_remedies(plan, replan)
    print(plan_to_json(plan, remedies) if options.json else format_plan(plan, remedies))


def choose_machine(options: PlanOptions) -> "Machine":
    """Return the machine that the options name.

    Args:
        options: The options.

    Returns:
        The machine.
    """
    from opd.analysis.plan.known_machines import find_machine, with_figures

    figures = (options.gpu_memory, options.gpu_flops, options.gpu_bandwidth)
    is_own = not options.gpu and all(figures)
    machine = None if is_own else find_machine(options.gpu or "H100")
    return with_figures(machine, *figures)


def check_plannable(config: Config, gpus: int) -> None:
    """Refuse settings that training would refuse.

    Args:
        config: The settings.
        gpus: Number of processes of the planned run; this process is alone.

    Raises:
        InvalidInput: There are problems.
    """
    from opd.training.validation import validate

    if gpus > 1 and config.rollout.engine == "vllm":
        raise InvalidInput(
            f"gpus is {gpus}, but engine vllm loads weights from a single process; plan one GPU, "
            "or set engine to servers or hf"
        )
    alone = with_settings(config, sharding="none") if gpus > 1 else config
    raise_problems(validate(alone))
