"""The loss for a loop of one's own: against dense formulas, and against the trainer's gradient.

Shapes: B responses, T positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.models.model import CausalLM
from opd.objectives.factory import make_objective
from opd.objectives.reduction import DENOMINATORS
from opd.rollouts.hf_engine import sample
from opd.scoring.loss import policy_loss, policy_losses
from opd.scoring.request import ScoreRequest
from opd.scoring.score import ScoredBatch, score_batch
from opd.teachers.pair import ModelPair, load_pair
from opd.training import update as updates
from opd.training.train import train
from tests.helpers.runs import settings

TEMPERATURE = 0.7
GAMMA = 0.6


@pytest.fixture(scope="module")
def pair(two_layer_pair) -> ModelPair:
    return load_pair(*map(str, two_layer_pair), "cpu", "float32")


def scored_batch(
    pair: ModelPair, name: str, gamma: float = 0.0, view: Sequence[Sequence[int]] | None = None
) -> ScoredBatch:
    """Return three prompts of different lengths with two rollouts each, some tokens masked.

    Args:
        pair: Student and teacher.
        name: Name of the objective.
        gamma: Its discount.
        view: Ids of the prompts that the teacher reads; None for those of the student.

    Returns:
        The scored batch.
    """
    problems = [Problem("1+2" * n, "3") for n in (1, 3, 2)]
    prompts = encode_prompts(pair.tokenizer, problems, 2, 64)
    if view is not None:
        prompts = replace(prompts, view=Prompts.from_ids(view, prompts.index))
    rollouts = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=8,
        temperature=TEMPERATURE,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    request = ScoreRequest(
        requirements=make_objective(name, gamma=gamma, support_k=4).requirements,
        temperature=TEMPERATURE,
        full_statistics=True,
    )
    batch = score_batch(pair.student, pair.teacher, prompts, rollouts, request)
    keep = torch.rand(batch.scored.mask.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    scored = batch.scored.restrict_mask(keep)
    return ScoredBatch(prompts, scored, batch.teacher_hidden)


def dense_logp(
    model: CausalLM, batch: ScoredBatch, view: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Return (B, T, V) log-probabilities, each row scored by the network without padding."""
    rows = []
    for i in range(len(batch.scored)):
        prompt = batch.prompts.tokens[i][batch.prompts.mask[i]]
        if view is not None:
            prompt = torch.tensor(view[i])
        logits = model.network(torch.cat([prompt, batch.scored.tokens[i]])[None]).logits[0]
        rows.append(logits[len(prompt) - 1 : -1, : model.vocabulary])
    return (torch.stack(rows) / TEMPERATURE).log_softmax(-1)


def weights_by_hand(mask: Tensor, denominator: str) -> list[float]:
    """Return the weight of a token of each response; every prompt has two responses."""
    lengths = [int(n) for n in mask.sum(1)]
    groups = [lengths[i] + lengths[i ^ 1] for i in range(len(lengths))]
    return {
        "token_mean": [1 / sum(lengths)] * len(lengths),
        "sequence_sum": [1 / len(lengths)] * len(lengths),
        "sequence_mean": [1 / (len(lengths) * n) for n in lengths],
        "group_mean": [1 / (len(lengths) / 2 * n) for n in groups],
    }[denominator]


