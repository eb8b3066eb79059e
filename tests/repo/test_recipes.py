"""The recipes of docs/adding.md run as they stand on the page, and their numbers are right."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.grading.graders import make_grader
from opd.data.prompts import encode_prompts
from opd.envs.task import load_games
from opd.objectives.catalogue import OBJECTIVES
from opd.rollouts.factory import ENGINES, make_engine
from opd.teachers.pair import load_pair
from opd.training.train import train
from synthetic import experiments
from synthetic.runner.run import load_experiment, run
from tests.helpers.batches import batch
from tests.helpers.paths import ROOT
from tests.helpers.runs import rows, settings

PAGE = (ROOT / "docs" / "adding.md").read_text()


def code_blocks(section: str) -> list[str]:
    """Return the Python blocks below a heading of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_functions_of_ones_own_run_as_on_the_page(tiny_pair, tmp_path: Path) -> None:
    file = tmp_path / "my.py"
    file.write_text("\n\n".join(code_blocks("Functions of your own")))
    data = tmp_path / "data.jsonl"
    answers = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in answers))
    own = {"objective": f"{file}:loss", "metrics": (f"{file}:unlikely",)}
    short = {"steps": 1, "eval_every": 0, "eval_problems": 1}
    config = settings(
        tiny_pair, tmp_path / "own", task=str(data), grader=f"{file}:grade", **own, **short
    )
    row = rows(train(config).folder)[0]
    assert row["loss"] == pytest.approx(row["divergence/reverse_kl"], rel=1e-3)
    assert 0 < row["mine/unlikely"] < 1
    assert row["response/graded_share"] == 1
    games = settings(
        tiny_pair, tmp_path / "games", task=f"env:{file}:Countdown", max_turns=2, **short
    )
    assert rows(train(games).folder)[0]["episodes/success"] == 0
    grade = make_grader(f"{file}:grade")
    texts = ("it is 4", "4 it is", "five")
    assert [grade(text, "4").reward for text in texts] == [1.0, 0.5, 0.0]
    game = load_games(f"env:{file}:Countdown", 0).make()
    assert game.begin(0).text == "The number is 3."
    endings = [game.act(action) for action in ("2", "2", "1", "0")]
    assert [x.won for x in endings] == [False, False, False, True]


def test_an_objective_descends_to_the_teacher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OBJECTIVES, "full_hellinger", None)  # removed again after the test
    names: dict = {}
    for code in code_blocks("An objective"):
        exec(code, names)
    assert float(capsys.readouterr().out) < 0.01
    student, teacher = torch.randn(2, 3, 5, generator=torch.manual_seed(1), dtype=torch.float64)
    student.requires_grad_()
    p, q = student.softmax(-1), teacher.softmax(-1)
    distance = ((p.sqrt() - q.sqrt()) ** 2).sum() / 2
    (expected,) = torch.autograd.grad(distance, student)
    gradient = names["expected_gradients"](student.detach(), teacher, names["objective"], None)
    torch.testing.assert_close(gradient, expected)


def test_a_metric_is_the_share_that_a_loop_counts() -> None:
    (code,) = code_blocks("A metric")
    names: dict = {}
    exec(code, names)
    b = batch()
    row = names["monitor"](0, [b.rows(slice(0, 6)), b.rows(slice(6, 12))])
    supervised = [float(x.exp()) for x in b.teacher_logp[b.mask]]
    unlikely = [x for x in supervised if x < 0.01]
    assert 0 < len(unlikely) < len(supervised)
    assert row["signal/unlikely_share"] == pytest.approx(len(unlikely) / len(supervised))
    assert row["signal/unlikely_share_se"] > 0
    assert "divergence/k1" in row


def test_an_engine_counts_what_it_samples(monkeypatch: pytest.MonkeyPatch, tiny_pair) -> None:
    monkeypatch.setitem(ENGINES, "counting", None)
    (code,) = code_blocks("An engine")
    exec(code, {})
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    prompts = encode_prompts(pair.tokenizer, [Problem("1+2", "3"), Problem("4+5+6", "15")], 2, 64)
    options = {"max_response": 12, "temperature": 1.0, "top_p": 1.0}
    engine, plain = (make_engine(name, pair.student) for name in ("counting", "hf"))
    num_tokens = 0
    for seed in range(2):
        expected = plain.sample(
            prompts, pair.eos, generator=torch.Generator().manual_seed(seed), **options
        )
        rollouts = engine.sample(
            prompts, pair.eos, generator=torch.Generator().manual_seed(seed), **options
        )
        assert torch.equal(rollouts.tokens, expected.tokens)
        num_tokens += int(expected.lengths.sum())
    assert engine.num_tokens == num_tokens > 8


def test_an_experiment_runs_and_its_claim_holds(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (code,) = code_blocks("An experiment")
    (tmp_path / "missing_future.py").write_text(code)
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path)])
    name = "missing_future"
    try:
        table = run(name, "smoke", out=tmp_path / "results")
    finally:
        sys.modules.pop(f"synthetic.experiments.{name}", None)
    assert (tmp_path / "results/missing_future/smoke/summary.csv").exists()
    assert isinstance(table, pd.DataFrame)
    missing = dict(zip(table["horizon"], table["value"], strict=True))
    assert missing[1] == pytest.approx(0, abs=1e-12)  # no future
    assert 0.02 < missing[2] < missing[32] < 0.5
    monkeypatch.undo()
    with pytest.raises(InvalidInput, match="missing_future"):
        load_experiment(name)
