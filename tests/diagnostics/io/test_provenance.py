"""The recorded commit is that of the packages or unknown, not of an enclosing repository."""

import shutil
import subprocess
from pathlib import Path

import pytest

from diagnostics.io.provenance import PACKAGES, ROOT, code_state, source_hash


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository that contains two packages with these names."""
    root = tmp_path / "checkout"
    for name in ("opd", "diagnostics"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
        (root / name / "a.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def test_a_checkout_has_its_commit_and_what_changed_in_all_packages(checkout: Path) -> None:
    clean = code_state(checkout)
    assert clean.commit == git(checkout, "rev-parse", "HEAD").strip()
    assert clean.changed_files == ()
    assert clean.diff == ""
    (checkout / "diagnostics" / "a.py").write_text("x = 2\n")
    (checkout / "notes.txt").write_text("of no package")
    modified = code_state(checkout)
    assert modified.commit == clean.commit
    assert modified.changed_files == ("diagnostics/a.py",)
    assert "+x = 2" in modified.diff
    assert modified.source != clean.source


def test_an_installed_package_does_not_take_the_commit_of_the_repository_around_it(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is installed in a virtual environment inside a user's own repository."""
    installed = checkout / ".venv" / "site-packages"
    for name in ("opd", "diagnostics"):
        shutil.copytree(checkout / name, installed / name)
    state = code_state(installed)
    assert state.commit == "unknown"
    assert state.diff == ""
    assert state.source == source_hash(checkout)  # the same files
    outside_checkout = shutil.copytree(installed, tmp_path / "alone")
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))  # as in a hook of another repository
    assert code_state(outside_checkout).commit == "unknown"
    assert code_state(checkout).commit == git(checkout, "rev-parse", "HEAD").strip()


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_state().commit == "unknown"
    assert len(code_state().source) == 16


def test_the_packages_are_all_that_there_are() -> None:
    package_names = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert package_names == set(PACKAGES)
