"""Every loss of the bank against the audit: zero misses, zero false verdicts, and seconds."""

import time
from collections import Counter
from pathlib import Path

import pytest

from opd.objectives.audit.audit import audit
from opd.objectives.audit.card import FAULTS
from tests.opd.objectives.audit.bank import right, right_sampled
from tests.opd.objectives.audit.bank.claims import REFUTED, TRUE
from tests.opd.objectives.audit.bank.entry import FAULTY, RIGHT, Faulty, Right
from tests.opd.objectives.audit.bank.faulty import (
    elsewhere,
    layout,
    numbers,
    positions,
    teacher,
    vanishing,
)

MODULES = (
    right,
    right_sampled,
    *(elsewhere, layout, numbers, positions, teacher, vanishing),
)
SECONDS = 30.0
FOUND: Counter[tuple[str, str]] = Counter()
"""Pairs of what a loss is and what the audit says -> losses, for the confusion matrix."""


@pytest.fixture(scope="module", autouse=True)
def confusion_matrix():
    """Print how many losses of each kind were said to have which fault."""
    yield
    for (expected, found), count in sorted(FOUND.items()):
        print(f"{expected:>24} -> {found:<24} {count}")


@pytest.mark.parametrize("entry", RIGHT, ids=lambda x: x.function.__name__)
def test_right_loss_has_its_target_and_no_fault(entry: Right) -> None:
    begin = time.process_time()
    card = audit(entry.function, faults_only=not entry.caveats)
    seconds = time.process_time() - begin
    FOUND["right", card.verdict] += 1
    assert card.faults == [], card.evidence
    assert sorted(card.warnings) == sorted(entry.warnings), card.evidence
    assert card.verdict == entry.verdict
    assert all(part in card.target.name for part in entry.target), card.target
    assert {*entry.caveats} <= {*card.caveats}
    assert seconds < SECONDS


@pytest.mark.parametrize("entry", FAULTY, ids=lambda x: x.function.__name__)
def test_faulty_loss_has_its_fault(entry: Faulty) -> None:
    card = audit(entry.function, faults_only=entry.code != "off_teacher_fixed_point")
    found = entry.code if entry.code in card.faults else (card.faults or [card.verdict])[0]
    FOUND[entry.code, found] += 1
    assert card.verdict == "faulty"
    assert entry.code in card.faults, card.evidence
    assert card.exit_status == 1


@pytest.mark.parametrize(("loss", "claim"), REFUTED, ids=lambda x: getattr(x, "__name__", x))
def test_false_claim_is_the_verdict_without_a_code(loss, claim: str) -> None:
    card = audit(loss, claims=claim, faults_only=True)
    assert (card.verdict, card.faults) == ("faulty", [])
    assert claim in card.evidence["remark_claim"]


@pytest.mark.parametrize(("loss", "claim"), TRUE, ids=lambda x: getattr(x, "__name__", x))
def test_true_claim_leaves_the_verdict(loss, claim: str) -> None:
    assert audit(loss, claims=claim, faults_only=True).verdict == "ok"


def test_bank_is_large_and_every_code_occurs_in_it() -> None:
    assert len(RIGHT) >= 20
    assert len(FAULTY) >= 40
    assert {entry.code for entry in FAULTY} == {*FAULTS}
    names = [entry.function.__name__ for entry in (*RIGHT, *FAULTY)]
    assert len(names) == len(set(names))


def test_bank_uses_none_of_our_code() -> None:
    for module in MODULES:
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        lines = [x for x in text.splitlines() if x.startswith(("import ", "from "))]
        assert all(x.split()[1].split(".")[0] in ("math", "torch", "tests") for x in lines), lines
