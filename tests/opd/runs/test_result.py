"""The result of a run: every state, the confidence intervals, and the output of the command."""

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diagnostics.records.run_folder import RunFolder
from diagnostics.stats import gain_interval, problem_accuracies, unpaired_interval
from opd.cli.train import main as train_command
from opd.cli.train import parse_arguments
from opd.config.prefixes import parse_prefixes
from opd.objectives.catalogue import CONTROLS
from opd.objectives.factory import make_objective
from opd.report.run_data import read_run, run_page_data
from opd.runs import result
from opd.runs.alarm_rules import TEACHER_FREE
from opd.runs.result import BETTER, INCONCLUSIVE, WORSE, accuracy_change, divergence_change


def evaluation(step: int, right: int, problems: int, problem_set: str = "p") -> dict[str, Any]:
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
        (
            falling(1, 0.2),
            [evaluation(0, 10, 64), evaluation(20, 40, 64)],
            "good",
            "accuracy up by",
        ),
        (falling(1, 0.2), [], "good", "significant changes: reverse KL down by 0.6"),
        (falling(1, 1), [evaluation(0, 10, 64), evaluation(20, 40, 64)], "good", "accuracy up"),
        ([], [], "open", "no significant change"),
        (falling(1, 0.2, 6), [], "open", "no significant change"),  # few rows
        (falling(1, 1), [], "open", "no significant change"),
        ([], [evaluation(0, 10, 64)], "open", "no significant change"),  # one evaluation
        ([], [evaluation(0, 10, 64), evaluation(20, 11, 64)], "open", "no significant change"),
        (
            [],
            [evaluation(0, 0, 8), evaluation(20, 8, 8)],
            "open",
            "no significant change",
        ),  # few problems
        ([], [evaluation(0, 0, 4), evaluation(20, 0, 4)], "open", "no significant change"),
        (
            falling(0.2, 1, column="divergence/k1"),
            [],
            "bad",
            "significant changes: sampled cost up by 0.6",
        ),
        (falling(1, 0.2), [evaluation(0, 40, 64), evaluation(20, 10, 64)], "bad", "accuracy down"),
    ],
)
def test_the_state_is_what_was_shown(
    rows: list[Any], evaluations: list[Any], state: str, text: str
) -> None:
    judgement = result.verdict(rows, evaluations)
    assert judgement["state"] == state
    assert text in judgement["text"]
    assert judgement["alarms"] == (["drift_k1"] if "cost up" in text else [])


def test_an_alarm_that_is_on_outweighs_what_was_shown() -> None:
    rows = falling(1, 0.2)
    better = [evaluation(0, 10, 64), evaluation(20, 40, 64)]
    alarming_rows = [row | {"repetition/repeated_share": 0.9} for row in rows]
    judgement = result.verdict(alarming_rows, better)
    assert (judgement["state"], judgement["alarms"]) == ("bad", ["repetition"])
    assert judgement["text"].startswith(
        "active alarms: repetition; significant changes: held-out accuracy up by 0.469 ["
    )
    recovered_rows = alarming_rows[:10] + [
        row | {"repetition/repeated_share": 0.0} for row in rows[10:]
    ]
    assert result.verdict(recovered_rows, better)["state"] == "good"


def test_the_change_of_accuracy_is_paired_by_problem() -> None:
    paired = accuracy_change([evaluation(0, 10, 64), evaluation(5, 3, 64), evaluation(9, 40, 64)])
    assert (paired.before, paired.after, paired.change) == pytest.approx(
        (10 / 64, 40 / 64, 30 / 64)
    )
    differences = np.array([0.0] * 10 + [1.0] * 30 + [0.0] * 24)
    assert (paired.low, paired.high) == gain_interval(differences)
    assert (paired.shown, paired.basis) == (BETTER, "64 problems, paired")
    unpaired = accuracy_change([evaluation(0, 10, 64), evaluation(9, 40, 64, "q")])
    assert (unpaired.low, unpaired.high) == unpaired_interval(
        np.arange(64) < 10, np.arange(64) < 40
    )
    assert "not paired" in unpaired.basis
    sampled_outcomes = {"outcomes": "11 01 00", "problem_set": "p"}
    assert problem_accuracies(sampled_outcomes["outcomes"]).tolist() == [1, 0.5, 0]


