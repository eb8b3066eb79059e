"""Repeated-sample accuracy against enumeration, graders against tables, and real evaluations."""

import json
import math
import threading
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from diagnostics.stats import gain_interval, share_interval, wilson_interval
from opd.cli import evaluate as command
from opd.data.chain_task import Problem, problems
from opd.data.grading.answer_text import last_boxed_content
from opd.data.grading.graders import (
    Grade,
    GraderWorker,
    grade_exact,
    grade_lab,
    grade_math,
    grade_numeric,
    make_grader,
)
from opd.data.prompts import decode_response
from opd.data.sources import DatasetProblem
from opd.data.tasks import Task, load_task
from opd.evaluation.evaluate import evaluate, evaluation_result, problem_fingerprint
from opd.evaluation.responses import GREEDY, GradedResponses, respond
from opd.evaluation.statistics import (
    compare,
    decode_outcomes,
    encode_outcomes,
    majority_at_k,
    mcnemar,
    pass_at_k,
    summarize,
)
from opd.lab.build import make_tokenizer
from opd.models.loading import eos_ids, load_model, num_head_rows
from opd.models.model import split_head
from opd.rollouts.hf_engine import HfEngine


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample() -> None:
    for n in range(1, 7):
        for right, k in product(range(n + 1), range(1, n + 1)):
            samples = [1] * right + [0] * (n - right)
            share = np.mean([max(subset) for subset in combinations(samples, k)])
            assert pass_at_k(right, n, k) == pytest.approx(share, abs=1e-12)
    with pytest.raises(ValueError, match="k is 4, but each problem has 3 samples"):
        pass_at_k(1, 3, 4)


def voted(answers: list[str | None], worth: dict[str, float]) -> float:
    """Return the correctness of a vote with fair draws among ties."""
    votes = [a for a in answers if a is not None]
    if not votes:
        return 0.0
    top = max(map(votes.count, votes))
    winners = {a for a in votes if votes.count(a) == top}
    return sum(worth[a] for a in winners) / len(winners)


def test_majority_at_k_is_the_mean_over_subsets_and_ties() -> None:
    generator = np.random.default_rng(0)
    for trial in range(60):
        n = int(generator.integers(1, 9))
        answers = [None if x == 0 else "abcd"[x - 1] for x in generator.integers(0, 5, n)]
        worth = {a: float(generator.random() < 0.5) for a in "abcd"}
        if trial % 5 == 0:
            worth = {a: float(generator.random()) for a in "abcd"}
        right = [0.0 if a is None else worth[a] for a in answers]
        for k in range(1, n + 1):
            want = np.mean([voted(list(subset), worth) for subset in combinations(answers, k)])
            assert majority_at_k(answers, right, k) == pytest.approx(want, abs=1e-12)
    assert majority_at_k(["a", "b", "b", "a"], [1, 0, 0, 1], 4) == 0.5, (
        "ties are broken by a fair draw"
    )
    assert majority_at_k([None] * 5 + ["a"], [0] * 5 + [1], 6) == 1, (
        "unreadable answers have no vote"
    )
    big = majority_at_k(["a"] * 20 + ["b"] * 12, [0] * 20 + [1] * 12, 31)
    assert big == pytest.approx(0.0, abs=1e-12)


def test_both_are_unbiased_for_fresh_samples() -> None:
    """The mean over all draws of 4 samples equals the value for k = 2, 3 fresh ones."""
    chances = {"x": 0.5, "y": 0.3, None: 0.2}
    worth = {"x": 0.0, "y": 1.0}

    def expected(n: int, statistic) -> float:
        return sum(
            math.prod(chances[a] for a in samples) * statistic(list(samples))
            for samples in product(chances, repeat=n)
        )

    def right(answers: list) -> list[float]:
        return [0.0 if a is None else worth[a] for a in answers]

    for k in (2, 3):
        fresh = expected(k, lambda a: voted(a, worth))
        assert expected(4, lambda a: majority_at_k(a, right(a), k)) == pytest.approx(fresh)  # noqa: B023
        fresh = 1 - (1 - chances["y"]) ** k
        estimate = expected(4, lambda a: pass_at_k(int(sum(right(a))), 4, k))  # noqa: B023
        assert estimate == pytest.approx(fresh)


