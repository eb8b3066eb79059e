"""A remote teacher gives the same scores as a local one, and invalid responses are rejected."""

import math
import re
import time
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
from opd.teachers.client import TeacherClient, connect, group_rows
from opd.teachers.pair import ModelPair, load_pair
from opd.teachers.remote_scores import score_remote
from opd.teachers.teacher import ServerTeacher
from tests.helpers.fake_teacher_server import (
    FakeTeacher,
    delay,
    drop_connection,
    edit_answer,
    error_status,
    serve,
    shorten_body,
    truncate_body,
)
from tests.helpers.requests import full_request, lean_request

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


@pytest.mark.parametrize("support_only", [True, False])
def test_scores_losses_and_gradients_are_those_of_the_local_teacher(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    url: str,
    teacher: FakeTeacher,
    support_only: bool,
) -> None:
    pair, prompts, batch = rollouts_of_pair
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
        (full_request(K, "union"), "not a 'union' support"),
        (full_request(K, "full"), "does not support full distributions"),
        (lean_request(K, temperature=0.7), "a remote teacher scores at 1"),
    ):
        with pytest.raises(ValueError, match=message):
            score_batch(pair.student, server, prompts, batch, request)
    with pytest.raises(ValueError, match="provides neither hidden states nor full distributions"):
        _ = server.model


def test_questions_are_bounded_by_rows_and_by_ids() -> None:
    sizes = [10, 8000, 190, 3, 9000, 5000, 3000, 192, 1, 1, 1, 1, 1]
    rows = [i for i in range(len(sizes)) if i != 3]
    groups = group_rows(rows, sizes)
    assert groups == [[0, 1], [2], [4], [5, 6, 7], [8, 9, 10, 11], [12]]


def test_of_equal_probabilities_the_servers_ranks_decide() -> None:
    """bfloat16 logits often tie: a sampled id may tie with the last of the K ids."""
    logp_and_rank = {"7": (-2.0, 4), "5": (-1.0, 1), "9": (-2.0, 3), "8": (-2.0, 2)}
    entries = {v: {"logprob": logp, "rank": rank} for v, (logp, rank) in logp_and_rank.items()}
    assert read_position(entries, 7, 1, 3) == ([5, 8, 9], [-1.0, -2.0, -2.0], -2.0)


def reverse_choices(answer: dict[str, Any]) -> None:
    answer["choices"].reverse()


TEMPORARY_FAULTS = {
    "500": [error_status(500)] * 2,
    "503 and its wish": [error_status(503, **{"Retry-After": "1"})],
    "429": [error_status(429)],
    "dropped": [drop_connection] * 2,
    "truncated JSON": [truncate_body],
    "short of its length": [shorten_body],
    "all of them": [
        error_status(500),
        drop_connection,
        truncate_body,
        shorten_body,
        error_status(429),
    ],
    "out of order": [edit_answer(reverse_choices)] * 3,
}


@pytest.mark.parametrize("faults", TEMPORARY_FAULTS.values(), ids=TEMPORARY_FAULTS)
def test_faults_that_pass_change_nothing(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    url: str,
    teacher: FakeTeacher,
    faults: list[Any],
) -> None:
    pair, prompts, batch = rollouts_of_pair
    client = connect_to(url, pair)
    clean = score_remote(client, prompts, batch, K)
    num_requests = len(teacher.requests)
    teacher.faults = list(faults)
    start = time.monotonic()
    scores = score_remote(client, prompts, batch, K)
    assert not teacher.faults
    num_failed = 0 if faults is TEMPORARY_FAULTS["out of order"] else len(faults)
    assert len(teacher.requests) - num_requests == 4 + num_failed
    for name in ("ids", "logp", "sampled"):
        assert torch.equal(getattr(scores, name), getattr(clean, name))
    if faults is TEMPORARY_FAULTS["503 and its wish"]:
        assert time.monotonic() - start >= 1


def test_a_slow_try_is_put_again(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: FakeTeacher
) -> None:
    pair, prompts, batch = rollouts_of_pair
    client = connect_to(url, pair, timeout=3.0)  # one attempt takes at most a third of it
    clean = score_remote(client, prompts, batch, K)
    num_requests = len(teacher.requests)
    teacher.faults = [delay(1.4)]
    scores = score_remote(client, prompts, batch, K)
    assert torch.equal(scores.sampled, clean.sampled)
    assert len(teacher.requests) - num_requests > 4


def test_questions_in_flight_are_as_many_as_allowed(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: FakeTeacher
) -> None:
    pair, prompts, batch = rollouts_of_pair
    client = connect_to(url, pair, concurrency=2)
    teacher.faults = [delay(0.15)] * 3
    score_remote(client, prompts, batch, K)
    assert teacher.max_running == 2


def rename_model(answer: dict[str, Any]) -> None:
    answer["model"] = "other"


def swap_rows(answer: dict[str, Any]) -> None:
    a, b, *_ = answer["choices"]
    a["prompt_logprobs"], b["prompt_logprobs"] = b["prompt_logprobs"], a["prompt_logprobs"]


def swap_indices(answer: dict[str, Any]) -> None:
    a, b, *_ = answer["choices"]
    a["index"], b["index"] = b["index"], a["index"]


def remove_row(answer: dict[str, Any]) -> None:
    answer["choices"].pop()


def remove_logprobs(answer: dict[str, Any]) -> None:
    answer["choices"][0]["prompt_logprobs"] = None


