"""The doctor and the probes of a run whose teacher reads prompts of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.errors import InvalidInput
from diagnostics.records.batch_files import load_batch
from opd.analysis.continuation import probe_continuation
from opd.analysis.doctor import check_config
from opd.analysis.own_prefix import probe_own_prefix
from opd.analysis.pair_checks import load_side
from opd.analysis.sample_checks import gather_evidence, teacher_logp_at_end
from opd.config.settings import Config
from opd.data.chain_task import Problem
from opd.data.teacher_view.template import compile_view_template
from opd.data.teacher_view.view import TeacherView
from opd.lab.build import TEMPLATE
from opd.teachers.pair import join_models
from opd.training.checks.check_result import CheckResult
from opd.training.train import train
from tests.helpers.games import ECHO
from tests.helpers.runs import settings

VIEW = "{{ prompt }} Hint: {{ solution }}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    problems = [
        {"prompt": f"{a}+1", "answer": str(a + 1), "solution": f"{a}1" * 4} for a in range(30)
    ]
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


def view_config(pair: Any, data: Path, view: str, **changes: Any) -> Config:
    file = data.with_name("view.jinja")
    file.write_text(view)
    options = {"task": str(data), "teacher_view": str(file), "steps": 1, "eval_every": 0, **changes}
    return settings(pair, data.with_name("run"), **options)


def examine(config: Config) -> CheckResult:
    results = check_config(config, max_response=6, prompts=3, group=2, seed=0, device="cpu")
    (result,) = [x for x in results[""] if x.item == "teacher's prompts"]
    return result


@pytest.mark.parametrize("teacher", ["", "ema"])
def test_the_doctor_says_what_the_teacher_reads(tiny_pair, data: Path, teacher: str) -> None:
    changes = {"teacher": teacher} if teacher else {}
    result = examine(view_config(tiny_pair, data, VIEW, **changes))
    assert result.verdict == "ok", result.found
    numbers = result.numbers
    example = numbers["example"]
    assert example.startswith("<|im_start|>user\n")
    assert "+1 Hint: " in example
    assert repr(example) in result.found
    assert numbers["student"] < numbers["teacher"] <= numbers["limit"] == 256 - 8
    assert f"up to {numbers['teacher']} tokens, the student's {numbers['student']}" in result.found


def test_the_doctor_scores_its_sample_with_the_view(tiny_pair, data: Path) -> None:
    """With the view, a copy of the student finds another signal than none."""
    copy = {"teacher": str(tiny_pair[0])}
    results = check_config(
        view_config(tiny_pair, data, "{{ prompt }}{{ feedback }}", **copy),
        max_response=6,
        prompts=3,
        group=2,
        seed=0,
        device="cpu",
    )
    numbers = {x.item: x.numbers for x in results[""]}
    assert numbers["teacher noise"]["signal_rms"] > 1e-2
    assert numbers["teacher noise"]["alone_rms"] < 1e-4


def test_the_end_is_scored_by_the_teacher_with_its_view(tiny_pair) -> None:
    sides = [load_side(str(folder), "cpu", "float32") for folder in tiny_pair]
    pair = join_models(sides[0].loaded, "teacher", sides[1].loaded)
    view = TeacherView(template=compile_view_template("{{ prompt }} Hint", "view.jinja"))
    problems = [Problem(f"{a}+1", str(a + 1)) for a in range(3)]
    options = {"group": 1, "max_response": 5, "seed": 0}
    evidence = gather_evidence(*sides, pair, problems, **options, view=view)
    logq, ids = teacher_logp_at_end(evidence, [0, 1, 2])
    last = evidence.rollouts.lengths - 1
    expected = evidence.scored.teacher_logp[torch.arange(3), last]
    torch.testing.assert_close(logq.gather(1, ids[:, None])[:, 0], expected, atol=1e-5, rtol=0)


def test_the_doctor_warns_of_prompts_that_end_in_another_place(tiny_pair, data: Path) -> None:
    thinking = data.with_name("thinking.jinja")
    thinking.write_text(TEMPLATE.replace("assistant\n{%", "assistant\n<think>{%"))
    result = examine(view_config(tiny_pair, data, VIEW, teacher_template=str(thinking)))
    assert result.verdict == "warn"
    assert "the teacher's with" in result.found
    assert "<think>" in result.found
    other_end = data.with_name("other.jinja")
    other_end.write_text(TEMPLATE.replace("<|im_end|>", "</think>"))
    result = examine(view_config(tiny_pair, data, VIEW, teacher_template=str(other_end)))
    assert "ends a turn with </think>, no EOS of the pair" in result.found
    assert "map_eos" in result.advice


@pytest.mark.parametrize(
    ("view", "changes", "words"),
    [
        ("{{ hint }}", {"teacher": "ema"}, "which teacher_view uses"),
        ("{{ prompt }}", {"teacher": "ema"}, "the divergence is zero"),
    ],
)
def test_the_doctor_fails_where_the_run_would(
    tiny_pair, data: Path, view: str, changes: dict[str, Any], words: str
) -> None:
    result = examine(view_config(tiny_pair, data, view, **changes))
    assert result.verdict == "fail"
    assert words in result.found


def test_the_doctor_shows_the_view_of_a_game(tiny_pair, data: Path) -> None:
    view = "Goal {{ goal }}: {{ observation }}{{ feedback }}"
    config = view_config(tiny_pair, data, view, task=ECHO, max_prompt=200)
    assert "Goal 1 words: Say it." in examine(config).numbers["example"]


def test_probes_sample_the_teacher_with_its_view(tiny_pair, data: Path) -> None:
    config = view_config(tiny_pair, data, VIEW)
    folder = train(config).folder
    teacher_batch, student_batch, _ = map(load_batch, probe_own_prefix(folder, 3))
    gap = (teacher_batch.teacher_logp - teacher_batch.sampler_logp).abs()
    assert float(gap.max()) < 1e-4
    gap = (student_batch.student_logp - student_batch.sampler_logp).abs()
    assert float(gap.max()) < 1e-4
    rows = probe_continuation(folder, [0, 3], 3)
    assert [row["length"] for row in rows] == [0, 3]
    Path(config.view.teacher_view).write_text("{{ prompt }}{{ feedback }}")
    with pytest.raises(InvalidInput, match=r"uses responses, but this probe samples the teacher"):
        probe_own_prefix(folder, 3)
