"""Sampling for a training loop of one's own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opd import (
    ModelPair,
    ScoreRequest,
    load_pair,
    make_objective,
    policy_loss,
    sample,
    score_batch,
)

QUESTIONS = ["2+3=", "17+26=", "4="]


@pytest.fixture(scope="module")
def pair(tiny_pair: tuple[Path, Path]) -> ModelPair:
    return load_pair(*map(str, tiny_pair), device="cpu")


def sample_seeded(pair: ModelPair, prompts: Any, seed: int = 0, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return sample(pair, prompts, max_response=6, generator=generator, **settings)


def test_a_text_is_a_chat_of_one_message(pair: ModelPair) -> None:
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    (texts, from_texts), (messages, from_messages) = (
        sample_seeded(pair, prompts, group_size=2) for prompts in (QUESTIONS, chats)
    )
    assert torch.equal(texts.tokens, messages.tokens)
    assert torch.equal(from_texts.tokens, from_messages.tokens)
    assert from_texts.prompt.tolist() == [0, 0, 1, 1, 2, 2]
    with_system = [[{"role": "system", "content": "Add."}, *chat] for chat in chats]
    encoded, _ = sample_seeded(pair, with_system)
    decoded = pair.tokenizer.decode(encoded.tokens[1][encoded.mask[1]].tolist())
    assert "Add." in decoded
    assert "17+26=" in decoded


def test_the_noise_is_new_on_every_call_unless_it_is_seeded(pair: ModelPair) -> None:
    first, second = (sample(pair, QUESTIONS, max_response=6)[1].tokens for _ in range(2))
    assert not torch.equal(first, second)
    same = [sample_seeded(pair, QUESTIONS, seed=3)[1].tokens for _ in range(2)]
    assert torch.equal(*same)
    torch.manual_seed(3)
    assert torch.equal(sample(pair, QUESTIONS, max_response=6)[1].tokens, same[0])


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[]], {}, "a list without messages"),
        (QUESTIONS, {"group_size": 0}, "group_size is 0, expected at least 1"),
        (QUESTIONS, {"max_prompt": 2}, "but max_prompt is 2"),
        (QUESTIONS, {"teacher_prompts": ["a"]}, "there are 1 teacher_prompts for"),
        (QUESTIONS, {"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    pair: ModelPair, prompts: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_seeded(pair, prompts, **settings)


@pytest.mark.parametrize("has_view", [False, True])
def test_the_gradient_of_the_loss_is_that_of_dense_logits(pair: ModelPair, has_view: bool) -> None:
    """The reverse KL per token, from both models' logits of whole sequences."""
    views = [f"Hint {i}" for i in range(len(QUESTIONS))] if has_view else None
    prompts, rollouts = sample_seeded(pair, QUESTIONS, group_size=2, teacher_prompts=views)
    objective, student = make_objective("full_reverse_kl"), pair.student.network
    request = ScoreRequest(requirements=objective.requirements)
    batch = score_batch(pair.student, pair.teacher, prompts, rollouts, request)
    student.zero_grad()
    loss = policy_loss(
        pair.student, batch, objective, teacher=pair.teacher, max_tokens_per_microbatch=1
    )
    loss.backward()
    gradients = [weight.grad.clone() for weight in student.parameters()]

    student.zero_grad()
    total = torch.zeros(())
    for row in range(len(rollouts.tokens)):
        prompt = prompts.tokens[row][prompts.mask[row]]
        response = rollouts.tokens[row][rollouts.mask[row]]
        teacher_prompt = prompt
        if views is not None:
            text = f"<|im_start|>user\n{views[row // 2]}<|im_end|>\n<|im_start|>assistant\n"
            teacher_prompt = torch.tensor(pair.tokenizer.encode(text, add_special_tokens=False))
        p, q = (
            model.network(torch.cat([ids, response])[None])
            .logits[0, len(ids) - 1 : -1]
            .log_softmax(-1)
            for model, ids in ((pair.student, prompt), (pair.teacher.model, teacher_prompt))
        )
        total = total + (p.exp() * (p - q)).sum()
    dense = total / int(rollouts.mask.sum())
    dense.backward()
    torch.testing.assert_close(loss, dense)
    for gradient, weight in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)
