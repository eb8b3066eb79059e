"""The probability of answers against plain loops over logits, and the place of their tokens."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from opd.data.chain_task import Problem
from opd.data.grading.answer_spans import answer_span
from opd.data.grading.graders import make_grader
from opd.data.prompts import decode_response, encode_prompts
from opd.data.tasks import Task
from opd.evaluation import answer_confidence as module
from opd.evaluation.answer_confidence import answer_confidence, answer_tokens
from opd.evaluation.responses import GradedResponses, respond
from opd.lab.build import make_tokenizer
from opd.models.loading import eos_ids, load_model, num_head_rows
from opd.models.model import split_head
from tests.helpers.games import Script

PROBLEMS = [Problem("1+2", "3"), Problem("40+2 and more", "42")]
RESPONSES = [
    ["<think>a3b</think>3", "<think>9</think> 12 ", "<think>cut"],
    ["4</think>4</think>4", "<think>x</think>42", "<think></think>-7"],
]
ANSWERS = [["3", "12", None], [None, "42", "-7"]]


@pytest.fixture(scope="module")
def loaded(tiny_pair) -> Any:
    tokenizer, network = load_model(str(tiny_pair[0]), "cpu", "float32")
    return tokenizer, split_head(network, num_head_rows(network)), eos_ids(tokenizer, network)


def grade_script(loaded: Any, **sampling: Any) -> GradedResponses:
    tokenizer, _, eos = loaded
    task = Task(
        lambda step, count: [], lambda count: PROBLEMS[:count], make_grader("lab"), name="lab"
    )
    script = Script(lambda row, call: RESPONSES[row // 3][row % 3])
    settings = {"problems": 2, "max_prompt": 64, "max_response": 30, "temperature": 1.0}
    generator = torch.Generator().manual_seed(0)
    return respond(
        script, tokenizer, eos, task, samples=3, generator=generator, **(settings | sampling)
    )


def test_it_is_the_product_of_the_answers_token_probabilities(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model, _ = loaded
    graded = grade_script(loaded, temperature=0.3)
    assert graded.answers == ANSWERS
    confidence = answer_confidence(model, tokenizer, graded, 64)
    for i, problem in enumerate(PROBLEMS):
        prompt = encode_prompts(tokenizer, [problem], 1, 64).tokens[0].tolist()
        for j, answer in enumerate(ANSWERS[i]):
            if answer is None:
                assert math.isnan(confidence[i, j])
                continue
            ids = tokenizer.encode(RESPONSES[i][j])
            probability = 1.0
            start = RESPONSES[i][j].rindex(answer)  # one token per character, but for tags
            tags = sum(len(tag) - 1 for tag in ("<think>", "</think>"))
            for t in range(start - tags, start - tags + len(answer)):
                assert tokenizer.decode([ids[t]]) in answer
                logits = model.network(torch.tensor([prompt + ids[:t]])).logits[0, -1].detach()
                probability *= float(logits.softmax(-1)[ids[t]])
            assert confidence[i, j] == pytest.approx(probability, rel=1e-4)
    assert len(set(confidence[~np.isnan(confidence)].round(9))) == 4
    monkeypatch.setattr(module, "MAX_TOKENS_PER_MICROBATCH", 1)
    monkeypatch.setattr(module, "MAX_LOGITS_PER_CHUNK", 1)
    confidence_of_chunks = answer_confidence(model, tokenizer, graded, 64)
    np.testing.assert_allclose(confidence_of_chunks, confidence, rtol=1e-5)


def test_the_tokens_of_an_answer_hold_all_of_it_and_nothing_before_it() -> None:
    """With tokens of several characters, characters of several tokens, and unusual ids."""
    words = make_tokenizer(texts=["the answer is twelve twelve apples"] * 20)
    text = r"<think>é3</think>so \boxed{12}é twelve apples"
    for tokenizer in (make_tokenizer(), words):
        ids = tokenizer.encode(text)
        assert decode_response(tokenizer, ids) == text
        for part in ("12", "é3", "é", "twelve", "elve a", text):
            for start in (text.index(part), text.rindex(part)):
                span = start, start + len(part)
                token_range = answer_tokens(tokenizer, np.array(ids), text, span)
                assert token_range is not None
                first, last = token_range
                # each token's own bytes, counted one by one
                ends = np.cumsum([len(token) for token in tokenizer.convert_ids_to_tokens(ids)])
                byte_span = [len(text[:x].encode()) for x in span]
                begins = ends - np.diff(ends, prepend=0)
                is_in = (ends > byte_span[0]) & (begins < byte_span[1])
                assert list(range(first, last)) == np.flatnonzero(is_in).tolist(), (part, start)
    assert len(words.encode("twelve")) < 6
    assert answer_tokens(words, ids, text + "!", (len(text), len(text) + 1)) is None
    single_ids = [i for character in "twelve" for i in words.encode(character)]
    assert answer_tokens(words, single_ids, "twelve", (2, 4)) == (2, 4), "the ids that were sampled"


def test_a_number_that_ends_inside_a_token_takes_the_token() -> None:
    tokenizer = make_tokenizer(texts=["12} 12} 12}"] * 30)
    text = r"\boxed{12}"
    ids = tokenizer.encode(text)
    span = answer_span("numeric", text)
    assert span is not None
    token_range = answer_tokens(tokenizer, ids, text, span)
    assert token_range is not None
    decoded = tokenizer.decode(ids[slice(*token_range)])
    assert "12" in decoded
    assert len(decoded) <= len("{12}")


def test_games_have_no_answer_to_be_confident_of(loaded: Any) -> None:
    tokenizer, model, _ = loaded
    graded = grade_script(loaded)
    without_tokens = GradedResponses(
        graded.problems, graded.reward, graded.length, graded.ended, graded.answers, graded.texts
    )
    with pytest.raises(ValueError, match="episodes of games have no answer"):
        answer_confidence(model, tokenizer, without_tokens, 64)
