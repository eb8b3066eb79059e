"""The own-prefix probe: each source is sampled from its model and scored by the same pair."""

import json
from pathlib import Path

import pytest
import torch

from diagnostics.records.batch_files import load_batch
from figures.runs import fan
from opd.analysis.own_prefix import SOURCES, probe_own_prefix
from opd.config.settings import Config, with_settings
from opd.training.train import train


@pytest.fixture(scope="module")
def run(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    student, teacher = map(str, tiny_pair)
    return train(
        with_settings(
            Config(
                student=student,
                teacher=teacher,
                out=str(tmp_path_factory.mktemp("control") / "run"),
                steps=2,
            ),
            prompts_per_step=2,
            group_size=1,
            max_prompt=64,
            max_response=12,
            top_p=0.9,
            lr=1e-2,
            support_k=4,
            eval_problems=2,
        )
    ).folder


def test_each_source_is_sampled_from_its_model(run: Path) -> None:
    batches = dict(zip(SOURCES, map(load_batch, probe_own_prefix(run, 10)), strict=True))
    for name, batch in batches.items():
        assert len(batch) == 10
        assert batch.top_p == 1, "the probe samples from the full softmax"
        assert batch.prompt.tolist() == batches["teacher"].prompt.tolist(), name

    def max_difference(source: str, scorer: str) -> float:
        batch = batches[source]
        return float((getattr(batch, scorer) - batch.sampler_logp).abs().max())

    assert max_difference("teacher", "teacher_logp") < 1e-4
    assert max_difference("student", "student_logp") < 1e-4
    assert max_difference("teacher", "student_logp") > 0.1
    assert max_difference("student", "teacher_logp") > 0.1
    assert max_difference("trained", "student_logp") > 1e-3, (
        "scored by the initial student, not the trained one"
    )
    table = fan.collect([run])
    assert set(table["source"]) == set(SOURCES)
    for name in SOURCES:
        is_supervised, prefix = batches[name].mask[:, 4:8], batches[name].prefix
        mean_doubt = (1 - prefix.teacher_max[:, 4:8])[is_supervised].mean()
        rows = table[(table["source"] == name) & (table["first"] == 4)].set_index("quantity")
        assert rows.loc["doubt", "value"] == pytest.approx(float(mean_doubt), rel=1e-4)


def test_the_probe_is_deterministic(run: Path) -> None:
    first_tokens, second_tokens = (
        [load_batch(path).tokens for path in probe_own_prefix(run, 4)] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first_tokens, second_tokens, strict=True))


def test_runs_without_a_separate_teacher_are_rejected(run: Path, tmp_path: Path) -> None:
    settings = json.loads((run / "config.json").read_text())
    tasks = [{"name": name, "task": "lab"} for name in ("a", "b")]
    for name, changes, error, message in (
        (
            "moving",
            {"teacher": "ema"},
            ValueError,
            "'ema', but probes need a teacher with weights of its own",
        ),
        ("several", {"tasks": tasks}, ValueError, "has 2 tasks"),
        ("unfinished", {}, FileNotFoundError, "finish the run first"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(error, match=message):
            probe_own_prefix(tmp_path / name)
