"""Faults of servers that score chosen ids: each wrong answer names the row and the position."""

import base64
import io
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.serving import json_endpoint
from opd.serving.position_logprobs import PositionLogprobs, ScoreQuery, check_chosen
from opd.serving.vllm_generate import check_top_k, generate_payload
from opd.teachers.client import TeacherClient
from opd.teachers.pair import ModelPair
from opd.teachers.remote_scores import TeacherScores, score_remote
from tests.helpers.servers.chosen_ids import (
    GenerateTeacher,
    SglangTeacher,
    decode_array,
    encode_array,
)
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
from tests.opd.teachers.test_client import K, connect_to, rollouts_of_pair

__all__ = ["rollouts_of_pair"]  # a fixture
Setting = tuple[FakeTeacher, str, TeacherClient, Prompts, Rollouts, torch.Tensor]
KINDS: dict[str, Callable[[Path], FakeTeacher]] = {
    "vllm": GenerateTeacher,
    "sglang": SglangTeacher,
    "whole": lambda folder: GenerateTeacher(folder, max_logprobs=-1, has_v2_runner=False),
}


@contextmanager
def connected(
    kind: str, folder: Path, case: tuple[ModelPair, Prompts, Rollouts], **changes: Any
) -> Iterator[Setting]:
    """A server, a client, and ids that contain the sampled token at every other position."""
    pair, prompts, batch = case
    tokens = batch.tokens[batch.sampled]
    shifts = torch.arange(K) + (torch.arange(len(tokens)) % 2)[:, None]
    chosen_ids = (tokens[:, None] + 7 * shifts) % pair.student.vocabulary
    fake = KINDS[kind](folder)
    with serve(fake) as url:
        client = connect_to(url, pair, num_chosen=K, **changes)
        yield fake, url, client, prompts, batch, chosen_ids


@pytest.fixture(scope="module")
def servers(
    tiny_pair: tuple[Path, Path], rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts]
) -> Iterator[Callable[[str], Setting]]:
    """Connected servers of the kinds, made when they are first asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_endpoint, "FIRST_RETRY_DELAY", 0.02)
        patch.delenv(json_endpoint.KEY_VARIABLE, raising=False)
        settings: dict[str, Any] = {}

        def setting(kind: str) -> Setting:
            if kind not in settings:
                context = connected(kind, tiny_pair[1], rollouts_of_pair)
                settings[kind] = (context, context.__enter__())
            return settings[kind][1]

        yield setting
        for context, _ in settings.values():
            context.__exit__(None, None, None)


def score(setting: Setting, k: int) -> TeacherScores:
    _, _, client, prompts, batch, chosen_ids = setting
    return score_remote(client, prompts, batch, k, chosen_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_faults_that_pass_change_nothing(servers: Callable[[str], Setting], kind: str) -> None:
    setting = servers(kind)
    clean = score(setting, K)
    setting[0].faults = [error_status(500), drop_connection, truncate_body, shorten_body]
    scores = score(setting, K)
    assert not setting[0].faults
    for name in ("ids", "logp", "sampled", "chosen_logp"):
        assert torch.equal(getattr(scores, name), getattr(clean, name))


def test_requests_in_flight_are_as_many_as_allowed(
    tiny_pair: tuple[Path, Path], rollouts_of_pair: tuple[ModelPair, Prompts, Rollouts]
) -> None:
    with connected("vllm", tiny_pair[1], rollouts_of_pair, concurrency=2) as setting:
        setting[0].faults = [delay(0.15)] * 3
        score(setting, 0)
        assert setting[0].max_running == 2


def edit_scores(change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Any]], None]:
    """Change vLLM's array in place, or replace it by what `change` returns."""

    def edit(answer: dict[str, Any]) -> None:
        scores = decode_array(answer["prompt_token_id_logprobs"])
        replacement = change(scores)
        scores = scores if replacement is None else replacement
        answer["prompt_token_id_logprobs"] = encode_array(scores)

    return edit


def set_last(value: float) -> Callable[[np.ndarray], None]:
    def change(scores: np.ndarray) -> None:
        scores[-1, 1] = value

    return change


def set_field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(answer: dict[str, Any]) -> None:
        answer[name] = value

    return edit


def object_array() -> str:
    """A NumPy file whose content would be unpickled."""
    with io.BytesIO() as buffer:
        np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
        return base64.b64encode(buffer.getvalue()).decode()


def to_float64(scores: np.ndarray) -> np.ndarray:
    return scores.astype(np.float64)


def zero_all(scores: np.ndarray) -> np.ndarray:
    return np.zeros_like(scores)


