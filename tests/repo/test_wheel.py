"""The wheel in an environment of its own, used in a folder whose names hide ours if they may."""

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from diagnostics.io.provenance import PACKAGES, source_hash
from tests.helpers.paths import EXAMPLES, ROOT
from tests.repo.test_public_api import HIDE_OPTIONAL

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE_ONLY = {"OPD_TEST_BASE_ONLY": "1"}
HIDING = f"import os\nif 'OPD_TEST_BASE_ONLY' in os.environ:\n    exec({HIDE_OPTIONAL!r})\n"
"""Module of the environment that hides the packages of the extras where BASE_ONLY is set."""

MONITOR = """
import torch
from diagnostics import Monitor, from_logits

torch.manual_seed(0)
student, teacher = torch.randn(2, 4, 6, 8)
tokens, mask = student.argmax(-1), torch.ones(4, 6, dtype=torch.bool)
batch = from_logits(tokens, mask, student, teacher, prompt=torch.arange(4), ended=mask[:, 0], k=3)
row = Monitor()(0, [batch.validate()])
p, q = student.log_softmax(-1), teacher.log_softmax(-1)
torch.testing.assert_close(row["divergence/reverse_kl"], float((p.exp() * (p - q)).sum(-1).mean()))
"""

CODE_STATE = """
import dataclasses, json
from diagnostics.io.provenance import code_state
print(json.dumps(dataclasses.asdict(code_state())))
"""

PROCESSES = """
from opd.experiments.subcommand import run_opd
from opd.data.grading.worker_process import GraderWorker
run_opd("--version")
with_module = GraderWorker(5.0, "my_grader:score")
print(with_module("a", "a"), with_module("a", "b"))
with_module.end()
"""


def tracked_files(*folders: str) -> list[str]:
    """Return the files that git tracks, or would track, in folders of the repository."""
    line = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    names = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.splitlines() if (ROOT / name).is_file()]


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, inside a repository of somebody else."""

    wheel: Path
    packages: Path
    """Folder of the installed packages."""
    folder: Path
    """Working directory with folders named as our packages."""

    def run(
        self, *words: str, environment: dict[str, str] | None = None, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the working directory."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GIT_"))}
        line = [str(self.folder.parent / "env" / "bin" / words[0]), *words[1:]]
        result = subprocess.run(
            line,
            cwd=self.folder,
            env=variables | (environment or {}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code, result.stderr
        return result


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    source = tmp_path_factory.mktemp("source")
    for name in tracked_files(*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    line = [sys.executable, "-P", "-c", build, str(source.parent)]
    subprocess.run(line, cwd=source, capture_output=True, check=True)
    (wheel,) = source.parent.glob("*.whl")

    repository = tmp_path_factory.mktemp("repository")
    env, folder = repository / "env", repository / "work"
    venv.create(env, symlinks=True)
    (packages,) = env.glob("lib/python*/site-packages")
    # the programs below compile what they import, a small part of the packages
    options = ("--no-deps", "--no-index", "--no-compile")
    pip = ("-m", "pip", "--python", str(env), "install", *options, str(wheel))
    subprocess.run([sys.executable, *pip], capture_output=True, check=True)
    # the requirements are those of the running environment, whose own .pth files do not count here
    (packages / "requirements.pth").write_text(
        f"{sysconfig.get_path('purelib')}\nimport hide_optional\n"
    )
    (packages / "hide_optional.py").write_text(HIDING)
    for package in PACKAGES:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise RuntimeError('a folder of the user')")
    (folder / "my_grader.py").write_text(
        "def score(response, answer):\n    return response == answer"
    )
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "work"), (*identity, "commit", "-qm", "theirs")):
        subprocess.run(["git", *words], cwd=repository, capture_output=True, check=True)
    return Installed(wheel, packages, folder)


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(
    installed: Installed,
) -> None:
    names = {x for x in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in x}
    tracked = {name for name in tracked_files(*PACKAGES) if not name.startswith("figures/shown/")}
    assert names == tracked
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {"opd/report/assets/report.html", "figures/data/training.csv"} <= names


def test_the_metadata_are_complete(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        (name,) = (x for x in archive.namelist() if x.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "opdlab developers"
    assert metadata["Keywords"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert "# opdlab" in metadata.get_payload()
    requirements = metadata.get_all("Requires-Dist")
    base = {x.partition(">")[0] for x in requirements if "extra ==" not in x}
    assert base == {"torch", "numpy", "safetensors"}
    assert {"train", "study", "figures", "all", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_the_command_and_the_monitor_need_the_base_requirements_only(installed: Installed) -> None:
    assert "usage: opd COMMAND" in installed.run("opd", "--help", environment=BASE_ONLY).stdout
    version = installed.run("opd", "--version", environment=BASE_ONLY).stdout
    assert version == f"opdlab {PROJECT['version']}\n"
    installed.run("python", "-P", "-c", MONITOR, environment=BASE_ONLY)
    message = installed.run("opd", "train", "lab", environment=BASE_ONLY, code=1).stderr
    assert message == "opd train: this command needs tyro: pip install 'opdlab[train]'\n"


def test_the_training_example_runs(installed: Installed, tiny_pair: tuple[Path, Path]) -> None:
    (installed.folder / "lab-tiny").mkdir()
    for role, path in zip(("student", "teacher"), tiny_pair, strict=True):
        (installed.folder / "lab-tiny" / role).symlink_to(path)
    example = (EXAMPLES / "train_from_python.py").read_text() + "print(float(loss))\n"
    example = example.replace("policy_loss(pair.student, batch, objective).backward()", TRACED)
    loss = installed.run("python", "-P", "-c", example).stdout
    assert 0 < float(loss) < 10


TRACED = """loss = policy_loss(pair.student, batch, objective)
    loss.backward()"""


def test_provenance_is_the_version_and_not_the_commit_of_another_repository(
    installed: Installed,
) -> None:
    state = json.loads(installed.run("python", "-P", "-c", CODE_STATE).stdout)
    assert state == {
        "commit": "unknown",
        "version": PROJECT["version"],
        "source": source_hash(ROOT),
        "changed_files": [],
        "diff": "",
    }


def test_started_processes_import_our_packages(installed: Installed) -> None:
    result = installed.run("python", "-P", "-c", PROCESSES)
    assert result.stdout == "{'score': 1.0} {'score': 0.0}\n"
    assert f"opdlab {PROJECT['version']}" in result.stderr


def test_recorded_tables_are_read_and_never_written(installed: Installed) -> None:
    data = installed.packages / "figures" / "data"
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    study = ("study", "run", "estimators", "--preset", "smoke", "--jobs", "2", "--update-figures")
    message = installed.run("opd", *study, code=1).stderr
    assert f"opdlab is installed in {installed.packages}" in message
    assert "add --data-folder" in message
    installed.run("opd", *study, "--data-folder", "mine")
    assert (
        json.loads((installed.folder / "mine" / "estimators.json").read_text())["preset"] == "smoke"
    )
    assert "estimators: " in installed.run("opd", "study", "show", "estimators").stdout
    installed.run("opd", "figures", "estimators", "--out", "drawn")
    assert (installed.folder / "drawn" / "estimators.png").stat().st_size > 10_000
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before
