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
from opd.scoring.request import ScoreRequest
from opd.scoring.score import score_batch
from opd.teachers.pair import ModelPair, load_pair
from opd.tokens.eos import EosMap
from tests.helpers.requests import full_request, lean_request


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split chunks into blocks of a few tokens, as those of a large vocabulary are."""
    monkeypatch.setattr("opd.models.lm_head.CPU_BLOCK", 1000)


@pytest.fixture(scope="module")
def rolled(two_layer_pair) -> tuple[ModelPair, Prompts, Rollouts]:
    pair = load_pair(*map(str, two_layer_pair), "cpu", "float32")
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
            for model in (pair.student, pair.teacher.model)
        ]


@pytest.mark.parametrize("source", ["teacher", "student", "full", *JOINT_SUPPORTS])
def test_supports_are_those_of_whole_distributions(rolled, source: str) -> None:
    pair, prompts, batch = rolled
    p, q = full_log_probs(*rolled, 0.7)
    topk_by_model = {"teacher": q.topk(5, -1).indices, "student": p.topk(5, -1).indices}
    topk_by_model["full"] = topk_by_model["teacher"]
    ids, present = topk_by_model.get(source), None
    if source in JOINT_SUPPORTS:
        ids, present = JOINT_SUPPORTS[source](topk_by_model["teacher"], topk_by_model["student"])
        assert present.any()
        assert not present.all()
    request = full_request(5, source, temperature=0.7)
    result = score_batch(pair.student, pair.teacher, prompts, batch, request)
    scored, teacher_hidden = result.scored, result.teacher_hidden
    assert not result.reuses_sampler
    mask, support = batch.mask, scored.support
    assert torch.equal(support.ids[mask], ids)
    assert present is None or torch.equal(support.present[mask], present)
    for support_logp, logp in ((support.student_logp, p), (support.teacher_logp, q)):
        torch.testing.assert_close(support_logp[mask], logp.gather(-1, ids), atol=1e-5, rtol=1e-5)
    assert support.source == ("teacher" if source == "full" else source)
    y = batch.tokens[mask][:, None]
    torch.testing.assert_close(scored.student_logp[mask], p.gather(-1, y)[:, 0], atol=1e-5, rtol=0)
    entropy = -(p.exp() * p).sum(-1)
    torch.testing.assert_close(scored.prefix.student_entropy[mask], entropy, atol=1e-5, rtol=1e-5)
    if source != "full":
        assert teacher_hidden is None
        return
    with torch.no_grad():
        states = response_hidden_states(pair.teacher.model, prompts, batch)
    torch.testing.assert_close(teacher_hidden, states, atol=1e-5, rtol=1e-5)


def test_each_model_is_read_at_its_own_end(rolled) -> None:
    """The student's EOS is its most frequent token, the teacher's another likely one."""
    pair, prompts, batch = rolled
    p, q = full_log_probs(*rolled, 0.7)
    student_eos = int(batch.tokens[batch.mask].mode().values)
    teacher_eos = int(q.topk(5, -1).indices.mode(0).values[0])
    assert student_eos != teacher_eos
    eos_map = EosMap(student=(student_eos,), teacher=(teacher_eos,))
    request = full_request(5, temperature=0.7, eos_map=eos_map, map_eos=True)
    scored = score_batch(pair.student, pair.teacher, prompts, batch, request).scored
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
    joint = full_request(5, "union", eos_map=eos_map, map_eos=True)
    with pytest.raises(ValueError, match="not in the 'union' support; set map_eos to False"):
        score_batch(pair.student, pair.teacher, prompts, batch, joint)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_lean_pass_agrees_with_the_whole_one(rolled, top_p: float) -> None:
    """Also holds after top-p, which changes the sampled tokens but not the student's softmax."""
    pair, prompts, _ = rolled
    batch = rollouts(pair, prompts, 0.7, top_p)
    rich, lean = (
        score_batch(pair.student, pair.teacher, prompts, batch, request)
        for request in (full_request(5, temperature=0.7), lean_request(5, temperature=0.7))
    )
    assert lean.reuses_sampler
    rich, lean = rich.scored, lean.scored
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
    request = lean_request(5, temperature=0.7)
    for model, multiplied in ((pair.teacher.model, True), (pair.student, False)):
        with Users(model.head.weight) as users:
            score_batch(pair.student, pair.teacher, prompts, batch, request)
        assert bool(users.names & products) == multiplied, users.names


def needs(request: ScoreRequest, **changes: object) -> ScoreRequest:
    return replace(request, requirements=replace(request.requirements, **changes))


def test_what_the_sampler_does_not_know_is_computed(rolled) -> None:
    """Wherever its softmax is not that of the scores, the student's full pass is taken."""
    pair, prompts, batch = rolled
    lean = lean_request(5, temperature=0.7)
    cases = {
        "another temperature": (batch, replace(lean, temperature=1.0)),
        "no softmax": (replace(batch, softmax_logp=None), lean),
        "older weights": (replace(batch, age=torch.ones_like(batch.prompt)), lean),
        "full statistics": (batch, replace(lean, full_statistics=True)),
        "log-probabilities": (batch, needs(lean, normalised=True)),
        "distributions": (batch, needs(lean, distributions=True)),
        "another support": (batch, needs(lean, support="none")),
    }
    for name, (rollouts_of_case, request) in cases.items():
        result = score_batch(pair.student, pair.teacher, prompts, rollouts_of_case, request)
        assert not result.reuses_sampler, name
        p, _ = full_log_probs(pair, prompts, batch, request.temperature)
        y = batch.tokens[batch.mask][:, None]
        student_logp = result.scored.student_logp[batch.mask]
        torch.testing.assert_close(student_logp, p.gather(-1, y)[:, 0], atol=1e-5, rtol=0)


def test_two_passes_in_half_precision_are_not_combined(rolled) -> None:
    batch, request = rolled[2], lean_request(5, temperature=0.7)
    allowed = {
        dtype: request.allows_sampler_softmax(batch, dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    assert list(allowed.values()) == [True, True, False, False]


def test_what_cannot_be_scored_is_refused(rolled) -> None:
    pair, prompts, batch = rolled
    for support, k, message in (
        ("both", 5, "unknown support source 'both'; known: teacher, student"),
        ("teacher", 1000, "support_k is 1000, but the shared vocabulary has"),
    ):
        with pytest.raises(ValueError, match=message):
            score_batch(pair.student, pair.teacher, prompts, batch, full_request(k, support))
