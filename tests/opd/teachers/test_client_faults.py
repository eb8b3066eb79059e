"""Faults of teacher servers: temporary ones are retried, wrong answers raise and name the row."""

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.teachers.pair import ModelPair
from opd.teachers.remote_scores import score_remote
from tests.helpers.servers.teacher_server import (
    FakeTeacher,
    delay,
    drop_connection,
    edit_answer,
    error_status,
    serve,
    shorten_body,
    truncate_body,
)
from tests.opd.teachers.test_client import K, connect_to, rollouts_of_pair, teacher, url

__all__ = ["rollouts_of_pair", "teacher", "url"]  # fixtures


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
