"""Rollouts from fake servers: weights, order, retries, restarts, and rejected responses."""

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.models.model import CausalLM
from opd.rollouts.base import BatchSlice
from opd.rollouts.decoding import mask_until_eos
from opd.rollouts.factory import make_engine
from opd.rollouts.vllm_server_engine import VllmServerEngine, halved_weights
from opd.serving import json_endpoint
from tests.helpers.servers.rollout_server import FakeRolloutServer
from tests.helpers.servers.teacher_server import (
    delay,
    drop_connection,
    edit_answer,
    error_status,
    load_network,
    serve,
    shorten_body,
    truncate_body,
)
from tests.opd.rollouts.reference_sampling import (
    TEMPERATURE,
    TOP_P,
    assert_matches_forward_pass,
    seeded,
)

MAX_RESPONSE = 12
EOS_IDS = list(range(0, 120, 8))


@pytest.fixture(scope="module", autouse=True)
def fast_retries() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_endpoint, "FIRST_RETRY_DELAY", 0.02)
        yield


@pytest.fixture
def two(two_layer_pair: tuple[Path, Path]) -> list[FakeRolloutServer]:
    """Servers with the teacher's weights, so that the student's come only from `sync`."""
    return [FakeRolloutServer(two_layer_pair[1]) for _ in range(2)]


@pytest.fixture
def server(two: list[FakeRolloutServer]) -> FakeRolloutServer:
    return two[0]


@pytest.fixture
def urls(two: list[FakeRolloutServer]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serve(server)) for server in two]


def make_server_engine(
    model: CausalLM, urls: list[str], folder: Path, **changes: Any
) -> VllmServerEngine:
    options = {"max_length": 100, "timeout": 20.0, "concurrency": 4}
    return make_engine("servers", model, urls=urls, folder=folder, **(options | changes))  # type: ignore[return-value]


def sample_from_servers(
    engine: VllmServerEngine, prompt_rows: Prompts, seed: int = 0, **changes: Any
) -> Rollouts:
    options = {"max_response": MAX_RESPONSE, "temperature": TEMPERATURE, "top_p": 1.0}
    return engine.sample(
        prompt_rows, EOS_IDS, **(options | changes), generator=seeded(seed)
    ).validate()


def assert_same_rows(actual: Rollouts, expected: Rollouts) -> None:
    for name in ("tokens", "mask", "ended", "prompt"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.sampler_logp, expected.sampler_logp)


@pytest.fixture(scope="module")
def shared_engine(
    pair, two_layer_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[FakeRolloutServer], VllmServerEngine]]:
    """Two servers and their engine, for faults of responses, after which both go on."""
    fake_servers = [FakeRolloutServer(two_layer_pair[1]) for _ in range(2)]
    with ExitStack() as stack:
        urls = [stack.enter_context(serve(fake_server)) for fake_server in fake_servers]
        folder = tmp_path_factory.mktemp("shared")
        yield fake_servers, make_server_engine(pair.student, urls, folder)


@pytest.fixture(scope="module")
def shared_reference(shared_engine, prompts) -> Rollouts:
    """The rollouts of the shared engine without a fault."""
    return sample_from_servers(shared_engine[1], prompts)


@pytest.mark.parametrize("top_p", [1.0, TOP_P])
def test_rows_are_the_students_and_the_same_from_one_server_or_two(
    pair, prompts, two, urls, tmp_path: Path, top_p: float
) -> None:
    engine = make_server_engine(pair.student, urls, tmp_path / "two")
    num_requests = [len(fake_server.requests) for fake_server in two]
    two[0].faults = [delay(0.2)]  # the first row arrives last
    batch = sample_from_servers(engine, prompts, top_p=top_p)
    assert [
        len(fake_server.requests) - n for fake_server, n in zip(two, num_requests, strict=True)
    ] == [5, 5]
    assert two[0].max_running > 1
    assert int(batch.mask.sum()) > 60
    assert_matches_forward_pass(
        batch, pair.student.network, prompts, pair.student.vocabulary, top_p
    )
    mask, ended = mask_until_eos(batch.tokens, EOS_IDS)
    assert 0 < int(ended.sum()) < len(ended)
    assert torch.equal(batch.ended, ended)
    assert torch.equal(batch.mask[ended], mask[ended])
    assert (batch.softmax_logp is None) == (top_p < 1)
    assert batch.prompt.tolist() == prompts.index.tolist()
    assert not torch.equal(
        sample_from_servers(engine, prompts, 1, top_p=top_p).tokens, batch.tokens
    )
    same_prompt = batch.tokens.reshape(5, 2, -1)
    assert not torch.equal(same_prompt[:, 0], same_prompt[:, 1]), (
        "rows of one prompt have the same seed"
    )
    engine.close()
    assert not list((tmp_path / "two").iterdir())

    single_server_engine = make_server_engine(pair.student, urls[1:], tmp_path / "one")
    assert_same_rows(sample_from_servers(single_server_engine, prompts, top_p=top_p), batch)
    rows = [7, 2, 9]
    slice_rollouts = single_server_engine.sample(
        prompts.rows(rows),
        EOS_IDS,
        max_response=MAX_RESPONSE,
        temperature=TEMPERATURE,
        top_p=top_p,
        generator=seeded(0),
        batch_slice=BatchSlice(rows, len(prompts)),
    )
    width = slice_rollouts.tokens.shape[1]
    assert torch.equal(slice_rollouts.tokens, batch.tokens[rows][:, :width])


