"""Real evaluations: samples of a problem, greedy decoding, the record and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diagnostics.stats import gain_interval
from opd.cli import evaluate as command
from opd.data.chain_task import Problem
from opd.data.grading.graders import (
    Grade,
)
from opd.data.prompts import decode_response
from opd.data.sources import DatasetProblem
from opd.data.tasks import Task, load_task
from opd.evaluation.evaluate import evaluate, evaluation_result, problem_fingerprint
from opd.evaluation.responses import GREEDY, GradedResponses, respond
from opd.models.loading import eos_ids, load_model, num_head_rows
from opd.models.model import split_head
from opd.rollouts.hf_engine import HfEngine


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