def test_the_change_of_divergence_has_welchs_interval() -> None:
    values = np.random.default_rng(3).gamma(2, 0.1, 60)
    values[-6:] *= 0.3
    change = divergence_change(steps(values.tolist()))
    expected = stats.ttest_ind(values[-6:], values[:6], equal_var=False).confidence_interval(0.95)
    assert (change.low, change.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert change.basis == "first and last 6 steps, nats per token"
    cost = divergence_change(steps([1.0, math.nan] * 3 + [1.1, 0.9] * 20, "divergence/k1"))
    assert (cost.quantity, cost.shown) == ("sampled cost", INCONCLUSIVE)
    assert divergence_change(steps([0.1] * 5 + [1.0] * 5)).shown == WORSE


@pytest.mark.parametrize("text", ["teacher", "dataset", "mixed:0.5"])
def test_a_cost_on_tokens_of_others_is_no_divergence(tmp_path: Any, text: str) -> None:
    rows = falling(0.2, 1, column="divergence/k1")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judgements = []
    for prefixes in ("student", "replay:2", text):
        settings = {"student": "s", "teacher": "t", "seed": 0, "prefixes": prefixes}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        judgement = result.run_verdict(RunFolder(tmp_path))
        on_page = run_page_data(read_run(tmp_path))
        assert on_page["verdict"] == judgement
        raised = {alarm["rule"] for alarm in on_page["tasks"][0]["alarms"]}
        assert raised == (set() if prefixes == text else {"drift_k1"})
        judgements.append(judgement["state"])
    assert judgements == ["bad", "bad", "open"]
    rows = falling(0.2, 1)
    assert result.verdict(rows, [], parse_prefixes(text))["state"] == "bad", "the exact divergence"


def test_steps_with_different_shares_of_own_responses_show_no_trend() -> None:
    rows = falling(0.2, 0.2) + [row | {"step": row["step"] + 20} for row in falling(2, 2)]
    assert result.verdict(rows, [], parse_prefixes("mixed:0.5"))["alarms"] == [
        "drift_kl",
        "no_progress",
    ]
    judgement = result.verdict(rows, [], parse_prefixes("mixed:0-1"))
    assert (judgement["state"], judgement["alarms"]) == ("open", [])
    assert "different shares" in judgement["changes"][1]["sentence"]


@pytest.mark.parametrize("objective", ["sampled_token", "full_jsd", *TEACHER_FREE])
def test_an_objective_without_a_teacher_minimises_no_divergence(objective: str) -> None:
    rows = falling(0.2, 0.2) + [row | {"step": row["step"] + 20} for row in falling(2, 2)]
    judgement = result.verdict(rows, [], objective=objective)
    reads_teacher = make_objective(objective, reward_weight=1.0).requirements.teacher
    assert judgement["state"] == ("bad" if reads_teacher else "open")
    assert bool(judgement["alarms"]) == reads_teacher
    assert judgement["changes"][1]["change"] == pytest.approx(1.8, abs=0.1)
    assert ("does not minimise it" in judgement["changes"][1]["basis"]) != reads_teacher
    assert set(TEACHER_FREE) == CONTROLS.keys()


def test_steps_count_by_their_tokens() -> None:
    """Sums are added: a step with three times the tokens has three times the weight."""
    rows = steps([1.0, 2.0, 3.0, 4.0, 5.0] * 2)
    counts = [3, 1, 1, 1, 1] * 2
    for row, count in zip(rows, counts, strict=True):
        row |= {"divergence/tokens@0-1": count, "divergence/tokens@2-3": count}
    change = divergence_change(rows)
    assert change.before == pytest.approx((3 * 1 + 2 + 3 + 4 + 5) / 7)


def test_tasks_are_judged_apart() -> None:
    rows = [row | {"task": "ab"[i % 2]} for i, row in enumerate(falling(1, 0.2, 40))]
    for row in rows[1::2]:
        row["divergence/reverse_kl"] = 1.2 - row["divergence/reverse_kl"]
    judgement = result.verdict(rows, [])
    conclusions = {
        change["task"]: change["shown"]
        for change in judgement["changes"]
        if change["quantity"] == "reverse KL"
    }
    assert conclusions == {"a": BETTER, "b": WORSE}
    assert judgement["state"] == "bad"
    assert "reverse KL of b up" in judgement["text"]


def test_a_run_ends_with_what_it_has_shown(
    tiny_pair: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = tiny_pair
    words = ["smoke", "--student", str(student), "--teacher", str(teacher), "--steps", "1"]
    assert parse_arguments(words).settings.steps == 1
    train_command(
        [*words, "--eval-problems", "4", "--out", str(tmp_path / "run"), "--device", "cpu"]
    )
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("held-out accuracy: 0.")
    assert "4 problems, paired; at least 16 are required" in output[0]
    assert output[1].endswith("not measured (1 rows; 10 with a divergence are required)")
    assert output[2] == "no significant change"
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert str(student) in card
    assert str(teacher) in card
    assert "no significant change" in card
