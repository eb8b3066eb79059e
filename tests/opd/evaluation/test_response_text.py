"""Text of a response: cut at every EOS id, from the tokenizer or the generation config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from diagnostics.records.eos_ids import read_eos_ids
from diagnostics.records.vocabulary import load_vocabulary
from opd.analysis import continuation
from opd.analysis.continuation import grade_correct
from opd.data.chain_task import Problem
from opd.data.grading.graders import GRADERS, grade_exact, grade_responses
from opd.data.prompts import decode_response
from opd.data.tasks import Task
from opd.envs.base import Observation
from opd.envs.rollout import play_episodes
from opd.envs.task import GameTask
from opd.evaluation.responses import respond
from opd.lab.build import make_tokenizer
from opd.models.loading import eos_ids, load_model
from opd.teachers.pair import ModelPair
from opd.teachers.teacher import LocalTeacher
from tests.helpers.games import Script

ADDED_TOKENS = ["<|end_of_text|>", "<end_of_turn>"]
"""End tokens as in Llama 3 and Gemma 3: special by their flag, without a named role."""
PLAIN = "~"
"""An ordinary token that the generation config lists as EOS."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base_tokenizer = make_tokenizer()
    base_tokenizer.add_tokens(
        [AddedToken(name, special=True) for name in [*ADDED_TOKENS, "<tool_call>"]]
    )
    base_tokenizer.add_tokens([AddedToken(PLAIN, special=False)])
    folder = tmp_path_factory.mktemp("tokenizer")
    base_tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ends(tokenizer: Any) -> list[int]:
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **settings)
    )
    named_ids = tokenizer.convert_tokens_to_ids([*ADDED_TOKENS, PLAIN])
    network.generation_config.eos_token_id = named_ids
    end_ids = eos_ids(tokenizer, network)
    assert set(end_ids) == {*named_ids, tokenizer.eos_token_id}
    return end_ids


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_every_end_is_cut_and_nothing_else(tokenizer: Any, ends: list[int]) -> None:
    right = ids(tokenizer, "<think>6*7</think>42")
    for end in ends:
        for suffix in ([], [tokenizer.pad_token_id], ids(tokenizer, "43")):
            text = decode_response(tokenizer, [*right, end, *suffix], ends)
            assert text == "<think>6*7</think>42", tokenizer.decode([end])
    assert decode_response(tokenizer, right, ends) == "<think>6*7</think>42"
    assert decode_response(tokenizer, [], ends) == ""
    assert decode_response(tokenizer, ends[:1], ends) == ""


def test_without_the_pair_special_tokens_are_cut_at_the_end_alone(tokenizer: Any) -> None:
    for name in [*ADDED_TOKENS, "<|im_end|>"]:
        assert decode_response(tokenizer, ids(tokenizer, f"42{name}")) == "42"
    inside = f"<tool_call>{ADDED_TOKENS[0]}4~"
    assert decode_response(tokenizer, ids(tokenizer, inside)) == inside


def test_a_closing_tag_is_content_even_where_it_ends_a_response(tokenizer: Any) -> None:
    truncated = ids(tokenizer, r"\boxed{5}</think>")
    assert decode_response(tokenizer, truncated, truncated[-1:]) == r"\boxed{5}</think>"
    assert (
        decode_response(tokenizer, [*truncated, *truncated], truncated[-1:]) == r"\boxed{5}</think>"
    )


def test_graders_read_what_stands_before_the_end(tokenizer: Any, ends: list[int]) -> None:
    teacher = LocalTeacher("", None, tuple(ends[1:]))  # type: ignore[arg-type]
    pair = ModelPair(None, teacher, tokenizer, ends[:1])  # type: ignore[arg-type]
    assert set(continuation.response_eos_ids(pair)) == set(ends)
    for end in ends:
        tokens = torch.tensor([[*ids(tokenizer, "<think>6*7</think>42"), end]])
        real = torch.ones_like(tokens, dtype=torch.bool)
        for name in ("exact", "numeric", "lab"):
            (grade,) = grade_responses(tokenizer, tokens, real, ["42"], GRADERS[name], ends)
            assert grade.reward == 1.0
        task = Task(lambda step, count: [], lambda count: [], grade_exact)
        assert grade_correct(pair, tokens, real, ["42"], task) == [1.0], (
            "the teacher's ends are cut too"
        )


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
    for episode in play_episodes(script, tokenizer, ends, games, [(0, 1)], 2, **settings, **noise):
        assert episode.won, episode.turns[0].action
    problems = [Problem("1+1", "open"), Problem("1+2", "open")]
    task = Task(lambda step, count: [], lambda count: problems, grade_exact)
    graded = respond(script, tokenizer, ends, task, problems=2, samples=2, **settings, **noise)
    assert graded.answers == [["open"] * 2] * 2
    assert graded.texts == [["open"] * 2] * 2
    assert ends[plain] in ends


def test_the_report_names_the_same_ends_as_the_model(tokenizer: Any, tmp_path: Path) -> None:
    """The report reads files only; the trainer uses the loaded model."""
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **settings)
    network = LlamaForCausalLM(config)
    network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ADDED_TOKENS)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    panel_ends = read_eos_ids(tmp_path, load_vocabulary(tmp_path))
    assert panel_ends[0] == tokenizer.eos_token_id
    assert sorted(panel_ends) == eos_ids(*load_model(str(tmp_path), "cpu", "float32"))
    assert tokenizer.eos_token_id in panel_ends
    assert len(panel_ends) == 3
