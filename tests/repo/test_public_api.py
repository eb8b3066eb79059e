"""What `opd` and `diagnostics` export: a fixed list, imported when used, with its requirements."""

import ast
import inspect
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import diagnostics
import opd
from tests.helpers.paths import ROOT
from tests.helpers.processes.bare_process import Ended, run_programs

EXPORTS = {
    "opd": {
        "AuditCard",
        "audit",
        "Config",
        "ModelPair",
        "OBJECTIVES",
        "Objective",
        "Requirements",
        "ScoreRequest",
        "ScoredBatch",
        "Teacher",
        "TrainResult",
        "__version__",
        "evaluate",
        "load_pair",
        "make_objective",
        "policy_loss",
        "policy_losses",
        "sample",
        "score_batch",
        "train",
    },
    "diagnostics": {
        "Alarms",
        "DistributionStats",
        "Monitor",
        "PANEL",
        "Rollouts",
        "ScoredRollouts",
        "Support",
        "UserError",
        "bootstrap_interval",
        "from_logits",
        "load_records",
        "observe_trl",
        "save_records",
        "to_file",
        "trl_callback",
    },
}
"""The stable names; a change here is a change of the interface and belongs in CHANGELOG.md."""

STATEMENT = "Modules are private; only names exported by `opd` and `diagnostics` are stable."
NAMES = [
    pytest.param(package, name, id=f"{package}.{name}")
    for package in (opd, diagnostics)
    for name in sorted(EXPORTS[package.__name__])
]

OPTIONAL = (
    *("transformers", "tokenizers", "huggingface_hub", "tyro", "tqdm", "httpx2", "httpx", "scipy"),
    *("joblib", "pandas", "matplotlib", "pyarrow", "datasets", "ray", "distributed", "peft"),
    *("trl", "verl", "accelerate", "requests", "rich", "regex", "PIL", "wandb", "trackio"),
)
"""Packages that torch, numpy and safetensors do not bring."""

NEEDS_MORE = {"diagnostics.records.run_tables": "pandas"}
"""Modules of `diagnostics` that no exported name uses, and what they import."""

HIDE_OPTIONAL = f"""
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
"""

IMPORT_ALL = """
import importlib, json, pkgutil
import diagnostics
errors = {}
for module in pkgutil.walk_packages(diagnostics.__path__, "diagnostics."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        errors[module.name] = error.name
print(json.dumps(errors))
"""


NEED_NO_EXTRA = ("OBJECTIVES", "Objective", "make_objective", "__version__")
MISSING = {
    "from opd import train": "opd.train needs tqdm: pip install 'opdlab[train]'",
    "from opd.models.loading import load_model; load_model('x', 'cpu', 'float32')": (
        "a model needs transformers: pip install 'opdlab[train]'"
    ),
    "from diagnostics.stats import t_critical; t_critical(2.0)": (
        "an interval from Student's t needs scipy: pip install 'opdlab[study]'"
    ),
}
"""Program -> the message where no extra is installed."""

MISSING_FOR_COMMANDS = {
    "study list": "opd study: this command needs tyro: pip install 'opdlab[study]'",
    "diagnose x": "opd diagnose: this command needs tyro: pip install 'opdlab[train]'",
    "train --help": "opd train: this command needs tyro: pip install 'opdlab[train]'",
    "figures toy": "opd figures: this command needs tyro: pip install 'opdlab[figures]'",
}
NEED_NO_EXTRA_OPTIONS = ("--help", "--version")


def import_program(name: str) -> str:
    return f"from opd import {name}"


def command_program(words: str) -> str:
    return (
        f"import sys; sys.argv = {['opd', *words.split()]}\nfrom opd.cli.main import main\nmain()"
    )


@pytest.fixture(scope="module")
def without_extras() -> dict[str, Ended]:
    """The results of all programs below where only the base requirements are installed."""
    programs = [IMPORT_ALL, *map(import_program, NEED_NO_EXTRA), *MISSING]
    programs += map(command_program, (*MISSING_FOR_COMMANDS, *NEED_NO_EXTRA_OPTIONS))
    return run_programs(f"{HIDE_OPTIONAL}\nimport torch", programs)


@pytest.mark.parametrize("package", [opd, diagnostics])
def test_the_exported_names_are_these(package: ModuleType) -> None:
    names = EXPORTS[package.__name__]
    assert set(package.__all__) == set(package.MODULES) == set(dir(package)) == names
    assert len(package.__all__) == len(names)
    body = ast.parse(Path(str(package.__file__)).read_text()).body
    guarded = next(node for node in body if isinstance(node, ast.If))
    for_checkers = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_checkers == package.MODULES, "what type checkers see is what is imported"
    assert STATEMENT in " ".join((package.__doc__ or "").split())
    with pytest.raises(AttributeError, match="has no attribute 'magic'"):
        _ = package.magic


def test_the_documentation_says_what_is_stable() -> None:
    assert STATEMENT in " ".join((ROOT / "docs" / "architecture.md").read_text().split())


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_name_is_documented_and_annotated(package: ModuleType, name: str) -> None:
    value = getattr(package, name)
    assert value is getattr(import_module(package.MODULES[name]), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == package.MODULES[name], "exported from where it is defined"
        assert len(inspect.getdoc(value) or "") > 20
        function = value.__init__ if inspect.isclass(value) else value
        if inspect.isfunction(function) and not getattr(value, "_is_protocol", False):
            signature = inspect.signature(function)
            assert signature.return_annotation is not inspect.Signature.empty
            for parameter in [*signature.parameters.values()][inspect.isclass(value) :]:
                assert parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("package", ["opd", "diagnostics"])
def test_importing_the_package_loads_nothing_heavy(package: str) -> None:
    program = f"import sys, {package}\ndir({package})\nprint(*sys.modules)"
    (ended,) = run_programs("", [program]).values()
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert package in loaded
    assert not loaded & {"torch", "numpy", *OPTIONAL}


def test_diagnostics_needs_its_base_requirements_only(without_extras: dict[str, Ended]) -> None:
    assert json.loads(without_extras[IMPORT_ALL].stdout) == NEEDS_MORE


@pytest.mark.parametrize("name", NEED_NO_EXTRA)
def test_objectives_need_no_extra(name: str, without_extras: dict[str, Ended]) -> None:
    ended = without_extras[import_program(name)]
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize("program", MISSING)
def test_a_missing_package_names_the_extra(program: str, without_extras: dict[str, Ended]) -> None:
    assert without_extras[program].code == 1
    assert MISSING[program] in without_extras[program].stderr


@pytest.mark.parametrize("words", MISSING_FOR_COMMANDS)
def test_a_command_names_the_extra(words: str, without_extras: dict[str, Ended]) -> None:
    ended = without_extras[command_program(words)]
    assert ended.code == 1
    assert ended.stderr.strip() == MISSING_FOR_COMMANDS[words]


@pytest.mark.parametrize("words", NEED_NO_EXTRA_OPTIONS)
def test_these_options_need_no_extra(words: str, without_extras: dict[str, Ended]) -> None:
    ended = without_extras[command_program(words)]
    assert ended.code == 0, ended.stderr
    assert ended.stdout


def test_the_version_is_that_of_pyproject() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert opd.__version__ == project["version"]
    for file in ROOT.glob("*/**/*.py"):
        if file.relative_to(ROOT).parts[0] in EXPORTS:
            assert f'"{project["version"]}"' not in file.read_text(), file
