"""Losses from hidden states: every objective and head against dense autograd; what each keeps.

Shapes: B responses, T positions, D hidden size, V vocabulary, K support ids.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diagnostics.batch import ScoredRollouts, Support
from opd.models.lm_head import LmHead
from opd.models.model import CausalLM
from opd.objectives.catalogue import OBJECTIVES
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import Objective, batch_losses
from opd.objectives.support import JOINT_SUPPORTS
from opd.scoring.chunked_loss import chunked_loss
from opd.scoring.loss import loss_from_hidden
from tests.opd.models.test_lm_head import largest, normal, seeded

B, T, D, V, K = 3, 5, 6, 23, 4
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.3},
    "padded": {"rows": V + 4},
    "all": {"bias": True, "softcap": 1.5, "scale": 0.3, "rows": V + 4},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split chunks into blocks of two tokens, as those of a large vocabulary are."""
    monkeypatch.setattr("opd.models.lm_head.CPU_BLOCK", 2 * V)


def a_head(seed: int, bias: bool = False, rows: int = V, **shape: float) -> LmHead:
    offset = normal(rows, seed=seed + 1).requires_grad_() if bias else None
    return LmHead(normal(rows, D, seed=seed).requires_grad_(), V, offset, **shape)


def dense(hidden: Tensor, head: LmHead) -> Tensor:
    """(..., D) -> (..., V) as the models do it, everything kept."""
    z = linear(hidden, head.weight, head.bias)[..., : head.vocabulary] * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def model(head: LmHead) -> CausalLM:
    return CausalLM(None, lambda *_: torch.empty(0), lambda: head, head.vocabulary)


def a_batch(source: str, student: Tensor, teacher: Tensor, temperature: float) -> ScoredRollouts:
    """A scored batch of (B, T, V) log-probabilities; tokens are drawn, half of them in S."""
    best = {name: x.detach().topk(K, -1).indices for name, x in (("t", teacher), ("s", student))}
    ids, present = best["s" if source == "student" else "t"], None
    if source in JOINT_SUPPORTS:
        ids, present = JOINT_SUPPORTS[source](best["t"], best["s"])
    tokens = torch.randint(V, (B, T), generator=seeded(5))
    tokens[:, ::2] = ids[:, ::2, 1]
    mask = torch.ones((B, T), dtype=torch.bool)
    mask[0, 3:], mask[1, 1] = False, False

    def gather_masked(logp: Tensor, at_ids: Tensor) -> Tensor:
        return logp.detach().gather(-1, at_ids) * mask[..., None]

    return ScoredRollouts(
        tokens=tokens * mask,
        mask=mask,
        sampler_logp=gather_masked(student, tokens[..., None])[..., 0],
        student_logp=gather_masked(student, tokens[..., None])[..., 0],
        teacher_logp=gather_masked(teacher, tokens[..., None])[..., 0],
        prompt=torch.arange(B),
        ended=torch.ones(B, dtype=torch.bool),
        score_temperature=temperature,
        support=Support(
            ids=ids,
            student_logp=gather_masked(student, ids),
            teacher_logp=gather_masked(teacher, ids),
            source=source,
            present=present,
        ),
    )


def on_the_support(objective: Objective, logp: Tensor, batch: ScoredRollouts) -> Tensor | None:
    if objective.support == "full":
        return logp
    return None if objective.support == "none" else logp.gather(-1, batch.support.ids)


