"""Scoring a batch: supports by definition, and the pass without the student's full softmax."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diagnostics.batch import Rollouts
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.models.forward import log_probabilities, response_hidden_states
from opd.objectives.support import JOINT_SUPPORTS
from opd.rollouts.hf_engine import sample
from opd.scoring.score import score, score_support
from opd.teachers.pair import ModelPair, load_pair
from opd.tokens.eos import EosMap

LIMITS = {"max_tokens_per_microbatch": 90, "max_logits_per_chunk": 700}


@pytest.fixture(scope="module")
def rolled(tiny_pair) -> tuple[ModelPair, Prompts, Rollouts]:
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    problems = [Problem("1+2" * n, "3") for n in (1, 3, 2)]
    prompts = encode_prompts(pair.tokenizer, problems, 2, 64)
    return pair, prompts, rollouts(pair, prompts, 0.7, 1.0)


def rollouts(pair: ModelPair, prompts: Prompts, temperature: float, top_p: float) -> Rollouts:
    return sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=10,
        temperature=temperature,
        top_p=top_p,
        generator=torch.Generator().manual_seed(0),
    )


def full_log_probs(
    pair: ModelPair, prompts: Prompts, batch: Rollouts, temperature: float
) -> list[Tensor]:
    """Return (N, V) log-probabilities of student and teacher from a single pass."""
    with torch.no_grad():
        return [
            log_probabilities(model, response_hidden_states(model, prompts, batch), temperature)
            for model in (pair.student, pair.teacher)
        ]


@pytest.mark.parametrize("source", ["teacher", "student", *JOINT_SUPPORTS])
def test_supports_are_those_of_whole_distributions(rolled, source: str) -> None:
    pair, prompts, batch = rolled
    p, q = full_log_probs(*rolled, 0.7)
    topk_by_model = {"teacher": q.topk(5, -1).indices, "student": p.topk(5, -1).indices}
    ids, present = topk_by_model.get(source), None
    if source in JOINT_SUPPORTS:
        ids, present = JOINT_SUPPORTS[source](topk_by_model["teacher"], topk_by_model["student"])
        assert present.any()
        assert not present.all()
    scored, teacher_hidden = score(
        pair, prompts, batch, k=5, source=source, temperature=0.7, keep_teacher=True, **LIMITS
    )
    mask, support = batch.mask, scored.support
    assert torch.equal(support.ids[mask], ids)
    assert present is None or torch.equal(support.present[mask], present)
    for support_logp, logp in ((support.student_logp, p), (support.teacher_logp, q)):
        torch.testing.assert_close(support_logp[mask], logp.gather(-1, ids), atol=1e-5, rtol=1e-5)
    assert support.source == source
    y = batch.tokens[mask][:, None]
    torch.testing.assert_close(scored.student_logp[mask], p.gather(-1, y)[:, 0], atol=1e-5, rtol=0)
    entropy = -(p.exp() * p).sum(-1)
    torch.testing.assert_close(scored.prefix.student_entropy[mask], entropy, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            teacher_hidden,
            response_hidden_states(pair.teacher, prompts, batch),
            atol=1e-5,
            rtol=1e-5,
        )


def test_each_model_is_read_at_its_own_end(rolled) -> None:
    """The student's EOS is its most frequent token, the teacher's another likely one."""
    pair, prompts, batch = rolled
    p, q = full_log_probs(*rolled, 0.7)
    student_eos = int(batch.tokens[batch.mask].mode().values)
    teacher_eos = int(q.topk(5, -1).indices.mode(0).values[0])
    assert student_eos != teacher_eos
    eos_map = EosMap(student=(student_eos,), teacher=(teacher_eos,))
    scored, _ = score(
        pair, prompts, batch, k=5, temperature=0.7, keep_teacher=False, eos_map=eos_map, **LIMITS
    )
    mask, support = batch.mask, scored.support
    for row, y in enumerate(batch.tokens[mask].tolist()):
        teacher_token = teacher_eos if y == student_eos else y
        assert float(scored.teacher_logp[mask][row]) == pytest.approx(
            float(q[row, teacher_token]), abs=1e-5
        )
        assert float(scored.student_logp[mask][row]) == pytest.approx(float(p[row, y]), abs=1e-5)
        seen_ids: set[int] = set()
        for j, v in enumerate(q[row].topk(5).indices.tolist()):
            student_id = student_eos if v == teacher_eos else v
            assert int(support.ids[mask][row, j]) == student_id
            assert bool(support.present[mask][row, j]) == (student_id not in seen_ids)
            seen_ids.add(student_id)
            for support_logp, want in (
                (support.student_logp, p[row, student_id]),
                (support.teacher_logp, q[row, v]),
            ):
                assert float(support_logp[mask][row, j]) == pytest.approx(float(want), abs=1e-5)
    with pytest.raises(ValueError, match="not in the 'union' support; set map_eos to False"):
        score(
            pair,
            prompts,
            batch,
            k=5,
            source="union",
            temperature=0.7,
            keep_teacher=False,
            eos_map=eos_map,
            **LIMITS,
        )


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_lean_pass_agrees_with_the_whole_one(rolled, top_p: float) -> None:
    """Also holds after top-p, which changes the sampled tokens but not the student's softmax."""
    pair, prompts, _ = rolled
    batch = rollouts(pair, prompts, 0.7, top_p)
    rich, _ = score(pair, prompts, batch, k=5, temperature=0.7, keep_teacher=False, **LIMITS)
    lean = score_support(pair, prompts, batch, k=5, temperature=0.7, **LIMITS)
    assert lean.prefix is None
    assert torch.equal(lean.support.ids, rich.support.ids)
    for result, expected in (
        (lean.student_logp, rich.student_logp),
        (lean.teacher_logp, rich.teacher_logp),
        (lean.support.student_logp, rich.support.student_logp),
        (lean.support.teacher_logp, rich.support.teacher_logp),
    ):
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5)


class Users(TorchDispatchMode):
    """Record the names of the operations that received a tensor of this storage."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.storage, self.names = weight.untyped_storage().data_ptr(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.untyped_storage().data_ptr() == self.storage for x in tensors):
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_lean_pass_multiplies_with_the_teachers_head_only(rolled) -> None:
    pair, prompts, batch = rolled
    products = {"mm", "addmm", "matmul", "linear"}
    for model, multiplied in ((pair.teacher, True), (pair.student, False)):
        with Users(model.head.weight) as users:
            score_support(pair, prompts, batch, k=5, temperature=0.7, **LIMITS)
        assert bool(users.names & products) == multiplied, users.names


def test_what_the_lean_pass_cannot_know_is_refused(rolled) -> None:
    pair, prompts, batch = rolled
    with pytest.raises(ValueError, match=r"ran at temperature 0\.7 .* at temperature 1\.0 use"):
        score_support(pair, prompts, batch, k=5, temperature=1.0, **LIMITS)
    silent = replace(batch, softmax_logp=None)
    with pytest.raises(ValueError, match="kept no full softmax"):
        score_support(pair, prompts, silent, k=5, temperature=0.7, **LIMITS)
    with pytest.raises(ValueError, match="unknown support source 'both'; known: teacher, student"):
        score(
            pair, prompts, batch, k=5, source="both", temperature=0.7, keep_teacher=False, **LIMITS
        )
