"""Rows of turns and of whole trajectories: the same numbers and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.monitor import Monitor
from opd.config.settings import Config
from opd.data.prompts import Prompts
from opd.envs.packing import pack_rows
from opd.envs.rollout import Turn
from opd.envs.task import GameTask
from opd.models.forward import log_probabilities, response_hidden_states
from opd.rollouts.hf_engine import HfEngine
from opd.scoring.score import ScoredBatch, score_batch
from opd.teachers.pair import load_pair
from opd.training.optimizer import make_optimizer
from opd.training.setup import objective_from_config, score_request
from opd.training.state import TaskState, TrainState
from opd.training.update import accumulate_gradients, prepare_loss
from tests.helpers.games import Echo, play_games
from tests.helpers.requests import full_request
from tests.helpers.runs import settings


@pytest.fixture(scope="module")
def conversation(tiny_pair) -> tuple[Any, list[Any]]:
    """A pair, and trajectories of its student in games of 1, 2 and 3 turns."""
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    games = GameTask(source="", make=Echo, layout="trajectory")
    episodes = play_games(HfEngine(pair.student), games, [0, 2, 4], 2, max_response=7)
    assert [len(episode.turns) for episode in episodes] == [1, 1, 2, 2, 3, 3]
    return pair, episodes


def score_episodes(
    pair: Any, prompts: Prompts, rollouts: Rollouts, support: str = "teacher"
) -> ScoredBatch:
    request = full_request(6, support, max_tokens_per_microbatch=900, max_logits_per_chunk=1 << 20)
    return score_batch(pair.student, pair.teacher, prompts, rollouts, request)


def test_turns_and_trajectories_have_the_same_numbers(conversation) -> None:
    pair, episodes = conversation
    columns_by_layout: list[dict[str, Tensor]] = []
    for layout in ("turns", "trajectory"):
        rows_of_layout = pack_rows(episodes, layout, temperature=1.0, top_p=1.0)
        batch = score_episodes(pair, *rows_of_layout).scored
        assert batch.prefix is not None
        assert batch.support is not None
        columns = {name: getattr(batch, name) for name in ("tokens", "sampler_logp")}
        columns |= {"student": batch.student_logp, "teacher": batch.teacher_logp}
        columns |= {"kl": batch.prefix.reverse_kl, "ids": batch.support.ids}
        columns_by_layout.append({name: x[batch.mask] for name, x in columns.items()})
        gap = (batch.sampler_logp - batch.student_logp)[batch.mask].abs().max()
        assert gap < 1e-5, "sampled and scored log-probabilities differ"
    assert len(columns_by_layout[0]["tokens"]) > 40
    for name in columns_by_layout[0]:
        torch.testing.assert_close(
            columns_by_layout[0][name], columns_by_layout[1][name], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("objective", ["sampled_token", "teacher_topk", "full_reverse_kl"])
def test_turns_and_trajectories_have_one_gradient(
    conversation, tiny_pair, tmp_path: Path, objective: str
) -> None:
    """At gamma 0; equal to the gradient of the dense loss, computed turn by turn."""
    pair, episodes = conversation
    config = settings(tiny_pair, tmp_path, objective=objective, support_k=6)
    network = pair.student.network
    gradients = []
    for layout in ("turns", "trajectory"):
        prompts, rollouts = pack_rows(episodes, layout, temperature=1.0, top_p=1.0)
        state = make_state(config, pair)
        (task,) = state.tasks
        batch = score_episodes(pair, prompts, rollouts, task.objective.support)
        network.zero_grad()
        loss = accumulate_gradients(state, task, prepare_loss(task, batch), 0, 1.0).loss
        gradients.append([p.grad.clone() for p in network.parameters()] + [loss])
    turns = [turn for episode in episodes for turn in episode.turns]
    num_tokens = sum(len(turn.response) for turn in turns)
    network.zero_grad()
    dense = sum(dense_turn_loss(pair, turn, objective) for turn in turns) / num_tokens
    dense.backward()
    expected = [p.grad.clone() for p in network.parameters()] + [dense.detach()]
    if objective == "sampled_token":  # only the gradient of a score-function loss is meaningful
        gradients, expected = [x[:-1] for x in gradients], expected[:-1]
    for layout_gradients in gradients:
        for x, y in zip(layout_gradients, expected, strict=True):
            torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-3)


def make_state(config: Config, pair: Any) -> TrainState:
    from opd.training.prefetch import RolloutPrefetcher

    objective = objective_from_config(config)
    task = TaskState(
        config=config,
        pair=pair,
        problems=GameTask(source="", make=Echo),
        objective=objective,
        request=score_request(config, objective, pair),
        masks=[],
        monitor=Monitor({}),
    )
    return TrainState(
        config=config,
        folder=Path(config.out),
        student=pair.student,
        optimizer=make_optimizer(pair.student.network.parameters(), (0.9, 0.999), 0.0),
        engine=HfEngine(pair.student),
        prefetcher=RolloutPrefetcher(lambda step: [], lambda: None, lag=0, steps=1, updates=1),
        tasks=[task],
    )


def dense_turn_loss(pair: Any, turn: Turn, objective: str) -> Tensor:
    """Sum of one turn's token losses from full logits."""
    ids, n = torch.tensor([turn.prompt + turn.response]), len(turn.response)
    p = pair.student.network(ids).logits[0, -n - 1 : -1].log_softmax(-1)
    with torch.no_grad():
        q = pair.teacher.model.network(ids).logits[0, -n - 1 : -1].log_softmax(-1)
    if objective == "sampled_token":
        y = ids[0, -n:, None]
        cost = (p.detach() - q).gather(1, y)
        return (cost * p.gather(1, y)).sum()
    if objective == "teacher_topk":
        top_logp, support = q.topk(6)
        p, q = p.gather(1, support).log_softmax(-1), top_logp.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def test_what_was_read_is_not_supervised(conversation) -> None:
    pair, episodes = conversation
    prompts, rollouts = pack_rows(episodes, "trajectory", temperature=1.0, top_p=1.0)
    holes = (~rollouts.mask) & (rollouts.mask.long().flip(1).cumsum(1).flip(1) > 0)
    assert bool(holes.any())
    assert float(rollouts.sampler_logp[holes].abs().max()) == 0
    assert bool((rollouts.tokens[holes] != 0).any())
    states = response_hidden_states(pair.student, prompts, rollouts)
    logp = log_probabilities(pair.student, states, 1.0).gather(
        1, rollouts.tokens[rollouts.mask][:, None]
    )
    torch.testing.assert_close(
        logp[:, 0], rollouts.sampler_logp[rollouts.mask], atol=1e-5, rtol=1e-5
    )
