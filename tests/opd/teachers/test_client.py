"""A teacher on a server equals the one at hand, and what goes wrong on the way never passes."""

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
from opd.data.prompts import Prompts, encode
from opd.models.forward import response_hidden
from opd.objectives.factory import make
from opd.objectives.support import JOINED
from opd.rollouts.hf_engine import sample
from opd.scoring.loss import loss_from_hidden
from opd.scoring.score import score, score_support, score_told
from opd.serving import json_endpoint
from opd.serving.vllm_protocol import read_position
from opd.teachers.client import TeacherClient, connect, grouped
from opd.teachers.pair import ModelPair, load_pair
from opd.teachers.remote_scores import asked
from tests.helpers.fake_teacher_server import (
    Teacher,
    changed,
    cut,
    dropped,
    serving,
    short,
    slow,
    status,
)

K = 5
SIZES = {"max_tokens_per_microbatch": 90, "max_logits_per_chunk": 700}


@pytest.fixture(scope="module")
def rolled(tiny_pair: tuple[Path, Path]) -> tuple[ModelPair, Prompts, Rollouts]:
    """Twelve rows of ragged prompts; the mask of some has a hole, as the turns of games have."""
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    prompts = encode(pair.tokenizer, [Problem("1+2" * n, "3") for n in (1, 3, 2)], 4, 64)
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
    return pair, prompts, masked_by(batch, hole)


def masked_by(batch: Rollouts, mask: torch.Tensor) -> Rollouts:
    assert batch.softmax_logp is not None
    logp, whole = batch.sampler_logp * mask, batch.softmax_logp * mask
    return replace(batch, mask=mask, sampler_logp=logp, softmax_logp=whole)