def test_ids_beyond_the_vocabulary_are_never_drawn(pair, prompts, urls, tmp_path: Path) -> None:
    small = replace(pair.student, vocabulary=60)
    batch = sample_from_servers(make_server_engine(small, urls, tmp_path), prompts)
    assert int(batch.tokens.max()) < 60
    assert_matches_forward_pass(batch, small.network, prompts, 60, 1.0)


def test_a_synchronised_server_samples_from_the_new_weights(
    pair, prompts, two, urls, tmp_path: Path
) -> None:
    network = copy.deepcopy(pair.student.network)
    model = replace(pair.student, network=network)
    engine = make_server_engine(model, urls, tmp_path)
    with torch.no_grad():
        for i, x in enumerate(network.parameters()):
            x += 0.03 * torch.randn(x.shape, generator=seeded(i))
    engine.sync(model)
    assert_matches_forward_pass(
        sample_from_servers(engine, prompts), network, prompts, model.vocabulary, 1.0
    )
    assert [x.name for x in tmp_path.iterdir()] == ["weights_3"]
    assert (
        two[0].loaded_folders
        == two[1].loaded_folders
        == [f"{tmp_path}/weights_{i}" for i in (1, 2, 3)]
    )


def test_halving_is_undone_to_the_bit_even_by_an_error(pair) -> None:
    network = pair.student.network
    initial_weights = {name: x.clone() for name, x in network.state_dict().items()}

    def failing() -> None:
        with halved_weights(network):
            assert torch.equal(network.lm_head.weight, initial_weights["lm_head.weight"] / 2)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert all(torch.equal(x, initial_weights[name]) for name, x in network.state_dict().items())


@pytest.mark.parametrize(
    "fault", [error_status(503), error_status(500), drop_connection, truncate_body, shorten_body]
)
def test_answers_that_fail_are_asked_for_again(
    prompts, shared_engine, shared_reference: Rollouts, fault
) -> None:
    fake_servers, engine = shared_engine
    for fake_server in fake_servers:
        fake_server.faults = [lambda body: (200, {}, body), fault, fault]
    assert_same_rows(sample_from_servers(engine, prompts), shared_reference)
    assert not any(fake_server.faults for fake_server in fake_servers)


def with_choice_field(name: str, value: Any) -> Any:
    return edit_answer(lambda answer: answer["choices"][0].update({name: value}))


def remove_last_token(answer: dict[str, Any]) -> None:
    choice = answer["choices"][0]
    for values in (choice["token_ids"], *choice["logprobs"].values()):
        values.pop()


def with_first_logp(value: Any) -> Any:
    return edit_answer(
        lambda answer: answer["choices"][0]["logprobs"]["token_logprobs"].__setitem__(0, value)
    )


def rename_first_token(answer: dict[str, Any]) -> None:
    answer["choices"][0]["logprobs"]["tokens"][0] = "token_id:258"