POSITION = r"position \d+: "
VLLM_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "fewer ids": (edit_scores(lambda x: x[:, :-1]), "ids or positions are missing"),
    "more ids": (edit_scores(lambda x: np.c_[x, x]), "ids or positions are missing or too many"),
    "fewer positions": (edit_scores(lambda x: x[1:]), "ids or positions are missing"),
    "nan": (edit_scores(set_last(math.nan)), POSITION + "not a number"),
    "minus infinity": (edit_scores(set_last(-math.inf)), POSITION + "a probability of 0"),
    "sentinel": (edit_scores(set_last(-9999.0)), POSITION + "a probability of 0"),
    "logits": (edit_scores(set_last(2.5)), POSITION + "probabilities sum to more than 1"),
    "mass beyond 1": (edit_scores(zero_all), POSITION + "probabilities sum to more than 1"),
    "other order of ids": (
        edit_scores(lambda x: x[:, [*range(1, K), 0, K]]),
        POSITION + r"the id \d+ has the two log-probabilities",
    ),
    "other positions": (
        edit_scores(lambda x: np.roll(x, 1, 0)),
        POSITION + "(ids that are both|the id .* two log|not a number|a probability of 0)",
    ),
    "doubles": (edit_scores(to_float64), "its scores are float64"),
    "no field": (set_field("prompt_token_id_logprobs", None), "no prompt_token_id_logprobs"),
    "no base64": (set_field("prompt_token_id_logprobs", "§"), "not a NumPy array in base64"),
    "no array": (set_field("prompt_token_id_logprobs", "AAAA"), "not a NumPy array in base64"),
    "a pickle": (set_field("prompt_token_id_logprobs", object_array()), "not a NumPy array"),
    "bare pickle": (
        set_field("prompt_token_id_logprobs", base64.b64encode(pickle.dumps(print)).decode()),
        "not a NumPy array in base64",
    ),
    "other model": (set_field("model", "other"), "it is of model 'other'"),
    "other sequence": (set_field("prompt_token_ids", [1, 2]), "differ from the ids"),
    "no top-K": (set_field("prompt_logprobs", None), "no prompt_logprobs"),
}


