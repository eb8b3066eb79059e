"""Recovery from an error: engines whose recovery is known, plain loops, and all places."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from opd.data.chain_task import Problem
from opd.data.grading.graders import make_grader
from opd.data.prompts import encode_prompts
from opd.evaluation import recovery
from opd.evaluation.perturbation import (
    Perturbation,
    digit_alternatives,
    draw_perturbations,
    reasoning_places,
    runner_up_ids,
)
from opd.evaluation.recovery import (
    RecoveryRecord,
    continue_prefixes,
    measure_recovery,
    recovery_metrics,
)
from opd.evaluation.responses import GradedResponses
from opd.lab.build import make_tokenizer
from opd.models.loading import eos_ids, load_model, num_head_rows
from opd.models.model import split_head
from opd.rollouts.hf_engine import HfEngine
from tests.helpers.games import Script

SETTINGS: dict[str, Any] = {
    "source": "response",
    "max_prompt": 64,
    "max_response": 40,
    "temperature": 1.0,
    "top_p": 1.0,
    "seed": 0,
}
LAB = make_grader("lab")


@pytest.fixture(scope="module")
def loaded(tiny_pair) -> Any:
    tokenizer, network = load_model(str(tiny_pair[0]), "cpu", "float32")
    return tokenizer, split_head(network, num_head_rows(network)), eos_ids(tokenizer, network)


def graded_texts(tokenizer: Any, texts: list[list[str]], solution: str = "") -> GradedResponses:
    shape = len(texts), len(texts[0])
    problems = [Problem(f"prompt {i}", str(i % 10), solution) for i in range(len(texts))]
    eos = tokenizer.eos_token_id
    return GradedResponses(
        problems,
        np.zeros(shape),
        np.zeros(shape),
        np.ones(shape, bool),
        [[None] * shape[1]] * shape[0],
        texts,
        [[np.array([*tokenizer.encode(text), eos]) for text in row] for row in texts],
        "lab",
    )


def run(loaded: Any, engine: Any, graded: GradedResponses, **changes: Any) -> Any:
    tokenizer, model, eos = loaded
    settings = {"kind": "digit", **SETTINGS, **changes}
    return measure_recovery(engine, model, tokenizer, eos, graded, LAB, **settings)


def test_an_engine_that_trusts_the_prefix_loses_what_the_error_changes(loaded: Any) -> None:
    """The continuation repeats the first digit of the reasoning, the only place of an error."""
    texts = [["<think>d" + str(i % 10) + " so</think>1", "<think>none</think>2"] for i in range(30)]
    graded = graded_texts(loaded[0], texts)
    engine = Script(lambda row, call: "", end=True)

    def trusting(row: int, call: int) -> str:
        return f" so</think>{engine.read[call][row].rpartition('d')[2][0]}"

    engine.say = trusting
    metrics, records = run(loaded, engine, graded)
    assert (metrics["unperturbed"], metrics["perturbed"], metrics["loss"]) == (1, 0, 1)
    assert metrics["loss/low"] > 0.8
    assert (metrics["prefixes"], metrics["left_out"]) == (30, 0.5)
    assert metrics["prefix_length"] == 2
    assert metrics["by_problem"] == [[1, 1]] * 30
    for record, (text, _) in zip(records, texts, strict=True):
        assert record.perturbation.sample == 0
        assert record.texts[0] == text[:-1] + text[8]
        assert len(record.texts[0]) == len(record.texts[1])
        assert record.texts[0] != record.texts[1]

    def stubborn(row: int, call: int) -> str:
        return f"</think>{engine.read[call][row].split('prompt ')[1].split('<')[0].strip()[-1]}"

    engine.say, engine.read = stubborn, []
    metrics, _ = run(loaded, engine, graded)
    assert (metrics["unperturbed"], metrics["perturbed"], metrics["loss"]) == (1, 1, 0)
    assert metrics["loss/low"] < 0 < metrics["loss/high"]


def test_both_continuations_are_the_models_own_from_their_prefix(loaded: Any) -> None:
    tokenizer, model, eos = loaded
    texts = [["<think>1:7*3=21+8=29</think>9"], ["<think>4</think>0"], ["<think>55 66"]]
    graded = graded_texts(tokenizer, texts)
    changes = {"temperature": 0.0, "max_response": 18}
    prompts = encode_prompts(tokenizer, graded.problems, 1, 64)
    for kind in ("digit", "runner_up"):
        _, records = run(loaded, HfEngine(model), graded, kind=kind, **changes)
        assert len(records) == 3
        for record in records:
            place = record.perturbation
            row = place.problem
            prompt = prompts.tokens[row][prompts.mask[row]].tolist()
            for token, text in zip((place.original, place.replacement), record.texts, strict=True):
                ids = [*place.prefix, token]
                while len(ids) < 18 and ids[-1] not in eos:
                    logits = model.network(torch.tensor([prompt + ids])).logits[0, -1]
                    ids.append(int(logits[: model.vocabulary].argmax()))
                ids = ids[:-1] if ids[-1] in eos else ids
                assert text == tokenizer.decode(ids)


def test_equal_prefixes_have_equal_continuations(loaded: Any) -> None:
    """Both use the same random numbers, so that only the error can make a difference."""
    tokenizer, model, eos = loaded
    graded = graded_texts(tokenizer, [["<think>1 2 3</think>9"]] * 4)
    prompts = encode_prompts(tokenizer, graded.problems, 1, 64)
    places = [Perturbation(i, 0, tuple(range(8, 9 + i)), 6, 6) for i in range(4)]
    prefixes = [[*place.prefix, place.original] for place in places]

    def texts(seed: int) -> list[str]:
        return continue_prefixes(
            HfEngine(model),
            tokenizer,
            eos,
            prompts,
            places,
            prefixes,
            max_response=30,
            temperature=1.0,
            top_p=1.0,
            seed=seed,
        )

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    once, twice = [run(loaded, HfEngine(model), graded, max_response=30) for _ in range(2)]
    assert once == twice
    assert {len(record.perturbation.prefix) for record in once[1]} <= {1, 3, 5}
    other_seed = run(loaded, HfEngine(model), graded, max_response=30, seed=5)
    places_of_seeds = [[x.perturbation for x in records] for _, records in (once, other_seed)]
    assert places_of_seeds[0] != places_of_seeds[1]


class RecordingScript(Script):
    """A script that keeps the settings of every call, and the state of its random numbers."""

    def __init__(self, say: Any) -> None:
        super().__init__(say)
        self.settings: list[dict[str, Any]] = []
        self.states: list[bytes] = []

    def sample(self, prompts: Any, eos: list[int], **options: Any) -> Any:
        generator = options.pop("generator")
        self.states.append(bytes(generator.get_state().tolist()))
        torch.rand(1, generator=generator)
        self.settings.append(options)
        return super().sample(prompts, eos)


def test_both_continuations_have_the_same_random_numbers_and_settings(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of two rows, which differ in their random numbers and have their own prompts."""
    monkeypatch.setattr(recovery, "ROWS_AT_ONCE", 2)
    graded = graded_texts(loaded[0], [[f"<think>a{'b' * i}{i}</think>9"] for i in range(3)])
    engine = RecordingScript(lambda row, call: "c")
    _, records = run(loaded, engine, graded, temperature=0.7, top_p=0.9)
    assert engine.states[:2] == engine.states[2:]
    assert engine.states[0] != engine.states[1]
    for call, longest in enumerate((37, 35) * 2):
        assert engine.settings[call] == {
            "temperature": 0.7,
            "top_p": 0.9,
            "max_response": longest,
        }
    for call, rows in enumerate(([0, 1], [2], [0, 1], [2])):
        for text, i in zip(engine.read[call], rows, strict=True):
            token = loaded[0].decode([records[i].perturbation.replacement])
            digit = str(i) if call < 2 else token
            assert text.endswith(f"<think>a{'b' * i}{digit}")
            assert f"prompt {i}" in text


