"""Measures of saved models: what is printed, compared and refused, against their parts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagnostics.stats import gain_interval
from opd.cli import evaluate as command
from opd.config.groups import EvalConfig
from opd.data import sort_task
from opd.data.tasks import Task
from opd.evaluation.answer_confidence import answer_confidence
from opd.evaluation.calibration import over_confidence, vote_confidence
from opd.evaluation.comparison import compare_results
from opd.evaluation.evaluate import problem_fingerprint
from opd.evaluation.folder import (
    EvaluationSettings,
    load_evaluated,
    load_problems,
    measure_folder,
    respond_with,
)
from opd.evaluation.measures import Measures, format_table
from opd.evaluation.recovery import measure_recovery
from opd.evaluation.statistics import decode_outcomes, encode_outcomes, summarize
from opd.evaluation.teacher_ceiling import ceiling_metrics, closed_share
from opd.rollouts.hf_engine import HfEngine
from tests.helpers.games import ECHO


def settings(**changes: Any) -> EvaluationSettings:
    evaluation = EvalConfig(eval_problems=6, eval_samples=3)
    fields = {"evaluation": evaluation, "max_prompt": 64, "max_response": 12, "seed": 0}
    return EvaluationSettings(device="cpu", **(fields | changes))


@pytest.fixture(scope="module")
def sorting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sorting") / "sort.jsonl"
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in sort_task.problems("test", 6, 0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(tiny_pair: Any) -> list[str]:
    return [
        str(tiny_pair[0]),
        *("--device", "cpu", "--max-response", "12", "--eval-problems", "6"),
        *("--eval-samples", "3"),
    ]


def test_the_command_measures_all_and_compares_it(
    tiny_pair, sorting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a grader that finds every other response of the untrained models correct."""
    (tmp_path / "odd.py").write_text("def odd(response, answer):\n    return len(response) % 2\n")
    grader = f"{tmp_path / 'odd.py'}:odd"
    measure_options = ["--grader", grader, "--calibration", "--recovery", "runner_up"]
    measure_options += ["--recovery-prefix", "solution", "--seed", "2"]
    measure_options += ["--eval-temperature", "0.7", "--eval-top-p", "0.9"]
    measure_options += ["--other-task", str(sorting), "--other-grader", "exact", "--teacher"]
    out, responses = tmp_path / "a.json", tmp_path / "responses.jsonl"
    options = [*words(tiny_pair), *measure_options, str(tiny_pair[1]), "--out", str(out)]
    command.main([*options, "--responses", str(responses)])
    printed, saved_result = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert not [name for name in printed if name.endswith(("outcomes", "bins", "by_problem"))]
    assert printed.items() <= saved_result.items()
    interval_names = (
        *("gap@3", "vote/over_confidence", "vote/brier", "vote/ece"),
        *("calibration/over_confidence", "calibration/brier", "calibration/ece"),
        *("recovery/perturbed", "recovery/unperturbed", "recovery/loss", "teacher/gap"),
    )
    for name in interval_names:
        assert printed[f"{name}/low"] <= printed[name] <= printed[f"{name}/high"]
    sampling = EvalConfig(eval_problems=6, eval_samples=3, eval_temperature=0.7, eval_top_p=0.9)
    same = settings(evaluation=sampling, grader=grader, seed=2)
    loaded, teacher = (load_evaluated(str(folder), same) for folder in tiny_pair)
    other_task = load_problems(
        loaded.tokenizer,
        settings(task="lab", evaluation=EvalConfig(eval_task=str(sorting)), grader="exact"),
    )
    assert {p.prompt for p in other_task.test(9)} == {  # type: ignore[union-attr]
        p.prompt for p in sort_task.problems("test", 6, 0)
    }
    assert printed["other/problem_set"] == problem_fingerprint(other_task.test(6))  # type: ignore[arg-type]
    assert printed["other/accuracy"] == 0, "by its own grader"
    task = load_problems(loaded.tokenizer, same)
    assert isinstance(task, Task)
    graded = respond_with(loaded, task, same)
    assert saved_result["outcomes"] == encode_outcomes(graded.correct)
    assert 0 < printed["accuracy"] < 1
    teachers = respond_with(teacher, task, same).correct
    assert printed["teacher/accuracy"] == teachers.mean() != printed["accuracy"]
    for name, confidence in (
        ("calibration", answer_confidence(loaded.model, loaded.tokenizer, graded, 64)),
        ("vote", vote_confidence(graded.answers)),
    ):
        excess = over_confidence(confidence, graded.correct)
        assert printed[f"{name}/over_confidence"] == excess["over_confidence"]
        is_answered = ~np.isnan(confidence)
        squares = (confidence - graded.correct)[is_answered] ** 2
        assert printed[f"{name}/brier"] == pytest.approx(squares.mean())
        if name == "calibration":
            excesses = np.where(is_answered, confidence - graded.correct, 0).sum(1)
            by_problem = np.stack([excesses, is_answered.sum(1)], 1)
            np.testing.assert_allclose(saved_result["calibration/by_problem"], by_problem)
    recovery_metrics, records = measure_recovery(
        HfEngine(loaded.model),
        *(loaded.model, loaded.tokenizer, loaded.eos, graded, task.grade),
        kind="runner_up",
        source="solution",
        max_prompt=64,
        max_response=12,
        temperature=0.7,
        top_p=0.9,
        seed=2,
    )
    for name, value in recovery_metrics.items():
        assert saved_result[f"recovery/{name}"] == value
    file_rows = [json.loads(line) for line in responses.read_text().splitlines()]
    assert sum(len(row["recovery"]) for row in file_rows) == len(records) == 18
    for record in records:
        place = record.perturbation
        (saved,) = (x for x in file_rows[place.problem]["recovery"] if x["sample"] == place.sample)
        solution = loaded.tokenizer.encode(graded.problems[place.problem].solution)
        assert saved["ids"] == [place.original, place.replacement]
        assert saved["ids"][0] == solution[saved["position"]] != saved["ids"][1]
        assert tuple(saved["responses"]) == record.texts
        assert tuple(saved["correct"]) == record.correct
    other_rights = {"other/outcomes": saved_result["other/outcomes"].replace("0", "1")}
    out.write_text(
        json.dumps(saved_result | other_rights)
    )  # everything was solved and is forgotten
    command.main([*options, "--against", str(out), "--eval-top-p", "0.9"])
    repeated_result = json.loads(capsys.readouterr().out)
    assert "against/settings" not in repeated_result
    assert (repeated_result["against/gain"], repeated_result["against/other/gain"]) == (0, -1)
    for name in ("calibration/over_confidence", "recovery/loss"):
        assert repeated_result[f"against/{name}/change"] == 0
        assert repeated_result[f"against/{name}/low"] < 0 < repeated_result[f"against/{name}/high"]
    assert "is not clearly better than the start" in repeated_result["teacher/closed/undefined"]