@pytest.mark.parametrize(("edit", "message"), VLLM_FAULTS.values(), ids=VLLM_FAULTS)
def test_wrong_scores_of_vllm_name_the_row(
    servers: Callable[[str], Setting], edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    assert_refused(servers("vllm"), edit, message)


def assert_refused(setting: Setting, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    """One row, so that no request is left that takes the fault of the next test."""
    fake, url, client, prompts, batch, chosen_ids = setting
    row_of_token = batch.sampled.nonzero()[:, 0]
    fake.faults = [edit_answer(edit)]
    with pytest.raises(ValueError, match=message) as caught:
        score_remote(client, prompts.rows([3]), batch.rows([3]), K, chosen_ids[row_of_token == 3])
    assert "rows 0 of 1" in str(caught.value)
    assert url.removesuffix("/v1") in str(caught.value)


def in_last_entries(
    name: str, change: Callable[[list[Any]], Any]
) -> Callable[[dict[str, Any]], None]:
    """Change the entries of the last position of one of SGLang's lists."""
    return lambda answer: change(answer["meta_info"][name][-1])


def in_list(name: str, change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda answer: change(answer["meta_info"][name])


def set_logp(value: Any) -> Callable[[list[Any]], None]:
    def change(entries: list[Any]) -> None:
        entries[1][0] = value

    return change


def repeat_id(entries: list[Any]) -> None:
    entries[1] = entries[0]


def rename_id(entries: list[Any]) -> None:
    entries[-1][1] = entries[-1][1] + 1 if entries[-1][1] < 259 else 1


def shift_values(entries: list[Any]) -> None:
    values = [entry[0] for entry in entries]
    for entry, value in zip(entries, [*values[1:], values[0]], strict=True):
        entry[0] = value


CHOSEN, TOKENS, TOP = "input_token_ids_logprobs", "input_token_logprobs", "input_top_logprobs"
SGLANG_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "fewer ids": (in_last_entries(CHOSEN, list.pop), POSITION + r"\d+ chosen ids instead of \d+"),
    "repeated id": (in_last_entries(CHOSEN, repeat_id), POSITION + "an id is repeated"),
    "other id": (in_last_entries(CHOSEN, rename_id), POSITION + ".*has no log-probability"),
    "other order": (in_last_entries(CHOSEN, list.reverse), POSITION + "the chosen ids are"),
    "nothing at a position": (
        lambda answer: answer["meta_info"][CHOSEN].__setitem__(-1, None),
        POSITION + "None, expected a list",
    ),
    "null": (in_last_entries(CHOSEN, set_logp(None)), r"position \d+, id \d+: None is not a"),
    "fewer positions": (in_list(CHOSEN, list.pop), "expected a list of"),
    "fewer tokens": (in_list(TOKENS, list.pop), "expected a list of"),
    "fewer most probable": (in_last_entries(TOP, list.pop), POSITION + f"4 entries, expected {K}"),
    "logits": (in_last_entries(TOP, set_logp(3.0)), POSITION + "probabilities sum to more"),
    "top nan": (in_last_entries(TOP, set_logp(math.nan)), POSITION + "not a number"),
    "top sentinel": (in_last_entries(TOP, set_logp(-9999.0)), POSITION + "a probability of 0"),
    "beyond the vocabulary": (
        lambda answer: answer["meta_info"][TOP][-1][0].__setitem__(1, 999),
        "contains the id 999",
    ),
    "other row": (
        in_list(TOKENS, lambda entries: [x.__setitem__(1, 0) for x in entries[1:]]),
        POSITION + r"the input token is 0, but \d+ was sent",
    ),
    "truncated": (
        lambda answer: answer["meta_info"].__setitem__("prompt_tokens", 3),
        "it is of 3 tokens.*--context-length",
    ),
    "no meta_info": (lambda answer: answer.pop("meta_info"), "it has no meta_info.*SGLang"),
    "values in another order": (
        lambda answer: [shift_values(x) for x in answer["meta_info"][CHOSEN] if x],
        POSITION + "(the id .* two log|probabilities sum)",
    ),
}


@pytest.mark.parametrize(("edit", "message"), SGLANG_FAULTS.values(), ids=SGLANG_FAULTS)
def test_wrong_scores_of_sglang_name_the_row(
    servers: Callable[[str], Setting], edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    assert_refused(servers("sglang"), edit, message)


@pytest.mark.parametrize("value", [math.nan, -math.inf, -9999.0, 2.5])
def test_values_that_are_no_log_probabilities_are_noticed_at_any_chosen_id(value: float) -> None:
    ids = np.array([[3, -1], [4, 5]])
    query = ScoreQuery([1, 2, 0], [1, 2], 0, ids)
    values, sampled = np.array([[-1.0, value], [-2.0, -3.0]]), np.array([-1.5, -2.5])
    assert check_chosen(query, values, sampled).tolist() == [[-1.0, 0.0], [-2.0, -3.0]]  # padding
    values = np.array([[-1.0, -1.0], [-2.0, value]])
    with pytest.raises(ValueError, match="position 2: "):
        check_chosen(query, values, sampled)


def at_last_position(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda answer: change(answer["choices"][0]["prompt_logprobs"][-1])


def forget_unlikely_id(entries: dict[str, Any]) -> None:
    del entries[max(entries, key=lambda v: entries[v]["rank"])]


def halve_all(entries: dict[str, Any]) -> None:
    for entry in entries.values():
        entry["logprob"] /= 2


def lower_all(entries: dict[str, Any]) -> None:
    for entry in entries.values():
        entry["logprob"] -= 0.01


def exclude_unlikely_id(entries: dict[str, Any]) -> None:
    for entry in entries.values():
        if entry["rank"] > 5:
            entry["logprob"] = -9999.0
    best = min(entries.values(), key=lambda entry: entry["rank"])
    rest = sum(math.exp(x["logprob"]) for x in entries.values() if x is not best)
    best["logprob"] = math.log1p(-rest)


WHOLE_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an id less": (at_last_position(forget_unlikely_id), POSITION + r"the id \d+ has no log-prob"),
    "another softmax": (at_last_position(halve_all), POSITION + "the probabilities of all ids sum"),
    "less than 1": (
        at_last_position(lower_all),
        POSITION + "the probabilities of all ids sum to 0",
    ),
    "excluded ids": (at_last_position(exclude_unlikely_id), POSITION + "a probability of 0"),
}


@pytest.mark.parametrize(("edit", "message"), WHOLE_FAULTS.values(), ids=WHOLE_FAULTS)
def test_wrong_distributions_name_the_row(
    servers: Callable[[str], Setting], edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    assert_refused(servers("whole"), edit, message)


def test_a_request_has_a_row_for_every_prediction_from_the_first_position_on() -> None:
    query = ScoreQuery([5, 6, 7, 8, 9], [2, 4], 0, np.array([[1, -1], [2, 3]]))
    payload = generate_payload("m", query)
    parameters = payload["sampling_params"]
    # row 0 predicts token 2, row 1 token 3, which nobody asks about, row 2 token 4
    assert parameters["prompt_logprob_start"] == 1
    assert parameters["prompt_logprob_token_ids"] == [[1, -1, 7], [-1], [2, 3, 9]]
    assert "prompt_logprobs" not in parameters


def test_ids_in_both_lists_of_one_answer_need_one_value() -> None:
    query = ScoreQuery([1, 2, 0], [1, 2], 2, np.array([[3, 4], [5, -1]]))
    ids = np.array([[4, 3], [5, 7]])
    logp = np.array([[-1.0, -2.0], [-0.5, -3.0]], np.float32)
    top, sampled = PositionLogprobs(ids, logp, logp[:, 0]), np.array([[-2.0, -1.0], [-0.5, 0.0]])
    rounded = sampled.astype(np.float32) + np.float32(0.05)  # half precision in another batch
    check_top_k(query, top, rounded)
    for scores, position in ((sampled[:, ::-1], 1), (sampled * [[1], [9]], 2)):
        with pytest.raises(ValueError, match=f"position {position}: ids that are both among"):
            check_top_k(query, top, scores.astype(np.float32))
    check_top_k(query, PositionLogprobs(ids + 100, logp, logp[:, 0]), sampled.astype(np.float32))
