"""Rollouts from servers: the student's own, in order, through faults; other weights never pass."""

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
from opd.rollouts.factory import make_engine
from opd.rollouts.hf_engine import until_end
from opd.rollouts.vllm_server_engine import VllmServerEngine, halved
from opd.serving import json_endpoint
from tests.helpers.fake_rollout_server import SamplingServer
from tests.helpers.fake_teacher_server import changed, cut, dropped, serving, short, slow, status
from tests.opd.rollouts.test_hf_engine import (
    TEMPERATURE,
    TOP_P,
    agrees_with_a_forward_pass,
    pair,
    prompts,
    seeded,
)

__all__ = ["pair", "prompts"]  # fixtures
LENGTH = 12
END = list(range(0, 120, 8))


@pytest.fixture
def two(tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> list[SamplingServer]:
    """Servers that hold the teacher, so that a student comes from synchronising alone."""
    monkeypatch.setattr(json_endpoint, "FIRST_WAIT", 0.02)
    return [SamplingServer(tiny_pair[1]) for _ in range(2)]


@pytest.fixture
def server(two: list[SamplingServer]) -> SamplingServer:
    return two[0]


@pytest.fixture
def urls(two: list[SamplingServer]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(one)) for one in two]


def made(model: CausalLM, urls: list[str], folder: Path, **changes: Any) -> VllmServerEngine:
    how = {"max_length": 100, "patience": 20.0, "in_flight": 4}
    return make_engine("servers", model, urls=urls, folder=folder, **(how | changes))  # type: ignore[return-value]


def rolled(engine: VllmServerEngine, some: Prompts, seed: int = 0, **changes: Any) -> Rollouts:
    how = {"max_response": LENGTH, "temperature": TEMPERATURE, "top_p": 1.0}
    return engine.sample(some, END, **(how | changes), generator=seeded(seed)).checked()


def equal(one: Rollouts, other: Rollouts) -> None:
    for name in ("tokens", "mask", "ended", "prompt"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.sampler_logp, other.sampler_logp)


@pytest.mark.parametrize("top_p", [1.0, TOP_P])
def test_rows_are_the_students_and_the_same_from_one_server_or_two(
    pair, prompts, two, urls, tmp_path: Path, top_p: float
) -> None:
    engine = made(pair.student, urls, tmp_path / "two")
    before = [len(one.asked) for one in two]
    two[0].faults = [slow(0.2)]  # the first row comes last
    batch = rolled(engine, prompts, top_p=top_p)
    assert [len(one.asked) - n for one, n in zip(two, before, strict=True)] == [5, 5]
    assert two[0].most_at_once > 1
    assert int(batch.mask.sum()) > 60
    agrees_with_a_forward_pass(batch, pair.student.network, prompts, pair.student.vocabulary, top_p)
    mask, ended = until_end(batch.tokens, END)
    assert 0 < int(ended.sum()) < len(ended)
    assert torch.equal(batch.ended, ended)
    assert torch.equal(batch.mask[ended], mask[ended])
    assert (batch.softmax_logp is None) == (top_p < 1)
    assert batch.prompt.tolist() == prompts.index.tolist()
    assert not torch.equal(rolled(engine, prompts, 1, top_p=top_p).tokens, batch.tokens)
    same_prompt = batch.tokens.reshape(5, 2, -1)
    assert not torch.equal(same_prompt[:, 0], same_prompt[:, 1]), "rows share a seed"
    engine.close()
    assert not list((tmp_path / "two").iterdir())

    alone = made(pair.student, urls[1:], tmp_path / "one")
    equal(rolled(alone, prompts, top_p=top_p), batch)
    some = [7, 2, 9]
    part = alone.sample(
        prompts.rows(some),
        END,
        max_response=LENGTH,
        temperature=TEMPERATURE,
        top_p=top_p,
        generator=seeded(0),
        share=BatchSlice(some, len(prompts)),
    )
    width = part.tokens.shape[1]
    assert torch.equal(part.tokens, batch.tokens[some][:, :width])


def test_ids_beyond_the_vocabulary_are_never_drawn(pair, prompts, urls, tmp_path: Path) -> None:
    small = replace(pair.student, vocabulary=60)
    batch = rolled(made(small, urls, tmp_path), prompts)
    assert int(batch.tokens.max()) < 60
    agrees_with_a_forward_pass(batch, small.network, prompts, 60, 1.0)


def test_a_synchronised_server_samples_from_the_new_weights(
    pair, prompts, two, urls, tmp_path: Path
) -> None:
    network = copy.deepcopy(pair.student.network)
    model = replace(pair.student, network=network)
    engine = made(model, urls, tmp_path)
    with torch.no_grad():
        for i, x in enumerate(network.parameters()):
            x += 0.03 * torch.randn(x.shape, generator=seeded(i))
    engine.sync(model)
    agrees_with_a_forward_pass(rolled(engine, prompts), network, prompts, model.vocabulary, 1.0)
    assert [x.name for x in tmp_path.iterdir()] == ["weights_3"]
    assert two[0].loads == two[1].loads == [f"{tmp_path}/weights_{i}" for i in (1, 2, 3)]


