"""Runs with several tasks and teachers: routing, order, weights, resume and record."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.alarms.alarms import replay
from diagnostics.batch import ScoredRollouts
from diagnostics.records.batch_files import load_batch
from opd.analysis import doctor
from opd.cli.doctor import main
from opd.cli.train import parse_arguments
from opd.config.files import read_config, read_tasks
from opd.config.settings import Config, TaskSettings, with_settings
from opd.data.prompts import encode_prompts
from opd.data.tasks import load_task
from opd.models.loading import load_model
from opd.teachers.factory import make_pairs
from opd.training.multitask import prompts_per_task, task_configs, tasks_of_step
from opd.training.train import train
from tests.helpers.runs import rows, settings
from tests.opd.training.test_step import adamw_by_hand, final


@pytest.fixture(scope="module")
def sources(tiny_pair, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Two files of prompts, and a second teacher: the first one with noise on its weights."""
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


def two_task_config(tiny_pair, sources, out: Path, **changes: object) -> Config:
    """Two tasks: one with the run's teacher, one with its own teacher, length and weight.

    With task_order alternate, where weights have no effect and are refused, both weigh 1.
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


@pytest.mark.parametrize("objective", ["teacher_topk", "full_reverse_kl"])
def test_a_mixed_step_has_the_same_rows_with_one_forward_pass_and_two(
    tiny_pair, sources, tmp_path: Path, objective: str
) -> None:
    changes = {"task_order": "mixed", "steps": 2, "objective": objective, "rescore_every": 0}
    shared, separate = (
        rows(
            train(
                two_task_config(
                    tiny_pair, sources, tmp_path / str(is_shared),
                    share_forward_pass=is_shared, max_tokens_per_microbatch=60, **changes,
                )
            ).folder
        )
        for is_shared in (True, False)
    )  # fmt: skip
    for row, reference in zip(shared, separate, strict=True):
        assert row.keys() == reference.keys()
        for key in ("loss", "grad_norm", "divergence/k1", "update/leftover_gradient"):
            assert row[key] == pytest.approx(reference[key], rel=1e-4), key


def dense(network, config: Config, batch: ScoredRollouts) -> Tensor:
    """(B, T, V) log-probabilities of one task's rows, each scored without padding."""
    tokenizer, _ = load_model(config.student, "cpu", "float32")
    problems = load_task(config.data.task, config.seed).train(
        0, len(batch) // config.data.group_size
    )
    prompts = encode_prompts(tokenizer, problems, config.data.group_size, config.data.max_prompt)
    logits_by_row = []
    for i in range(len(batch)):
        prompt = prompts.tokens[i][prompts.mask[i]]
        logits = network(torch.cat([prompt, batch.tokens[i]])[None]).logits[0]
        logits_by_row.append(logits[len(prompt) - 1 : -1])
    return torch.stack(logits_by_row).log_softmax(-1)