def at_last_position(change: Any) -> Any:
    """Change the entries at the last position of the first row."""
    return lambda answer: change(answer["choices"][0]["prompt_logprobs"][-1])


def keep_two_entries(entries: dict[str, Any]) -> None:
    while len(entries) > 2:
        entries.popitem()


def with_all_logprobs(value: Any) -> Any:
    def change(entries: dict[str, Any]) -> None:
        for entry in entries.values():
            entry["logprob"] = value

    return change


def add_foreign_id(entries: dict[str, Any]) -> None:
    entries["999999"] = {"logprob": -1e-9, "rank": 1}
    if len(entries) > K + 1:
        del entries[next(v for v in entries if entries[v]["rank"] == K)]


def use_huge_id(entries: dict[str, Any]) -> None:
    entries["9" * 30] = entries.popitem()[1]


def use_padded_id(entries: dict[str, Any]) -> None:
    entries["0" + next(iter(entries))] = entries.popitem()[1]


INVALID_ANSWERS = {
    "another model": (edit_answer(rename_model), "it is of model 'other'"),
    "another row's numbers": (edit_answer(swap_rows), "has no log-probability|positions for"),
    "another index": (edit_answer(swap_indices), "differ from the ids that were sent"),
    "a row is lost": (edit_answer(remove_row), r"rows \[0, 1, 2\], requested were 4 rows"),
    "no numbers": (edit_answer(remove_logprobs), "no prompt_logprobs"),
    "fewer than K": (edit_answer(at_last_position(keep_two_entries)), "--max-logprobs"),
    "nothing at a position": (edit_answer(at_last_position(dict.clear)), "has no log-probability"),
    "minus infinity": (
        edit_answer(at_last_position(with_all_logprobs(-math.inf))),
        "a probability of 0",
    ),
    "clamped": (edit_answer(at_last_position(with_all_logprobs(-9999.0))), "a probability of 0"),
    "nan": (edit_answer(at_last_position(with_all_logprobs(math.nan))), "not a number"),
    "null": (
        edit_answer(at_last_position(with_all_logprobs(None))),
        r"does not match the request: .* None is not a log-prob",
    ),
    "true": (
        edit_answer(at_last_position(with_all_logprobs(True))),
        "True is not a log-probability",
    ),
    "text": (
        edit_answer(at_last_position(with_all_logprobs("-1"))),
        "'-1' is not a log-probability",
    ),
    "beyond floats": (
        edit_answer(at_last_position(with_all_logprobs(-(10**400)))),
        "-1000.* is not a log-probability",
    ),
    "beyond 64 bits": (edit_answer(at_last_position(use_huge_id)), "'999.*999' is not a token id"),
    "an id written twice": (edit_answer(at_last_position(use_padded_id)), "is not a token id"),
    "logits": (edit_answer(at_last_position(with_all_logprobs(3.0))), "raw_logits"),
    "mass beyond 1": (edit_answer(at_last_position(with_all_logprobs(-0.1))), "raw_logits"),
    "an id of no student": (edit_answer(at_last_position(add_foreign_id)), "999999"),
    "400": (error_status(400), "status 400: as ordered"),
    "401": (error_status(401), "OPDLAB_TEACHER_KEY"),
    "404": (error_status(404), "ends in /v1"),
    "redirect": (error_status(307, Location="http://elsewhere/"), "redirects are not followed"),
    "endless": (lambda body: (200, {}, b" " * (3 << 20)), "longer than"),
}


@pytest.mark.parametrize(("fault", "message"), INVALID_ANSWERS.values(), ids=INVALID_ANSWERS)
def test_wrong_answers_raise_and_name_the_row(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    url: str,
    teacher: FakeTeacher,
    fault: Any,
    message: str,
) -> None:
    pair, prompts, batch = rollouts_of_pair
    client = connect_to(url, pair)
    teacher.faults = [fault]
    with pytest.raises(ValueError, match=message) as caught:
        score_remote(client, prompts, batch, K)
    assert url in str(caught.value)
    assert re.search(r"rows (0, 1, 2, 3|4, 5, 6, 7|8, 9, 10, 11) of 12", str(caught.value))
    teacher.faults = []
    score_remote(client, prompts, batch, K)  # the client still works


def test_impatience_names_the_remedy(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], teacher: FakeTeacher
) -> None:
    pair, prompts, batch = rollouts_of_pair
    with serve(teacher) as url:
        client = connect_to(url, pair, timeout=0.5)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no response for .* teacher_timeout"):
        score_remote(client, prompts, batch, K)
    assert time.monotonic() - start < 3


def test_a_server_that_comes_back_is_waited_for_and_recognised(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    teacher: FakeTeacher,
    tiny_pair: tuple[Path, Path],
) -> None:
    import threading

    pair, prompts, batch = rollouts_of_pair
    with serve(teacher) as url:
        client = connect_to(url, pair)
        clean = score_remote(client, prompts, batch, K)
    port = int(url.split(":")[2].removesuffix("/v1"))
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(score_remote(client, prompts, batch, K))
    )
    thread.start()
    time.sleep(0.2)
    assert not results
    with serve(teacher, port):
        thread.join(20)
    assert torch.equal(results[0].logp, clean.logp)
    with (
        serve(FakeTeacher(tiny_pair[0]), port),
        pytest.raises(RuntimeError, match="not the same model as at the start"),
    ):
        score_remote(client, prompts, batch, K)


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
