"""Which code made a result: the commit where it is known, and a hash of the sources in any case."""

import hashlib
import os
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the packages: the checkout, or the folder that packages are installed in."""
PACKAGES = ("diagnostics", "figures", "opd", "synthetic")
DISTRIBUTION = "opdlab"


@dataclass(frozen=True)
class CodeState:
    """The code of the packages.

    commit: "unknown" where the sources are not tracked by git, as those of an installed package,
    wherever it was installed. version: of the installed distribution, or "unknown". source: hash
    of all Python files. changed: files that differ from the commit; difference: in what.
    """

    commit: str
    version: str
    source: str
    changed: tuple[str, ...]
    difference: str


def code_state(root: Path = ROOT) -> CodeState:
    """The state of the packages' code below `root`."""
    commit = _git(root, "rev-parse", "HEAD") if _tracked(root) else ""
    changed, difference = "", ""
    if commit:
        changed = _git(root, "diff", "--name-only", "HEAD", "--", *PACKAGES)
        difference = _git(root, "diff", "HEAD", "--", *(f"{name}/*.py" for name in PACKAGES))
    return CodeState(
        commit=commit.strip() or "unknown",
        version=package_version(DISTRIBUTION),
        source=source_hash(root),
        changed=tuple(changed.splitlines()),
        difference=difference,
    )


def package_version(name: str) -> str:
    """The version of an installed distribution, or "unknown"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def source_hash(root: Path = ROOT) -> str:
    """Hash of the paths and contents of the packages' Python files; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in PACKAGES:
        for path in sorted((root / name).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def _tracked(root: Path) -> bool:
    """Whether git tracks the packages themselves, and not merely a folder that they lie in."""
    files = [f"{name}/__init__.py" for name in PACKAGES if (root / name).is_dir()]
    return bool(files) and bool(_git(root, "ls-files", "--error-unmatch", "--", *files))


def _git(folder: Path, *arguments: str) -> str:
    """What git prints, or nothing where there is no git, no repository or no such thing.

    Variables such as GIT_DIR, which git sets for its hooks, name another repository.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
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
    return done.stdout
