"""Rules on synthetic rows; alarms of real runs: faults are detected, healthy runs raise none."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults import FAULTS, Fault, format_alarms, make_models, record_rows
from diagnostics.alarms.alarms import Alarm, Alarms, lead_times, replay
from diagnostics.alarms.rules import (
    RULES,
    AlarmRule,
    average,
    combined_z,
    growth,
    rise,
    rules_table,
)
from diagnostics.records.rows import Row

RULES_BY_NAME = {rule.name: rule for rule in RULES}


def rule(**changes: object) -> AlarmRule:
    plain: dict = {"name": "r", "metric": "x", "null": "", "means": "", "remedy": "", "high": 1.0}
    return AlarmRule(**plain | {"min_outside": 1, "window": 1} | changes)


def rows(values: list, name: str = "x", errors: list | None = None) -> list[Row]:
    table: list[Row] = [{"step": i, name: x} for i, x in enumerate(values)]
    for row, error in zip(table, errors or [], strict=False):
        row[name + "_se"] = error
    return table


def steps(values: list, errors: list | None = None, **changes: object) -> list[int]:
    return [alarm.step for alarm in replay(rows(values, errors=errors), [rule(**changes)])]


def test_an_alarm_needs_z_standard_errors_beyond_the_range() -> None:
    assert steps([1.5, 1.5], [0.1, 0.13], z=4.0) == [0]  # 1.5 - 0.4 > 1, 1.5 - 0.52 < 1
    assert steps([1.5, 1.5], [0.13, 0.1], z=4.0) == [1]
    low = {"low": 0.0, "high": math.inf}
    assert steps([-0.5], [0.1], **low) == [0]
    assert steps([-0.5], [0.13], **low) == []
    assert steps([1.01]) == [0], "without an error the value alone counts"
    assert steps([9.0], [None]) == [], "an unknown error is not a reading"


def test_persistence_counts_the_last_readings_and_speaks_once() -> None:
    two = {"min_outside": 2, "window": 3}
    assert steps([2, 0, 0, 2], **two) == []
    assert steps([2, 0, 2], **two) == [2]
    assert steps([0, 2, 2, 2, 2], **two) == [2]
    assert steps([2, 2, 0, 0, 0, 2, 2], **two) == [1, 6], "raised again after it became inactive"


def test_rows_without_the_column_are_no_readings() -> None:
    record = rows([2, 0, 2])
    record.insert(1, {"step": 0.5, "other": 1})
    alarms = Alarms([rule(min_outside=2, window=2), rule(name="o", metric="no")])
    assert [alarms.update(row) for row in record] == [[], [], [], []]
    assert alarms.unwatched == ["o"]
    with pytest.raises(ValueError, match='no column "step"'):
        alarms.update({"x": 1})


def test_null_is_no_reading_unless_the_rule_says_it_is_a_fault() -> None:
    two = {"min_outside": 2, "window": 2}
    for undefined in (None, math.nan):
        assert steps([2, undefined, 2], **two) == [2]
        assert steps([0, undefined], nan_is_outside=True) == [1]
    assert steps([math.inf], nan_is_outside=True) == [0]
    assert steps([0, 1], nan_is_outside=True) == []


def test_a_reference_is_the_average_of_the_first_readings() -> None:
    start = {"num_reference": 2, "high": 0.5, "z": 1.0}
    # reference 2 with error hypot(0.3, 0.4) / 2 = 0.25
    assert steps([1, 3, 2.9], [0.3, 0.4, 0.6], **start) == []  # 0.9 - hypot(0.6, 0.25) = 0.25
    assert steps([1, 3, 3.2], [0.3, 0.4, 0.6], **start) == [2]  # 1.2 - 0.65 > 0.5
    assert rise((3.2, 0.6), (2.0, 0.25)) == pytest.approx((1.2, 0.65))
    assert average([(1.0, 0.3), (3.0, 0.4)]) == pytest.approx((2.0, 0.25))


def test_growth_has_the_linearised_error_of_a_ratio() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(6, 0.1, 200_000), generator.normal(2, 0.05, 200_000)
    value, error = growth((6.0, 0.1), (2.0, 0.05))
    assert value == 3
    assert error == pytest.approx((a / b).std(), rel=0.01)
    assert all(math.isnan(x) for x in growth((1.0, 0.1), (0.0, 0.1)))
    assert steps([0, 9, 9], num_reference=1, compare=growth) == []


def test_z_of_several_steps_is_one_z() -> None:
    samples = np.random.default_rng(1).normal(size=(20_000, 16))
    combined = [combined_z([(float(x), 0.0) for x in row])[0] for row in samples]
    assert np.std(combined) == pytest.approx(1, rel=0.02)
    mild = {"num_pooled": 16, "pool": combined_z, "low": -5.0, "high": 5.0}
    assert steps([1.3] * 14, **mild) == []
    assert steps([1.3] * 16, **mild) == [14]  # 1.3 sqrt(15) > 5
    assert steps([-1.3] * 16, **mild) == [14]


def test_a_rule_that_waits() -> None:
    assert steps([2] * 6, min_readings=4) == [4]
    assert steps([2] * 9, num_pooled=3, num_reference=2, high=-0.5, min_readings=6) == [6]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="min_outside is 3; it must be between 1 and window=2"):
        rule(min_outside=3, window=2)
    with pytest.raises(ValueError, match="num_pooled >= 1"):
        rule(num_pooled=0)
    with pytest.raises(ValueError, match="must be unique"):
        Alarms([rule(), rule()])


def test_a_restart_anywhere_gives_the_same_alarms() -> None:
    generator = np.random.default_rng(2)
    names = {r.metric for r in RULES}
    record = [
        {"step": i} | {name: float(generator.normal(0, 4)) for name in names} for i in range(60)
    ]
    record[30]["loss"] = None
    uninterrupted = Alarms()
    expected = [uninterrupted.update(row) for row in record]
    assert len({a.rule.name for raised in expected for a in raised}) > 8
    for num_rows in (1, 17, 33, 59):
        first, second = Alarms(), Alarms()
        actual = [first.update(row) for row in record[:num_rows]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.active == first.active
        actual += [second.update(row) for row in record[num_rows:]]
        assert actual == expected
        assert second.state_dict() == uninterrupted.state_dict()


def test_replay_takes_the_last_of_rows_that_a_restart_repeated() -> None:
    assert steps([0, 2]) == [1]
    repeated_rows = [*rows([0, 2]), {"step": 1, "x": 0}, {"step": 2, "x": 0}]
    assert replay(repeated_rows, [rule()]) == []


def test_lead_times_count_from_the_first_alarm() -> None:
    alarms = [Alarm(rule(name=n), s, 0, 0) for n, s in (("a", 3), ("b", 8), ("a", 5), ("c", 9))]
    assert lead_times(alarms, 9) == {"a": 6, "b": 1}


def test_a_rule_is_one_sentence_and_stands_alone() -> None:
    """`means` and `remedy` are printed with a full stop appended."""
    for rule in RULES:
        for text in (rule.means, rule.remedy):
            assert text[-1].isalnum() or text[-1] in ")`", rule.name
            assert not text.startswith("as for "), f"{rule.name}: {text}"


def test_an_alarm_says_what_and_what_to_do() -> None:
    (alarm,) = replay(rows([0.9] * 3, "tokens/one_id_signal"))
    text = str(alarm)
    assert text.startswith("step 2, one_token_imbalance: one token id holds most")
    assert "tokens/one_id_signal is 0.9, healthy up to 0.5" in text
    assert "To do: find the id in the token table" in text
    for r in RULES:
        assert f"| {r.name} | {r.tested} |" in rules_table()


@pytest.mark.parametrize(
    ("name", "healthy", "faulty"),
    [
        ("one_token_imbalance", 0.3, 0.6),
        ("special_tokens", 0.0, 0.1),
        ("end_renamed", 0.5, 9.0),
        ("masked_signal", 0.2, 0.7),
        ("repetition", 0.02, 0.4),
        ("budget", 0.5, 1.0),
        ("stale_sampler", 1e-4, 0.05),
        ("dead_gradient", 0.5, 0.0),
        ("skipped", 0.0, 1.0),
        ("not_finite", 0.5, None),
        ("sampler_mismatch", 1.0, -6.0),
        ("teacher_mismatch", -1.0, 6.0),
    ],
)
def test_levels(name: str, healthy: float, faulty: float | None) -> None:
    """A fault from step 10: rules with one reading alarm at once, others at the third reading."""
    r = RULES_BY_NAME[name]
    alarms = replay(rows([healthy] * 10 + [faulty] * 20, r.metric), [r])
    pooled = r.pool is combined_z
    assert [a.step for a in alarms] == ([alarms[0].step] if pooled else [10 + r.min_outside - 1])
    assert 10 <= alarms[0].step < 26
    assert replay(rows([healthy] * (3 if pooled else 40), r.metric), [r]) == []


@pytest.mark.parametrize(
    ("name", "start", "healthy", "faulty"),
    [
        ("drift_support", 0.1, 0.12, 0.2),
        ("drift_kl", 0.5, 0.6, 0.9),
        ("drift_k1", 0.5, 0.6, 0.9),
        ("truncation", 0.3, 0.4, 0.7),
        ("mass_escapes", 0.9, 0.88, 0.8),
        ("no_progress", 0.5, 0.3, 0.5),
        ("reward_falls", 0.6, 0.5, 0.4),
    ],
)
def test_trends(name: str, start: float, healthy: float, faulty: float) -> None:
    r = RULES_BY_NAME[name]
    assert replay(rows([start] * 3 + [healthy] * 60, r.metric), [r]) == []
    assert len(replay(rows([start] * 3 + [faulty] * 60, r.metric), [r])) == 1


SHORT = {
    "top-p 0.9, undeclared": (5, {"sampler_mismatch"}),
    "temperature 0.8, undeclared": (6, {"sampler_mismatch"}),
    "mask shifted by one": (4, {"sampler_mismatch"}),
    "padding counted": (3, {"sampler_mismatch", "teacher_mismatch"}),
    "scored one token late": (3, {"sampler_mismatch", "teacher_mismatch"}),
    "un-normalised top-K": (8, {"mass_escapes", "drift_support"}),
    "teacher's ids one higher": (3, {"special_tokens"}),
    "teacher ends otherwise": (8, {"end_renamed"}),
    "teacher's tag is another": (3, {"special_tokens"}),
    "gradient stopped": (5, {"dead_gradient"}),
}
"""Fault -> steps within which its rules raise an alarm, and these rules."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_models(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def healthy_rows(pair, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Row]]:
    """Rows of runs without a fault, by seed."""
    folder = tmp_path_factory.mktemp("healthy")
    num_steps = {0: 24, 1: 12}
    return {
        seed: record_rows(pair, folder / str(seed), seed, steps, Fault())
        for seed, steps in num_steps.items()
    }