def test_the_summary_has_problems_as_its_sampling_unit() -> None:
    right = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)
    answers = [["a"] * 4, ["b"] * 4, ["a", "b", "c", "a"], ["a", "b", "b", "c"]]
    metrics = summarize(right, answers)
    assert metrics["accuracy"] == pytest.approx(7 / 16)
    assert metrics["pass@2"] == pytest.approx((1 + 0 + 5 / 6 + 1 / 2) / 4)
    assert metrics["pass@4"] == 0.75
    assert metrics["majority@4"] == 0.5
    gaps = {2: np.array([0, 0, 1 / 3, 1 / 4]), 4: np.array([0, 0, 1 / 2, 3 / 4])}
    for k, gap in gaps.items():
        assert metrics[f"gap@{k}"] == pytest.approx(gap.mean())
        ends = (metrics[f"gap@{k}/low"], metrics[f"gap@{k}/high"])
        assert ends == pytest.approx(share_interval(gap))
    assert (metrics["low"], metrics["high"]) == share_interval(right.mean(1))
    assert (metrics["pass@4/low"], metrics["pass@4/high"]) == wilson_interval(0.75, 4)
    # more samples of the same problems are not more problems
    repeated_metrics = summarize(np.tile(right, 4), [a * 4 for a in answers])
    assert repeated_metrics["high"] - repeated_metrics["low"] == pytest.approx(
        metrics["high"] - metrics["low"], abs=0.02
    )
    single_metrics = summarize(right[:, :1], [a[:1] for a in answers])
    assert (single_metrics["low"], single_metrics["high"]) == wilson_interval(0.75, 4)
    assert "pass@1" not in single_metrics
    alone = summarize(right[:1], answers[:1])
    assert (alone["low"], alone["high"]) == wilson_interval(1.0, 1)


def evaluation(right: np.ndarray, problem_set: str = "s") -> dict:
    return {"problems": len(right), "outcomes": encode_outcomes(right), "problem_set": problem_set}


def test_comparisons_are_paired() -> None:
    generator = np.random.default_rng(1)
    hard = generator.random((200, 1))
    correct_a, correct_b = (generator.random((200, 1)) < hard * x for x in (0.6, 0.9))
    comparison = compare(evaluation(correct_a), evaluation(correct_b))
    difference = correct_b.mean(1) - correct_a.mean(1)
    assert comparison["gain"] == pytest.approx(difference.mean())
    half = 1.96 * difference.std() / 200**0.5
    assert comparison["low"] == pytest.approx(difference.mean() - half, abs=0.01)
    assert comparison["high"] == pytest.approx(difference.mean() + half, abs=0.01)
    assert (comparison["lost"], comparison["won"]) == (
        (difference < 0).sum(),
        (difference > 0).sum(),
    )
    # a run has no gain over itself, and the interval shows the uncertainty of 200 problems
    self_comparison = compare(evaluation(correct_a), evaluation(correct_a))
    assert (self_comparison["gain"], self_comparison["p"]) == (0, 1)
    assert (self_comparison["low"], self_comparison["high"]) == gain_interval(np.zeros(200))
    correct_c = generator.random((50, 4)) < 0.5
    assert "p" not in compare(evaluation(correct_c), evaluation(correct_c))
    correct_d = generator.random((50, 2)) < 0.7
    comparison = compare(evaluation(correct_c), evaluation(correct_d))
    assert comparison["gain"] == pytest.approx(correct_d.mean() - correct_c.mean())
    expected = gain_interval(correct_d.mean(1) - correct_c.mean(1))
    assert (comparison["low"], comparison["high"]) == expected
    assert (decode_outcomes(evaluation(correct_c)) == correct_c).all()
    assert (decode_outcomes(evaluation(correct_a)) == correct_a).all()
    with pytest.raises(ValueError, match=r"different problems \(200, set s; 200, set t\)"):
        compare(evaluation(correct_a), evaluation(correct_b, "t"))


def test_mcnemar_counts_coin_flips() -> None:
    for n in range(11):
        flips = [sum(x) for x in product((0, 1), repeat=n)]
        for won in range(n + 1):
            as_far = [abs(2 * x - n) >= abs(2 * won - n) for x in flips]
            assert mcnemar(n - won, won) == pytest.approx(np.mean(as_far) if n else 1)


