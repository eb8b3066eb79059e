"""Several tasks with a teacher each in one run: routing, order, weights, resume, record."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.alarms.alarms import replay
from diagnostics.batch import ScoredRollouts
from diagnostics.records.batch_files import load
from opd.analysis import doctor
from opd.cli.doctor import main
from opd.cli.train import parse
from opd.config.settings import Config, TaskSettings, from_json
from opd.data.prompts import encode
from opd.data.tasks import load_task
from opd.models.loading import load as load_model
from opd.teachers.factory import make_pairs
from opd.training.multitask import read_tasks, settings_of, shares, turns
from opd.training.train import train
from tests.opd.training.test_step import adamw_by_hand, final
from tests.opd.training.test_train import rows, settings


@pytest.fixture(scope="module")
def sources(tiny_pair, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Two files of prompts, and another teacher: the first one with noise on its weights."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, word in (("sums", "1+"), ("words", "say ")):
        lines = [json.dumps({"prompt": f"{word}{i}", "answer": str(i)}) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    tokenizer, network = load_model(str(tiny_pair[1]), "cpu", "float32")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    network.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder / "sums.jsonl", folder / "words.jsonl", folder / "teacher"


def several(tiny_pair, sources, out: Path, **changes: object) -> Config:
    """Two tasks: the first has the run's teacher, the second another, a length and a weight.

    In turns, where weights have no effect and are refused, both weigh 1.
    """
    weight = 1.0 if changes.get("task_order", "alternate") == "alternate" else 3.0
    tasks = (
        TaskSettings(name="sums", task=str(sources[0])),
        TaskSettings(
            name="words",
            task=str(sources[1]),
            teacher=str(sources[2]),
            max_response=8,
            weight=weight,
        ),
    )
    return settings(tiny_pair, out, **({"tasks": tasks} | changes))


def dense(network, config: Config, batch: ScoredRollouts) -> Tensor:
    """(B, T, V) log-probabilities of one task's rows, each without padding."""
    tokenizer, _ = load_model(config.student, "cpu", "float32")
    problems = load_task(config.task, config.seed).train(0, len(batch) // config.group_size)
    prompts = encode(tokenizer, problems, config.group_size, config.max_prompt)
    found = []
    for i in range(len(batch)):
        prompt = prompts.tokens[i][prompts.mask[i]]
        logits = network(torch.cat([prompt, batch.tokens[i]])[None]).logits[0]
        found.append(logits[len(prompt) - 1 : -1])
    return torch.stack(found).log_softmax(-1)


def test_a_mixed_step_is_the_weighted_mean_of_what_each_teacher_asks(
    tiny_pair, sources, tmp_path: Path
) -> None:
    config = several(
        tiny_pair,
        sources,
        tmp_path / "run",
        task_order="mixed",
        prompts_per_step=4,
        objective="full_reverse_kl",
        steps=1,
        eval_every=0,
        eval_problems=1,
        save_batch_every=1,
    )
    folder = train(config)
    batch = load(folder / "batches" / "step_000000.safetensors")
    assert isinstance(batch, ScoredRollouts)
    student = load_model(config.student, "cpu", "float32")[1]
    parts = []
    for place, own in enumerate(settings_of(config)):
        mine = batch.rows((batch.task == place).nonzero()[:, 0])
        teacher = load_model(own.teacher, "cpu", "float32")[1]
        with torch.no_grad():
            parts.append((own, mine, dense(teacher, own, mine)))
    assert [len(mine) // config.group_size for _, mine, _ in parts] == [1, 3]
    assert [int(mine.mask.sum(1).max()) for _, mine, _ in parts][1] <= 8

    def loss() -> Tensor:
        each = []
        for own, mine, theirs in parts:
            ours = dense(student, own, mine)
            kl = (ours.exp() * (ours - theirs)).sum(-1)
            each.append(kl[mine.mask].mean())
        return 0.25 * each[0] + 0.75 * each[1]

    row = rows(folder)[0]
    assert row["loss"] == pytest.approx(float(loss().detach()), rel=1e-5)
    adamw_by_hand(student, [loss], config)
    for ours, theirs in zip(final(folder).parameters(), student.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)
    for name, mine in (("sums", parts[0][1]), ("words", parts[1][1])):
        cost = float(mine.log_ratio[mine.mask].mean())
        assert row[f"task={name}/divergence/k1"] == pytest.approx(cost, rel=1e-6)
    assert "task" not in row


def test_alternating_steps_are_steps_of_the_tasks_own_runs(
    tiny_pair, sources, tmp_path: Path
) -> None:
    config = several(tiny_pair, sources, tmp_path / "both", steps=2, eval_every=1)
    found = rows(train(config))
    assert [row.pop("task") for row in found] == ["sums", "words"]
    alone = rows(train(replace(settings_of(config)[0], out=str(tmp_path / "alone"), steps=1)))
    assert found[0] == alone[0]
    evals = [json.loads(x) for x in (tmp_path / "both" / "evals.jsonl").read_text().splitlines()]
    assert [(x["step"], x["task"]) for x in evals] == [
        (step, name) for step in (0, 1, 2) for name in ("sums", "words")
    ]
    saved = [load(path) for path in sorted((tmp_path / "both" / "batches").glob("*.safetensors"))]
    assert [batch.task.unique().tolist() for batch in saved] == [[0], [1]]
    assert saved[1].tokens.shape[1] <= 8


@pytest.mark.parametrize("order", ["alternate", "weighted", "mixed"])
def test_a_run_cut_within_its_tasks_goes_on_to_the_same_bits(
    tiny_pair, sources, tmp_path: Path, order: str
) -> None:
    how = {"task_order": order, "prompts_per_step": 4, "save_every": 1, "eval_every": 0}
    whole = train(several(tiny_pair, sources, tmp_path / "whole", steps=5, **how))
    train(several(tiny_pair, sources, tmp_path / "cut", steps=3, **how))
    cut = train(several(tiny_pair, sources, tmp_path / "cut", steps=5, **how))
    assert rows(cut) == rows(whole)
    weights = [(x / "final" / "model.safetensors").read_bytes() for x in (cut, whole)]
    assert weights[0] == weights[1]


def test_a_teacher_that_two_tasks_name_is_loaded_once(tiny_pair, sources, tmp_path: Path) -> None:
    config = several(tiny_pair, sources, tmp_path)
    first, second = make_pairs(settings_of(config))
    assert second.student is first.student
    assert second.teacher is not first.teacher
    ids = torch.arange(6)[None]
    same = (torch.ones_like(ids), torch.arange(6)[None])
    for pair, name in ((first, tiny_pair[1]), (second, sources[2])):
        network = load_model(str(name), "cpu", "float32")[1]
        known = network.get_decoder()(ids).last_hidden_state
        assert torch.allclose(pair.teacher.hidden(ids, *same), known, atol=1e-6)
    shared = replace(config, tasks=tuple(replace(task, teacher=None) for task in config.tasks))
    first, second = make_pairs(settings_of(shared))
    assert second.teacher is first.teacher
    with pytest.raises(ValueError, match="'ema' is of the student"):
        make_pairs(settings_of(replace(shared, teacher="ema")))


def test_a_tasks_step_counts_its_own_steps(tiny_pair, sources, tmp_path: Path) -> None:
    config = several(tiny_pair, sources, tmp_path)
    assert [turns(config, s)[0] for s in range(5)] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert turns(replace(config, task_order="mixed"), 7) == [(0, 7), (1, 7)]
    weighted = several(tiny_pair, sources, tmp_path, task_order="weighted")
    found = [turns(weighted, s) for s in range(2000)]
    seen: Counter[int] = Counter()
    for [(task, nth)] in found:
        assert nth == seen[task]
        seen[task] += 1
    assert abs(seen[1] / 2000 - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    assert found != [turns(replace(weighted, seed=1), s) for s in range(2000)]
    assert turns(settings(tiny_pair, tmp_path), 9) == [(0, 9)]


def test_prompts_of_a_mixed_step_are_shared_by_weight(tiny_pair, sources, tmp_path: Path) -> None:
    config = several(tiny_pair, sources, tmp_path, prompts_per_step=10, task_order="mixed")
    assert shares(config) == [3, 7]
    for total in range(2, 30):
        parts = shares(replace(config, prompts_per_step=total))
        assert sum(parts) == total
        assert min(parts) >= 1
    rare = [replace(config.tasks[0], name=n, weight=w) for n, w in (("x", 0.1), ("y", 0.1))]
    both = replace(config, tasks=(*rare, replace(config.tasks[1], weight=3.8)), prompts_per_step=4)
    assert shares(both) == [1, 1, 2]
    with pytest.raises(ValueError, match="2 tasks are mixed"):
        shares(replace(config, prompts_per_step=1))
    with pytest.raises(ValueError, match=r"\[3, 7\] prompts a step: 3 cannot"):
        shares(replace(config, updates_per_batch=2))


def test_tasks_are_read_from_a_file_and_kept_in_the_run(tiny_pair, tmp_path: Path) -> None:
    path = tmp_path / "mix.toml"
    path.write_text(
        '[[tasks]]\nname = "a"\ntask = "lab"\nmask = ["role:eos"]\n'
        '[[tasks]]\nname = "b"\ntask = "b.jsonl"\nweight = 2.0\nmax_response = 5\n'
    )
    config = parse(["smoke", "--tasks", str(path), "--task-order", "weighted", "--seed", "3"])
    assert (config.task_order, config.seed) == ("weighted", 3)
    assert [own.mask for own in settings_of(config)] == [("role:eos",), ()]
    assert [own.max_response for own in settings_of(config)] == [32, 5]
    folder = train(
        replace(
            settings(tiny_pair, tmp_path / "run", steps=1),
            tasks=(replace(config.tasks[0], grader="lab"),),
        )
    )
    assert from_json(folder / "config.json").tasks[0].mask == ("role:eos",)
    for text, wrong in (
        ('[[tasks]]\nname = "a"\n', r"task 'a' lacks \['task'\]"),
        ('[[tasks]]\nname = "a"\ntask = "lab"\ntop_p = 0.9\n', r"unknown settings \['top_p'\]"),
        ("steps = 3\n", r"nothing else; it holds \['steps'\]"),
        ("[[tasks\n", "is not TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=wrong):
            read_tasks(path)
    with pytest.raises(ValueError, match="different from each other"):
        replace(config, tasks=(config.tasks[0], config.tasks[0]))
    with pytest.raises(ValueError, match="--tasks needs a file"):
        parse(["smoke", "--tasks"])


def test_alarms_of_tasks_that_take_turns_are_apart() -> None:
    levels = {"a": 0.1, "b": 1.0}
    record = [
        {"step": step, "task": task, "divergence/k1": levels[task], "divergence/k1_se": 0.001}
        for step, task in enumerate("aaa" + "ab" * 20)
    ]
    assert replay(record) == []
    without = [{k: v for k, v in row.items() if k != "task"} for row in record]
    assert {alarm.rule.name for alarm in replay(without)} == {"drift_k1"}
    record += [dict(row, step=row["step"] + 100, **{"divergence/k1": 2.0}) for row in record]
    raised = [alarm for alarm in replay(record) if alarm.rule.name == "drift_k1"]
    assert len(raised) == 2


def test_the_doctor_examines_each_tasks_pair(tiny_pair, sources, tmp_path: Path, capsys) -> None:
    path = tmp_path / "mix.toml"
    path.write_text(
        f'[[tasks]]\nname = "sums"\ntask = "{sources[0]}"\n'
        f'[[tasks]]\nname = "words"\ntask = "{sources[1]}"\nteacher = "{sources[2]}"\n'
    )
    how = {"prompts": 2, "group": 1, "max_response": 6, "device": "cpu"}
    student, teacher = map(str, tiny_pair)
    found = doctor.examine_tasks(path, student, teacher, **how)
    alone = doctor.examine(student, str(sources[2]), task=str(sources[1]), **how)
    other = doctor.examine(student, teacher, task=str(sources[1]), **how)
    assert found["words"] == alone != other
    assert found["sums"] == doctor.examine(student, teacher, task=str(sources[0]), **how)
    words = [student, teacher, "--tasks", str(path), "--prompts", "2", "--group", "1"]
    words += ["--max-response", "6", "--device", "cpu"]
    failed = any(f.verdict == "fail" for items in found.values() for f in items)
    for option in ([], ["--json"]):
        if failed:
            with pytest.raises(SystemExit):
                main([*words, *option])
        else:
            main([*words, *option])
        shown = capsys.readouterr().out
        assert shown.count("task ") == 2 if not option else list(json.loads(shown)) == list(found)
    with pytest.raises(ValueError, match="either --task or --tasks"):
        main([*words, "--task", "lab"])
