"""The taught pair on a tiny random model: merging, learning, resumption and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.records.run_folder import RunFolder
from opd.lab.build import make_tokenizer
from opd.lab.networks import make_network
from opd.lab.pretrained import pair
from opd.lab.pretrained.pair import TeachingConfig
from opd.lab.pretrained.word_problems import draw_splits
from opd.models.loading import load_model

CONFIG = TeachingConfig(
    seed=5,
    num_demonstrations=12,
    num_train=4,
    num_held_out=4,
    num_evaluated=2,
    max_prompt=128,
    max_response=112,
    steps=8,
    student_steps=2,
    responses_per_step=2,
    lr=5e-2,
    lora_rank=4,
    dtype="float32",
)


def save_random_model(folder: Path) -> None:
    """Save a tiny random model whose tokens are the frequent words of the problems."""
    problems = draw_splits({"all": 200}, seed=0)["all"]
    tokenizer = make_tokenizer(texts=[f"{p.prompt}\n{p.solution}" for p in problems])
    network = make_network(1, 32, tokenizer, 0)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of a random model, whose teacher is right as often as the student: never."""
    folder = tmp_path_factory.mktemp("taught")
    save_random_model(folder / pair.PACKAGED)
    with pytest.raises(OperationFailed, match="the teacher solves 0 of 2 problems and the student"):
        pair.build(folder, CONFIG)
    return folder


def dense_loss(network: Any, tokenizer: Any, row: dict[str, str]) -> float:
    """Return the mean negative log-likelihood of a response and its EOS, token by token."""
    message = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    response = [*tokenizer.encode(row["response"]), tokenizer.eos_token_id]
    total = 0.0
    logp = network(torch.tensor([ids + response])).logits.log_softmax(-1)[0]
    for position, token in enumerate(response, len(ids) - 1):
        total -= float(logp[position, token])
    return total / len(response)


@torch.no_grad()
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_model_is_the_packaged_one_with_its_adapters_merged(folder: Path, name: str) -> None:
    from peft import PeftModel

    _, packaged = load_model(str(folder / pair.PACKAGED), "cpu", "float32")
    _, taught = load_model(str(folder / name), "cpu", "float32")
    ids = torch.arange(24).reshape(2, 12)
    packaged_logits = packaged(ids).logits.clone()
    adapter = folder / "teaching" / name / "final" / "adapter"
    with_adapters = PeftModel.from_pretrained(packaged, str(adapter)).eval()
    torch.testing.assert_close(taught(ids).logits, with_adapters(ids).logits, atol=1e-5, rtol=0)
    assert (taught(ids).logits - packaged_logits).abs().max() > 1e-2
    names = {path.name for path in (folder / name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"adapter", "README.md"} & names, "an ordinary folder, without the run's additions"


@torch.no_grad()
def test_teaching_lowers_the_loss_of_the_demonstrations(folder: Path) -> None:
    """Both, in as many steps as each is given."""
    rows = [json.loads(x) for x in (folder / "demonstrations.jsonl").read_text().splitlines()]
    losses = {}
    for name in (pair.PACKAGED, "student", "teacher"):
        tokenizer, network = load_model(str(folder / name), "cpu", "float32")
        losses[name] = sum(dense_loss(network, tokenizer, row) for row in rows) / len(rows)
    assert losses["teacher"] < losses[pair.PACKAGED] - 0.05
    assert losses["student"] < losses[pair.PACKAGED] - 0.02
    for name, steps in (("student", 2), ("teacher", 8)):
        run = RunFolder(folder / "teaching" / name)
        assert len(run.rows()) == steps
        assert run.rows()[0]["loss"] == pytest.approx(losses[pair.PACKAGED], abs=0.05)
    seeds = [RunFolder(folder / "teaching" / x).settings()["seed"] for x in ("student", "teacher")]
    assert seeds == [6, 5], "the student sees its demonstrations in another order"


def test_a_student_that_is_not_taught_is_the_packaged_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / pair.PACKAGED, tmp_path / pair.PACKAGED)
    pair.teach(tmp_path, "student", replace(CONFIG, student_steps=0))
    weights = [tmp_path / name / "model.safetensors" for name in (pair.PACKAGED, "student")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (tmp_path / "teaching").exists()


def test_files_have_different_problems(folder: Path) -> None:
    splits = ("demonstrations", "train", "validation", "test")
    prompts = {
        split: {
            json.loads(x)["prompt"]
            for x in (folder / f"{split}.jsonl").read_text().split("\n")[:-1]
        }
        for split in splits
    }
    assert [len(prompts[split]) for split in splits] == [12, 4, 4, 4]
    assert len(set.union(*prompts.values())) == 24
    settings = RunFolder(folder / "teaching" / "teacher").settings()
    assert settings["task"] == str(folder / "demonstrations.jsonl")
    assert (settings["teacher"], settings["prefixes"]) == ("none", "dataset")


def test_a_second_call_teaches_nothing_again(folder: Path) -> None:
    final = folder / "teaching" / "teacher" / "final" / "model.safetensors"
    before = final.stat().st_mtime_ns
    pair.teach(folder, "teacher", CONFIG)
    assert final.stat().st_mtime_ns == before
    assert not (folder / pair.RECORD).exists(), "the teacher was refused"


def test_a_folder_with_other_settings_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"steps 8, not 5; choose another --out"):
        pair.build(folder, replace(CONFIG, steps=5))


def test_a_finished_pair_is_used_as_it_is(tmp_path: Path) -> None:
    pair.write_text(tmp_path / pair.RECORD, "{}")
    assert pair.build(tmp_path) == (tmp_path / "student", tmp_path / "teacher")


@pytest.mark.parametrize(
    ("student", "teacher", "is_taught"),
    [(0.25, 0.5, True), (0.25, 0.49, False), (0.0, 0.01, True), (0.0, 0.0, False)],
)
def test_a_teacher_is_right_twice_as_often(student: float, teacher: float, is_taught: bool) -> None:
    results = [{"accuracy": accuracy, "problems": 100} for accuracy in (student, teacher)]
    if is_taught:
        pair.check_taught(*results)
    else:
        with pytest.raises(OperationFailed, match=f"solves {100 * teacher:.0f} of 100 problems"):
            pair.check_taught(*results)
