"""The commit in a record is that of this code, or unknown; never of a repository around it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from diagnostics.io.provenance import PACKAGES, ROOT, code_state, source_hash


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    line = ["git", *who, *words]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with two packages of these names in it."""
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
    assert clean.changed == ()
    assert clean.difference == ""
    (checkout / "diagnostics" / "a.py").write_text("x = 2\n")
    (checkout / "notes.txt").write_text("of no package")
    changed = code_state(checkout)
    assert changed.commit == clean.commit
    assert changed.changed == ("diagnostics/a.py",)
    assert "+x = 2" in changed.difference
    assert changed.source != clean.source


def test_an_installed_package_does_not_take_the_commit_of_the_repository_around_it(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a virtual environment inside a user's own repository."""
    installed = checkout / ".venv" / "site-packages"
    for name in ("opd", "diagnostics"):
        shutil.copytree(checkout / name, installed / name)
    state = code_state(installed)
    assert state.commit == "unknown"
    assert state.difference == ""
    assert state.source == source_hash(checkout)  # the same files
    alone = shutil.copytree(installed, tmp_path / "alone")
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))  # as in a hook of another repository
    assert code_state(alone).commit == "unknown"
    assert code_state(checkout).commit == git(checkout, "rev-parse", "HEAD").strip()


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_state().commit == "unknown"
    assert len(code_state().source) == 16


def test_the_packages_are_all_that_there_are() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found == set(PACKAGES)