def test_halving_is_undone_to_the_bit_even_by_an_error(pair) -> None:
    network = pair.student.network
    before = {name: x.clone() for name, x in network.state_dict().items()}

    def failing() -> None:
        with halved(network):
            assert torch.equal(network.lm_head.weight, before["lm_head.weight"] / 2)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


@pytest.mark.parametrize("fault", [status(503), status(500), dropped, cut, short])
def test_answers_that_fail_are_asked_for_again(
    pair, prompts, two, urls, tmp_path: Path, fault
) -> None:
    engine = made(pair.student, urls, tmp_path)
    plain = rolled(engine, prompts)
    for one in two:
        one.faults = [lambda body: (200, {}, body), fault, fault]
    equal(rolled(engine, prompts), plain)


def other(name: str, value: Any) -> Any:
    return changed(lambda answer: answer["choices"][0].update({name: value}))


def shorter(answer: dict[str, Any]) -> None:
    choice = answer["choices"][0]
    for of in (choice["token_ids"], *choice["logprobs"].values()):
        of.pop()


def logp(value: Any) -> Any:
    return changed(
        lambda answer: answer["choices"][0]["logprobs"]["token_logprobs"].__setitem__(0, value)
    )


def misread(answer: dict[str, Any]) -> None:
    answer["choices"][0]["logprobs"]["tokens"][0] = "token_id:258"


WRONG = {
    "no ids": (other("token_ids", None), "no token ids"),
    "no logprobs": (other("logprobs", None), "no token ids or log-probabilities"),
    "another prompt": (other("prompt_token_ids", [1, 2]), "not those that were sent"),
    "cut before its end": (changed(shorter), "ids that end with"),
    "other tokens": (changed(misread), "log-probabilities of other tokens"),
    "not a number": (logp(float("nan")), "has the log-probability nan"),
    "impossible": (logp(-9999.0), "has the log-probability -9999"),
    "beyond 1": (logp(0.5), "has the log-probability 0.5"),
    "text": (logp("0"), "has the log-probability '0'"),
    "false": (logp(False), "has the log-probability False"),
    "beyond floats": (logp(-(10**400)), "has the log-probability -1000"),
    "another model": (changed(lambda answer: answer.update(model="other")), "'other' answers"),
    "nothing": (changed(lambda answer: answer.pop("choices")), "lacks 'choices'"),
    "two": (changed(lambda answer: answer.update(choices=answer["choices"] * 2)), "unpack"),
}


@pytest.mark.parametrize(("fault", "message"), WRONG.values(), ids=WRONG)
def test_an_answer_that_is_not_one_to_the_question_is_an_error(
    pair, prompts, server, urls, tmp_path: Path, fault, message: str
) -> None:
    engine = made(pair.student, urls, tmp_path)
    server.faults = [fault]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        engine.sample(
            prompts,
            [260],
            max_response=LENGTH,
            temperature=1.0,
            top_p=1.0,
            generator=seeded(0),
        )
    assert f"{urls[0]} (row " in str(caught.value)


def test_an_end_of_the_models_own_is_refused(pair, prompts, server, urls, tmp_path: Path) -> None:
    """A server whose generation settings stop at other ids than ours."""
    engine = made(pair.student, urls, tmp_path)
    honest = server.completions

    def earlier(question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return honest(question | {"stop_token_ids": list(range(200))})

    server.completions = earlier  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"up to the first of \[0, 8.*--generation-config vllm"):
        rolled(engine, prompts)


# --- other weights ------------------------------------------------------------------------------


def restarting(server: SamplingServer) -> Any:
    """The answer is given, and then the server is another process, with its first weights."""

    def fault(body: bytes) -> tuple[int, dict[str, str], bytes]:
        server.restart()
        return 200, {}, body

    return fault


def test_a_restart_is_noticed_and_nothing_of_the_old_weights_is_taken(
    pair, prompts, two, urls, tmp_path: Path
) -> None:
    engine = made(pair.student, urls, tmp_path)
    plain = rolled(engine, prompts)
    two[1].faults = [lambda body: (200, {}, body), restarting(two[1])]
    equal(rolled(engine, prompts), plain)
    assert [len(one.loads) for one in two] == [2, 3]
    assert two[1].loads[-1] == two[1].loads[-2]
    two[0].restart()  # between two batches
    equal(rolled(engine, prompts), plain)
    assert [len(one.loads) for one in two] == [3, 3]
    two[0].restart()  # before a synchronisation
    engine.sync(pair.student)
    equal(rolled(engine, prompts), plain)


