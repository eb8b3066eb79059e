"""The exported folder in the harnesses themselves, and what it holds without them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from opd.cli import evaluate as command
from opd.data.chain_task import Problem
from opd.data.grading.graders import make_grader
from opd.data.prompts import encode_prompt
from opd.data.sources import DatasetProblem
from opd.data.tasks import Task, load_task
from opd.evaluation.harness_export import export_task, portable_grader
from opd.lab.build import make_tokenizer
from tests.helpers.paths import ROOT

NUM_PROBLEMS = 12


def make_task(problems: list[Problem], grader: str = "lab") -> Task:
    return Task(
        lambda step, count: [], lambda count: problems[:count], make_grader(grader), name=grader
    )


def export(folder: Path, harness: Any, task: Task, tokenizer: Any = None, **changes: Any) -> None:
    tokenizer = tokenizer or make_tokenizer()
    settings = {"problems": 9, "max_response": 20, "temperature": 0.0, **changes}
    export_task(harness, folder, tokenizer, [tokenizer.eos_token_id], task, **settings)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]


def test_a_harness_asks_what_the_model_was_asked(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    chat = (("system", "Be brief."), ("user", "2+2?"))
    problems = [Problem("1+1?", "2"), DatasetProblem("x", "4", chat=chat)]
    for harness in ("lm-eval", "inspect"):
        export(tmp_path / harness, harness, make_task(problems))
        rows = read_rows(tmp_path / harness)
        assert [row["answer"] for row in rows] == ["2", "4"]
        assert rows[1]["messages"] == [{"role": r, "content": c} for r, c in chat]
        for row, problem in zip(rows, problems, strict=True):
            ids = encode_prompt(tokenizer, problem)
            assert tokenizer.encode(row["rendered"], add_special_tokens=False) == ids
    source = tmp_path / "worked.jsonl"
    worked = [{"prompt": f"p{i}", "answer": f"so\n#### {i}"} for i in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in worked))
    with pytest.warns(UserWarning, match="worked solution"):
        task = load_task(str(source), 0, test=str(source), grader="numeric")
    export(tmp_path / "worked", "lm-eval", task)
    assert {row["answer"] for row in read_rows(tmp_path / "worked")} == {"0", "1", "2"}


def test_tags_stay_visible_where_special_tokens_are_dropped(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    export(tmp_path, "lm-eval", make_task([Problem("1", "2")]))
    copied = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = "<think>1+1</think>2"
    ids = tokenizer.encode(text)
    assert copied.encode(text) == ids
    assert copied.get_vocab() == tokenizer.get_vocab()
    assert "</think>" not in tokenizer.decode(ids, skip_special_tokens=True)
    end = [tokenizer.eos_token_id]
    assert copied.decode(ids + end, skip_special_tokens=True) == text
    export(tmp_path, "lm-eval", make_task([Problem("1", "2")]), copied)
    assert not (tmp_path / "tokenizer").exists(), "needed by no harness"


def test_what_a_harness_cannot_repeat_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pair: Any
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="Inspect sends messages"):
        export(tmp_path, "inspect", make_task([Problem("1", "2")]), tokenizer)
    export(tmp_path, "lm-eval", make_task([Problem("1", "2")]), tokenizer)
    assert read_rows(tmp_path)[0]["rendered"] == "1"
    tokenizer.add_bos_token = True
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: "other")
    with pytest.raises(ValueError, match="not what its text encodes to"):
        export(tmp_path, "lm-eval", make_task([Problem("1", "2")]), tokenizer)
    with pytest.raises(ValueError, match="games cannot be exported"):
        command.main([str(tiny_pair[0]), "--task", "env:household", "--export", "inspect"])
    monkeypatch.chdir(tmp_path)
    assert portable_grader("mine.py:grade") == f"{tmp_path / 'mine.py'}:grade"
    assert portable_grader("numeric") == "numeric"


def run_harness(code: str, *arguments: object) -> dict[str, Any]:
    """Run code in another process with this environment; return the JSON of its last line."""
    completed = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout.splitlines()[-1])


LM_EVAL = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
folder, model = sys.argv[1:]
results = simple_evaluate(
    model="hf",
    model_args=f"pretrained={model},tokenizer={folder}/tokenizer,dtype=float32",
    tasks=["opdlab_task"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    device="cpu",
    batch_size=4,
)
samples = results["samples"]["opdlab_task"]
print(json.dumps({
    "accuracy": results["results"]["opdlab_task"]["accuracy,none"],
    "outcomes": {s["doc"]["id"]: s["accuracy"] for s in samples},
    "texts": {s["doc"]["id"]: s["resps"][0][0] for s in samples},
}))
"""
INSPECT = """
import json, os, sys
from inspect_ai import eval as inspect_eval
folder, model = sys.argv[1:]
os.chdir(folder)  # Inspect takes relative paths of tasks alone
(log,) = inspect_eval(
    "opdlab_task.py",
    model="hf/local",
    model_args={"model_path": model, "tokenizer_path": f"{folder}/tokenizer", "do_sample": False,
        "device": "cpu"},
    log_dir=f"{folder}/logs",
    display="none",
)
assert log.status == "success", log.error
print(json.dumps({
    "accuracy": log.results.scores[0].metrics["accuracy"].value,
    "outcomes": {s.id: s.scores["opdlab_grader"].value for s in log.samples},
    "texts": {s.id: s.output.completion for s in log.samples},
}))
"""


def plain_model(two_layer_pair: Any, folder: Path) -> Path:
    """Copy a model without its generation config, of which Inspect cannot change everything.

    It writes no padding token within a response, which harnesses would drop.
    """
    shutil.copytree(two_layer_pair[0], folder)
    tokenizer = make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def write_problems(path: Path, prompts: list[str], answers: list[str]) -> None:
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.harness
@pytest.mark.parametrize(("harness", "code"), [("lm-eval", LM_EVAL), ("inspect", INSPECT)])
def test_the_harness_reads_writes_and_grades_as_we_do(
    two_layer_pair: Any, tmp_path: Path, harness: str, code: str
) -> None:
    """The answers of every other problem are what the untrained model writes."""
    model, source = plain_model(two_layer_pair, tmp_path / "final"), tmp_path / "problems.jsonl"
    out, responses = tmp_path / "out.json", tmp_path / "responses.jsonl"
    words = [str(model), "--device", "cpu", "--eval-temperature", "0", "--max-response", "24"]
    words += ["--eval-task", str(source), "--responses", str(responses), "--out", str(out)]
    write_problems(source, [f"{3 * i}+{i}" for i in range(NUM_PROBLEMS)], ["no"] * NUM_PROBLEMS)
    command.main(words)
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    answers = [row["answers"][0] or "no" if i % 2 else "no" for i, row in enumerate(rows)]
    write_problems(source, [row["prompt"] for row in rows], answers)
    command.main([*words, "--export", harness, "--export-folder", str(tmp_path / "export")])
    result = json.loads(out.read_text())
    outcomes = [float(digit) for digit in result["outcomes"]]
    assert 0.3 < result["accuracy"] < 0.7
    texts = [json.loads(line)["responses"][0] for line in responses.read_text().splitlines()]
    assert len(set(texts)) > 3
    repeated_result = run_harness(code, tmp_path / "export", model)
    numbers = [str(i) for i in range(NUM_PROBLEMS)]
    assert [repeated_result["texts"][i].strip() for i in numbers] == [x.strip() for x in texts]
    assert [repeated_result["outcomes"][i] for i in numbers] == outcomes
    assert repeated_result["accuracy"] == pytest.approx(result["accuracy"])
