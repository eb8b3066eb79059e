"""The command `opd plan`: sources of settings, output, and what it refuses."""

import json
from pathlib import Path

import pytest

from diagnostics.errors import InvalidInput, MissingFile
from opd.cli import plan
from opd.config.files import to_toml
from tests.opd.analysis.plan.pairs import saved, settings

FIGURES = ["--gpu-memory", "2", "--gpu-flops", "100", "--gpu-bandwidth", "1000"]


def test_options_files_and_runs_give_the_same_plan(tmp_path: Path, capsys) -> None:
    student, teacher = saved(tmp_path / "s", "qwen2"), saved(tmp_path / "t", "llama")
    pair = ["--student", student, "--teacher", teacher]
    plan.main(["smoke", *pair, "--json", *FIGURES])
    data = json.loads(capsys.readouterr().out)
    assert data["memory"] == 2e9
    assert data["fits"]
    config = settings(student, teacher)
    (tmp_path / "run").mkdir()
    (tmp_path / "settings.toml").write_text(to_toml(config))
    (tmp_path / "run/config.json").write_text(
        json.dumps(
            {
                "student": student,
                "teacher": teacher,
                "out": "x",
                "steps": 4,
                "prompts_per_step": 4,
                "group_size": 2,
                "max_prompt": 64,
                "max_response": 32,
                "support_k": 8,
                "eval_problems": 8,
            }
        )
    )
    for source in (["--config", tmp_path / "settings.toml"], ["--run", tmp_path / "run"]):
        plan.main([*map(str, source), "--json", *FIGURES])
        assert json.loads(capsys.readouterr().out) == data
    plan.main([*pair, "--gpu", "L4", "--steps", "7"])
    text = capsys.readouterr().out
    assert "on 1 x L4" in text
    assert "fits" in text
    assert "7 steps" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--gpu", "H1000"], InvalidInput, "unknown GPU 'H1000'; known"),
        (["--student", "nowhere"], MissingFile, "model folder 'nowhere' does not exist"),
        (["--support-k", "100000"], InvalidInput, "support_k is 100000, but the shared"),
        (["--gamma", "2"], InvalidInput, "gamma is 2"),
        (["--objective", "k1"], InvalidInput, "k1"),
        (["--sharding", "full"], InvalidInput, "sharding full"),
        (["--gpus", "2", "--engine", "vllm"], InvalidInput, "plan one GPU"),
        (["--config", "a", "--run", "b"], InvalidInput, "only one of"),
        (["--run", "nowhere"], MissingFile, "is no run folder"),
    ],
)
def test_what_is_refused(
    arguments: list[str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", "qwen2")
    with pytest.raises(error, match=message):
        plan.main(["--student", folder, "--teacher", folder, *arguments])


def test_help_names_every_gpu(capsys) -> None:
    from opd.analysis.plan.known_machines import GPUS

    with pytest.raises(SystemExit):
        plan.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in GPUS)