def test_a_mixed_step_is_the_weighted_mean_of_what_each_teacher_asks(
    tiny_pair, sources, tmp_path: Path
) -> None:
    config = two_task_config(
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
    folder = train(config).folder
    batch = load_batch(folder / "batches" / "step_000000.safetensors")
    assert isinstance(batch, ScoredRollouts)
    student = load_model(config.student, "cpu", "float32")[1]
    parts = []
    for place, task_config in enumerate(task_configs(config)):
        task_batch = batch.rows((batch.task == place).nonzero()[:, 0])
        teacher = load_model(task_config.teacher, "cpu", "float32")[1]
        with torch.no_grad():
            parts.append((task_config, task_batch, dense(teacher, task_config, task_batch)))
    assert [len(task_batch) // config.data.group_size for _, task_batch, _ in parts] == [1, 3]
    assert [int(task_batch.mask.sum(1).max()) for _, task_batch, _ in parts][1] <= 8

    def loss() -> Tensor:
        task_losses = []
        for task_config, task_batch, teacher_logp in parts:
            student_logp = dense(student, task_config, task_batch)
            kl = (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)
            task_losses.append(kl[task_batch.mask].mean())
        return 0.25 * task_losses[0] + 0.75 * task_losses[1]

    row = rows(folder)[0]
    assert row["loss"] == pytest.approx(float(loss().detach()), rel=1e-5)
    adamw_by_hand(student, [loss], config)
    for student_logp, teacher_logp in zip(
        final(folder).parameters(), student.parameters(), strict=True
    ):
        assert torch.allclose(student_logp, teacher_logp, atol=2e-5)
    for name, task_batch in (("sums", parts[0][1]), ("words", parts[1][1])):
        cost = float(task_batch.log_ratio[task_batch.mask].mean())
        assert row[f"task={name}/divergence/k1"] == pytest.approx(cost, rel=1e-6)
    assert "task" not in row


def test_alternating_steps_are_steps_of_the_tasks_own_runs(
    tiny_pair, sources, tmp_path: Path
) -> None:
    config = two_task_config(tiny_pair, sources, tmp_path / "both", steps=2, eval_every=1)
    run_rows = rows(train(config).folder)
    assert [row.pop("task") for row in run_rows] == ["sums", "words"]
    single_task_rows = rows(
        train(replace(task_configs(config)[0], out=str(tmp_path / "alone"), steps=1)).folder
    )
    assert run_rows[0] == single_task_rows[0]
    evals = [json.loads(x) for x in (tmp_path / "both" / "evals.jsonl").read_text().splitlines()]
    assert [(x["step"], x["task"]) for x in evals] == [
        (step, name) for step in (0, 1, 2) for name in ("sums", "words")
    ]
    saved = [
        load_batch(path) for path in sorted((tmp_path / "both" / "batches").glob("*.safetensors"))
    ]
    assert [batch.task.unique().tolist() for batch in saved] == [[0], [1]]
    assert saved[1].tokens.shape[1] <= 8


@pytest.mark.parametrize("order", ["alternate", "weighted", "mixed"])
def test_a_run_cut_within_its_tasks_goes_on_to_the_same_bits(
    tiny_pair, sources, tmp_path: Path, order: str
) -> None:
    options = {"task_order": order, "prompts_per_step": 4, "save_every": 1, "eval_every": 0}
    complete = train(
        two_task_config(tiny_pair, sources, tmp_path / "whole", steps=5, **options)
    ).folder
    train(two_task_config(tiny_pair, sources, tmp_path / "cut", steps=3, **options))
    resumed = train(
        two_task_config(tiny_pair, sources, tmp_path / "cut", steps=5, **options)
    ).folder
    assert rows(resumed) == rows(complete)
    weights = [(x / "final" / "model.safetensors").read_bytes() for x in (resumed, complete)]
    assert weights[0] == weights[1]


def test_a_teacher_that_two_tasks_name_is_loaded_once(tiny_pair, sources, tmp_path: Path) -> None:
    config = two_task_config(tiny_pair, sources, tmp_path)
    first, second = make_pairs(task_configs(config))
    assert second.student is first.student
    assert second.teacher is not first.teacher
    ids = torch.arange(6)[None]
    inputs = (torch.ones_like(ids), torch.arange(6)[None])
    for pair, name in ((first, tiny_pair[1]), (second, sources[2])):
        network = load_model(str(name), "cpu", "float32")[1]
        expected = network.get_decoder()(ids).last_hidden_state
        assert torch.allclose(pair.teacher.model.hidden(ids, *inputs), expected, atol=1e-6)
    same_teacher = replace(
        config, tasks=tuple(replace(task, teacher=None) for task in config.tasks)
    )
    first, second = make_pairs(task_configs(same_teacher))
    assert second.teacher is first.teacher
    with pytest.raises(ValueError, match='"ema" starts as a copy of the student'):
        train(replace(same_teacher, teacher="ema"))
    with pytest.raises(ValueError, match="'ema' is derived from the student"):
        train(replace(config, teacher="ema"))


def test_a_tasks_step_counts_its_own_steps(tiny_pair, sources, tmp_path: Path) -> None:
    config = two_task_config(tiny_pair, sources, tmp_path)
    assert [tasks_of_step(config, s)[0] for s in range(5)] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
        (0, 2),
    ]
    assert tasks_of_step(with_settings(config, task_order="mixed"), 7) == [(0, 7), (1, 7)]
    weighted = two_task_config(tiny_pair, sources, tmp_path, task_order="weighted")
    order = [tasks_of_step(weighted, s) for s in range(2000)]
    counts: Counter[int] = Counter()
    for [(task, nth)] in order:
        assert nth == counts[task]
        counts[task] += 1
    assert abs(counts[1] / 2000 - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    assert order != [tasks_of_step(replace(weighted, seed=1), s) for s in range(2000)]
    assert tasks_of_step(settings(tiny_pair, tmp_path), 9) == [(0, 9)]


def test_prompts_of_a_mixed_step_are_shared_by_weight(tiny_pair, sources, tmp_path: Path) -> None:
    config = two_task_config(tiny_pair, sources, tmp_path, prompts_per_step=10, task_order="mixed")
    assert prompts_per_task(config) == [3, 7]
    for total in range(2, 30):
        parts = prompts_per_task(with_settings(config, prompts_per_step=total))
        assert sum(parts) == total
        assert min(parts) >= 1
    rare_tasks = [replace(config.tasks[0], name=n, weight=w) for n, w in (("x", 0.1), ("y", 0.1))]
    three_tasks = with_settings(
        config, tasks=(*rare_tasks, replace(config.tasks[1], weight=3.8)), prompts_per_step=4
    )
    assert prompts_per_task(three_tasks) == [1, 1, 2]
    with pytest.raises(ValueError, match="mixes 2 tasks"):
        prompts_per_task(with_settings(config, prompts_per_step=1))
    with pytest.raises(ValueError, match=r"\[3, 7\] prompts per step and 3 is not"):
        prompts_per_task(with_settings(config, updates_per_batch=2))


def test_tasks_are_read_from_a_file_and_kept_in_the_run(tiny_pair, tmp_path: Path) -> None:
    path = tmp_path / "mix.toml"
    path.write_text(
        '[[tasks]]\nname = "a"\ntask = "lab"\nmask = ["role:eos"]\n'
        '[[tasks]]\nname = "b"\ntask = "b.jsonl"\nweight = 2.0\nmax_response = 5\n'
    )
    config = parse_arguments(
        ["smoke", "--tasks", str(path), "--task-order", "weighted", "--seed", "3"]
    ).settings
    assert (config.data.task_order, config.seed) == ("weighted", 3)
    assert [task_config.objective.mask for task_config in task_configs(config)] == [
        ("role:eos",),
        (),
    ]
    assert [task_config.rollout.max_response for task_config in task_configs(config)] == [32, 5]
    folder = train(
        replace(
            settings(tiny_pair, tmp_path / "run", steps=1),
            tasks=(replace(config.tasks[0], grader="lab"),),
        )
    ).folder
    assert read_config(folder / "config.json").tasks[0].mask == ("role:eos",)
    for text, message in (
        ('[[tasks]]\nname = "a"\n', r"task 'a' lacks the settings \['task'\]"),
        ('[[tasks]]\nname = "a"\ntask = "lab"\ntop_p = 0.9\n', r"unknown settings \['top_p'\]"),
        ("steps = 3\n", r"tables only, but has \['steps'\]"),
        ("[[tasks\n", "is not valid TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_tasks(path)
    with pytest.raises(ValueError, match="different from each other"):
        train(replace(config, tasks=(config.tasks[0], config.tasks[0])))
    with pytest.raises(SystemExit):
        parse_arguments(["smoke", "--tasks"])


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
    options = {"prompts": 2, "group": 1, "max_response": 6, "device": "cpu"}
    student, teacher = map(str, tiny_pair)
    results = doctor.check_tasks(path, student, teacher, **options)
    words_results = doctor.check_pair(student, str(sources[2]), task=str(sources[1]), **options)
    other_teacher_results = doctor.check_pair(student, teacher, task=str(sources[1]), **options)
    assert results["words"] == words_results != other_teacher_results
    assert results["sums"] == doctor.check_pair(student, teacher, task=str(sources[0]), **options)
    words = [student, teacher, "--tasks", str(path), "--prompts", "2", "--group", "1"]
    words += ["--max-response", "6", "--device", "cpu"]
    failed = any(f.verdict == "fail" for items in results.values() for f in items)
    for option in ([], ["--json"]):
        if failed:
            with pytest.raises(SystemExit):
                main([*words, *option])
        else:
            main([*words, *option])
        output = capsys.readouterr().out
        assert (
            output.count("task ") == 2 if not option else list(json.loads(output)) == list(results)
        )
    with pytest.raises(ValueError, match="either --task or --tasks"):
        main([*words, "--task", "lab"])
