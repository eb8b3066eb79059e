"""The setting `prefixes`: its forms, its schedule, and what it refuses."""

import pytest

from diagnostics.errors import InvalidInput
from opd.config.prefixes import Prefixes, parse_prefixes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("student", Prefixes()),
        ("teacher", Prefixes(partner="teacher", first_share=0, last_share=0)),
        ("dataset", Prefixes(partner="dataset", first_share=0, last_share=0)),
        ("mixed:0.25", Prefixes(partner="teacher", first_share=0.25, last_share=0.25)),
        ("mixed:.5:dataset", Prefixes(partner="dataset", first_share=0.5, last_share=0.5)),
        ("mixed:0-1", Prefixes(partner="teacher", first_share=0, last_share=1)),
        ("mixed:1-0.5:dataset", Prefixes(partner="dataset", first_share=1, last_share=0.5)),
        ("mixed:1e-1-1", Prefixes(partner="teacher", first_share=0.1, last_share=1)),
        ("replay:3", Prefixes(replay_age=3)),
    ],
)
def test_every_form(text: str, expected: Prefixes) -> None:
    assert parse_prefixes(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Student", "'Student'; it must be student, teacher, dataset, mixed:SHARE"),
        ("mixed", "it must be"),
        ("mixed:", "it must be"),
        ("mixed:-0.5", "it must be"),
        ("mixed:nan", "it must be"),
        ("mixed:0.5:student", "it must be"),
        ("mixed:1.5", r"must lie in \[0, 1\]"),
        ("mixed:0.5-2", r"must lie in \[0, 1\]"),
        ("mixed:1", "mixes nothing; set it to student"),
        ("mixed:0", "mixes nothing; set it to teacher"),
        ("mixed:0:dataset", "mixes nothing; set it to dataset"),
        ("replay:0", "uses responses once; set it to student"),
        ("replay:1.5", "it must be"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_prefixes(text)


def test_the_share_is_linear_from_the_first_step_to_the_last() -> None:
    falling = parse_prefixes("mixed:1-0.2")
    assert [falling.own_share(step, 5) for step in range(5)] == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2]
    )
    assert falling.own_share(7, 5) == pytest.approx(0.2), "a step beyond a plan that was shortened"
    assert falling.own_share(0, 1) == 1
    assert parse_prefixes("mixed:0.3").own_share(9, 10) == pytest.approx(0.3)
    assert parse_prefixes("teacher").own_share(0, 10) == 0
    assert parse_prefixes("replay:2").own_share(3, 10) == 1