@pytest.fixture
def teacher(tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Teacher:
    monkeypatch.setattr(json_endpoint, "FIRST_WAIT", 0.02)
    monkeypatch.delenv(json_endpoint.KEY, raising=False)
    return Teacher(tiny_pair[1])


@pytest.fixture
def url(teacher: Teacher) -> Iterator[str]:
    with serving(teacher) as url:
        yield url


def connected(url: str, pair: ModelPair, **changes: Any) -> TeacherClient:
    how = {"k": K, "patience": 20.0, "in_flight": 3}
    return connect(url, pair.tokenizer, pair.student.vocabulary, **(how | changes))


def same(found: ScoredRollouts, local: ScoredRollouts) -> None:
    """Equal to rounding: the server's forward has one row, ours a padded batch."""
    assert found.support is not None
    assert local.support is not None
    assert torch.equal(found.support.ids, local.support.ids)
    assert found.support.source == local.support.source
    for name in ("student_logp", "teacher_logp"):
        for mine, theirs in ((found, local), (found.support, local.support)):
            torch.testing.assert_close(
                getattr(mine, name), getattr(theirs, name), atol=2e-5, rtol=0
            )


def loss_and_gradients(
    pair: ModelPair, name: str, prompts: Prompts, batch: ScoredRollouts, **choices: Any
) -> list[torch.Tensor]:
    objective = make(name, **choices)
    parameters = list(pair.student.network.parameters())
    loss = loss_from_hidden(
        pair,
        objective,
        response_hidden(pair.student, prompts, batch),
        None,
        batch,
        objective.credit(batch),
        torch.full((int(batch.mask.sum()),), 0.1),
        max_logits_per_chunk=700,
    )
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("spared", [True, False])
def test_scores_losses_and_gradients_are_those_of_the_local_teacher(
    rolled: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: Teacher, spared: bool
) -> None:
    pair, prompts, batch = rolled
    told = asked(connected(url, pair), prompts, batch, K)
    if spared:
        found = score_support(pair, prompts, batch, k=K, temperature=1.0, told=told, **SIZES)
        local = score_support(pair, prompts, batch, k=K, temperature=1.0, **SIZES)
    else:
        found = score_told(pair, prompts, batch, told, source="teacher", **SIZES)
        how = {"k": K, "temperature": 1.0, "keep_teacher": False}
        local, _ = score(pair, prompts, batch, **how, **SIZES)
    assert found.prefix is None
    same(found, local)
    outside = ~local.support.contains(batch.tokens) & batch.mask
    assert outside.any()  # sampled tokens that are not among the teacher's K are scored too
    for name, choices in (
        ("teacher_topk", {}),
        ("teacher_topk_and_sampled", {}),
        ("teacher_topk_bucket", {}),
        ("sampled_token", {"gamma": 0.9}),
    ):
        ours = loss_and_gradients(pair, name, prompts, found, **choices)
        theirs = loss_and_gradients(pair, name, prompts, local, **choices)
        assert max(float(g.abs().max()) for g in theirs[1:]) > 1e-2
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    # the probes, and three questions of four rows; connections were kept
    assert len(teacher.asked) == 3 + 3
    assert teacher.connections <= 2 + 3


def test_intersection_is_that_of_whole_distributions(
    rolled: tuple[ModelPair, Prompts, Rollouts], url: str
) -> None:
    pair, prompts, batch = rolled
    told = asked(connected(url, pair), prompts, batch, K)
    found = score_told(pair, prompts, batch, told, source="intersection", **SIZES)
    how = {"k": K, "temperature": 1.0, "keep_teacher": False}
    local, _ = score(pair, prompts, batch, source="intersection", **how, **SIZES)
    same(found, local)
    assert torch.equal(found.support.present[batch.mask], local.support.present[batch.mask])
    assert "union" in JOINED
    with pytest.raises(ValueError, match="not the support 'union'"):
        score_told(pair, prompts, batch, told, source="union", **SIZES)


def test_questions_are_bounded_by_rows_and_by_ids() -> None:
    sizes = [10, 8000, 190, 3, 9000, 5000, 3000, 192, 1, 1, 1, 1, 1]
    wanted = [i for i in range(len(sizes)) if i != 3]
    groups = grouped(wanted, sizes)
    assert groups == [[0, 1], [2], [4], [5, 6, 7], [8, 9, 10, 11], [12]]


def test_of_equal_probabilities_the_servers_ranks_decide() -> None:
    """bfloat16 logits tie often: the sampled id as probable as the last of the K is not of them."""
    told = {"7": (-2.0, 4), "5": (-1.0, 1), "9": (-2.0, 3), "8": (-2.0, 2)}
    entries = {v: {"logprob": logp, "rank": rank} for v, (logp, rank) in told.items()}
    assert read_position(entries, 7, 1, 3) == ([5, 8, 9], [-1.0, -2.0, -2.0], -2.0)


def reordered(answer: dict[str, Any]) -> None:
    answer["choices"].reverse()


PASSING = {
    "500": [status(500)] * 2,
    "503 and its wish": [status(503, **{"Retry-After": "1"})],
    "429": [status(429)],
    "dropped": [dropped] * 2,
    "truncated JSON": [cut],
    "short of its length": [short],
    "all of them": [status(500), dropped, cut, short, status(429)],
    "out of order": [changed(reordered)] * 3,
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_faults_that_pass_change_nothing(
    rolled: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: Teacher, faults: list[Any]
) -> None:
    pair, prompts, batch = rolled
    remote = connected(url, pair)
    clean = asked(remote, prompts, batch, K)
    before = len(teacher.asked)
    teacher.faults = list(faults)
    began = time.monotonic()
    found = asked(remote, prompts, batch, K)
    assert not teacher.faults
    failed = 0 if faults is PASSING["out of order"] else len(faults)
    assert len(teacher.asked) - before == 4 + failed
    for name in ("ids", "logp", "sampled"):
        assert torch.equal(getattr(found, name), getattr(clean, name))
    if faults is PASSING["503 and its wish"]:
        assert time.monotonic() - began >= 1


def test_a_slow_try_is_put_again(
    rolled: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: Teacher
) -> None:
    pair, prompts, batch = rolled
    remote = connected(url, pair, patience=7.5)  # a third of it for a try
    clean = asked(remote, prompts, batch, K)
    before = len(teacher.asked)
    teacher.faults = [slow(3.5)]
    found = asked(remote, prompts, batch, K)
    assert torch.equal(found.sampled, clean.sampled)
    assert len(teacher.asked) - before > 4


def test_questions_in_flight_are_as_many_as_allowed(
    rolled: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: Teacher
) -> None:
    pair, prompts, batch = rolled
    remote = connected(url, pair, in_flight=2)
    teacher.faults = [slow(0.4)] * 3
    asked(remote, prompts, batch, K)
    assert teacher.most_at_once == 2


def test_trickling_answers_end(url: str, teacher: Teacher) -> None:
    """A server that sends a byte at a time is slow, however short the wait for each."""
    import socket
    import threading

    listener = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        while True:
            try:
                one, _ = listener.accept()
                one.recv(1000)
                one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(1000):
                    one.sendall(b" ")
                    time.sleep(0.05)
            except OSError:
                if listener.fileno() == -1:
                    return

    thread = threading.Thread(target=trickle, daemon=True)
    thread.start()
    side = json_endpoint.JsonEndpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", patience=2.0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no answer for .* s \(TimeoutError"):
        side.ask("/models", most=2000)
    assert time.monotonic() - began < 4
    listener.close()


def renamed(answer: dict[str, Any]) -> None:
    answer["model"] = "other"


def another_row(answer: dict[str, Any]) -> None:
    a, b, *_ = answer["choices"]
    a["prompt_logprobs"], b["prompt_logprobs"] = b["prompt_logprobs"], a["prompt_logprobs"]


def swapped(answer: dict[str, Any]) -> None:
    a, b, *_ = answer["choices"]
    a["index"], b["index"] = b["index"], a["index"]


def lost_row(answer: dict[str, Any]) -> None:
    answer["choices"].pop()


def no_numbers(answer: dict[str, Any]) -> None:
    answer["choices"][0]["prompt_logprobs"] = None


def at_end(change: Any) -> Any:
    """Change the entries of the last position of the first row."""
    return lambda answer: change(answer["choices"][0]["prompt_logprobs"][-1])


def fewer(entries: dict[str, Any]) -> None:
    while len(entries) > 2:
        entries.popitem()


def every(value: Any) -> Any:
    def change(entries: dict[str, Any]) -> None:
        for at in entries.values():
            at["logprob"] = value

    return change


def alien(entries: dict[str, Any]) -> None:
    entries["999999"] = {"logprob": -1e-9, "rank": 1}
    if len(entries) > K + 1:
        del entries[next(v for v in entries if entries[v]["rank"] == K)]


def huge_id(entries: dict[str, Any]) -> None:
    entries["9" * 30] = entries.popitem()[1]


def padded_id(entries: dict[str, Any]) -> None:
    entries["0" + next(iter(entries))] = entries.popitem()[1]


LASTING = {
    "another model": (changed(renamed), "model 'other' answers"),
    "another row's numbers": (changed(another_row), "has no log-probability|positions for"),
    "another index": (changed(swapped), "not those that were sent"),
    "a row is lost": (changed(lost_row), r"rows \[0, 1, 2\], asked were 4 rows"),
    "no numbers": (changed(no_numbers), "no prompt_logprobs"),
    "fewer than K": (changed(at_end(fewer)), "--max-logprobs"),
    "nothing at a position": (changed(at_end(dict.clear)), "has no log-probability"),
    "minus infinity": (changed(at_end(every(-math.inf))), "a probability of 0"),
    "clamped": (changed(at_end(every(-9999.0))), "a probability of 0"),
    "nan": (changed(at_end(every(math.nan))), "not a number"),
    "null": (changed(at_end(every(None))), r"the answer is not the one .* None is no log-prob"),
    "true": (changed(at_end(every(True))), "True is no log-probability"),
    "text": (changed(at_end(every("-1"))), "'-1' is no log-probability"),
    "beyond floats": (changed(at_end(every(-(10**400)))), "-1000.* is no log-probability"),
    "beyond 64 bits": (changed(at_end(huge_id)), "'999.*999' is no token id"),
    "an id written twice": (changed(at_end(padded_id)), "is no token id"),
    "logits": (changed(at_end(every(3.0))), "raw_logits"),
    "mass beyond 1": (changed(at_end(every(-0.1))), "raw_logits"),
    "an id of no student": (changed(at_end(alien)), "999999"),
    "400": (status(400), "status 400: as ordered"),
    "401": (status(401), "OPDLAB_TEACHER_KEY"),
    "404": (status(404), "end in /v1"),
    "redirect": (status(307, Location="http://elsewhere/"), "no redirect is followed"),
    "endless": (lambda body: (200, {}, b" " * (3 << 20)), "longer than"),
}


@pytest.mark.parametrize(("fault", "message"), LASTING.values(), ids=LASTING)
def test_wrong_answers_raise_and_name_the_row(
    rolled: tuple[ModelPair, Prompts, Rollouts],
    url: str,
    teacher: Teacher,
    fault: Any,
    message: str,
) -> None:
    pair, prompts, batch = rolled
    remote = connected(url, pair)
    teacher.faults = [fault]
    with pytest.raises(ValueError, match=message) as caught:
        asked(remote, prompts, batch, K)
    assert url in str(caught.value)
    assert re.search(r"rows (0, 1, 2, 3|4, 5, 6, 7|8, 9, 10, 11) of 12", str(caught.value))
    teacher.faults = []
    asked(remote, prompts, batch, K)  # the connection can be used again


def test_impatience_names_the_remedy(
    rolled: tuple[ModelPair, Prompts, Rollouts], teacher: Teacher
) -> None:
    pair, prompts, batch = rolled
    with serving(teacher) as url:
        remote = connected(url, pair, patience=0.5)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no answer for .* teacher_timeout"):
        asked(remote, prompts, batch, K)
    assert time.monotonic() - began < 3


def test_a_server_that_comes_back_is_waited_for_and_recognised(
    rolled: tuple[ModelPair, Prompts, Rollouts], teacher: Teacher, tiny_pair: tuple[Path, Path]
) -> None:
    import threading

    pair, prompts, batch = rolled
    with serving(teacher) as url:
        remote = connected(url, pair)
        clean = asked(remote, prompts, batch, K)
    port = int(url.split(":")[2].removesuffix("/v1"))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(asked(remote, prompts, batch, K)))
    thread.start()
    time.sleep(0.5)
    assert not found
    with serving(teacher, port):
        thread.join(20)
    assert torch.equal(found[0].logp, clean.logp)
    with (
        serving(Teacher(tiny_pair[0]), port),
        pytest.raises(RuntimeError, match="another model than at the start"),
    ):
        asked(remote, prompts, batch, K)


