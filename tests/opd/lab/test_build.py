"""The toy pair at its tiny size: caching, determinism and Hugging Face folders."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd.config.groups import EvalConfig
from opd.data.chain_task import Problem, corrupted_solution, problems, solve
from opd.data.prompts import encode_prompts
from opd.evaluation.folder import respond_folder
from opd.lab import problem_files
from opd.lab.build import (
    VOCABULARY_SIZE,
    add_gradient,
    build,
    make_tokenizer,
    make_training_batch,
    new_model,
)
from opd.lab.configs import LabConfig, ToyModelConfig, household_config, tiny_config
from opd.lab.problem_files import MESSAGE_COLUMNS
from opd.lab.training_loop import ROWS_AT_ONCE
from opd.lab.writing_style import WritingStyle
from opd.runtime.seeds import derive_seed


def test_the_pair_is_deterministic_cached_and_keyed_by_its_settings(tmp_path: Path) -> None:
    first = build(tmp_path / "a", tiny_config())
    second_pair = build(tmp_path / "b", tiny_config())
    for folder, second_folder in zip(first, second_pair, strict=True):
        weights = [(d / "model.safetensors").read_bytes() for d in (folder, second_folder)]
        assert weights[0] == weights[1]
    stamp = (first[0] / "model.safetensors").stat().st_mtime_ns
    assert build(tmp_path / "a", tiny_config()) == first
    assert (first[0] / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        build(tmp_path / "a", replace(tiny_config(), seed=1))


def test_the_tokenizer_round_trips_from_disk(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    # the model in the same folder decides the class of the loaded tokenizer
    new_model(tiny_config().student, 0, tokenizer).save_pretrained(tmp_path)
    text = "<|im_start|>user\n3+8 <think>~!\" \té漢 12's</think>11<|im_end|>"
    expected_ids, tokenizer = tokenizer.encode(text), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode(text) == expected_ids
    assert tokenizer.decode(expected_ids) == text
    assert tokenizer.encode("<think>") == [tokenizer.convert_tokens_to_ids("<think>")]
    prompts = encode_prompts(tokenizer, [Problem("1+2", "3"), Problem("1+2+3", "6")], 2, 64)
    prompt_text = tokenizer.decode(prompts.tokens[0][prompts.mask[0]])
    assert prompt_text == "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.index.tolist() == [0, 0, 1, 1]
    assert prompts.mask[0].tolist() == [False, False] + [True] * (prompts.mask.shape[1] - 2)
    with pytest.raises(ValueError, match="max_prompt is 10"):
        encode_prompts(tokenizer, [Problem("1+2", "3")], 1, 10)


def test_only_the_response_is_labelled() -> None:
    tokenizer = make_tokenizer()
    ids, labels = make_training_batch(tokenizer, replace(tiny_config().teacher, batch=3), seed=0)
    for row, label, problem in zip(ids, labels, problems("train", 3, 0), strict=True):
        labelled_ids = label[label != -100]
        assert tokenizer.decode(labelled_ids) == problem.solution + "<|im_end|>"
        assert (row[label != -100] == labelled_ids).all()


def test_corrupted_solutions_propagate_errors_at_their_rate() -> None:
    generator, results, slips = random.Random(0), 0, 0
    for problem in problems("train", 300, 0):
        text = corrupted_solution(problem.prompt, 0.2, generator)
        lines = text.removeprefix("<think>").split("</think>")[0].split()
        state = None
        for line in lines:
            head, middle, total = line.split(":")[1].split("=")
            x, a = map(int, head.split("*"))
            product, b = map(int, middle.split("+"))
            assert state is None or x == state, (
                "a line continues from the previous one, right or wrong"
            )
            state = int(total) % 10
            results += 2
            slips += (product != x * a) + (int(total) != product + b)
        assert text.endswith(f"</think>{state}")
    assert abs(slips - 0.2 * results) < 4 * (results * 0.2 * 0.8) ** 0.5
    assert corrupted_solution("4:7*3+8", 0.0, generator) == solve("4:7*3+8")[1]


def test_models_of_games_have_word_tokens_and_single_digits(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer("<|im_end|>", household_config().texts)
    tokenizer.save_pretrained(tmp_path)
    new_model(tiny_config().student, 0, tokenizer).save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    words = [reloaded.decode(i) for i in reloaded.encode("<think>hold CUP</think>go to fridge")]
    assert words == ["<think>", "hold", " CUP", "</think>", "go", " to", " fridge"]
    assert [reloaded.decode(i) for i in reloaded.encode("27*3")] == ["2", "7", "*", "3"]
    assert reloaded.eos_token == "<|im_end|>"
    prompt = reloaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert prompt == "<|im_start|>user\na<|im_end|>\n"
    assert len(tokenizer) <= VOCABULARY_SIZE
    assert len(make_tokenizer()) == 261, "models without games have one token per byte"
    assert not tiny_config().texts


def test_a_task_named_twice_is_sampled_twice_as_often() -> None:
    tokenizer = make_tokenizer("<|im_end|>", household_config().texts)
    recipe = replace(household_config().student, batch=9, careless=0.0)
    assert recipe.tasks == ("household", "household", "sort")
    texts = [tokenizer.decode(row) for row in make_training_batch(tokenizer, recipe, seed=0)[0]]
    assert sum("Actions:" in text for text in texts) == 6
    assert sum("user\nsort " in text for text in texts) == 3
    assert len(set(texts)) == 9


def row_losses(row: list[int], label: list[int], scores: Tensor, prompts: bool) -> list[Tensor]:
    """Return the losses of the labelled tokens of a row, or those of its prompt."""
    start = next(i for i, label_id in enumerate(label) if label_id != -100)
    losses = [-scores[i - 1].log_softmax(-1)[row[i]] for i in range(1, len(row))]
    return [
        loss
        for i, loss in enumerate(losses, start=1)
        if (i < start if prompts else label[i] != -100)
    ]


@pytest.mark.parametrize(
    ("task", "end", "learns_prompts"),
    [("household", "<|im_end|>", True), ("chain", "<|endoftext|>", False)],
)
def test_the_gradient_of_parts_is_that_of_the_mean_loss(
    task: str, end: str, learns_prompts: bool
) -> None:
    texts = household_config().texts if task == "household" else []
    tokenizer = make_tokenizer(end, texts)
    style = WritingStyle(end=end)  # an EOS that is the padding token is learned, too
    recipe = ToyModelConfig(
        layers=1, width=32, steps=1, batch=ROWS_AT_ONCE + 3, lr=1e-3, tasks=(task,), habit=style
    )
    ids, labels = make_training_batch(tokenizer, recipe, seed=0)
    network = new_model(recipe, 0, tokenizer)
    parameters = list(network.parameters())
    value = add_gradient(network, ids, labels, tokenizer.pad_token_id, learns_prompts)
    gradients = [x.grad.clone() for x in parameters]
    logits = network(input_ids=ids).logits
    kinds = (False, True) if learns_prompts else (False,)
    means = []
    for prompts in kinds:
        rows = zip(ids.tolist(), labels.tolist(), logits, strict=True)
        means.append(torch.stack([x for r in rows for x in row_losses(*r, prompts)]).mean())
    assert value == pytest.approx(float(torch.stack(means).sum().detach()), rel=1e-5)
    expected = torch.autograd.grad(torch.stack(means).sum(), parameters)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny", "household", "mismatched"])
def test_a_missing_model_names_the_command_that_builds_it(kind: str) -> None:
    from opd.models.loading import load_model

    with pytest.raises(FileNotFoundError, match=f"opd lab --{kind}"):
        load_model(f"lab-{kind}/student", "cpu", "float32")


def test_a_model_that_continues_another_starts_from_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_training = 12
    monkeypatch.setattr(problem_files, "NUM_TRAINING", num_training)
    teacher = ToyModelConfig(layers=1, width=32, steps=2, batch=4, lr=2e-3, tasks=("shown",))
    copy = replace(teacher, steps=0, start="teacher")
    further = replace(copy, steps=1, careless=0.5)
    config = LabConfig(teacher=teacher, student=copy, others=(("further", further),), held_out=4)
    student_folder, teacher_folder = build(tmp_path, config)
    weights = {
        name: (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("teacher", "student", "further")
    }
    assert weights["student"] == weights["teacher"] != weights["further"]
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == num_training
    expected = respond_folder(
        str(teacher_folder),
        "lab",
        device="cpu",
        evaluation=EvalConfig(eval_task=str(tmp_path / "train.jsonl"), eval_problems=num_training),
        max_prompt=64,
        max_response=48,
        seed=derive_seed(0, 3),
    )
    texts = {p.prompt: texts[0] for p, texts in zip(expected.problems, expected.texts, strict=True)}
    assert {row["prompt"]: row["response"] for row in rows} == texts
    assert len(set(texts.values())) == num_training
    accuracies = json.loads((tmp_path / "lab.json").read_text())["student"]["tasks"]
    assert list(accuracies) == list(MESSAGE_COLUMNS)
    assert build(tmp_path, config) == (student_folder, teacher_folder)