def test_faults_of_real_runs_are_caught_and_healthy_ones_are_not(
    pair, healthy_rows, tmp_path: Path
) -> None:
    raised = {
        name: replay(record_rows(pair, tmp_path / f"fault {i}", 0, num_steps, FAULTS[name]))
        for i, (name, (num_steps, _)) in enumerate(SHORT.items())
    }
    healthy = {f"healthy {seed}": replay(table) for seed, table in healthy_rows.items()}
    print(format_alarms(raised | healthy))
    for name, (_, expected) in SHORT.items():
        assert expected <= {alarm.rule.name for alarm in raised[name]}, name
    assert not any(healthy.values())


def test_stale_weights_are_caught_by_both_rules(pair, tmp_path: Path) -> None:
    alarms = replay(record_rows(pair, tmp_path / "run", 0, 15, FAULTS["stale weights"]))
    assert {"sampler_mismatch", "stale_sampler"} <= {alarm.rule.name for alarm in alarms}


def test_a_gradient_that_does_not_know_the_teacher_is_caught(
    pair, healthy_rows, tmp_path: Path
) -> None:
    quick = [replace(RULES_BY_NAME["no_progress"], min_readings=15)]
    table = record_rows(pair, tmp_path / "k1", 0, 21, FAULTS["k1 differentiated"])
    assert [a.rule.name for a in replay(table, quick)] == ["no_progress"]
    assert replay(healthy_rows[0], quick) == []
