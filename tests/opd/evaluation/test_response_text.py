"""The text of a response: cut at every id that ends it, whoever names that id; content stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from diagnostics.records.token_text import read_spelling
from opd.analysis import continuation
from opd.analysis.continuation import graded
from opd.data.chain_task import Problem
from opd.data.grading.graders import GRADERS, grade_exact, grade_responses
from opd.data.prompts import response_text
from opd.data.tasks import Task
from opd.envs.base import Observation
from opd.envs.rollout import play
from opd.envs.task import GameTask
from opd.evaluation.evaluate import respond
from opd.lab.build import make_tokenizer
from opd.models.loading import end_ids, load
from opd.report import tokenizer_panel
from opd.teachers.pair import ModelPair
from opd.tokens.eos import EosMap
from tests.opd.envs.test_rollout import Script

ADDED = ["<|end_of_text|>", "<end_of_turn>"]
"""End tokens as Llama 3 and Gemma 3 have them: special by their flag, of no named role."""
PLAIN = "~"
"""An ordinary token that the generation config names as an end."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = make_tokenizer()
    made.add_tokens([AddedToken(name, special=True) for name in [*ADDED, "<tool_call>"]])
    made.add_tokens([AddedToken(PLAIN, special=False)])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ends(tokenizer: Any) -> list[int]:
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **settings)
    )
    named = tokenizer.convert_tokens_to_ids([*ADDED, PLAIN])
    network.generation_config.eos_token_id = named
    found = end_ids(tokenizer, network)
    assert set(found) == {*named, tokenizer.eos_token_id}
    return found


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_every_end_is_cut_and_nothing_else(tokenizer: Any, ends: list[int]) -> None:
    right = ids(tokenizer, "<think>6*7</think>42")
    for end in ends:
        for behind in ([], [tokenizer.pad_token_id], ids(tokenizer, "43")):
            text = response_text(tokenizer, [*right, end, *behind], ends)
            assert text == "<think>6*7</think>42", tokenizer.decode([end])
    assert response_text(tokenizer, right, ends) == "<think>6*7</think>42"
    assert response_text(tokenizer, [], ends) == ""
    assert response_text(tokenizer, ends[:1], ends) == ""


def test_without_the_pair_special_tokens_are_cut_at_the_end_alone(tokenizer: Any) -> None:
    for name in [*ADDED, "<|im_end|>"]:
        assert response_text(tokenizer, ids(tokenizer, f"42{name}")) == "42"
    inside = f"<tool_call>{ADDED[0]}4~"
    assert response_text(tokenizer, ids(tokenizer, inside)) == inside


def test_a_closing_tag_is_content_even_where_it_ends_a_response(tokenizer: Any) -> None:
    cut = ids(tokenizer, r"\boxed{5}</think>")
    assert response_text(tokenizer, cut, cut[-1:]) == r"\boxed{5}</think>"
    assert response_text(tokenizer, [*cut, *cut], cut[-1:]) == r"\boxed{5}</think>"


def test_graders_read_what_stands_before_the_end(tokenizer: Any, ends: list[int]) -> None:
    pair = ModelPair(None, None, tokenizer, ends[:1], EosMap(tuple(ends[:1]), tuple(ends[1:])))  # type: ignore[arg-type]
    assert set(continuation.ends(pair)) == set(ends)
    for end in ends:
        said = torch.tensor([[*ids(tokenizer, "<think>6*7</think>42"), end]])
        real = torch.ones_like(said, dtype=torch.bool)
        for name in ("exact", "numeric", "lab"):
            problems = [Problem("", "42")]
            assert grade_responses(tokenizer, said, real, problems, GRADERS[name], ends) == [1.0]
        task = Task(lambda step, count: [], lambda count: [], grade_exact)
        assert graded(pair, said, real, ["42"], task) == [1.0], "the teacher's ends are cut too"


class Door:
    """Won by the one action "open"."""

    def begin(self, seed: int) -> Observation:
        return Observation("A door.", goal="out", actions=("open", "wait"))

    def act(self, action: str) -> Observation:
        return Observation("Done.", over=True, won=action == "open")

    def close(self) -> None: ...


def test_answers_votes_and_actions_have_no_end(tokenizer: Any, ends: list[int]) -> None:
    settings: dict[str, Any] = {"max_response": 9, "temperature": 1.0, "max_prompt": 200}
    plain = ends.index(tokenizer.convert_tokens_to_ids(PLAIN))
    script = Script(lambda row, call: f"open{PLAIN if row % 2 else '<|im_end|>'}", end=False)
    script.tokenizer = tokenizer
    games = GameTask(source="env:door", make=Door, max_turns=1)
    generator = torch.Generator().manual_seed(0)
    noise: dict[str, Any] = {"generator": generator, "top_p": 1.0}
    for episode in play(script, tokenizer, ends, games, [(0, 1)], 2, **settings, **noise):
        assert episode.won, episode.turns[0].action
    problems = [Problem("1+1", "open"), Problem("1+2", "open")]
    task = Task(lambda step, count: [], lambda count: problems, grade_exact)
    found = respond(script, tokenizer, ends, task, problems=2, samples=2, **settings, **noise)
    assert found.answers == [["open"] * 2] * 2
    assert found.texts == [["open"] * 2] * 2
    assert ends[plain] in ends


def test_the_report_names_the_same_ends_as_the_model(tokenizer: Any, tmp_path: Path) -> None:
    """The report reads files alone; the trainer asks the loaded model."""
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **settings)
    network = LlamaForCausalLM(config)
    network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ADDED)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shown = tokenizer_panel.end_ids(tmp_path, read_spelling(tmp_path))
    assert shown == end_ids(*load(str(tmp_path), "cpu", "float32"))
    assert tokenizer.eos_token_id in shown
    assert len(shown) == 3
