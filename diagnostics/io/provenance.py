"""Code version of a result: the git commit if known, and always a hash of the sources."""

import hashlib
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Folder that contains the packages: the checkout or the installation folder."""
PACKAGES = ("diagnostics", "figures", "opd", "synthetic")
DISTRIBUTION = "opdlab"


@dataclass(frozen=True)
class CodeState:
    """Version of the packages' code."""

    commit: str
    """"unknown" if git does not track the sources, as for an installed package in any folder."""
    version: str
    """Version of the installed distribution, or "unknown"."""
    source: str
    """Hash of all Python files."""
    changed_files: tuple[str, ...]
    """Files that differ from the commit."""
    diff: str
    """Text of `git diff` against the commit."""


def code_state(root: Path = ROOT) -> CodeState:
    """Return the version of the packages' code below `root`."""
    commit = _git(root, "rev-parse", "HEAD") if _tracked(root) else ""
    changed_files, diff = "", ""
    if commit:
        changed_files = _git(root, "diff", "--name-only", "HEAD", "--", *PACKAGES)
        diff = _git(root, "diff", "HEAD", "--", *(f"{name}/*.py" for name in PACKAGES))
    return CodeState(
        commit=commit.strip() or "unknown",
        version=package_version(DISTRIBUTION),
        source=source_hash(root),
        changed_files=tuple(changed_files.splitlines()),
        diff=diff,
    )


@cache
def package_version(name: str) -> str:
    """Return the version of an installed distribution, or "unknown"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def source_hash(root: Path = ROOT) -> str:
    """Return a 16-digit hex hash of the paths and contents of the packages' Python files."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def _tracked(root: Path) -> bool:
    """Return whether git tracks the packages themselves, not merely a folder that contains them."""
    files = [f"{name}/__init__.py" for name in PACKAGES if (root / name).is_dir()]
    return bool(files) and bool(_git(root, "ls-files", "--error-unmatch", "--", *files))


def _git(folder: Path, *arguments: str) -> str:
    """Return the output of git; empty without git, without a repository, or if the command fails.

    Variables such as GIT_DIR, which git sets for its hooks, would select another repository, so
    they are removed.

    Args:
        folder: Working directory.
        *arguments: Arguments of git.

    Returns:
        Standard output.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout
