"""One-line mutations of the objectives and of the exact engine: a test must catch each."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType

import pytest

from opd.objectives import catalogue, credit
from synthetic import estimators
from tests.repo.mutations.exact import EXACT_MUTATIONS, check_moments
from tests.repo.mutations.mutate import mutate
from tests.repo.mutations.objectives import OBJECTIVE_MUTATIONS

ALL = (*OBJECTIVE_MUTATIONS, *EXACT_MUTATIONS)
MUTATIONS = [
    pytest.param(x.module, line, x.oracles, id=f"{x.module.__name__}: {name}")
    for x in ALL
    for name, line in x.lines.items()
]


def check(oracles: Iterable[Callable[[], object]]) -> None:
    for oracle in oracles:
        oracle()


@pytest.mark.parametrize(("module", "line", "oracles"), MUTATIONS)
def test_a_mutation_is_caught(
    module: ModuleType,
    line: tuple[str, str],
    oracles: tuple[Callable[[], object], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutate(module, line, monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check(oracles)


def test_a_wrong_row_of_the_table_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later costs as sampled instead of their mean: the same mean gradient, more noise."""
    row = replace(catalogue.OBJECTIVES["full_reverse_kl"], later_cost=credit.SAMPLED_COST)
    monkeypatch.setitem(estimators.ESTIMATORS, "rb_all", estimators.Estimator(objective=row))
    with pytest.raises(AssertionError):
        check_moments("rb_all")()


def test_the_originals_pass() -> None:
    check_moments("rb_all")()
    for mutations in ALL:
        check(mutations.oracles)
