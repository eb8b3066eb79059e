"""A server that scores ids the student chose is as good as a teacher in this process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diagnostics.batch import Rollouts, ScoredRollouts
from opd.config.settings import Config, with_settings
from opd.data.prompts import Prompts
from opd.scoring.score import score_batch
from opd.serving import json_endpoint, vllm_completions
from opd.teachers import server_kinds
from opd.teachers.pair import ModelPair
from opd.teachers.remote_scores import score_remote
from opd.teachers.teacher import Capability, ServerTeacher
from opd.tokens.eos import EosMap
from opd.training.checks.rescoring import rescoring_columns
from tests.helpers.requests import full_request, lean_request
from tests.helpers.servers.chosen_ids import GenerateTeacher, SglangTeacher
from tests.helpers.servers.teacher_server import FakeTeacher, serve
from tests.opd.teachers.test_client import (
    K,
    assert_same_scores,
    connect_to,
    loss_and_gradients,
    rollouts_of_pair,
)

__all__ = ["rollouts_of_pair"]  # a fixture

SERVERS: dict[str, Callable[[Path], FakeTeacher]] = {
    "vllm": GenerateTeacher,
    "whole": lambda folder: GenerateTeacher(folder, max_logprobs=-1, has_v2_runner=False),
    "sglang": SglangTeacher,
}
"""A server of each route that scores chosen ids."""


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_endpoint, "FIRST_RETRY_DELAY", 0.02)
    monkeypatch.delenv(json_endpoint.KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, tiny_pair: tuple[Path, Path]
) -> Iterator[tuple[FakeTeacher, str]]:
    fake = SERVERS[request.param](tiny_pair[1])
    with serve(fake) as url:
        yield fake, url


@contextmanager
def connected(
    fake: FakeTeacher, pair: ModelPair, **changes: Any
) -> Iterator[tuple[ServerTeacher, str]]:
    with serve(fake) as url:
        yield ServerTeacher(url, connect_to(url, pair, **({"num_chosen": K} | changes))), url


def present_support(batch: ScoredRollouts) -> torch.Tensor:
    support = batch.support
    assert support is not None
    if support.present is None:
        return batch.mask[..., None].expand_as(support.ids)
    return support.present & batch.mask[..., None]


@pytest.mark.parametrize("source", ["student", "union"])
def test_scores_losses_and_gradients_are_those_of_the_local_teacher(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    server: tuple[FakeTeacher, str],
    source: str,
) -> None:
    pair, prompts, batch = rollouts_of_pair
    teacher = ServerTeacher(server[1], connect_to(server[1], pair, num_chosen=K))
    remote, local = (
        score_batch(pair.student, scorer, prompts, batch, full_request(K, source)).scored
        for scorer in (teacher, pair.teacher)
    )
    assert_same_scores(remote, local)
    assert torch.equal(present_support(remote), present_support(local))
    for form in ("", "_and_sampled", "_stopped"):
        name = f"{source}_topk{form}"
        actual_values = loss_and_gradients(pair, name, prompts, remote, support_k=K)
        expected_values = loss_and_gradients(pair, name, prompts, local, support_k=K)
        assert max(float(g.abs().max()) for g in expected_values[1:]) > 1e-3
        for a, b in zip(actual_values, expected_values, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def score_top_k(pair: ModelPair, prompts: Prompts, batch: Rollouts) -> Any:
    return score_batch(pair.student, pair.teacher, prompts, batch, full_request(K)).scored.support


def test_the_teacher_reads_its_own_view(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], tiny_pair: tuple[Path, Path]
) -> None:
    pair, prompts, batch = rollouts_of_pair
    rows = [prompts.tokens[i][prompts.mask[i]].tolist() for i in range(len(batch))]
    view = Prompts.from_ids([[7 + i, *row] for i, row in enumerate(rows)], prompts.index)
    seeing, request = replace(prompts, view=view), full_request(K, "union")
    with connected(GenerateTeacher(tiny_pair[1]), pair) as (teacher, _):
        remote = score_batch(pair.student, teacher, seeing, batch, request).scored
    local, blind = (
        score_batch(pair.student, pair.teacher, x, batch, request).scored for x in (seeing, prompts)
    )
    assert_same_scores(remote, local)
    assert (local.teacher_logp - blind.teacher_logp).abs().max() > 1e-2


def test_the_support_has_ids_that_the_teacher_does_not_rank(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], server: tuple[FakeTeacher, str]
) -> None:
    """Otherwise the tests above would pass with a server that knows its own ids only."""
    pair, prompts, batch = rollouts_of_pair
    teacher = ServerTeacher(server[1], connect_to(server[1], pair, num_chosen=K))
    scored = score_batch(pair.student, teacher, prompts, batch, full_request(K, "student")).scored
    own_ids = score_top_k(pair, prompts, batch).ids
    beyond = ~(scored.support.ids[..., None] == own_ids[..., None, :]).any(-1)
    assert beyond[batch.mask].float().mean() > 0.3


@pytest.mark.parametrize("full", [True, False])
def test_the_teacher_is_read_at_its_own_eos(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    server: tuple[FakeTeacher, str],
    full: bool,
) -> None:
    pair, prompts, batch = rollouts_of_pair
    student_eos = int(batch.tokens[batch.mask].mode().values)
    teacher_eos = int(score_top_k(pair, prompts, batch).ids[batch.mask].mode().values.mode().values)
    assert student_eos != teacher_eos
    eos_map = EosMap(student=(student_eos,), teacher=(teacher_eos,))
    request = full_request if full else lean_request
    request = request(K, eos_map=eos_map, map_eos=True)
    teacher = ServerTeacher(server[1], connect_to(server[1], pair, num_chosen=1))
    remote, local, unmapped = (
        score_batch(pair.student, scorer, prompts, batch, request).scored
        for scorer, request in (
            (teacher, request),
            (pair.teacher, request),
            (pair.teacher, replace(request, map_eos=False)),
        )
    )
    assert_same_scores(remote, local)
    assert torch.equal(present_support(remote), present_support(local))
    changed = (local.teacher_logp - unmapped.teacher_logp).abs() > 0.1
    assert torch.equal(changed & batch.mask, (batch.tokens == student_eos) & batch.mask & changed)
    assert changed.sum() > 1


def test_scores_at_the_teachers_eos_are_found_again(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], tiny_pair: tuple[Path, Path]
) -> None:
    """The check that asks a server again reads it at the mapped ids too."""
    pair, prompts, batch = rollouts_of_pair
    ends = tuple(batch.tokens[batch.mask].unique().tolist()[::2])
    teacher_eos = next(v for v in range(pair.student.vocabulary) if v not in ends)
    config = with_settings(
        Config(student="s", teacher="t", out="o"), map_eos=True, support_k=K, device="cpu"
    )
    with connected(GenerateTeacher(tiny_pair[1]), pair) as (teacher, _):
        served = replace(pair, teacher=replace(teacher, eos=(teacher_eos,)), eos=list(ends))
        assert served.eos_map is not None
        request = full_request(K, eos_map=served.eos_map, map_eos=True)
        scored = score_batch(pair.student, served.teacher, prompts, batch, request).scored
        row = rescoring_columns(config, served, prompts, scored)
        unmapped = rescoring_columns(with_settings(config, map_eos=False), served, prompts, scored)
    assert row["consistency/teacher_rescored"] == 0
    assert unmapped["consistency/teacher_rescored"] > 16


def test_one_request_a_row_and_only_for_rows_with_chosen_ids(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], tiny_pair: tuple[Path, Path]
) -> None:
    pair, prompts, batch = rollouts_of_pair
    fake = GenerateTeacher(tiny_pair[1])
    with connected(fake, pair) as (teacher, _):
        num_probes = len(fake.requests)
        tokens = batch.tokens[batch.sampled]
        chosen_ids = torch.full((len(tokens), 2), -1)
        row_of_token = batch.sampled.nonzero()[:, 0]
        (last,) = (row_of_token == 5).nonzero()[-1].tolist()
        chosen_ids[last] = torch.tensor([7, 9])
        scores = teacher.top_k(prompts, batch, 3, chosen_ids)
        requests = fake.requests[num_probes:]
        plain = score_remote(teacher.client, prompts, batch, 3)
    (generate,) = [x for x in requests if "token_ids" in x and len(x["token_ids"]) != 32]
    rows = generate["sampling_params"]["prompt_logprob_token_ids"]
    # from the first sampled position on; the token itself is asked for last
    assert len(rows) == int(batch.attention_mask[5].sum())
    assert rows[-1] == [7, 9, int(tokens[last])]
    assert all(row[:2] == [-1, -1] for row in rows[:-1] if len(row) > 1)
    assert sum(len(x["prompt"]) for x in requests if "prompt" in x) == len(batch) - 1 + 1
    assert scores.chosen_logp is not None
    assert scores.chosen_logp[last].abs().min() > 0
    assert not scores.chosen_logp[:last].any()
    torch.testing.assert_close(scores.sampled, plain.sampled, atol=2e-5, rtol=0)
    assert torch.equal(scores.ids, plain.ids)


def test_sglang_is_asked_for_the_union_of_the_ids_of_a_row(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], tiny_pair: tuple[Path, Path]
) -> None:
    pair, prompts, batch = rollouts_of_pair
    fake = SglangTeacher(tiny_pair[1])
    with connected(fake, pair) as (teacher, _):
        probes = list(fake.requests)
        score_batch(pair.student, teacher, prompts, batch, full_request(K, "student"))
        requests = fake.requests[len(probes) :]
    support = score_batch(
        pair.student, pair.teacher, prompts, batch, full_request(K, "student")
    ).scored.support
    expected = []
    for row, sampled in enumerate(batch.sampled):
        sequence = [
            *prompts.tokens[row][prompts.mask[row]].tolist(),
            *batch.tokens[row][batch.attention_mask[row]].tolist(),
        ]
        largest = batch.tokens[row][sampled].max()
        ids = np.union1d(support.ids[row][sampled].numpy(), largest.numpy()).tolist()
        expected.append((sequence, ids))
    actual = [(x["input_ids"], x["token_ids_logprob"]) for x in requests if x not in probes]
    assert sorted(actual) == sorted(expected)
    assert min(len(ids) for _, ids in actual) > K + 1  # more than one position has


def test_the_last_id_of_the_vocabulary_is_scored_although_sglang_reports_another(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], tiny_pair: tuple[Path, Path]
) -> None:
    pair, prompts, batch = rollouts_of_pair
    tokens = batch.tokens.clone()
    tokens[2, 0] = pair.student.vocabulary - 1
    batch = replace(batch, tokens=tokens)
    with connected(SglangTeacher(tiny_pair[1]), pair) as (teacher, _):
        remote = score_batch(pair.student, teacher, prompts, batch, full_request(K)).scored
    local = score_batch(pair.student, pair.teacher, prompts, batch, full_request(K)).scored
    torch.testing.assert_close(remote.teacher_logp, local.teacher_logp, atol=2e-5, rtol=0)


def test_what_a_server_can_do_is_found_out_when_it_is_connected(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], tiny_pair: tuple[Path, Path]
) -> None:
    pair, _, _ = rollouts_of_pair
    for name, route in (
        ("vllm", "/inference/v1/generate"),
        ("whole", "/v1/completions with whole distributions"),
        ("sglang", "/generate"),
    ):
        with serve(SERVERS[name](tiny_pair[1])) as url:
            plain = ServerTeacher(url, connect_to(url, pair))
            assert plain.capabilities == {Capability.TOP_K}
            chosen_teacher = ServerTeacher(url, connect_to(url, pair, num_chosen=K))
            assert chosen_teacher.capabilities == {Capability.TOP_K, Capability.CHOSEN_IDS}
            assert chosen_teacher.client.chosen_route.name == route


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"has_v2_runner": False}, ["requires the V2 model runner"]),
        ({"has_scale_out": False}, ["--enable-scale-out", "status 403"]),
        ({"max_logprobs": K}, [f"Requested {K + 1} token ids per row", f"--max-logprobs {K + 1}"]),
    ],
)
def test_a_server_that_cannot_is_refused_with_what_can(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    tiny_pair: tuple[Path, Path],
    options: dict[str, Any],
    messages: list[str],
) -> None:
    pair, _, _ = rollouts_of_pair
    with (
        serve(GenerateTeacher(tiny_pair[1], **options)) as url,
        pytest.raises(ValueError, match=r"vLLM 0\.32\.0, cannot score ids") as caught,
    ):
        connect_to(url, pair, num_chosen=K)
    vocabulary = pair.student.vocabulary
    for message in (
        *messages,
        "vLLM 0.32 or later and its model runner V2",
        "VLLM_USE_V2_MODEL_RUNNER=1",
        "SGLang",
        f"Requested prompt logprobs of {vocabulary}",
    ):
        assert message in str(caught.value)


def test_an_older_server_is_refused(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], tiny_pair: tuple[Path, Path]
) -> None:
    """One without the route, and one whose route ignores the parameter."""
    pair, _, _ = rollouts_of_pair
    with (
        serve(FakeTeacher(tiny_pair[1])) as url,
        pytest.raises(ValueError, match=r"cannot score ids that the student chose.*status 404"),
    ):
        connect_to(url, pair, num_chosen=K)
    older = GenerateTeacher(tiny_pair[1])
    newest_generate = older.generate

    def generate(payload: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        for name in ("prompt_logprob_token_ids", "prompt_logprob_start"):
            payload["sampling_params"].pop(name)
        return newest_generate(payload)

    older.routes["/inference/v1/generate"] = generate
    with (
        serve(older) as url,
        pytest.raises(ValueError, match="it has no prompt_token_id_logprobs"),
    ):
        connect_to(url, pair, num_chosen=K)


def test_whole_distributions_are_for_small_vocabularies(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    tiny_pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, _, _ = rollouts_of_pair
    assert vllm_completions.MAX_WHOLE_VOCABULARY * vllm_completions.BYTES_PER_ID <= 1 << 17
    generate, whole = server_kinds.VLLM.chosen_routes
    assert whole.max_vocabulary == vllm_completions.MAX_WHOLE_VOCABULARY
    small = replace(whole, max_vocabulary=pair.student.vocabulary - 1)
    kind = replace(server_kinds.VLLM, chosen_routes=(generate, small))
    monkeypatch.setattr(server_kinds, "VLLM", kind)
    fake = SERVERS["whole"](tiny_pair[1])
    with serve(fake) as url, pytest.raises(ValueError, match="more than the 260 up to which"):
        connect_to(url, pair, num_chosen=K)
    assert all(x.get("prompt_logprobs") != -1 for x in fake.requests)


def test_a_server_with_other_values_for_chosen_ids_is_noticed_at_the_start(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], tiny_pair: tuple[Path, Path]
) -> None:
    pair, _, _ = rollouts_of_pair
    fake, other = GenerateTeacher(tiny_pair[1]), GenerateTeacher(tiny_pair[0])
    fake.routes["/inference/v1/generate"] = other.generate
    with serve(fake) as url, pytest.raises(RuntimeError, match="other log-probabilities than"):
        connect_to(url, pair, num_chosen=K)


def test_chosen_ids_need_a_connection_for_them(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts], tiny_pair: tuple[Path, Path]
) -> None:
    pair, prompts, batch = rollouts_of_pair
    with connected(GenerateTeacher(tiny_pair[1]), pair, num_chosen=0) as (teacher, _):
        for request in (
            full_request(K, "union"),
            full_request(K, "student"),
            full_request(K, map_eos=True),
        ):
            with pytest.raises(ValueError, match="connect it with num_chosen"):
                score_batch(pair.student, teacher, prompts, batch, request)
        chosen_ids = torch.zeros((int(batch.sampled.sum()), 1), dtype=torch.long)
        with pytest.raises(ValueError, match="connect it with num_chosen"):
            teacher.top_k(prompts, batch, K, chosen_ids)


def test_another_model_is_noticed_after_a_restart(
    rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts],
    tiny_pair: tuple[Path, Path],
) -> None:
    """Even one that answers the ordinary route as before."""
    pair, prompts, batch = rollouts_of_pair
    fake, other = GenerateTeacher(tiny_pair[1]), GenerateTeacher(tiny_pair[0])
    with connected(fake, pair) as (teacher, _):
        fake.routes["/inference/v1/generate"] = other.generate
        with pytest.raises(RuntimeError, match="not the same model as at the start"):
            score_batch(pair.student, teacher, prompts, batch, full_request(K, "student"))
