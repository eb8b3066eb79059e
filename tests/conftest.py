"""A tiny random pair for all tests, tests of engines, and the list of what may be skipped."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from opd.cli.main import GARBAGE_THRESHOLDS
from tests.helpers.warm_process import skip_file_sync

pytest_plugins = ["pytester"]

ENGINES = {
    "vllm": "vllm",
    "verl": "verl",
    "alfworld": "fast_downward",
    "harness": "lm_eval",
}
"""Marks of tests that need an engine, and the package that shows that it is installed.

`make test` leaves them out; `make test-engines` runs them, each in its own environment.
"""

LONG_FILES = (
    "benchmarks",
    "diagnostics/adapters",
    "diagnostics/alarms/test_alarms.py",
    "diagnostics/gradients",
    "diagnostics/io/test_atomic.py",
    "diagnostics/records/test_token_dumps.py",
    "diagnostics/test_monitor.py",
    "figures/runs",
    "figures/test_paper_figures.py",
    "figures/test_study_figures.py",
    "opd/analysis",
    "opd/data/grading/test_worker_process.py",
    "opd/data/test_files.py",
    "opd/envs/test_game_runs.py",
    "opd/evaluation",
    "opd/experiments",
    "opd/integrations",
    "opd/lab",
    "opd/models",
    "opd/report",
    "opd/rollouts",
    "opd/runs",
    "opd/serving",
    "opd/teachers",
    "opd/training",
    "repo/test_examples.py",
    "repo/mutations",
    "repo/test_wheel.py",
    "repo/test_recipes.py",
    "synthetic/exact/test_moments.py",
    "synthetic/experiments",
    "synthetic/runner",
    "synthetic/toy",
)
"""Tests that train models, start processes or draw pictures: `make test-fast` leaves them out."""

LONGEST_FILES = (
    "opd/experiments/test_demo.py",
    "opd/training/test_distributed.py",
    "figures/test_print.py",
    "opd/objectives/audit/test_bank.py",
    "opd/report/test_browser.py",
    "repo/test_wheel.py",
    "benchmarks/test_gpu.py",
    "opd/training/test_prefetch_runs.py",
    "opd/training/test_faults.py",
    "synthetic/runner/test_backends.py",
    "opd/report/test_browser_curves.py",
    "synthetic/experiments/test_experiments.py",
    "opd/analysis/plan/test_plan.py",
    "opd/training/teacher_view/test_view_runs.py",
    "opd/rollouts/test_vllm_servers.py",
    "opd/teachers/test_client_training.py",
    "opd/runs/test_restart.py",
    "diagnostics/adapters/test_trl_evaluation.py",
    "opd/rollouts/test_vllm_servers_distributed.py",
    "diagnostics/alarms/test_alarms.py",
    "opd/analysis/test_doctor.py",
    "opd/training/test_resume_and_errors.py",
    "opd/training/test_user_functions.py",
    "opd/teachers/test_factory.py",
    "figures/test_paper_figures.py",
    "figures/test_study_figures.py",
    "opd/training/test_multitask.py",
    "opd/training/prefixes/test_score_cache.py",
    "diagnostics/adapters/test_trl_trainers.py",
    "synthetic/runner/test_run.py",
    "opd/training/test_step.py",
    "opd/lab/test_smollm.py",
    "opd/lab/test_family.py",
    "opd/teachers/test_client_faults.py",
    "opd/data/grading/test_worker_process.py",
    "opd/teachers/test_chosen_ids.py",
    "opd/training/prefixes/test_runs.py",
)
"""Files that take longest, longest first: begun first, so that all processes end together."""

EXPECTED_SKIPS: dict[str, str] = {}
"""Name of a test -> why it may be skipped where `--no-new-skips` is given, as in CI."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-new-skips",
        action="store_true",
        help="fail if a test is skipped that EXPECTED_SKIPS in tests/conftest.py does not list",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of LONG_FILES as long, and put those of LONGEST_FILES first."""
    folder = Path(__file__).parent
    long_paths = [folder / name for name in LONG_FILES]
    is_long = {
        path: any(path.is_relative_to(long_path) for long_path in long_paths)
        for path in {item.path for item in items}
    }
    for item in items:
        if is_long[item.path]:
            item.add_marker(pytest.mark.long)
    ranks = {folder / name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark, package in ENGINES.items():
        if item.get_closest_marker(mark) and find_spec(package) is None:
            pytest.skip(f"{mark} is not installed; `make test-engines` installs and tests it")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Name the test after which transformers no longer ties weights: two threads loaded models."""
    if "transformers.modeling_utils" in sys.modules:
        tie_weights = sys.modules["transformers.modeling_utils"].PreTrainedModel.tie_weights
        assert tie_weights.__qualname__ == "PreTrainedModel.tie_weights"


def pytest_configure(config: pytest.Config) -> None:
    skip_file_sync()
    if hasattr(config, "workerinput"):  # an interpreter with torch takes long to be torn down
        atexit.register(os._exit, 0)
    if config.getoption("--no-new-skips") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipCheck(EXPECTED_SKIPS))


class SkipCheck:
    """Fail the session if a test is skipped that is not on the list."""

    def __init__(self, expected: dict[str, str]) -> None:
        self.expected = expected
        self.unexpected: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.check(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.check(report)

    def check(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            name = report.nodeid.rsplit("/", 1)[-1]
            if name not in self.expected:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
                self.unexpected.append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexpected:
            terminalreporter.section("skipped, and not listed in EXPECTED_SKIPS")
            for line in self.unexpected:
                terminalreporter.line(line)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher) folders of models of one layer, half as expensive as two."""
    return save_random_pair(tmp_path_factory.mktemp("pair"), layers=1)


@pytest.fixture(scope="session")
def two_layer_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher) folders, for what could treat layers differently."""
    return save_random_pair(tmp_path_factory.mktemp("deep pair"), layers=2)


def save_random_pair(folder: Path, layers: int) -> tuple[Path, Path]:
    """Save two random models; the student's generation config is hostile on purpose."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from opd.lab.build import make_tokenizer

    for seed, name in enumerate(("student", "teacher")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=len(make_tokenizer()),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=layers,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    max_position_embeddings=256,
                    initializer_range=0.3,
                )
            )
        model.generation_config.repetition_penalty = 1.5
        model.generation_config.top_k = 3
        model.generation_config.do_sample = True
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Search for no garbage while modules are imported, and never in what they have made."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        # late: pytest ends with full searches; bindings report what is not freed before the exit
        atexit.register(gc.unfreeze)
        gc.set_threshold(*GARBAGE_THRESHOLDS)
        gc.enable()
