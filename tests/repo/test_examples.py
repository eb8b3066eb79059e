"""The examples run as they stand, and compute what a run of the trainer computes."""

import ast
import json
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diagnostics import Monitor
from diagnostics.records.batch_files import load_batch
from opd import Config, train
from opd.config.settings import with_settings
from opd.data.tasks import load_task
from opd.runtime.seeds import ROLLOUT, derive_seed
from tests.helpers.paths import EXAMPLES, ROOT
from tests.helpers.runs import settings

STEPS = 2


def test_the_handwritten_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "handwritten_loop.py"), run_name="__main__")
    output = capsys.readouterr().out
    loss = [float(x) for x in re.findall(r"loss (\S+)", output)]
    assert [float(x) for x in re.findall(r"divergence/reverse_kl (\S+)", output)] == loss
    assert loss[-1] < 0.8 * loss[0]
    assert all(abs(float(z)) < 4 for z in re.findall(r"z_H (\S+)", output))
    assert "not computed: sampler_ratio (this run has no sampler_logp)" in output


def test_trl_is_attached(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attach_trl.py", *map(str, tiny_pair)])
    runpy.run_path(str(EXAMPLES / "attach_trl.py"), run_name="__main__")
    steps = re.findall(r"^step (\S+)  divergence/reverse_kl", capsys.readouterr().out, re.M)
    assert steps == ["2", "4", "6", "8", "10"]
    rows = [json.loads(x) for x in (tmp_path / "runs/trl/panel.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert all(row["divergence/tokens"] > 0 for row in rows)


@pytest.fixture(scope="module")
def run(tiny_pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run with the settings of the examples."""
    fields: dict[str, Any] = {"steps": STEPS, "prompts_per_step": 2, "group_size": 2}
    fields |= {"max_response": 12, "support_k": 16, "lr": 1e-3, "weight_decay": 0.01}
    fields |= {"max_grad_norm": 1e9, "eval_every": 0, "full_metrics_every": 1}
    config = settings(tiny_pair, tmp_path_factory.mktemp("runs") / "run", **fields)
    train(with_settings(config, objective="teacher_topk"))
    return config, Path(config.out)


def questions_of_steps(config: Config) -> Iterator[list[str]]:
    """Yield the prompts of every step, after seeding torch as the trainer seeds its sampler."""
    task = load_task(config.data.task, config.seed)
    for step in range(config.steps):
        torch.manual_seed(derive_seed(config.seed, step, ROLLOUT))
        yield [problem.prompt for problem in task.train(step, config.data.prompts_per_step)]


def run_example(code: str, tiny_pair: tuple[Path, Path], questions: Any) -> dict[str, Any]:
    """Run an example on other questions, with the tiny pair as its lab, and return its names."""
    for lab in ("lab", "lab-tiny"):
        folder = tiny_pair[0].parent / lab
        folder.mkdir(exist_ok=True)
        for role, path in zip(("student", "teacher"), tiny_pair, strict=True):
            if not (folder / role).exists():
                (folder / role).symlink_to(path)
    tree = ast.parse(code)
    tree.body = [x for x in tree.body if "my_questions =" not in ast.unparse(x).split("\n")[0]]
    namespace: dict[str, Any] = {"my_questions": questions, "my_optimizer": my_optimizer}
    exec(compile(tree, "example", "exec"), namespace)
    return namespace


def my_optimizer(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=1e-3)


TRAINING = {
    "examples/train_from_python.py": (EXAMPLES / "train_from_python.py").read_text(),
    "README.md": re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0],
}


def test_the_quick_starts_are_short() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for block in blocks:
        assert len([line for line in block.splitlines() if line]) <= 10


@pytest.mark.parametrize("file", TRAINING)
def test_training_from_python_takes_the_steps_of_the_trainer(
    file: str, run: tuple[Config, Path], tiny_pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = run
    monkeypatch.chdir(tiny_pair[0].parent)
    code = TRAINING[file].replace("max_response=256", "max_response=12, group_size=2")
    names = run_example(code, tiny_pair, questions_of_steps(config))
    trained = load_file(folder / "final" / "model.safetensors")
    weights, initial = (
        names["pair"].student.network.state_dict(),
        load_file(tiny_pair[0] / "model.safetensors"),
    )
    for name, weight in trained.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-7)
    assert max(float((weights[name] - initial[name]).abs().max()) for name in trained) > 1e-3


def test_a_scored_batch_has_the_panel_of_a_run(
    run: tuple[Config, Path],
    tiny_pair,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, folder = run
    monkeypatch.chdir(tiny_pair[0].parent)
    questions = next(questions_of_steps(config))
    code = (EXAMPLES / "score_batch.py").read_text()
    names = run_example(code, tiny_pair, questions)
    saved = load_batch(folder / "batches" / "step_000000.safetensors")
    scored, row = names["batch"].scored, names["row"]
    assert torch.equal(scored.tokens, saved.tokens)
    graded_row = Monitor()(0, [replace(scored, reward=saved.reward)])  # the example has no grader
    different = {name for name in row if not isnan(row[name]) and row[name] != graded_row[name]}
    assert different == {"response/graded_share"}
    recorded = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    assert {name for name in recorded if name.startswith(("divergence/", "signal/"))} <= set(row)
    for name in recorded.keys() & row.keys():
        value = float("nan") if recorded[name] is None else recorded[name]
        expected = pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True)
        assert graded_row[name] == expected, name
    assert "divergence/k1 " in capsys.readouterr().out
