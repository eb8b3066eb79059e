"""The process of a command."""

import gc
import sys
from collections.abc import Iterator

import pytest

from opd.cli.main import main


@pytest.fixture
def pythons_thresholds() -> Iterator[None]:
    """Let garbage be searched for as often as in a new interpreter."""
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*thresholds)


def num_searches() -> int:
    """Allocate what stays, as an import does; returns the searches for garbage meanwhile."""
    before = sum(generation["collections"] for generation in gc.get_stats())
    allocated = [[] for _ in range(15_000)]
    assert len(allocated) == 15_000
    return sum(generation["collections"] for generation in gc.get_stats()) - before


@pytest.mark.usefixtures("pythons_thresholds")
def test_imports_of_a_command_are_not_searched_for_garbage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert num_searches() >= 15
    monkeypatch.setattr(sys, "argv", ["opd", "--version"])
    main()
    assert capsys.readouterr().out.startswith("opdlab ")
    assert num_searches() <= 1
    assert gc.isenabled()
