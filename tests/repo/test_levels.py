"""The levels of each package: an import, lazy ones included, goes to a lower level only."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

LEVELS = {
    "diagnostics": (
        {"terminal"},
        {"errors", "missing", "ragged"},
        {"io"},
        {"stats", "tensor_fields", "formats"},
        {"batch"},
        {"concatenation"},
        {"core"},
        {"metrics", "gradients", "records"},
        {"alarms"},
        {"catalogue"},
        {"monitor"},
        {"adapters"},
    ),
    "opd": (
        {"objectives", "runtime", "serving", "tokens"},
        {"config", "data", "integrations"},
        {"models", "runs"},
        {"report", "rollouts", "teachers"},
        {"envs", "scoring"},
        {"evaluation", "library"},
        {"training"},
        {"analysis"},
        {"lab"},
        {"cli", "experiments"},
    ),
    "synthetic": (
        {"seeds", "worlds", "toy", "analysis"},
        {"sampling"},
        {"estimators"},
        {"exact"},
        {"learning"},
        {"experiments"},
        {"runner"},
    ),
    "figures": (
        {"style", "labels", "registry", "collect"},
        {"study", "runs", "claims", "regimes"},
        {"paper"},
        {"__main__"},
    ),
}
"""Folders and files at the top of each package, lowest level first."""

PACKAGES = {
    "diagnostics": set[str](),
    "figures": {"diagnostics"},
    "opd": {"diagnostics"},
    "synthetic": {"diagnostics", "opd"},
}
"""Package -> the packages of ours that it may import."""


def package_modules(package: str) -> dict[str, Path]:
    """Return the modules of a package by dotted name, its `__init__` files included."""
    modules = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = {name: path for package in PACKAGES for name, path in package_modules(package).items()}


@cache
def imported_modules(path: Path) -> list[str]:
    """Return the modules of ours that a file imports anywhere, `from folder import module` too."""
    return list(read_imports(path))


def read_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full_name = f"{node.module}.{alias.name}"
                name = full_name if full_name in MODULES else node.module
                if name in MODULES:
                    yield name


def level_of(module: str) -> int:
    """Return the level of a module's folder or file in its package."""
    package, _, path = module.partition(".")
    part = path.partition(".")[0]
    return next(i for i, names in enumerate(LEVELS[package]) if part in names)


@pytest.mark.parametrize("package", LEVELS)
def test_every_folder_and_file_has_one_level(package: str) -> None:
    parts = {name.split(".")[1] for name in package_modules(package) if "." in name}
    names = [name for level in LEVELS[package] for name in level]
    assert len(names) == len(set(names))
    assert parts == set(names)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down(package: str) -> None:
    num_imports = 0
    for module, path in package_modules(package).items():
        for target in imported_modules(path):
            if target.split(".")[0] != package:
                assert target.split(".")[0] in PACKAGES[package], f"{module} imports {target}"
            elif target != package and module != package:
                num_imports += 1
                same_part = target.split(".")[1] == module.split(".")[1]
                assert same_part or level_of(target) < level_of(module), (
                    f"{module} imports {target}, which is not on a lower level"
                )
    assert num_imports > 20


def test_no_modules_import_each_other() -> None:
    """A circle of imports would show as a module that is imported while it is being imported."""
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in finished:
            for target in imported_modules(MODULES[module]):
                if target != module and MODULES[target].name != "__init__.py":
                    visit(target, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("opd.models.loading", "opd.training.step"),
        ("diagnostics.metrics.signal", "diagnostics.monitor"),
        ("synthetic.worlds.mdp", "synthetic.exact.moments"),
    ],
)
def test_an_upward_import_would_be_found(module: str, target: str) -> None:
    assert module in MODULES
    assert target in MODULES
    assert level_of(target) >= level_of(module)


def test_no_folder_lists_much_more_than_twenty_entries() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        markers = ("__pycache__", "py.typed")
        entries = [path for path in folder.iterdir() if path.name not in markers]
        assert len(entries) <= 22, f"{folder} has {len(entries)} entries"