RIGHT = [
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac12}", "1/2"),
    (r"\boxed{0.50}", r"\frac{2}{4}"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    (r"\boxed{1,234}", "1234"),
    (r"\boxed{1\,234}", "1234"),
    (r"\boxed{1{,}234{,}567}", "1234567"),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}"),
    (r"\boxed{[0, 1)}", "[0,1)"),
    (r"\boxed{(-\infty, 2]}", r"(-\infty,2]"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{5 \mathrm{~cm}}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{\text{(B)}}", "B"),
    (r"\boxed{\text{Monday}}", "monday"),
    (r"\boxed{7}", r"\boxed{7}"),
    (r"\boxed{7}", "$7$"),
    (r"first \boxed{3}, no: \boxed{7}", "7"),
    (r"<think>\boxed{3}</think>so \boxed{7}", "7"),
    (r"\boxed{\frac{1}{\sqrt{2}}} and an open \boxed{", r"\frac{\sqrt{2}}{2}"),
]
WRONG = [
    (r"\boxed{8}", "7"),
    (r"\boxed{0.333}", r"\frac{1}{3}"),
    (r"\boxed{(0,1)}", "[0,1)"),
    (r"\boxed{(1,2)}", "(2,1)"),
    (r"\boxed{12,34}", "1234"),
    (r"\boxed{\text{evil}}", r"\text{live}"),
    (r"\boxed{evil}", "live"),
    (r"\boxed{x}", "y"),
    (r"first \boxed{7}, no: \boxed{3}", "7"),
]
UNREADABLE = [
    ("7", "7"),
    ("", "7"),
    (r"\boxed{}", "7"),
    (r"\boxed{7", "7"),
    (r"<think>\boxed{7}</think>7", "7"),
    (r"<think>a</think>7</think>\boxed{7}", "7"),
    (r"\boxed{\frac{1}{}}", "7"),
    (r"\boxed{" + "9" * 5000 + "}", "7"),
    ("\\boxed{\ud800\x00}", "7"),
]


def test_mathematical_answers_are_compared_as_mathematics() -> None:
    for response, answer in RIGHT:
        verdict = grade_math(response, answer)
        assert verdict.reward == 1, (response, answer)
        assert verdict.answer is not None
    for response, answer in WRONG:
        verdict = grade_math(response, answer)
        assert verdict.reward == 0, (response, answer)
        assert verdict.answer is not None, (response, answer)
    for response, answer in UNREADABLE:
        assert grade_math(response, answer) == Grade(0.0, None), (response, answer)


def test_equal_answers_vote_together() -> None:
    votes = {grade_math(rf"\boxed{{{x}}}", "3").answer for x in (r"\frac12", "0.5", "2/4", ".50")}
    assert len(votes) == 1
    assert grade_math(r"\boxed{0.6}", "3").answer not in votes
    # 50 % equals both 50 and 0.5: it votes for the reference answer if that is one of the two,
    # and for neither otherwise
    assert grade_math(r"\boxed{50\%}", "0.5").answer in votes
    assert grade_math(r"\boxed{50\%}", "50").answer == grade_math(r"\boxed{50}", "50").answer
    assert grade_math(r"\boxed{50\%}", "3").answer not in votes