def test_what_a_server_lacks_is_said_at_the_start(
    rolled: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: Teacher
) -> None:
    pair, _, _ = rolled
    teacher.most = K - 1
    with pytest.raises(ValueError, match=f"--max-logprobs {K}, or lower support_k"):
        connected(url, pair)
    teacher.most, teacher.limit = 20, 90
    remote = connected(url, pair)
    remote.check_length(89)
    with pytest.raises(ValueError, match="--max-model-len 91"):
        remote.check_length(90)
    with pytest.raises(ValueError, match=r"no model 'missing'.*#MODEL: teacher"):
        connected(url + "#missing", pair)
    assert connected(url + "#teacher", pair).model == "teacher"
    vocabulary = pair.student.vocabulary
    with pytest.raises(ValueError, match=f"must know ids 0 to {vocabulary}"):
        connect(url, pair.tokenizer, vocabulary + 1, k=K, patience=9.0, in_flight=1)


def test_other_tokens_are_refused(
    rolled: tuple[ModelPair, Prompts, Rollouts], url: str, teacher: Teacher
) -> None:
    pair, _, _ = rolled
    ids = teacher.tokenizer.encode("ab")
    other = dict(zip(ids, reversed(ids), strict=True))  # the two exchanged
    honest, split = teacher.tokenizer.decode, teacher.tokenizer.encode
    teacher.tokenizer.decode = lambda some: honest([other.get(v, v) for v in some])
    with pytest.raises(ValueError, match=f"reads the id {min(ids)} as 'b', the student as 'a'"):
        connected(url, pair)
    # ids of half a character have no text of their own
    a, b = split("é")
    assert honest([a]) == honest([b])
    other = {a: b, b: a}
    teacher.tokenizer.encode = lambda text, **how: [other.get(v, v) for v in split(text, **how)]
    with pytest.raises(ValueError, match=f"has the id {b} where the student has {a}"):
        connected(url, pair)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://somewhere/v1", "no http:// or https://"),
        ("http:///v1", "no http:// or https://"),
        ("http://me:secret@somewhere/v1", "a user, a password or a query"),
        ("http://somewhere/v1?key=secret", "a user, a password or a query"),
    ],
)
def test_addresses(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        json_endpoint.JsonEndpoint(address, patience=1.0)
    assert "secret" not in str(caught.value)


def test_the_key_is_sent_and_never_told(
    rolled: tuple[ModelPair, Prompts, Rollouts],
    url: str,
    teacher: Teacher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, prompts, batch = rolled
    monkeypatch.setenv(json_endpoint.KEY, "hush-hush")
    remote = connected(url, pair)
    assert set(teacher.keys) == {"Bearer hush-hush"}
    teacher.faults = [lambda body: (403, {}, b'{"message": "bad key hush-hush"}')]
    with pytest.raises(ValueError, match=r"bad key \*\*\*") as caught:
        asked(remote, prompts, batch, K)
    assert "hush" not in str(caught.value)
    assert "hush" not in repr(remote) + repr(remote.endpoint)