INVALID_ANSWERS = {
    "no ids": (with_choice_field("token_ids", None), "its response lacks token_ids, which vLLM"),
    "no logprobs": (with_choice_field("logprobs", None), "its response lacks logprobs, which vLLM"),
    "another prompt": (
        with_choice_field("prompt_token_ids", [1, 2]),
        "differ from the ids that were sent",
    ),
    "cut before its end": (edit_answer(remove_last_token), "ids ending with"),
    "other tokens": (edit_answer(rename_first_token), "log-probabilities that do not belong to"),
    "not a number": (with_first_logp(float("nan")), "has the log-probability nan"),
    "impossible": (with_first_logp(-9999.0), "has the log-probability -9999"),
    "beyond 1": (with_first_logp(0.5), "has the log-probability 0.5"),
    "text": (with_first_logp("0"), "has the log-probability '0'"),
    "false": (with_first_logp(False), "has the log-probability False"),
    "beyond floats": (with_first_logp(-(10**400)), "has the log-probability -1000"),
    "another model": (
        edit_answer(lambda answer: answer.update(model="other")),
        "it is of model 'other'",
    ),
    "nothing": (edit_answer(lambda answer: answer.pop("choices")), "lacks 'choices'"),
    "two": (
        edit_answer(lambda answer: answer.update(choices=answer["choices"] * 2)),
        "rows [0, 0], requested were 1 rows",
    ),
}


@pytest.mark.parametrize(("fault", "message"), INVALID_ANSWERS.values(), ids=INVALID_ANSWERS)
def test_an_answer_that_is_not_one_to_the_question_is_an_error(
    prompts, shared_engine, fault, message: str
) -> None:
    """One row for each server, so that no request is left to take the fault of another case."""
    (server, _), engine = shared_engine
    server.faults = [fault]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        engine.sample(
            prompts.rows([0, 1]),
            [260],
            max_response=MAX_RESPONSE,
            temperature=1.0,
            top_p=1.0,
            generator=seeded(0),
        )
    assert f"{engine.servers[0].url} (row 0 of 1)" in str(caught.value)


def test_an_end_of_the_models_own_is_refused(pair, prompts, server, urls, tmp_path: Path) -> None:
    """The server's generation settings stop at other ids."""
    engine = make_server_engine(pair.student, urls, tmp_path)
    honest = server.completions

    def earlier(question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return honest(question | {"stop_token_ids": list(range(200))})

    server.completions = earlier  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"up to the first of \[0, 8.*--generation-config vllm"):
        sample_from_servers(engine, prompts)


# --- wrong weights ------------------------------------------------------------------------------


def restart_after_answer(server: FakeRolloutServer) -> Any:
    """A fault that responds normally and then restarts the server with its initial weights."""

    def fault(body: bytes) -> tuple[int, dict[str, str], bytes]:
        server.restart()
        return 200, {}, body

    return fault


def test_a_restart_is_noticed_and_nothing_of_the_old_weights_is_taken(
    pair, prompts, two, urls, tmp_path: Path
) -> None:
    engine = make_server_engine(pair.student, urls, tmp_path)
    reference = sample_from_servers(engine, prompts)
    two[1].faults = [lambda body: (200, {}, body), restart_after_answer(two[1])]
    assert_same_rows(sample_from_servers(engine, prompts), reference)
    assert [len(fake_server.loaded_folders) for fake_server in two] == [2, 3]
    assert two[1].loaded_folders[-1] == two[1].loaded_folders[-2]
    two[0].restart()  # between two batches
    assert_same_rows(sample_from_servers(engine, prompts), reference)
    assert [len(fake_server.loaded_folders) for fake_server in two] == [3, 3]
    two[0].restart()  # before a synchronisation
    engine.sync(pair.student)
    assert_same_rows(sample_from_servers(engine, prompts), reference)


def test_a_restart_while_weights_are_loaded_is_noticed(
    pair, prompts, server, urls, tmp_path: Path
) -> None:
    """Only the name of the weights reveals it: the initial weights are the student's."""
    engine = make_server_engine(pair.student, urls, tmp_path)
    honest, count = server.reload, len(server.loaded_folders)

    def once(path: str) -> tuple[int, dict[str, Any]]:
        answer = honest(path)
        if len(server.loaded_folders) == count + 1:
            network = server.network
            server.restart()
            server.network = server.cached_network = network
        return answer

    server.reload = once  # type: ignore[method-assign]
    engine.sync(pair.student)
    assert len(server.loaded_folders) == count + 2
    assert server.weights_name != "default"


