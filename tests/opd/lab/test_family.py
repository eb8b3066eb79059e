"""A pair of the family at its tiny size: files, record, bases, resumption, other knobs."""

import json
import random
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.data.chain_task import solve
from opd.data.prompts import encode_prompt, read_problems
from opd.lab.family import build_pair
from opd.lab.knobs import PairKnobs
from opd.lab.pair_facts import foreign_facts, score_rollouts
from opd.lab.pair_models import base_name, pair_limits, training_prompts, training_rows
from opd.lab.pair_problems import split_prompts
from opd.lab.pair_text import write_student
from opd.lab.pair_tokenizer import PairIds, make_pair_tokenizer, pair_ids
from opd.models.loading import load_model
from tests.helpers.batches import batch as random_batch

KNOBS = PairKnobs(size="tiny", foreign_tags=2.0, second_end=True, foreign_ends=0.5)
"""Knobs of a pair whose training covers every kind of text but loops and terse steps."""


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pair with its own bases."""
    folder = tmp_path_factory.mktemp("family") / "pair"
    build_pair(folder, KNOBS, 3)
    return folder


def weights(folder: Path, role: str) -> bytes:
    """Return the saved weights of a model."""
    return (folder / role / "model.safetensors").read_bytes()


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a data file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shared_bases_give_the_same_weights(pair_folder: Path, tmp_path: Path) -> None:
    other_knobs = replace(KNOBS, foreign_tags=1.0, teacher_errors=0.5)
    build_pair(tmp_path / "other", other_knobs, 3, tmp_path / "bases")
    bases = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bases").iterdir()}
    build_pair(tmp_path / "pair", KNOBS, 3, tmp_path / "bases")
    assert bases == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bases").iterdir()}
    for role in ("student", "teacher"):
        assert weights(tmp_path / "pair", role) == weights(pair_folder, role)
        assert weights(tmp_path / "other", role) != weights(pair_folder, role)
    for name in ("train", "validation", "test", "other_task"):
        path = f"{name}.jsonl"
        assert (tmp_path / "pair" / path).read_text() == (pair_folder / path).read_text()


def test_an_interrupted_build_is_continued(pair_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pair"
    shutil.copytree(pair_folder, folder)
    record = json.loads((folder / "pair.json").read_text())
    (folder / "pair.json").write_text(
        json.dumps({k: v for k, v in record.items() if k not in ("facts", "seconds")})
    )
    shutil.rmtree(folder / "teacher")
    stamp = (folder / "student" / "model.safetensors").stat().st_mtime_ns
    build_pair(folder, KNOBS, 3)
    assert (folder / "student" / "model.safetensors").stat().st_mtime_ns == stamp
    assert weights(folder, "teacher") == weights(pair_folder, "teacher")
    assert json.loads((folder / "pair.json").read_text())["facts"] == record["facts"]


def test_a_folder_with_another_pair_is_refused(pair_folder: Path) -> None:
    assert build_pair(pair_folder, KNOBS, 3) == (pair_folder / "student", pair_folder / "teacher")
    with pytest.raises(ValueError, match=r"foreign_tags: 2.0 -> 1.0, seed: 3 -> 4"):
        build_pair(pair_folder, replace(KNOBS, foreign_tags=1.0), 4)


def test_the_files_hold_right_problems_and_share_none(pair_folder: Path) -> None:
    prompts = []
    for name in ("train", "validation", "test"):
        rows = rows_of(pair_folder / f"{name}.jsonl")
        prompts += [row["prompt"] for row in rows]
        for row in rows:
            assert solve(row["prompt"]) == (row["answer"], row["solution"])
            assert row["grader"] == "lab"
            assert ("response" in row) == (name == "train")
    assert len(set(prompts)) == len(prompts)
    for row in rows_of(pair_folder / "other_task.jsonl"):
        assert "".join(sorted(row["prompt"].removeprefix("sort "))) == row["answer"]


def test_the_record_says_what_was_measured(pair_folder: Path) -> None:
    record = json.loads((pair_folder / "pair.json").read_text())
    limits, facts = record["limits"], record["facts"]
    assert record["knobs"] == asdict(KNOBS)
    assert record["seed"] == 3
    assert limits["positions"] == limits["max_prompt"] + limits["max_response"]
    for role, folder in (
        ("student", pair_folder / "student"),
        ("teacher", pair_folder / "teacher"),
    ):
        config = json.loads((folder / "config.json").read_text())
        assert config["max_position_embeddings"] == limits["positions"]
        assert facts["accuracy"][role]["problems"] == len(rows_of(pair_folder / "validation.jsonl"))
        assert facts["other_task"][role]["problems"] == len(
            rows_of(pair_folder / "other_task.jsonl")
        )
    assert all(check["verdict"] != "ok" for check in facts["doctor"])
    batch, _, ids = score_rollouts(pair_folder, limits["max_prompt"], limits["max_response"], 3)
    lengths = batch.mask.sum(1).tolist()
    assert facts["rollouts"]["response/length"] == pytest.approx(sum(lengths) / len(lengths))
    assert facts["foreign"] == foreign_facts(batch, KNOBS, ids)
    # the teacher's log-probabilities, from a pass over each response alone
    tokenizer, teacher = load_model(str(pair_folder / "teacher"), "cpu", "float32")
    problems = read_problems(str(pair_folder / "validation.jsonl"))
    for i, (problem, length) in enumerate(zip(problems, lengths, strict=True)):
        prompt, row = encode_prompt(tokenizer, problem), batch.tokens[i, :length].tolist()
        with torch.no_grad():
            logp = teacher(input_ids=torch.tensor([prompt + row])).logits[0].log_softmax(-1)
        expected = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(row)[:, None])[:, 0]
        torch.testing.assert_close(batch.teacher_logp[i, :length], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("speller", ["student", "teacher"])
def test_foreign_tokens_are_counted_and_priced_as_in_a_loop(speller: str) -> None:
    batch = random_batch()
    ids = PairIds(start=0, tag=3, spelled=(6, 7, 8), end=1, second_end=5, pieces={})
    knobs = replace(KNOBS, spelled_by=speller)  # type: ignore[arg-type]
    own_tag = {"student": 6, "teacher": 3}[speller]
    facts = foreign_facts(batch, knobs, ids)
    positions = [(i, j) for i in range(len(batch)) for j in range(batch.mask.shape[1])]
    positions = [position for position in positions if batch.mask[position]]
    costs = {}
    for name, token in (("tags", own_tag), ("ends", 5)):
        tokens_of_kind = [
            position for position in positions if int(batch.tokens[position]) == token
        ]
        assert facts[f"{name}_per_response"] == pytest.approx(len(tokens_of_kind) / len(batch))
        costs[name] = [float(batch.student_logp[p] - batch.teacher_logp[p]) for p in tokens_of_kind]
        logp = [float(batch.teacher_logp[p]) for p in tokens_of_kind]
        assert facts[name]["teacher_logp"]["count"] == len(tokens_of_kind) > 5
        for key, values in (("teacher_logp", logp), ("cost", costs[name])):
            assert facts[name][key]["mean"] == pytest.approx(sum(values) / len(values), rel=1e-5)
            assert facts[name][key]["q25"] == pytest.approx(float(np.quantile(values, 0.25)), 1e-5)
    num_foreign = len(costs["tags"]) + len(costs["ends"])
    assert facts["token_share"] == pytest.approx(num_foreign / len(positions))
    absent = replace(ids, second_end=99)
    assert foreign_facts(batch, knobs, absent)["ends"] is None


def test_only_a_student_with_a_second_end_ends_with_it(pair_folder: Path) -> None:
    ids = pair_ids(make_pair_tokenizer(KNOBS.vocabulary))
    expected = {"student": [ids.end, ids.second_end], "teacher": ids.end}
    for role, end_ids in expected.items():
        config = json.loads((pair_folder / role / "generation_config.json").read_text())
        assert config["eos_token_id"] == end_ids


def test_training_problems_are_those_of_the_training_split_and_of_the_students_length() -> None:
    splits = split_prompts(KNOBS, 3)
    assert {len(prompt_list) > 300 for prompt_list in splits.values()} == {True}
    assert splits != split_prompts(KNOBS, 4)
    held_out = {*splits["validation"], *splits["test"]}
    for role in ("student", "teacher"):
        assert not held_out & set(training_prompts(role, KNOBS, 3))
    short = replace(KNOBS, student_weakness="short_sighted")
    num_steps = {role: set(prompt_steps(role, short)) for role in ("student", "teacher")}
    assert num_steps == {"student": {3, 4}, "teacher": {3, 4, 5, 6}}


def prompt_steps(role: str, knobs: PairKnobs) -> list[int]:
    """Return the numbers of steps of a model's training problems."""
    return [int(prompt[0]) for prompt in training_prompts(role, knobs, 3)]


