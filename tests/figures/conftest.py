"""Run folders that figures are drawn from."""

from pathlib import Path

import pytest

from tests.helpers.records.saved_runs import write_runs


@pytest.fixture(scope="session")
def saved_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_runs(tmp_path_factory.mktemp("runs"))
