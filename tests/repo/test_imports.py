"""The architecture: who may import whom, and what the command line costs before it works."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes.bare_process import run_programs

PACKAGES = ("diagnostics", "figures", "opd", "synthetic")
PUBLIC = ("diagnostics", "opd")
"""Packages that export names; see test_public_api.py."""


def imported(file: Path) -> set[str]:
    """Return the full names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_nothing_else(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 20
    for file in files:
        if file.name == "__init__.py" and file.parent.name not in PUBLIC:
            body = ast.parse(file.read_text()).body
            assert len(body) == 1, f"{file} holds more than its docstring"
            assert isinstance(body[0], ast.Expr), f"{file} has no docstring"
        if package != "opd":
            roots = {name.split(".")[0] for name in imported(file)}
            assert "transformers" not in roots, f"{file} imports transformers"


def test_the_study_uses_nothing_of_the_trainer_but_its_objectives() -> None:
    for file in sorted((ROOT / "synthetic").rglob("*.py")):
        for name in imported(file):
            if name.split(".")[0] == "opd":
                assert name.startswith("opd.objectives"), f"{file} imports {name}"


TORCH = "import torch"
HEAVY = {
    (
        "import opd.cli.main, opd.config.settings, opd.config.recipes, opd.runs.run_folder; "
        "import opd.data.chain_task, opd.tokens.mask_rules, opd.analysis.doctor"
    ): {"torch", "pandas"},
    "import diagnostics.stats, diagnostics.records.run_tables": {"torch", "transformers"},
}
"""Statement -> packages that it must not load."""

HEAVY_BESIDE_TORCH = {
    "import opd.objectives.factory, diagnostics.monitor": {"transformers", "pandas", "matplotlib"},
    (
        "import diagnostics.adapters.trl, diagnostics.adapters.verl, "
        "diagnostics.records.reader, diagnostics.records.writer"
    ): {"transformers", "trl", "verl", "pyarrow", "pandas"},
    "import synthetic.exact.moments, synthetic.sampling.trajectories": {
        "transformers",
        "matplotlib",
    },
}
"""The same of statements that load torch."""


def loaded_by(preparation: str, statements: Iterable[str]) -> list[set[str]]:
    """Top-level modules after each statement, in forks of a fresh interpreter."""
    names = "\nimport sys; print(*{m.split('.')[0] for m in sys.modules})"
    ended = run_programs(preparation, [statement + names for statement in statements])
    assert all(x.code == 0 for x in ended.values()), ended
    return [set(x.stdout.splitlines()[-1].split()) for x in ended.values()]


@pytest.mark.parametrize(("preparation", "statements"), [("", HEAVY), (TORCH, HEAVY_BESIDE_TORCH)])
def test_heavy_packages_are_loaded_only_where_used(
    preparation: str, statements: dict[str, set[str]]
) -> None:
    loaded = loaded_by(preparation, statements)
    for (statement, without), names in zip(statements.items(), loaded, strict=True):
        assert not names & without, statement


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["train", "--help"],
        ["eval", "--help"],
        ["study", "--help"],
        ["diagnose", "--help"],
    ],
)
def test_help_loads_no_torch(words: list[str]) -> None:
    program = f"import sys; sys.argv = ['opd', *{words!r}]\nfrom opd.cli.main import main\n"
    program += "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    (names,) = loaded_by("", [program])
    assert "torch" not in names


def test_an_unknown_command_says_what_there_is() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "opd.cli.main", "trian"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert "unknown command 'trian'" in process.stderr
    assert "train" in process.stderr
    assert "Traceback" not in process.stderr
