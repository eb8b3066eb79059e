"""A remote teacher gives the same scores as a local one, and invalid responses are rejected."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.batch import Rollouts, ScoredRollouts
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.models.forward import response_hidden_states
from opd.objectives.factory import make_objective
from opd.objectives.inputs import TokenInputs
from opd.objectives.support import JOINT_SUPPORTS
from opd.rollouts.hf_engine import sample
from opd.scoring.loss import loss_from_hidden
from opd.scoring.score import score_batch
from opd.serving import json_endpoint
from opd.serving.vllm_protocol import read_position
from opd.teachers.client import TeacherClient, group_rows
from opd.teachers.connection import connect
from opd.teachers.pair import ModelPair, load_pair
from opd.teachers.remote_scores import score_remote
from opd.teachers.server_kinds import VLLM
from opd.teachers.teacher import ServerTeacher
from tests.helpers.requests import full_request, lean_request
from tests.helpers.servers.teacher_server import (
    FakeTeacher,
    delay,
    serve,
)

K = 5


@pytest.fixture(scope="module")
def rollouts_of_pair(tiny_pair: tuple[Path, Path]) -> tuple[ModelPair, Prompts, Rollouts]:
    """Twelve rows of different lengths; some masks have a gap, as in game trajectories."""
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    prompts = encode_prompts(pair.tokenizer, [Problem("1+2" * n, "3") for n in (1, 3, 2)], 4, 64)
    batch = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=10,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    hole = batch.mask.clone()
    hole[::3, 1:3] = False
    return pair, prompts, with_mask(batch, hole)


def with_mask(batch: Rollouts, mask: torch.Tensor) -> Rollouts:
    assert batch.softmax_logp is not None
    logp, softmax_logp = batch.sampler_logp * mask, batch.softmax_logp * mask
    return replace(batch, mask=mask, sampler_logp=logp, softmax_logp=softmax_logp)


@pytest.fixture
def teacher(tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> FakeTeacher:
    monkeypatch.setattr(json_endpoint, "FIRST_RETRY_DELAY", 0.02)
    monkeypatch.delenv(json_endpoint.KEY_VARIABLE, raising=False)
    return FakeTeacher(tiny_pair[1])


@pytest.fixture
def url(teacher: FakeTeacher) -> Iterator[str]:
    with serve(teacher) as url:
        yield url


def connect_to(url: str, pair: ModelPair, **changes: Any) -> TeacherClient:
    options = {"k": K, "timeout": 20.0, "concurrency": 3}
    return connect(url, pair.tokenizer, pair.student.vocabulary, **(options | changes))


def assert_same_scores(remote: ScoredRollouts, local: ScoredRollouts) -> None:
    """Equal up to rounding: the server scores one row at a time, the local model padded batches."""
    assert remote.support is not None
    assert local.support is not None
    assert torch.equal(remote.support.ids, local.support.ids)
    assert remote.support.source == local.support.source
    for name in ("student_logp", "teacher_logp"):
        for actual, expected in ((remote, local), (remote.support, local.support)):
            torch.testing.assert_close(
                getattr(actual, name), getattr(expected, name), atol=2e-5, rtol=0
            )


def loss_and_gradients(
    pair: ModelPair, name: str, prompts: Prompts, batch: ScoredRollouts, **options: Any
) -> list[torch.Tensor]:
    objective = make_objective(name, **options)
    parameters = list(pair.student.network.parameters())
    loss = loss_from_hidden(
        pair.student,
        objective,
        response_hidden_states(pair.student, prompts, batch),
        TokenInputs.of(
            batch, objective.support, objective.credit(batch), torch.full(batch.mask.shape, 0.1)
        ),
        temperature=1.0,
        max_logits_per_chunk=700,
    )
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize(
    ("support_only", "has_view"), [(True, False), (False, False), (False, True)]
)
def test_scores_losses_and_gradients_are_those_of_the_local_teacher(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    url: str,
    teacher: FakeTeacher,
    support_only: bool,
    has_view: bool,
) -> None:
    pair, prompts, batch = rollouts_of_pair
    if has_view:  # prompts of the teacher's own, longer and shorter than the student's
        ids = [[7, 8, 9] * (1 + row % 4) for row in range(len(prompts))]
        prompts = replace(prompts, view=Prompts.from_ids(ids, prompts.index))
    request = lean_request(K) if support_only else full_request(K)
    server = ServerTeacher(url, connect_to(url, pair))
    remote, local = (
        score_batch(pair.student, scorer, prompts, batch, request)
        for scorer in (server, pair.teacher)
    )
    assert remote.reuses_sampler == local.reuses_sampler == support_only
    remote, local = remote.scored, local.scored
    assert remote.prefix is None
    assert_same_scores(remote, local)
    outside = ~local.support.contains(batch.tokens) & batch.mask
    assert outside.any()  # sampled tokens outside the teacher's top-K are scored too
    for name, objective_options in (
        ("teacher_topk", {}),
        ("teacher_topk_and_sampled", {}),
        ("teacher_topk_bucket", {}),
        ("sampled_token", {"gamma": 0.9}),
    ):
        actual_values = loss_and_gradients(pair, name, prompts, remote, **objective_options)
        expected_values = loss_and_gradients(pair, name, prompts, local, **objective_options)
        assert max(float(g.abs().max()) for g in expected_values[1:]) > 1e-2
        for a, b in zip(actual_values, expected_values, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    # probes, and three requests of four rows; connections are reused
    assert len(teacher.requests) == 3 + 3
    assert teacher.connections <= 2 + 3


def test_intersection_is_that_of_whole_distributions(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], url: str
) -> None:
    pair, prompts, batch = rollouts_of_pair
    server = ServerTeacher(url, connect_to(url, pair))
    remote, local = (
        score_batch(pair.student, x, prompts, batch, full_request(K, "intersection")).scored
        for x in (server, pair.teacher)
    )
    assert_same_scores(remote, local)
    assert torch.equal(remote.support.present[batch.mask], local.support.present[batch.mask])
    assert "union" in JOINT_SUPPORTS
    for request, message in (
        (full_request(K, "union"), "not for a 'union' support"),
        (full_request(K, "full"), "does not support full distributions"),
        (lean_request(K, temperature=0.7), "is a server, which scores at 1"),
    ):
        with pytest.raises(ValueError, match=message):
            score_batch(pair.student, server, prompts, batch, request)
    with pytest.raises(ValueError, match="provides neither hidden states nor full distributions"):
        _ = server.model


def test_questions_are_bounded_by_rows_and_by_ids() -> None:
    sizes = [10, 8000, 190, 3, 9000, 5000, 3000, 192, 1, 1, 1, 1, 1]
    rows = [i for i in range(len(sizes)) if i != 3]
    groups = group_rows(rows, sizes, VLLM.top_k)
    assert groups == [[0, 1], [2], [4], [5, 6, 7], [8, 9, 10, 11], [12]]


def test_of_equal_probabilities_the_servers_ranks_decide() -> None:
    """bfloat16 logits often tie: a sampled id may tie with the last of the K ids."""
    logp_and_rank = {"7": (-2.0, 4), "5": (-1.0, 1), "9": (-2.0, 3), "8": (-2.0, 2)}
    entries = {v: {"logprob": logp, "rank": rank} for v, (logp, rank) in logp_and_rank.items()}
    assert read_position(entries, 7, 1, 3) == ([5, 8, 9], [-1.0, -2.0, -2.0], -2.0)


def test_questions_in_flight_are_as_many_as_allowed(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: FakeTeacher
) -> None:
    pair, prompts, batch = rollouts_of_pair
    client = connect_to(url, pair, concurrency=2)
    teacher.faults = [delay(0.15)] * 3
    score_remote(client, prompts, batch, K)
    assert teacher.max_running == 2


def test_what_a_server_lacks_is_said_at_the_start(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: FakeTeacher
) -> None:
    pair, _, _ = rollouts_of_pair
    teacher.max_logprobs = K - 1
    with pytest.raises(ValueError, match=f"--max-logprobs {K}, or lower support_k"):
        connect_to(url, pair)
    teacher.max_logprobs, teacher.limit = 20, 90
    client = connect_to(url, pair)
    client.check_length(89)
    with pytest.raises(ValueError, match="--max-model-len 91"):
        client.check_length(90)
    with pytest.raises(ValueError, match=r"no model 'missing'.*#MODEL: teacher"):
        connect_to(url + "#missing", pair)
    assert connect_to(url + "#teacher", pair).model == "teacher"
    vocabulary = pair.student.vocabulary
    with pytest.raises(ValueError, match=f"must have the ids 0 to {vocabulary}"):
        connect(url, pair.tokenizer, vocabulary + 1, k=K, timeout=9.0, concurrency=1)


def test_other_tokens_are_refused(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    url: str,
    teacher: FakeTeacher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, _, _ = rollouts_of_pair
    ids = teacher.tokenizer.encode("ab")
    exchanged = dict(zip(ids, reversed(ids), strict=True))  # swap the two ids
    decode, encode = teacher.tokenizer.decode, teacher.tokenizer.encode
    monkeypatch.setattr(
        teacher.tokenizer, "decode", lambda ids: decode([exchanged.get(v, v) for v in ids])
    )
    with pytest.raises(ValueError, match=f"decodes the id {min(ids)} as 'b', the student as 'a'"):
        connect_to(url, pair)
    # ids of partial characters have no text of their own
    a, b = encode("é")
    assert decode([a]) == decode([b])
    exchanged = {a: b, b: a}
    monkeypatch.setattr(
        teacher.tokenizer,
        "encode",
        lambda text, **options: [exchanged.get(v, v) for v in encode(text, **options)],
    )
    with pytest.raises(ValueError, match=f"has the id {b} where the student has {a}"):
        connect_to(url, pair)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://somewhere/v1", "not an http:// or https://"),
        ("http:///v1", "not an http:// or https://"),
        ("http://me:secret@somewhere/v1", "a user, a password or a query"),
        ("http://somewhere/v1?key=secret", "a user, a password or a query"),
    ],
)
def test_addresses(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        json_endpoint.JsonEndpoint(address, timeout=1.0)
    assert "secret" not in str(caught.value)


def test_the_key_is_sent_and_never_told(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    url: str,
    teacher: FakeTeacher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, prompts, batch = rollouts_of_pair
    monkeypatch.setenv(json_endpoint.KEY_VARIABLE, "hush-hush")
    client = connect_to(url, pair)
    assert set(teacher.keys) == {"Bearer hush-hush"}
    teacher.faults = [lambda body: (403, {}, b'{"message": "bad key hush-hush"}')]
    with pytest.raises(ValueError, match=r"bad key \*\*\*") as caught:
        score_remote(client, prompts, batch, K)
    assert "hush" not in str(caught.value)
    assert "hush" not in repr(client) + repr(client.endpoint)