def test_a_server_that_never_stays_up_is_an_error(
    pair, prompts, server, urls, tmp_path: Path
) -> None:
    engine = make_server_engine(pair.student, urls, tmp_path)
    honest = server.completions

    def dying(question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = honest(question)
        if question["max_tokens"] > 1:
            server.restart()
        return answer

    server.completions = dying  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="restarted 4 times during one batch"):
        sample_from_servers(engine, prompts)


def test_two_runs_do_not_share_a_server(pair, prompts, urls, tmp_path: Path) -> None:
    engine = make_server_engine(pair.student, urls, tmp_path / "one")
    make_server_engine(pair.student, urls[1:], tmp_path / "other")
    with pytest.raises(RuntimeError, match="another run loads weights into it"):
        sample_from_servers(engine, prompts)


def test_a_tied_head_left_stale_is_refused_though_the_student_has_not_moved(
    pair, two_layer_pair, server, urls, tmp_path: Path
) -> None:
    server.first_network, server.keeps_old_head = load_network(two_layer_pair[0]), True
    server.restart()  # has the student's weights: only halved ones differ
    with pytest.raises(RuntimeError, match="does not have the student's weights") as caught:
        make_server_engine(pair.student, urls[:1], tmp_path)
    assert urls[0] in str(caught.value)
    assert "--hf-overrides '{\"tie_word_embeddings\": false}'" in str(caught.value)


def test_weights_that_did_not_arrive_are_refused(pair, server, urls, tmp_path: Path) -> None:
    engine = make_server_engine(pair.student, urls, tmp_path)
    server.reload = lambda path: (200, {"results": [None]})  # type: ignore[method-assign]
    changed_network = copy.deepcopy(pair.student.network)
    next(changed_network.parameters()).data.mul_(1.2)
    with pytest.raises(RuntimeError, match=rf"{urls[0]} does not have"):
        engine.sync(replace(pair.student, network=changed_network))


def test_a_cache_of_old_weights_is_refused(pair, server, urls, tmp_path: Path) -> None:
    server.resets_cache = False
    with pytest.raises(RuntimeError, match="of another distribution than it samples from"):
        make_server_engine(pair.student, urls, tmp_path)


def test_log_probabilities_before_temperature_are_refused(
    pair, server, urls, tmp_path: Path
) -> None:
    server.raw_logprobs = True
    with pytest.raises(RuntimeError, match="--logprobs-mode processed_logprobs"):
        make_server_engine(pair.student, urls, tmp_path)


def test_a_busy_cache_is_waited_for(pair, prompts, server, urls, tmp_path: Path) -> None:
    engine = make_server_engine(pair.student, urls, tmp_path)
    server.busy_requests = 2
    engine.sync(pair.student)
    assert server.busy_requests == -1
    sample_from_servers(engine, prompts)


def test_servers_that_cannot_take_weights_are_refused_at_once(
    pair, server, urls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.dev_mode = False
    with pytest.raises(ValueError, match="VLLM_SERVER_DEV_MODE=1"):
        make_server_engine(pair.student, urls, tmp_path, timeout=600.0)
    server.dev_mode = True
    server.reload = lambda path: (500, {"error": {"message": "no such folder"}})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"no such folder.*weights_folder"):
        make_server_engine(pair.student, urls, tmp_path, timeout=600.0)


def test_lengths_and_addresses_are_refused(pair, prompts, urls, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max-model-len 300"):
        make_server_engine(pair.student, urls, tmp_path, max_length=300)
    with pytest.raises(ValueError, match="each only once"):
        make_server_engine(pair.student, urls[:1] * 2, tmp_path)
    with pytest.raises(ValueError, match="at least one address"):
        make_server_engine(pair.student, [], tmp_path)
    engine = make_server_engine(pair.student, urls, tmp_path)
    with pytest.raises(ValueError, match=r"supports at most 256 tokens"):
        sample_from_servers(engine, prompts, max_response=256)


def test_a_server_that_stays_away_is_named_with_its_own_settings(
    pair, prompts, two, urls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPDLAB_ROLLOUT_KEY", "hush-hush")
    engine = make_server_engine(pair.student, urls, tmp_path, timeout=1.0)
    assert set(two[0].keys) == {"Bearer hush-hush"}
    two[0].faults = [drop_connection] * 1000
    with pytest.raises(RuntimeError, match="set by rollout_timeout, 1 s"):
        sample_from_servers(engine, prompts)
    two[0].faults = []
    sample_from_servers(engine, prompts)