def test_neither_place_nor_error_is_special(loaded: Any) -> None:
    """Of the two tokens that end no response, the error is the one that is not there."""
    tokenizer, model, _ = loaded
    a, b = tokenizer.encode("ab")
    end_ids = [i for i in range(model.vocabulary) if i not in (a, b)]
    graded = graded_texts(tokenizer, [["<think>aaa</think>9"], ["<think>abb</think>9"]])
    engine = Script(lambda row, call: "")
    for seed in range(4):
        _, records = measure_recovery(
            engine,
            model,
            tokenizer,
            end_ids,
            graded,
            LAB,
            kind="runner_up",
            **SETTINGS | {"seed": seed},
        )
        assert len(records) == 2
        for record in records:
            place = record.perturbation
            assert {place.original, place.replacement} == {a, b}
    eos = [tokenizer.eos_token_id]
    texts = [["<think>a</think>9", "<think></think>"]] * 4
    _, records = run(
        (tokenizer, model, eos), engine, graded_texts(tokenizer, texts), kind="runner_up"
    )
    assert [record.perturbation.original for record in records] == [a] * 4


def test_the_runner_up_is_the_most_probable_other_token(loaded: Any) -> None:
    tokenizer, model, eos = loaded
    graded = graded_texts(tokenizer, [["<think>abc</think>9"], ["<think>a longer one</think>9"]])
    prompts = encode_prompts(tokenizer, graded.problems, 1, 64)
    ids = graded.tokens[1][0].tolist()
    rows = [(0, 2, None)] + [(1, t, None) for t in range(1, 9)]
    places, expected = [], []
    for problem, t, _ in rows:
        ids = graded.tokens[problem][0].tolist()
        prompt = prompts.tokens[problem][prompts.mask[problem]].tolist()
        logits = model.network(torch.tensor([prompt + ids[:t]])).logits[0, -1].detach()
        order = logits.argsort(descending=True).tolist()
        # the most probable token itself is the response's, which must not be taken
        original = order[0] if t % 2 else ids[t]
        places.append(Perturbation(problem, 0, tuple(ids[:t]), original, -1))
        excluded = {*eos, order[1]} if t == 4 else set(eos)
        expected.append(next(i for i in order if i != original and i not in excluded))
        if t == 4:
            assert runner_up_ids(model, prompts, places[-1:], sorted(excluded)) == expected[-1:]
            places.pop(), expected.pop()
    assert runner_up_ids(model, prompts, places, eos) == expected