def test_a_base_is_named_after_all_that_it_depends_on() -> None:
    names = {
        base_name("student", replace(KNOBS, **{name: value}), 3)  # type: ignore[arg-type]
        for name, value in (
            ("size", "small"),
            ("response_tokens", 80),
            ("vocabulary", 300),
            ("foreign_tags", 0.0),
            ("student_weakness", "small"),
        )
    }
    same_base = [
        base_name("student", knobs, 3)
        for knobs in (KNOBS, replace(KNOBS, foreign_tags=0.1, student_errors=0.2, second_end=False))
    ]
    assert len(set(same_base)) == 1
    other_names = {base_name("teacher", KNOBS, 3), base_name("student", KNOBS, 4)}
    assert len({*names, *other_names, same_base[0]}) == 8
    weak = replace(KNOBS, student_weakness="small")
    assert base_name("teacher", weak, 3) == base_name("teacher", KNOBS, 3)


def test_a_batch_with_loops_is_cut_to_the_models_positions() -> None:
    knobs = replace(KNOBS, student_loops=0.5)
    ids, limits = pair_ids(make_pair_tokenizer(KNOBS.vocabulary)), pair_limits(knobs)
    write = partial(write_student, knobs=knobs, ids=ids)
    prompts = training_prompts("student", knobs, 3)
    generator = random.Random(0)
    rows = [row for _ in range(20) for row in training_rows(prompts, knobs, ids, write, generator)]
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    assert max(lengths) <= limits.positions
    ended = [response[-1].token in (ids.end, ids.second_end) for _, response in rows]
    assert 0.2 < sum(ended) / len(ended) < 1
    assert pair_limits(replace(KNOBS, response_budget=50)).max_response == 50
