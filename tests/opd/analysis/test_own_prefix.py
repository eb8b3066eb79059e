"""The own-prefix control: each source is sampled by its own model and scored by one pair."""

import json
from pathlib import Path

import pytest
import torch

from diagnostics.records.batch_files import load
from figures.runs import fan
from opd.analysis.own_prefix import SOURCES, control
from opd.config.settings import Config
from opd.training.train import train


@pytest.fixture(scope="module")
def run(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    student, teacher = map(str, tiny_pair)
    return train(
        Config(
            student=student,
            teacher=teacher,
            out=str(tmp_path_factory.mktemp("control") / "run"),
            steps=2,
            prompts_per_step=2,
            group_size=1,
            max_prompt=64,
            max_response=12,
            top_p=0.9,
            lr=1e-2,
            support_k=4,
            eval_problems=2,
        )
    )


def test_each_source_is_its_own_models_text(run: Path) -> None:
    found = dict(zip(SOURCES, map(load, control(run, 10)), strict=True))
    for name, batch in found.items():
        assert len(batch) == 10
        assert batch.top_p == 1, "the control samples the whole softmax, whatever the run did"
        assert batch.prompt.tolist() == found["teacher"].prompt.tolist(), name

    def apart(name: str, scorer: str) -> float:
        batch = found[name]
        return float((getattr(batch, scorer) - batch.sampler_logp).abs().max())

    assert apart("teacher", "teacher_logp") < 1e-4
    assert apart("student", "student_logp") < 1e-4
    assert apart("teacher", "student_logp") > 0.1
    assert apart("student", "teacher_logp") > 0.1
    assert apart("trained", "student_logp") > 1e-3, "scored by the first student, not the last"
    table = fan.collect([run])
    assert set(table["source"]) == set(SOURCES)
    for name in SOURCES:
        some, prefix = found[name].mask[:, 4:8], found[name].prefix
        doubt = (1 - prefix.teacher_max[:, 4:8])[some].mean()
        at = table[(table["source"] == name) & (table["first"] == 4)].set_index("quantity")
        assert at.loc["doubt", "value"] == pytest.approx(float(doubt), rel=1e-4)


def test_the_control_is_the_same_twice(run: Path) -> None:
    first, second = ([load(path).tokens for path in control(run, 4)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_runs_without_a_teacher_to_compare_are_refused(run: Path, tmp_path: Path) -> None:
    settings = json.loads((run / "config.json").read_text())
    tasks = [{"name": name, "task": "lab"} for name in ("a", "b")]
    for name, changed, error, message in (
        ("moving", {"teacher": "ema"}, ValueError, "'ema', which has no text of its own"),
        ("several", {"tasks": tasks}, ValueError, "has 2 tasks"),
        ("unfinished", {}, FileNotFoundError, "finish the run first"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings | changed))
        with pytest.raises(error, match=message):
            control(tmp_path / name)