def test_errors_are_drawn_before_the_answer_and_never_at_special_tokens() -> None:
    tokenizer = make_tokenizer()
    eos = [tokenizer.eos_token_id]
    excluded = set(tokenizer.all_special_ids)

    def places(text: str, grader: str) -> str:
        ids = [*tokenizer.encode(text), *eos]
        return tokenizer.decode(
            [ids[t] for t in reasoning_places(tokenizer, ids, eos, excluded, grader)]
        )

    assert places("<think>1+2</think>34", "lab") == "1+2"
    assert places("<think>cut 1", "lab") == "cut 1"
    assert places(r"so \boxed{12} end", "math") == r"so \boxed{"
    assert places("all of it", "exact") == "all of it"
    assert places("<think></think>5", "lab") == ""


def test_places_and_digits_are_drawn_uniformly() -> None:
    ids, alternatives = [7, 3, 7, 4, 7, 3], {3: [4, 5], 4: [3, 5, 6]}
    place_counts: Counter = Counter()
    generator = np.random.default_rng(0)
    for _ in range(6000):
        (place,) = draw_perturbations([[[0, 1, 2, 3, 5]]], [[ids]], alternatives, 6, generator)
        place_counts[len(place.prefix), place.replacement] += 1
        assert place.prefix == tuple(ids[: len(place.prefix)])
        assert place.original == ids[len(place.prefix)]
    # position 5 has no token left to continue; positions 0 and 2 have no digit
    expected = {(1, 4): 1500, (1, 5): 1500, (3, 3): 1000, (3, 5): 1000, (3, 6): 1000}
    assert place_counts.keys() == expected.keys()
    for key, count in expected.items():
        assert abs(place_counts[key] - count) < 4 * count**0.5
    assert not draw_perturbations([[[0, 2]]], [[ids]], alternatives, 6, generator)


def test_digits_are_replaced_by_as_many_digits() -> None:
    class Vocabulary:
        def get_vocab(self) -> dict[str, int]:
            names = ["4", "7", "Ġ4", "Ġ9", "42", "13", "▁1", "x1", "<0x41>", "½", "99"]
            return {name: i for i, name in enumerate(names)}

    assert digit_alternatives(Vocabulary(), 10) == {0: [1], 1: [0], 2: [3], 3: [2], 4: [5], 5: [4]}
    tokenizer = make_tokenizer()
    alternatives = digit_alternatives(tokenizer, len(tokenizer))
    digits = tokenizer.encode("0123456789")
    assert alternatives == {i: sorted(set(digits) - {i}) for i in digits}


def test_totals_are_added_over_problems_with_different_numbers_of_places() -> None:
    def record(problem: int, correct: tuple[bool, bool]) -> RecoveryRecord:
        return RecoveryRecord(Perturbation(problem, 0, (1,) * problem, 0, 0), ("", ""), correct)

    records = [record(0, (True, False)), record(0, (True, True)), record(2, (False, True))]
    metrics = recovery_metrics(records, 4, 2)
    assert metrics["unperturbed"] == pytest.approx(2 / 3)
    assert metrics["perturbed"] == pytest.approx(2 / 3)
    assert metrics["loss"] == pytest.approx(0)
    assert metrics["by_problem"] == [[1, 2], [0, 0], [-1, 1], [0, 0]]
    assert (metrics["left_out"], metrics["prefix_length"]) == (5 / 8, pytest.approx(2 / 3))


def test_what_cannot_be_perturbed_is_refused(loaded: Any) -> None:
    graded = graded_texts(loaded[0], [["<think>no number</think>1"]])
    engine = Script(lambda row, call: "")
    assert run(loaded, engine, graded) == ({"prefixes": 0, "left_out": 1.0}, [])
    assert not engine.read
    two_answers = graded_texts(loaded[0], [["<think>a</think>1</think>2"]] * 3)
    _, records = run(loaded, Script(lambda row, call: "</think>0"), two_answers)
    assert records[0].correct == (False, False), "the prefix is graded too, with its tag"
    without_digits = graded_texts(loaded[0], [["<think>a</think>1"]], "<think>b</think>3")
    with pytest.raises(ValueError, match="no solution has a token before its answer"):
        run(loaded, engine, without_digits, source="solution")
    with pytest.raises(ValueError, match="1 of 1 problems have no solution to perturb"):
        run(loaded, engine, graded, source="solution")
    with_solution = graded_texts(loaded[0], [["<think>no", "<think>no"]], "<think>1:2</think>3")
    _, records = run(loaded, engine, with_solution, source="solution")
    assert [record.perturbation.sample for record in records] == [0, 1]
    assert {record.texts[0][:8] for record in records} == {"<think>1"}