def test_bad_input_is_refused_before_anything_is_sampled(
    tiny_pair, sorting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = str(tiny_pair[0])
    result = measure_folder(student, settings()).metrics

    def sample(*_: Any, **__: Any) -> None:
        raise AssertionError("something was sampled")

    monkeypatch.setattr("opd.rollouts.hf_engine.sample", sample)
    loaded = load_evaluated(student, settings())
    loaded.tokenizer.add_tokens(["<new>"])
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny_pair[1] / name).read_bytes())
    loaded.tokenizer.save_pretrained(tmp_path)
    some_path = tmp_path / "some.jsonl"
    problems = load_problems(loaded.tokenizer, settings())
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in problems.test(2)]  # type: ignore[union-attr]
    rows.append({"prompt": "another", "answer": "1"})
    some_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for measures, changes, against, message in (
        (Measures(teacher=str(tmp_path)), {}, None, "tokenizers differ in 1 of"),
        (Measures(other_task="lab"), {}, None, "6 of the 6 problems of other_task 'lab'"),
        (Measures(other_task=str(some_path)), {}, None, "2 of the 3 problems of other_task"),
        (Measures(recovery="digit"), {"task": ECHO}, None, "recovery cannot be measured on env:"),
        (Measures(calibration=True), {"task": ECHO}, None, "calibration cannot be measured on"),
        (Measures(), {"evaluation": EvalConfig(eval_problems=5)}, result, "different problems"),
        (
            Measures(),
            {"task": "x", "evaluation": EvalConfig(eval_task="y")},
            None,
            "leave one of them out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            measure_folder(student, settings(**changes), measures, against)
    with pytest.raises(ValueError, match="repeat it with the same --other-task"):
        compare_results(result, result | {"other/outcomes": "0"})
    other_result = {"other/outcomes": "01", "other/problems": 2, "other/problem_set": "x"}
    with pytest.raises(ValueError, match="other task: the evaluations used different problems"):
        compare_results(result | other_result, result | other_result | {"other/problem_set": "y"})


def test_the_table_has_every_number_with_its_interval() -> None:
    metrics = {
        **{"accuracy": 0.25, "low": 0.125, "high": 0.5, "other/accuracy": 1.0},
        **{"other/low": 0.75, "other/high": 1.0, "gap@2": 0.0625, "gap@2/low": 0.0},
        **{
            "gap@2/high": 0.1,
            "length": 12.0,
            "truncated": 0.0,
            "outcomes": "01",
            "cost/steps": 30.0,
        },
        **{"against/recovery/loss/change": -0.5, "against/recovery/loss/low": -0.75},
        **{"against/recovery/loss/high": -0.25, "teacher/closed/undefined": "too few"},
        "against/settings": {"seed": [0, 1]},
    }
    words = [line.split(maxsplit=1) for line in format_table(metrics).splitlines()]
    assert words == [
        ["accuracy", "0.250  [0.125, 0.500]"],
        ["other/accuracy", "1.000  [0.750, 1.000]"],
        ["gap@2", "0.062  [0.000, 0.100]"],
        ["length", "12"],
        ["truncated", "0.000"],
        ["cost/steps", "30"],
        ["against/recovery/loss/change", "-0.500  [-0.750, -0.250]"],
        ["teacher/closed/undefined", "too few"],
    ]


def row_of(correct: np.ndarray) -> dict[str, Any]:
    metrics = summarize(correct, [["a"] * correct.shape[1]] * len(correct))
    return {**metrics, "problems": len(correct), "outcomes": encode_outcomes(correct)}


def test_forgetting_is_paired_by_problem_of_the_other_task() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random((200, 1))
    tables = [generator.random((200, 2)) < hard * share for share in (1.0, 0.7, 0.5, 0.5)]
    other_start, other_end, task_start, task_end = (row_of(table) for table in tables)
    results = [
        {**task, "problem_set": "t"}
        | {f"other/{k}": v for k, v in (other_row | {"problem_set": "o"}).items()}
        for task, other_row in ((task_start, other_start), (task_end, other_end))
    ]
    comparison = compare_results(*results)
    difference = tables[1].mean(1) - tables[0].mean(1)
    assert comparison["other/gain"] == pytest.approx(difference.mean()) != comparison["gain"]
    assert (comparison["other/low"], comparison["other/high"]) == gain_interval(difference)
    assert comparison["other/high"] < 0
    totals = [[1.0, 2], [-0.5, 1], [0, 0]], [[0.5, 2], [0.0, 0], [0.5, 1]]
    comparison_of_totals = compare_results(
        *(result | {"calibration/by_problem": x} for result, x in zip(results, totals, strict=True))
    )
    name = "calibration/over_confidence/change"
    assert comparison_of_totals[name] == pytest.approx(1 / 3 - 0.5 / 3)


@pytest.mark.parametrize("measure", ["calibration/over_confidence", "recovery/loss"])
def test_the_change_of_a_ratio_is_paired_by_problem(measure: str) -> None:
    """With equal counts it is the mean of the problems' own changes, which differ little."""
    generator = np.random.default_rng(4)
    old = generator.uniform(-1, 1, 50)
    new = old - 0.1 + generator.uniform(-0.02, 0.02, 50)
    totals = measure.partition("/")[0] + "/by_problem"
    task = row_of(np.ones((50, 1), bool)) | {"problem_set": "t"}
    results = [task | {totals: np.stack([2 * x, 0 * x + 2], 1).tolist()} for x in (old, new)]
    comparison = compare_results(*results)
    assert comparison[f"{measure}/change"] == pytest.approx((new - old).mean())
    ends = comparison[f"{measure}/low"], comparison[f"{measure}/high"]
    assert ends == pytest.approx(gain_interval(new - old))
    assert ends[1] < 0
    others = {"calibration/over_confidence", "recovery/loss"} - {measure}
    assert not [name for name in comparison if name.startswith(tuple(others))]
    no_answer = task | {totals: [[0, 0]] * 50}
    assert f"{measure}/change" not in compare_results(results[0], no_answer)


def test_the_share_closed_is_fiellers() -> None:
    """Its ends are where a paired t test of gain - r lead turns, found by trying many r."""
    generator = np.random.default_rng(1)
    lead = (generator.random(300) < 0.5).astype(float) - (generator.random(300) < 0.05)
    gain = np.where(generator.random(300) < 0.6, lead, 0) - (generator.random(300) < 0.05)
    share = closed_share(gain, lead)
    assert share["teacher/closed"] == pytest.approx(gain.sum() / lead.sum())
    ratios = np.linspace(0, 1.2, 1201)
    residual = gain - ratios[:, None] * lead
    from scipy.stats import ttest_1samp

    inside = ratios[ttest_1samp(residual, 0, axis=1).pvalue >= 0.05]
    assert share["teacher/closed/low"] == pytest.approx(inside[0], abs=0.006)
    assert share["teacher/closed/high"] == pytest.approx(inside[-1], abs=0.006)
    assert share["teacher/closed/low"] < inside[0], "two problems more make it a little wider"
    assert share["teacher/closed/high"] > inside[-1]
    # the start has closed nothing and the teacher everything, neither with certainty
    share_of_start, share_of_teacher = closed_share(0 * lead, lead), closed_share(lead, lead)
    assert share_of_start["teacher/closed/low"] < share_of_start["teacher/closed"] == 0
    assert share_of_teacher["teacher/closed/high"] > share_of_teacher["teacher/closed"] == 1
    for weak in (
        lead * 0,
        -lead,
        (generator.random(300) < 0.1) - (generator.random(300) < 0.1) * 1.0,
    ):
        assert closed_share(gain, weak).keys() == {"teacher/closed/undefined"}
    assert "2 problems" in closed_share(lead[:2], lead[:2])["teacher/closed/undefined"]


def test_the_interval_of_the_share_covers_it() -> None:
    generator = np.random.default_rng(2)
    num_covered = num_defined = 0
    for _ in range(300):
        ability = generator.random((80, 1))
        start, student, teacher = (
            generator.random((80, 2)) < ability * x for x in (0.3, 0.65, 1.0)
        )
        share = closed_share(student.mean(1) - start.mean(1), teacher.mean(1) - start.mean(1))
        if "teacher/closed" in share:
            num_defined += 1
            num_covered += share["teacher/closed/low"] <= 0.5 <= share["teacher/closed/high"]
    assert num_defined > 280
    assert 0.92 < num_covered / num_defined <= 1


def test_the_ceiling_is_compared_on_the_same_problems() -> None:
    generator = np.random.default_rng(3)
    ability = generator.random((150, 1))
    start, student, teacher = (
        row_of(generator.random((150, 2)) < ability * x) for x in (0.2, 0.6, 1.0)
    )
    metrics = ceiling_metrics(student, teacher, start)
    accuracies = [decode_outcomes(row).mean(1) for row in (start, student, teacher)]
    assert metrics["teacher/accuracy"] == teacher["accuracy"]
    assert metrics["teacher/gap"] == pytest.approx(teacher["accuracy"] - student["accuracy"])
    ends = gain_interval(accuracies[2] - accuracies[1])
    assert (metrics["teacher/gap/low"], metrics["teacher/gap/high"]) == ends
    share = (student["accuracy"] - start["accuracy"]) / (teacher["accuracy"] - start["accuracy"])
    assert metrics["teacher/closed"] == pytest.approx(share)
    assert "teacher/closed" not in ceiling_metrics(student, teacher, None)