def both_losses(
    objective: Objective,
    student_head: LmHead,
    teacher_head: LmHead,
    temperature: float,
    max_elements: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Value and gradients (hidden, weight, bias) of the dense loss and of `loss_from_hidden`."""
    states, teacher_states = normal(B, T, D, seed=7).requires_grad_(), normal(B, T, D, seed=8)
    student, teacher = (
        (dense(h, head) / temperature).log_softmax(-1)
        for h, head in ((states, student_head), (teacher_states, teacher_head))
    )
    source = objective.support if objective.support not in ("none", "full") else "teacher"
    batch = a_batch(source, student, teacher, temperature)
    credit, weight = normal(B, T, seed=9) * batch.mask, normal(B, seed=10).abs() + 0.1
    leaves = [x for x in (states, student_head.weight, student_head.bias) if x is not None]

    full = None
    if objective.support == "full":  # the dense loss needs the whole vocabulary as its support
        all_ids = torch.arange(V).expand(B, T, V)
        values = {"student_logp": student.detach(), "teacher_logp": teacher.detach()}
        full = replace(batch, support=Support(ids=all_ids, source="full", **values))
    logp = student.gather(-1, batch.tokens[..., None])[..., 0]
    losses = batch_losses(
        objective,
        full or batch,
        logp,
        on_the_support(objective, student, batch),
        denominator=1 / weight,
        credit=credit,
    )
    dense_loss = 2.5 * losses.sum()

    student_states = states.detach().requires_grad_()
    chunk_loss = 2.5 * loss_from_hidden(
        model(student_head),
        objective,
        student_states[batch.mask],
        TokenInputs.of(batch, objective.support, credit, weight[:, None].expand(B, T)),
        teacher=model(teacher_head),
        teacher_hidden=teacher_states[batch.mask],
        temperature=temperature,
        max_logits_per_chunk=max_elements,
    )
    chunk_leaves = [student_states, *leaves[1:]]
    return (
        (dense_loss.detach(), *torch.autograd.grad(dense_loss, leaves, materialize_grads=True)),
        (
            chunk_loss.detach(),
            *torch.autograd.grad(chunk_loss, chunk_leaves, materialize_grads=True),
        ),
    )


@pytest.mark.parametrize("max_elements", [1, 3 * V, 10**6])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_its_dense_gradient(name: str, max_elements: int) -> None:
    student_head, teacher_head = a_head(1, **HEADS["all"]), a_head(3, bias=True, softcap=2.0)
    torch.testing.assert_close(
        *both_losses(OBJECTIVES[name], student_head, teacher_head, 0.7, max_elements)
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["teacher_topk", "sampled_token", "full_reverse_kl"])
def test_every_head_has_its_dense_gradient(head: str, name: str) -> None:
    student_head, teacher_head = a_head(1, **HEADS[head]), a_head(3)
    torch.testing.assert_close(
        *both_losses(OBJECTIVES[name], student_head, teacher_head, 1.0, 2 * V)
    )


def test_the_sampled_row_may_come_from_k_plus_one_rows_or_from_all() -> None:
    """Renormalised on S and y, raw logits serve as well as log-probabilities."""
    base = OBJECTIVES["teacher_topk_and_sampled"]
    heads = a_head(1, **HEADS["all"]), a_head(3)
    assert not base.requirements.normalised
    all_rows = replace(base, local=replace(base.local, renormalises=False))
    torch.testing.assert_close(
        both_losses(base, *heads, 0.7, 1)[1], both_losses(all_rows, *heads, 0.7, 1)[1]
    )


def test_a_frozen_head_has_no_gradient_and_costs_none() -> None:
    head = LmHead(normal(V, D), V)
    hidden, ids = normal(9, D, seed=1).requires_grad_(), torch.zeros((9, 2), dtype=torch.long)
    for loss in (
        head.gather(hidden, ids).square().sum(),
        chunked_loss(hidden, head, lambda _: lambda z, _: z.logsumexp(-1).sum(), 2 * V),
    ):
        with Sizes() as sizes:
            loss.backward()
        assert sizes.largest < V * D
    assert head.weight.grad is None


def test_a_chunked_loss_has_its_gradient_once_and_a_value_without() -> None:
    head, hidden = a_head(1), normal(9, D).requires_grad_()
    loss = chunked_loss(hidden, head, lambda _: lambda z, _: z.logsumexp(-1).sum(), 2 * V)
    torch.testing.assert_close(loss, dense(hidden, head).logsumexp(-1).sum())
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_loss(hidden, head, lambda _: lambda z, _: z.logsumexp(-1).sum(), 2 * V), loss
        )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already called"):
        loss.backward()


def test_the_gradient_of_a_half_precision_head_adds_up_in_float32() -> None:
    """400 chunks of one token: a sum in bfloat16 would lose most of them."""
    hidden = normal(400, D).abs().bfloat16()
    weight = normal(V, D, seed=1).bfloat16().requires_grad_()
    chunked_loss(
        hidden, LmHead(weight, V), lambda _: lambda z, _: z.logsumexp(-1).sum(), V
    ).backward()
    exact = weight.detach().double().requires_grad_()
    (hidden.double() @ exact.T).logsumexp(-1).sum().backward()
    assert largest((weight.grad,), (exact.grad,)) < 8e-3


# --- memory -------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Record the largest number of elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        sizes = (x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(out)
                 if isinstance(x, Tensor))  # fmt: skip
        self.largest = max(self.largest, *sizes, 0)
        return out


def training_sizes(name: str, vocabulary: int, max_elements: int) -> int:
    """Return the size of the largest tensor of forward and backward at N = 240, D = 4, K = 4."""
    n, k, d = 240, 4, 4
    hidden = normal(n, d, dtype=torch.float32).requires_grad_()
    weight = normal(vocabulary, d, dtype=torch.float32).requires_grad_()
    ids = torch.stack([torch.randperm(vocabulary, generator=seeded(i))[:k] for i in range(n)])[None]
    logp = -normal(1, n, k, dtype=torch.float32).abs() - 2
    batch = ScoredRollouts(
        tokens=ids[..., 0],
        mask=torch.ones((1, n), dtype=torch.bool),
        sampler_logp=logp[..., 0],
        student_logp=logp[..., 0],
        teacher_logp=logp[..., 0],
        prompt=torch.zeros(1, dtype=torch.long),
        ended=torch.ones(1, dtype=torch.bool),
        support=Support(ids=ids, student_logp=logp, teacher_logp=logp, source="teacher"),
    )
    causal_lm = model(LmHead(weight, vocabulary))
    with Sizes() as sizes:
        loss_from_hidden(
            causal_lm,
            OBJECTIVES[name],
            hidden,
            TokenInputs.of(batch, OBJECTIVES[name].support, torch.ones((1, n)), torch.ones((1, n))),
            teacher=causal_lm,
            teacher_hidden=hidden.detach(),
            temperature=1.0,
            max_logits_per_chunk=max_elements,
        ).backward()
    return sizes.largest


def test_a_renormalised_objective_never_makes_tokens_by_vocabulary() -> None:
    """Only the gradient of the head, (V, D), grows with V."""
    for vocabulary in (2000, 8000):
        assert training_sizes("teacher_topk", vocabulary, 10**9) == vocabulary * 4


@pytest.mark.parametrize("name", ["sampled_token", "teacher_topk_bucket", "full_reverse_kl"])
def test_no_tensor_of_a_chunked_objective_exceeds_a_chunk(name: str) -> None:
    assert training_sizes(name, 2000, 7 * 2000 + 1) == 7 * 2000
