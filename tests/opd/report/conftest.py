"""A short run, and a live server of its copy, that the tests of the report share."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd.report.server import HOST, make_server
from opd.training.train import train
from tests.helpers.runs import settings


@pytest.fixture(scope="session")
def run(tiny_pair, tmp_path_factory) -> Path:
    """Train a short run that saves the batch of every step."""
    folder = tmp_path_factory.mktemp("report") / "run"
    return train(settings(tiny_pair, folder, steps=3, save_batch_every=1, eval_every=1)).folder


@pytest.fixture
def server(run: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "live"
    shutil.copytree(run, folder)
    http_server = make_server([folder], 1000, port=0)
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    yield f"http://{HOST}:{http_server.server_address[1]}", folder
    http_server.shutdown()
    http_server.server_close()
