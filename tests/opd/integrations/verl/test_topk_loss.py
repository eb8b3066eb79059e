"""Losses of packed logits, whole or as vocabulary shards, against the dense objective."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from opd.integrations.verl.topk_loss import logit_losses
from opd.integrations.verl.vocab_parallel import Shard, gather_logits, log_normaliser
from opd.objectives.factory import make_objective
from opd.objectives.objective import batch_losses
from tests.helpers.warm_process import run_ranks

VOCABULARY, TOP = 23, 4
MODES = ["teacher_topk", "teacher_topk_bucket", "teacher_topk_stopped"]


def scattered(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_inputs(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return student logits, the teacher's top-K with log-probabilities, and the next tokens."""
    logits = scattered(seed, count, VOCABULARY).requires_grad_()
    teacher = scattered(seed + 1, count, VOCABULARY).log_softmax(-1)
    top = teacher.topk(TOP, -1)
    tokens = torch.arange(count) * 5 % VOCABULARY
    return logits, top.indices, top.values, tokens


def test_the_divergence_of_packed_logits_is_that_of_the_definition() -> None:
    logits, ids, teacher_logp, tokens = random_inputs(0, 8)
    outputs = logit_losses(make_objective("teacher_topk"), logits, ids, teacher_logp, tokens)
    total = torch.zeros(())
    for n in range(8):
        p, q = (x.exp() / x.exp().sum() for x in (logits[n, ids[n]], teacher_logp[n]))
        loss = sum(p[k] * (p[k] / q[k]).log() for k in range(TOP))
        assert float(outputs["distillation_losses"][n]) == pytest.approx(float(loss), rel=1e-4)
        total = total + loss
    want, gradient = (
        torch.autograd.grad(x, logits)[0] for x in (total, outputs["distillation_losses"].sum())
    )
    torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODES)
def test_losses_of_packed_logits_are_the_dense_objective(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "opd.integrations.verl.topk_loss.MAX_LOGITS", 3 * VOCABULARY
    )  # several chunks
    logits, ids, teacher_logp, tokens = random_inputs(0, 8)
    outputs = logit_losses(make_objective(name), logits, ids, teacher_logp, tokens)
    dense = logits.detach().double().requires_grad_()
    logp = dense.log_softmax(-1)
    zeros = torch.zeros(1, 8, dtype=torch.double)
    support = Support(
        ids=ids[None],
        student_logp=logp.detach().gather(-1, ids)[None],
        teacher_logp=teacher_logp[None].double(),
        source="teacher",
    )
    scored = ScoredRollouts(
        tokens=tokens[None],
        mask=torch.ones(1, 8, dtype=torch.bool),
        sampler_logp=zeros,
        prompt=torch.zeros(1, dtype=torch.long),
        ended=torch.ones(1, dtype=torch.bool),
        student_logp=logp.detach().gather(-1, tokens[:, None]).T,
        teacher_logp=zeros,
        support=support,
    )
    expected = batch_losses(make_objective(name), scored, None, logp.gather(-1, ids)[None])[0]
    torch.testing.assert_close(outputs["distillation_losses"].double(), expected, rtol=0, atol=3e-6)
    weights = torch.arange(8.0)
    (packed_gradient,) = torch.autograd.grad(
        (outputs["distillation_losses"] * weights).sum(), logits
    )
    (two,) = torch.autograd.grad((expected * weights).sum(), dense)
    torch.testing.assert_close(packed_gradient.double(), two, rtol=0, atol=3e-5)
    assert float(two.abs().max()) > 0.1
    p = logp.detach().exp()
    torch.testing.assert_close(outputs["student_mass"].double(), p.gather(-1, ids).sum(-1))
    torch.testing.assert_close(
        outputs["log_probs"].double(), scored.student_logp[0], rtol=0, atol=3e-6
    )
    assert not outputs["log_probs"].requires_grad


@pytest.mark.parametrize("name", ["teacher_topk", "teacher_topk_bucket"])
def test_nothing_as_wide_as_the_vocabulary_is_kept_for_the_backward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.integrations.verl.topk_loss.MAX_LOGITS", 2 * VOCABULARY)
    logits, ids, teacher_logp, tokens = random_inputs(0, 8)
    saved_tensors: list[Tensor] = []
    half_logits = logits.half()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved_tensors.append(x), x)[1], lambda x: x
    ):
        logit_losses(make_objective(name), half_logits, ids, teacher_logp, tokens)
    assert saved_tensors
    logits_pointer = half_logits.untyped_storage().data_ptr()
    copies = [x for x in saved_tensors if x.untyped_storage().data_ptr() != logits_pointer]
    assert not [x.shape for x in copies if x.shape[-1:] == (VOCABULARY,)]


def shard_process(name: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    logits, ids, teacher_logp, tokens = random_inputs(0, 8)
    half = 12
    shard = Shard(rank * half, None)
    local_logits = torch.nn.functional.pad(
        logits.detach(), (0, 1), value=-60.0
    )  # as verl pads to a shard
    local_logits = local_logits[:, rank * half : (rank + 1) * half].clone().requires_grad_()
    weights = torch.arange(8.0)
    full_outputs = logit_losses(make_objective(name), logits, ids, teacher_logp, tokens)
    outputs = logit_losses(make_objective(name), local_logits, ids, teacher_logp, tokens, shard)
    for key, value in full_outputs.items():
        torch.testing.assert_close(outputs[key], value, rtol=0, atol=3e-6)
    (expected,) = torch.autograd.grad((full_outputs["distillation_losses"] * weights).sum(), logits)
    (local_gradient,) = torch.autograd.grad(
        (outputs["distillation_losses"] * weights).sum(), local_logits
    )
    width = min(half, VOCABULARY - rank * half)
    expected = expected[:, rank * half : rank * half + width]
    torch.testing.assert_close(local_gradient[:, :width], expected, rtol=0, atol=3e-5)
    assert float(expected.abs().max()) > 0.1
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["teacher_topk", "teacher_topk_bucket"])
def test_shards_of_the_vocabulary_give_the_losses_and_gradients_of_the_whole(
    name: str, tmp_path: Path
) -> None:
    run_ranks(tmp_path, shard_process, name)


def test_one_process_needs_no_shard() -> None:
    logits, ids, _, _ = random_inputs(3, 5)
    torch.testing.assert_close(gather_logits(logits, ids), logits.gather(-1, ids))
    torch.testing.assert_close(log_normaliser(logits, elements=1), logits.logsumexp(-1))
