"""What a run has shown: every state of its card, the intervals, the terminal's last line."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diagnostics.stats import gain_interval, unpaired_interval
from opd.cli.train import main as train_command
from opd.cli.train import parse
from opd.runs import result
from opd.runs.result import BETTER, NOTHING, WORSE, accuracy_change, divergence_change


def evaluated(step: int, right: int, problems: int, problem_set: str = "p") -> dict[str, Any]:
    outcomes = "1" * right + "0" * (problems - right)
    return {"step": step, "outcomes": outcomes, "problem_set": problem_set}


def steps(values: list[float], column: str = "divergence/reverse_kl") -> list[dict[str, Any]]:
    return [{"step": i, column: x, "loss": 1.0} for i, x in enumerate(values)]


def falling(
    first: float, last: float, count: int = 20, column: str = "divergence/reverse_kl"
) -> list[dict[str, Any]]:
    noise = np.random.default_rng(0).normal(0, 0.01, count)
    return steps((np.linspace(first, last, count) + noise).tolist(), column)


@pytest.mark.parametrize(
    ("rows", "evaluations", "state", "text"),
    [
        (falling(1, 0.2), [evaluated(0, 10, 64), evaluated(20, 40, 64)], "good", "accuracy up by"),
        (falling(1, 0.2), [], "good", "shown: reverse KL down by 0.6"),
        (falling(1, 1), [evaluated(0, 10, 64), evaluated(20, 40, 64)], "good", "accuracy up"),
        ([], [], "open", "nothing shown"),
        (falling(1, 0.2, 6), [], "open", "nothing shown"),  # few rows
        (falling(1, 1), [], "open", "nothing shown"),
        ([], [evaluated(0, 10, 64)], "open", "nothing shown"),  # one evaluation
        ([], [evaluated(0, 10, 64), evaluated(20, 11, 64)], "open", "nothing shown"),
        ([], [evaluated(0, 0, 8), evaluated(20, 8, 8)], "open", "nothing shown"),  # few problems
        ([], [evaluated(0, 0, 4), evaluated(20, 0, 4)], "open", "nothing shown"),
        (falling(0.2, 1, column="divergence/k1"), [], "bad", "shown: sampled cost up by 0.6"),
        (falling(1, 0.2), [evaluated(0, 40, 64), evaluated(20, 10, 64)], "bad", "accuracy down"),
    ],
)
def test_the_state_is_what_was_shown(
    rows: list[Any], evaluations: list[Any], state: str, text: str
) -> None:
    found = result.verdict(rows, evaluations)
    assert found["state"] == state
    assert text in found["text"]
    assert found["alarms"] == (["drift_k1"] if "cost up" in text else [])


def test_an_alarm_that_is_on_outweighs_what_was_shown() -> None:
    rows = falling(1, 0.2)
    better = [evaluated(0, 10, 64), evaluated(20, 40, 64)]
    ill = [row | {"repetition/repeated_share": 0.9} for row in rows]
    found = result.verdict(ill, better)
    assert (found["state"], found["alarms"]) == ("bad", ["repetition"])
    assert found["text"].startswith("alarms on: repetition; shown: held-out accuracy up by 0.469 [")
    over = ill[:10] + [row | {"repetition/repeated_share": 0.0} for row in rows[10:]]
    assert result.verdict(over, better)["state"] == "good"


def test_the_change_of_accuracy_is_paired_by_problem() -> None:
    one = accuracy_change([evaluated(0, 10, 64), evaluated(5, 3, 64), evaluated(9, 40, 64)])
    assert (one.before, one.after, one.change) == pytest.approx((10 / 64, 40 / 64, 30 / 64))
    away = np.array([0.0] * 10 + [1.0] * 30 + [0.0] * 24)
    assert (one.low, one.high) == gain_interval(away)
    assert (one.shown, one.basis) == (BETTER, "64 problems, paired")
    apart = accuracy_change([evaluated(0, 10, 64), evaluated(9, 40, 64, "q")])
    assert (apart.low, apart.high) == unpaired_interval(np.arange(64) < 10, np.arange(64) < 40)
    assert "not paired" in apart.basis
    several = {"outcomes": "11 01 00", "problem_set": "p"}
    assert result.shares(several["outcomes"]).tolist() == [1, 0.5, 0]


def test_the_change_of_divergence_has_welchs_interval() -> None:
    values = np.random.default_rng(3).gamma(2, 0.1, 60)
    values[-6:] *= 0.3
    one = divergence_change(steps(values.tolist()))
    want = stats.ttest_ind(values[-6:], values[:6], equal_var=False).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((want.low, want.high), rel=1e-9)
    assert one.basis == "first and last 6 steps, nats a token"
    cost = divergence_change(steps([1.0, math.nan] * 3 + [1.1, 0.9] * 20, "divergence/k1"))
    assert (cost.quantity, cost.shown) == ("sampled cost", NOTHING)
    assert divergence_change(steps([0.1] * 5 + [1.0] * 5)).shown == WORSE


def test_steps_count_by_their_tokens() -> None:
    """Sums are added: a step of three times the tokens is three times as heavy."""
    rows = steps([1.0, 2.0, 3.0, 4.0, 5.0] * 2)
    counts = [3, 1, 1, 1, 1] * 2
    for row, count in zip(rows, counts, strict=True):
        row |= {"divergence/tokens@0-1": count, "divergence/tokens@2-3": count}
    one = divergence_change(rows)
    assert one.before == pytest.approx((3 * 1 + 2 + 3 + 4 + 5) / 7)


def test_tasks_are_judged_apart() -> None:
    rows = [row | {"task": "ab"[i % 2]} for i, row in enumerate(falling(1, 0.2, 40))]
    for row in rows[1::2]:
        row["divergence/reverse_kl"] = 1.2 - row["divergence/reverse_kl"]
    found = result.verdict(rows, [])
    shown = {c["task"]: c["shown"] for c in found["changes"] if c["quantity"] == "reverse KL"}
    assert shown == {"a": BETTER, "b": WORSE}
    assert found["state"] == "bad"
    assert "reverse KL of b up" in found["text"]


def test_a_run_ends_with_what_it_has_shown(
    tiny_pair: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = tiny_pair
    words = ["smoke", "--student", str(student), "--teacher", str(teacher), "--steps", "1"]
    assert parse(words).steps == 1
    train_command(
        [*words, "--eval-problems", "4", "--out", str(tmp_path / "run"), "--device", "cpu"]
    )
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("held-out accuracy: 0.")
    assert "4 problems, paired; fewer than 16 show nothing" in said[0]
    assert said[1].endswith("nothing shown (1 rows; 10 with a divergence are needed)")
    assert said[2] == "nothing shown"
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert str(student) in card
    assert str(teacher) in card
    assert "nothing shown" in card