def test_a_judge_that_hangs_or_dies_is_replaced_in_any_thread() -> None:
    judge = GraderWorker(seconds=0.5)
    grades: list = []

    def work() -> None:
        grades.append(judge("5", "9^{9^{9^{9}}}"))
        grades.append(judge("5", "5"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert grades == [None, {"gold": True, "key": "5", "equal": True}]
    assert judge.process is not None
    judge.process.kill()
    assert judge("5", "5") is None
    answer = judge("5", "6")
    assert answer is not None
    assert not answer["equal"]


def test_an_answer_that_is_no_mathematics_is_said_to_be() -> None:
    with pytest.warns(UserWarning, match=r"'\\\\frac\{' cannot be read as mathematics"):
        assert grade_math(r"\boxed{4}", r"\frac{").reward == 0


def test_a_missing_package_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'opdlab\[math\]'"):
        make_grader("math")


def test_boxes_nest_and_the_last_that_closes_counts() -> None:
    assert last_boxed_content(r"\boxed{a{b{c}}d} }") == "a{b{c}}d"
    assert last_boxed_content(r"\boxed {1}\boxed{2}\fbox{3}") == "2"
    assert last_boxed_content(r"\boxed{\boxed{5}}") == "5"
    assert last_boxed_content(r"\boxed{1} \boxed{2") == "1"
    assert last_boxed_content("{1}") is None


def test_the_other_graders() -> None:
    assert grade_exact("<think>8</think> 7\n", "7") == Grade(1.0, "7")
    assert grade_exact("<think>7</think>8", "7") == Grade(0.0, "8")
    assert grade_exact("<think>7</think> ", "7") == Grade(0.0, None)
    for text, answer, reward, vote in (
        ("It is 1,234.50.", "1234.5", 1.0, "2469/2"),
        ("3 + 4 = 7", "7", 1.0, "7"),
        ("7 = 3 + 4", "7", 0.0, "4"),
        ("-6/8", "-0.75", 1.0, "-3/4"),
        ("<think>7</think>none", "7", 0.0, None),
        ("1/0", "7", 0.0, None),
        (r"\boxed{7}, not 8", "7", 1.0, "7"),
        ("9" * 6000, "7", 0.0, None),
    ):
        assert grade_numeric(text, answer) == Grade(reward, vote), text
    with pytest.raises(ValueError, match="answer 'seven' is not a number; use the grader exact"):
        grade_numeric("7", "seven")
    for p in problems("test", 20, 0):
        assert grade_lab(p.solution, p.answer) == Grade(1.0, p.answer)
    assert grade_lab("7", "7") == Grade(0.0, None)
    with pytest.raises(
        ValueError, match="unknown grader 'maths'; known: exact, numeric, math, gym, lab"
    ):
        make_grader("maths")


def test_a_response_cut_behind_its_thoughts_has_not_answered() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(r"\boxed{5}</think>")
    assert decode_response(tokenizer, ids) == r"\boxed{5}</think>"
    assert decode_response(tokenizer, [*ids, tokenizer.eos_token_id]) == r"\boxed{5}</think>"


def graded(reward: list[list[float]], tasks: list[str]) -> GradedResponses:
    shape = np.array(reward).shape
    length = np.arange(shape[0] * shape[1]).reshape(shape)
    votes: list[list[str | None]] = [["yes" if x >= 1 else None for x in row] for row in reward]
    problems: list[Problem] = [DatasetProblem(f"p{i}", "a", task=t) for i, t in enumerate(tasks)]
    return GradedResponses(
        problems, np.array(reward), length, length % 3 > 0, votes, [[""]] * len(tasks)
    )


def test_results_by_task_and_their_plain_mean() -> None:
    metrics = evaluation_result(graded([[1, 0], [1, 1], [0, 0], [0.9, 1]], ["x", "x", "y", "x"]))
    assert metrics["accuracy"] == 0.5
    assert metrics["task/x/accuracy"] == pytest.approx(2 / 3)
    assert (metrics["task/x/problems"], metrics["task/y/problems"]) == (3, 1)
    assert metrics["task_mean"] == pytest.approx(1 / 3)
    assert metrics["outcomes"] == "10 11 00 01"
    assert (metrics["length"], metrics["truncated"]) == (3.5, pytest.approx(3 / 8))
    assert metrics["unparsed"] == 0.5
    assert not [
        k for k in evaluation_result(graded([[1], [0]], ["x", "x"])) if k.startswith("task")
    ]
    single_task = graded([[1], [0]], ["x", "x"])
    assert evaluation_result(single_task)["problem_set"] != metrics["problem_set"]


def test_problems_are_known_by_their_prompts_answers_and_order() -> None:
    first, second = DatasetProblem("1+2", "3"), DatasetProblem("2+2", "4")
    sets = [[first, second], [second, first], [first], [first, DatasetProblem("2+2", "5")]]
    prints = [problem_fingerprint(list(problems)) for problems in sets]
    assert len(set(prints)) == 4
    assert problem_fingerprint([DatasetProblem("1+2", "3", task="x"), second]) == prints[0]


@pytest.fixture(scope="module")
def loaded(tiny_pair):
    tokenizer, network = load_model(str(tiny_pair[0]), "cpu", "float32")
    return tokenizer, split_head(network, num_head_rows(network)), eos_ids(tokenizer, network)


def measure(loaded, task: Task, **changes) -> GradedResponses:
    tokenizer, model, eos = loaded
    settings = {"problems": 5, "max_prompt": 64, "max_response": 6, "temperature": 1.0}
    generator = torch.Generator().manual_seed(0)
    return respond(
        HfEngine(model), tokenizer, eos, task, generator=generator, **(settings | changes)
    )


def test_samples_stay_with_their_problem(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward is the response's length: rewards, lengths and texts must belong together."""
    test_problems = [Problem("1+2" * (1 + n % 3), str(n)) for n in range(7)]
    graded_texts: list[tuple[str, str]] = []

    def grade(response: str, answer: str) -> Grade:
        graded_texts.append((response, answer))
        return Grade(float(len(response) % 2), f"{answer}:{response}")

    task = Task(train=lambda step, count: [], test=lambda count: test_problems[:count], grade=grade)
    monkeypatch.setattr("opd.evaluation.responses.ROWS_AT_ONCE", 6)  # two problems a call
    measured_responses = measure(loaded, task, problems=7, samples=3)
    assert [a for _, a in graded_texts] == [str(n) for n in range(7) for _ in range(3)]
    assert measured_responses.reward.shape == (7, 3)
    for i, row in enumerate(measured_responses.texts):
        assert measured_responses.answers[i] == [f"{i}:{text}" for text in row]
        assert measured_responses.reward[i].tolist() == [float(len(text) % 2) for text in row]
    assert len({text for row in measured_responses.texts for text in row}) > 7, "samples differ"


def test_greedy_is_the_argmax_and_does_not_depend_on_the_seed(loaded) -> None:
    tokenizer, model, eos = loaded
    task = load_task("lab", 0)
    greedy = measure(loaded, task, temperature=0.0, top_p=0.3)
    for problem, (text,) in zip(greedy.problems, greedy.texts, strict=True):
        message = [{"role": "user", "content": problem.prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids, response_ids = tokenizer.encode(prompt, add_special_tokens=False), []
        while len(response_ids) < 6 and not set(response_ids) & set(eos):
            logits = model.network(torch.tensor([ids + response_ids])).logits[
                0, -1, : model.vocabulary
            ]
            response_ids.append(int(logits.argmax()))
        assert text == decode_response(tokenizer, response_ids)
    assert GREEDY["top_p"] < 1e-6
    with pytest.raises(ValueError, match="3 greedy samples would all be equal"):
        measure(loaded, task, temperature=0.0, samples=3)
    with pytest.raises(ValueError, match="samples is 0"):
        measure(loaded, task, samples=0)


def test_evaluate_is_what_the_loop_calls(loaded) -> None:
    tokenizer, model, eos = loaded
    settings = {"problems": 4, "max_prompt": 64, "max_response": 5, "temperature": 1.0}
    generator = torch.Generator().manual_seed(3)
    task = load_task("lab", 0)
    metrics = evaluate(model, tokenizer, eos, task, generator=generator, **settings)
    assert metrics["problems"] == 4
    assert len(metrics["outcomes"]) == 4
    json.dumps(metrics)


def test_the_command_writes_what_it_found(
    tiny_pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"q": f"{i}+1", "a": i + 1, "task": "ab"[i % 2]} for i in range(20)]
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    words = [str(tiny_pair[0]), "--eval-samples", "3", "--max-response", "6"]
    words += ["--grader", "numeric", "--device", "cpu", "--eval-top-p", "0.9"]
    held_out = ["--task", str(file), "--prompt-column", "q", "--answer-column", "a"]
    complete = ["--eval-task", str(file), "--eval-prompt-column", "q", "--eval-answer-column", "a"]
    out, records_path = tmp_path / "deep" / "evals.json", tmp_path / "said.jsonl"
    command.main([*words, *complete, "--out", str(out), "--responses", str(records_path)])
    printed = json.loads(capsys.readouterr().out)
    assert printed["problems"] == 20
    assert {"accuracy", "pass@2", "pass@3", "majority@3", "task/a/accuracy"} <= printed.keys()
    written_row = json.loads(out.read_text())
    assert len(written_row["outcomes"].split()) == 20
    assert written_row["settings"]["eval_top_p"] == 0.9
    rows = [json.loads(line) for line in records_path.read_text().splitlines()]
    assert {(row["prompt"], row["answer"]) for row in rows} == {
        (x["q"], str(x["a"])) for x in lines
    }
    command.main([*words, *complete, "--against", str(out)])
    printed_again = json.loads(capsys.readouterr().out)
    assert printed_again["against/gain"] == 0
    assert (printed_again["against/low"], printed_again["against/high"]) == gain_interval(
        np.zeros(20)
    )
    kinds = [{"q": x["q"], "a": x["a"], "kind": f"k{i}"} for i, x in enumerate(lines)]
    file.write_text("".join(json.dumps(x) + "\n" for x in kinds))
    command.main([*words, *held_out])
    unlabelled = json.loads(capsys.readouterr().out)
    assert (unlabelled["problems"], "task_mean" in unlabelled) == (2, False)
    command.main([*words, *held_out, "--task-column", "kind"])
    assert "task_mean" in json.loads(capsys.readouterr().out)
    with pytest.raises(ValueError, match="different problems"):
        command.main([*words, *held_out, "--against", str(out)])