def dense_loss(
    pair: ModelPair,
    batch: ScoredBatch,
    name: str,
    denominator: str,
    view: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Return the loss by loops over tokens."""
    scored, p = batch.scored, dense_logp(pair.student, batch)
    with torch.no_grad():
        q = dense_logp(pair.teacher.model, batch, view)
    weights, total = weights_by_hand(scored.mask, denominator), torch.zeros(())
    for i, t in scored.mask.nonzero().tolist():
        logp = p[i, t, scored.tokens[i, t]]
        if name == "teacher_topk":
            ids = q[i, t].topk(4).indices
            a, b = (x[i, t, ids].log_softmax(-1) for x in (p, q))
            total = total + weights[i] * (a.exp() * (a - b)).sum()
            continue
        credit, discount = 0.0, 1.0
        for u in range(t, scored.mask.shape[1]):
            if not scored.sampled[i, u]:
                break
            y = scored.tokens[i, u]
            ratio = float((p[i, u, y] - q[i, u, y]).detach())
            mean = float((p[i, u].exp() * (p[i, u] - q[i, u])).sum().detach())
            cost = ratio if name == "sampled_token" else mean
            is_own = u == t and name == "full_reverse_kl"  # its own cost is the divergence
            credit += 0.0 if is_own else discount * cost * float(scored.mask[i, u])
            discount *= GAMMA
        if name == "full_reverse_kl":
            total = total + weights[i] * (p[i, t].exp() * (p[i, t] - q[i, t])).sum()
        total = total + weights[i] * credit * logp
    return total


VIEW = [[9, 8, 7][: 1 + i % 3] * (7 - i) for i in range(6)]
"""Prompts that only the teacher reads, one a row, of other lengths than the student's."""


@pytest.mark.parametrize(
    ("denominator", "view"),
    [*((name, None) for name in DENOMINATORS), ("token_mean", VIEW)],
    ids=[*DENOMINATORS, "view"],
)
@pytest.mark.parametrize("name", ["sampled_token", "teacher_topk", "full_reverse_kl"])
def test_the_loss_of_a_batch_is_the_dense_one(
    pair, name: str, denominator: str, view: list[list[int]] | None
) -> None:
    gamma = 0.0 if name == "teacher_topk" else GAMMA
    batch = scored_batch(pair, name, gamma, view)
    objective = make_objective(name, gamma=gamma, support_k=4)
    parameters = list(pair.student.network.parameters())
    want = dense_loss(pair, batch, name, denominator, view)
    want_gradients = torch.autograd.grad(want, parameters)
    assert max(float(x.abs().max()) for x in want_gradients) > 1e-3
    for limit in (None, 40):
        loss = policy_loss(
            pair.student,
            batch,
            objective,
            teacher=pair.teacher,
            denominator=denominator,
            max_tokens_per_microbatch=limit,
            max_logits_per_chunk=500,
        )
        torch.testing.assert_close(loss, want.detach(), atol=1e-5, rtol=1e-5, check_dtype=False)
        for gradient, expected in zip(
            torch.autograd.grad(loss, parameters), want_gradients, strict=True
        ):
            assert float((gradient - expected).norm()) < 1e-4 * float(expected.norm()) + 1e-6


def test_micro_batches_are_passed_one_by_one(pair) -> None:
    batch, objective = scored_batch(pair, "teacher_topk"), make_objective("teacher_topk")
    options = {"max_tokens_per_microbatch": 40}
    parts = list(policy_losses(pair.student, batch, objective, **options))
    assert len(parts) > 2
    whole = policy_loss(pair.student, batch, objective)
    torch.testing.assert_close(torch.stack(parts).sum(), whole, atol=1e-6, rtol=1e-5)


def test_what_is_missing_is_named(pair) -> None:
    batch = scored_batch(pair, "teacher_topk")
    with pytest.raises(InvalidInput, match="needs a 'student' support, but the batch has"):
        policy_loss(pair.student, batch, make_objective("student_topk"))
    with pytest.raises(InvalidInput, match="the teacher's hidden states are missing"):
        policy_loss(pair.student, batch, make_objective("full_jsd"), teacher=pair.teacher)
    with pytest.raises(InvalidInput, match="unknown denominator 'mean'; known: token_mean"):
        policy_loss(pair.student, batch, make_objective("teacher_topk"), denominator="mean")


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "teacher_topk"},
        {"objective": "full_reverse_kl", "gamma": 0.5, "denominator": "group_mean"},
        {"objective": "sampled_token", "baseline": "leave_one_out", "ratio": "token", "top_p": 0.9},
    ],
    ids=lambda options: options["objective"],
)
def test_the_trainer_has_the_same_loss_and_gradient(
    two_layer_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    original, compared = updates.accumulate_gradients, []

    def compare(state, task, loss, update_index: int, task_weight: float):  # type: ignore[no-untyped-def]
        parameters = list(state.student.network.parameters())
        own_loss = policy_loss(
            state.student,
            loss.batch,
            task.objective,
            teacher=task.pair.teacher,
            denominator=task.config.objective.denominator,
        )
        own_gradients = torch.autograd.grad(own_loss, parameters)
        result = original(state, task, loss, update_index, task_weight)
        torch.testing.assert_close(result.loss, own_loss.detach(), atol=1e-6, rtol=1e-5)
        for parameter, gradient in zip(parameters, own_gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
        compared.append(float(own_loss.detach()))
        return result

    monkeypatch.setattr(updates, "accumulate_gradients", compare)
    train(
        settings(
            two_layer_pair,
            tmp_path / "run",
            steps=2,
            eval_every=0,
            eval_problems=1,
            max_tokens_per_microbatch=60,
            share_forward_pass=False,
            **options,
        )
    )
    assert len(compared) == 2
    assert all(compared)