def test_a_restart_while_weights_are_loaded_is_noticed(
    pair, prompts, server, urls, tmp_path: Path
) -> None:
    """By the name alone: the weights it starts with are the student's, as at the first step."""
    engine = made(pair.student, urls, tmp_path)
    honest, count = server.reload, len(server.loads)

    def once(path: str) -> tuple[int, dict[str, Any]]:
        answer = honest(path)
        if len(server.loads) == count + 1:
            network = server.network
            server.restart()
            server.network = server.cached = network
        return answer

    server.reload = once  # type: ignore[method-assign]
    engine.sync(pair.student)
    assert len(server.loads) == count + 2
    assert server.version != "default"


def test_a_server_that_never_stays_up_is_an_error(
    pair, prompts, server, urls, tmp_path: Path
) -> None:
    engine = made(pair.student, urls, tmp_path)
    honest = server.completions

    def dying(question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = honest(question)
        if question["max_tokens"] > 1:
            server.restart()
        return answer

    server.completions = dying  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="restarted 4 times during one batch"):
        rolled(engine, prompts)


def test_two_runs_do_not_share_a_server(pair, prompts, urls, tmp_path: Path) -> None:
    one = made(pair.student, urls, tmp_path / "one")
    made(pair.student, urls[1:], tmp_path / "other")
    with pytest.raises(RuntimeError, match="another run loads weights into it"):
        rolled(one, prompts)


def test_a_tied_head_left_stale_is_refused_though_the_student_has_not_moved(
    pair, tiny_pair, server, urls, tmp_path: Path
) -> None:
    server.folder, server.tied = tiny_pair[0], True
    server.restart()  # holds the student already: only halved weights tell that its head stays
    with pytest.raises(RuntimeError, match="did not become the student") as caught:
        made(pair.student, urls[:1], tmp_path)
    assert urls[0] in str(caught.value)
    assert "--hf-overrides '{\"tie_word_embeddings\": false}'" in str(caught.value)


def test_weights_that_did_not_arrive_are_refused(pair, server, urls, tmp_path: Path) -> None:
    engine = made(pair.student, urls, tmp_path)
    server.reload = lambda path: (200, {"results": [None]})  # type: ignore[method-assign]
    moved = copy.deepcopy(pair.student.network)
    next(moved.parameters()).data.mul_(1.2)
    with pytest.raises(RuntimeError, match=rf"{urls[0]} did not become"):
        engine.sync(replace(pair.student, network=moved))


def test_a_cache_of_old_weights_is_refused(pair, server, urls, tmp_path: Path) -> None:
    server.forgets = False
    with pytest.raises(RuntimeError, match="than those of the distribution that it draws from"):
        made(pair.student, urls, tmp_path)


def test_log_probabilities_before_temperature_are_refused(
    pair, server, urls, tmp_path: Path
) -> None:
    server.raw = True
    with pytest.raises(RuntimeError, match="--logprobs-mode processed_logprobs"):
        made(pair.student, urls, tmp_path)


def test_a_busy_cache_is_waited_for(pair, prompts, server, urls, tmp_path: Path) -> None:
    engine = made(pair.student, urls, tmp_path)
    server.busy = 2
    engine.sync(pair.student)
    assert server.busy == -1
    rolled(engine, prompts)


def test_servers_that_cannot_take_weights_are_refused_at_once(
    pair, server, urls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.obeys = False
    with pytest.raises(ValueError, match="VLLM_SERVER_DEV_MODE=1"):
        made(pair.student, urls, tmp_path, patience=600.0)
    server.obeys = True
    server.reload = lambda path: (500, {"error": {"message": "no such folder"}})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"no such folder.*weights_folder"):
        made(pair.student, urls, tmp_path, patience=600.0)


def test_lengths_and_addresses_are_refused(pair, prompts, urls, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max-model-len 300"):
        made(pair.student, urls, tmp_path, max_length=300)
    with pytest.raises(ValueError, match="each once"):
        made(pair.student, urls[:1] * 2, tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        made(pair.student, [], tmp_path)
    engine = made(pair.student, urls, tmp_path)
    with pytest.raises(ValueError, match=r"has room for 256 ids"):
        rolled(engine, prompts, max_response=256)


def test_a_server_that_stays_away_is_named_with_its_own_settings(
    pair, prompts, two, urls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPDLAB_ROLLOUT_KEY", "hush-hush")
    engine = made(pair.student, urls, tmp_path, patience=1.0)
    assert set(two[0].keys) == {"Bearer hush-hush"}
    two[0].faults = [dropped] * 1000
    with pytest.raises(RuntimeError, match="rollout_timeout, 1 s"):
        rolled(engine, prompts)
    two[0].faults = []
    rolled(engine, prompts)
