"""Episodes of text games: rollouts by a script and by tiny models, packing, training."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.core.totals import compute
from diagnostics.monitor import Monitor
from diagnostics.records.batch_files import load_batch
from opd.analysis import doctor
from opd.config.groups import EvalConfig, GamesConfig
from opd.config.settings import Config, TaskSettings
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompt
from opd.envs.base import Observation
from opd.envs.household import Household
from opd.envs.packing import episode_accumulators, pack_rows, sample_per_episode, samples_per_turn
from opd.envs.rollout import Episode, Turn, play_episodes
from opd.envs.task import GameTask
from opd.evaluation.evaluate import evaluate_folder
from opd.lab.build import make_tokenizer
from opd.models.forward import log_probabilities, response_hidden_states
from opd.models.loading import load_model
from opd.rollouts.hf_engine import HfEngine
from opd.scoring.score import ScoredBatch, score_batch
from opd.teachers.pair import load_pair
from opd.training.optimizer import make_optimizer
from opd.training.setup import objective_from_config, score_request
from opd.training.state import TaskState, TrainState
from opd.training.train import train
from opd.training.update import accumulate_gradients, prepare_loss
from tests.helpers.requests import full_request
from tests.helpers.runs import rows, settings


class Echo:
    """Answers any text with its length; ends after 1 to 3 turns, won if the last length is odd."""

    closed = False

    def begin(self, seed: int) -> Observation:
        self.remaining = seed // 2 % 3 + 1
        return Observation("Say it.", goal=f"{self.remaining} words")

    def act(self, action: str) -> Observation:
        self.remaining -= 1
        return Observation(f"{len(action)}!", over=not self.remaining, won=bool(len(action) % 2))

    def close(self) -> None:
        self.closed = True


class Broken(Echo):
    """Raises in `begin` for seed 2, and at the first action for seed 4."""

    def begin(self, seed: int) -> Observation:
        if seed == 2:
            raise OSError("no such game")
        self.seed = seed
        return super().begin(seed)

    def act(self, action: str) -> Observation:
        if self.seed == 4:
            raise KeyError(action)
        return super().act(action)


class Script:
    """An engine that returns `say(row, call)`, with log-probabilities that encode the position."""

    def __init__(self, say: Any, end: bool = True) -> None:
        self.say, self.end, self.tokenizer = say, end, make_tokenizer()
        self.read: list[list[str]] = []

    def sample(self, prompts: Prompts, eos: list[int], **_: Any) -> Rollouts:
        call = len(self.read)
        id_mask_pairs = zip(prompts.tokens, prompts.mask, strict=True)
        self.read.append([self.tokenizer.decode(ids[real]) for ids, real in id_mask_pairs])
        responses = [self.tokenizer.encode(self.say(i, call)) for i in range(len(prompts))]
        responses = [ids + [eos[0]] * self.end for ids in responses]
        width = max(map(len, responses))
        tokens = torch.zeros(len(responses), width, dtype=torch.long)
        mask = torch.zeros(len(responses), width, dtype=torch.bool)
        for i, ids in enumerate(responses):
            tokens[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = True
        position_logp = -torch.arange(1.0, width + 1).expand_as(mask) - 100 * call
        return Rollouts(
            tokens=tokens,
            mask=mask,
            sampler_logp=position_logp * mask,
            softmax_logp=2 * position_logp * mask,
            prompt=prompts.index,
            ended=torch.full((len(responses),), self.end),
        )

    def sync(self, model: Any) -> None:
        pass

    def close(self) -> None:
        pass


def play_games(
    engine: Any, games: GameTask, seeds: list[int], group: int = 1, **options: Any
) -> list[Any]:
    tokenizer = make_tokenizer()
    defaults = {"max_prompt": 4000, "max_response": 60, "temperature": 1.0, "top_p": 1.0}
    return play_episodes(
        engine,
        tokenizer,
        [tokenizer.eos_token_id],
        games,
        list(enumerate(seeds)),
        group,
        generator=torch.Generator().manual_seed(0),
        **(defaults | options),
    )


def test_an_expert_wins_in_words_with_one_call_a_turn() -> None:
    environments: list[Household] = []

    class Watched(Household):
        over = False

        def begin(self, seed: int) -> Observation:
            environments.append(self)
            return self.noted(super().begin(seed))

        def act(self, action: str) -> Observation:
            return self.noted(super().act(action))

        def noted(self, observation: Observation) -> Observation:
            self.over = observation.over
            return observation

    def say(row: int, call: int) -> str:
        running = [home for home in environments if not home.over]
        return f"<think>so</think>{[x.expert() for x in running][row].upper()}"

    expected_actions: list[list[str]] = []
    for seed in (1, 3, 5):
        home, actions = Household(), []
        observation = home.begin(seed)
        while not observation.over:
            actions.append(home.expert())
            observation = home.act(actions[-1])
        expected_actions += [actions, actions]
    for layout in ("turns", "trajectory"):
        environments.clear()
        engine = Script(say)
        episodes = play_games(
            engine, GameTask(source="", make=Watched, layout=layout), [1, 3, 5], 2
        )
        assert [[turn.action for turn in episode.turns] for episode in episodes] == expected_actions
        assert {episode.outcome for episode in episodes} == {"won"}
        assert [len(x) for x in engine.read] == [
            sum(len(actions) > call for actions in expected_actions)
            for call in range(max(map(len, expected_actions)))
        ]


def test_a_prompt_of_its_own_tells_the_recent_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Script(lambda row, call: ["a", "bc", "def"][call])
    games = GameTask(source="", make=Echo, history=1, system="Play.")
    [episode] = play_games(engine, games, [4])
    frame = "<|im_start|>system\nPlay.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    frame += "<|im_start|>assistant\n"
    assert [texts[0] for texts in engine.read] == [
        frame.format("Task: 3 words\nSay it."),
        frame.format("Task: 3 words\n1. Say it.\n> a\n1!"),
        frame.format("Task: 3 words\n2. 1!\n> bc\n2!"),
    ]
    assert episode.outcome == "won"
    prompts, rollouts = pack_rows([episode], "turns", temperature=1.0, top_p=1.0)
    assert rollouts.turn.tolist() == [0, 1, 2]
    assert rollouts.reward.isnan().tolist() == [True, True, False]
    assert float(rollouts.reward[2]) == 1
    assert prompts.index.tolist() == rollouts.prompt.tolist() == [0, 0, 0]
    words = [engine.tokenizer.decode(x[m]) for x, m in zip(*tokens_and_mask(rollouts), strict=True)]
    assert words == ["a<|im_end|>", "bc<|im_end|>", "def<|im_end|>"]
    assert rollouts.sampler_logp[1].tolist() == [-101, -102, -103, 0]
    assert rollouts.softmax_logp is not None
    assert rollouts.softmax_logp[1].tolist() == [-202, -204, -206, 0]


def tokens_and_mask(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    return rollouts.tokens, rollouts.mask


@pytest.mark.parametrize("end", [True, False])
def test_a_trajectory_is_the_chat_as_the_template_renders_it(end: bool) -> None:
    responses = ["a", "<think>b</think>c", "def"]
    engine = Script(lambda row, call: responses[call], end)
    games = GameTask(source="", make=Echo, layout="trajectory", system="Play.")
    [episode] = play_games(engine, games, [4])
    prompts, rollouts = pack_rows([episode], "trajectory", temperature=1.0, top_p=1.0)
    chat = [{"role": "system", "content": "Play."}]
    for text, answer in zip(("Task: 3 words\nSay it.", "1!", "1!"), responses, strict=True):
        chat += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    rendered = engine.tokenizer.apply_chat_template(chat, tokenize=False)
    rendered = rendered.removesuffix("\n" if end else "<|im_end|>\n")
    conversation_ids = torch.cat([prompts.tokens[0], rollouts.tokens[0]])
    assert conversation_ids.tolist() == engine.tokenizer.encode(rendered)
    closing = "<|im_end|>" if end else ""
    supervised_text = engine.tokenizer.decode(rollouts.tokens[0][rollouts.mask[0]])
    assert supervised_text == closing.join([*responses, ""])
    supervised_logp = rollouts.sampler_logp[0][rollouts.mask[0]].tolist()
    sizes = [len(engine.tokenizer.encode(text)) + end for text in responses]
    assert supervised_logp == [
        -100 * call - t - 1 for call, n in enumerate(sizes) for t in range(n)
    ]
    assert bool(rollouts.ended[0]) == end
    assert rollouts.reward.tolist() == [1.0]


def test_a_tokenizer_without_a_template_goes_on_in_lines() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    engine = Script(lambda row, call: "ab")
    [episode] = play_episodes(
        engine,
        tokenizer,
        [tokenizer.eos_token_id],
        GameTask(source="", make=Echo, layout="trajectory"),
        [(0, 2)],
        1,
        max_prompt=99,
        max_response=9,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator(),
    )
    assert engine.read[1] == ["Task: 2 words\nSay it.ab<|im_end|>\n2!\n"]
    assert episode.outcome == "lost"


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
        loss, _ = accumulate_gradients(state, task, prepare_loss(task, batch), 0, 1.0)
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


def test_rows_of_a_history_are_not_one_conversation() -> None:
    [episode] = play_games(Script(lambda row, call: "ab"), GameTask(source="", make=Echo), [4])
    assert len(samples_per_turn(episode)) == 3
    with pytest.raises(ValueError, match="does not start with the previous turns"):
        sample_per_episode(episode)


def test_failures_of_the_environment_are_left_out_and_counted() -> None:
    games = GameTask(source="env:broken", make=Broken)
    engine = Script(lambda row, call: "abc")
    with pytest.warns(RuntimeWarning, match=r"3 of 5 episodes .* \(seed 2\) with OSError: no such"):
        episodes = play_games(engine, games, [0, 2, 4, 6, 2])
    assert [e.outcome for e in episodes] == ["won", "failed", "failed", "won", "failed"]
    assert [e.error[:8] for e in episodes] == ["", "OSError:", "KeyError", "", "OSError:"]
    assert all(episode.environment.closed for episode in episodes)
    _, rollouts = pack_rows(episodes, "turns", temperature=1.0, top_p=1.0)
    assert rollouts.prompt.tolist() == [0, 3]
    numbers = compute(episode_accumulators(episodes))
    assert numbers["episodes/failed_share"] == pytest.approx(3 / 5)
    assert numbers["episodes/success"] == 1
    with pytest.raises(RuntimeError, match="2 of 2 episodes of env:broken failed"):
        play_games(engine, games, [2, 4])


def test_an_endless_episode_is_cut_and_a_full_one_too() -> None:
    class Endless(Echo):
        def act(self, action: str) -> Observation:
            return Observation("more")

    for layout in ("turns", "trajectory"):
        games = GameTask(source="", make=Endless, layout=layout, max_turns=4)
        [episode] = play_games(Script(lambda row, call: "x"), games, [0])
        assert (episode.outcome, len(episode.turns)) == ("unfinished", 4)
        _, rollouts = pack_rows([episode], layout, temperature=1.0, top_p=1.0)
        assert rollouts.ended.tolist() == [layout == "turns"] * len(rollouts)
        assert rollouts.reward[-1] == 0
    [episode] = play_games(Script(lambda row, call: "x"), games, [0], max_prompt=70)
    assert (episode.outcome, len(episode.turns)) == ("full", 2)
    assert all(len(turn.prompt) <= 70 for turn in episode.turns)
    with pytest.raises(ValueError, match="seed 0 has 40 tokens, but max_prompt is 20"):
        play_games(Script(lambda row, call: "x"), games, [0], max_prompt=20)


def test_actions_that_are_not_admitted_change_nothing_and_count() -> None:
    class Strict(Household):
        def act(self, action: str) -> Observation:
            assert action.startswith("go to "), (
                "inadmissible actions must not reach the environment"
            )
            return super().act(action)

    engine = Script(lambda row, call: ["fly", "go to " + target][call])
    rooms = Household()
    target = rooms.begin(2).actions[0].removeprefix("go to ")
    games = GameTask(source="", make=Strict, max_turns=2)
    [episode] = play_games(engine, games, [2])
    assert [(turn.action, turn.admissible) for turn in episode.turns] == [
        ("fly", False),
        (f"go to {target}", True),
    ]
    assert "Nothing happens.\nActions: go to " in engine.read[1][0]
    assert episode.environment.current_place == target
    assert compute(episode_accumulators([episode]))["episodes/invalid_share"] == 0.5


def test_totals_are_those_of_plain_loops() -> None:
    turn = Turn([1], [2], [0.0], None, True, "", True)
    table = [
        (0, "won", [1, 1]),
        (0, "lost", [0]),
        (1, "unfinished", [1, 0, 0, 1]),
        (1, "won", [1]),
        (2, "full", [1, 1, 0]),
        (2, "failed", [0, 0]),
    ]
    episodes = []
    for game, outcome, admitted in table:
        episode = Episode(game=game, seed=0, environment=Echo(), outcome=outcome)
        episode.turns += [replace(turn, admissible=bool(x)) for x in admitted]
        episodes.append(episode)
    numbers = compute(episode_accumulators(episodes))
    not_failed = [
        (game, outcome, admitted) for game, outcome, admitted in table if outcome != "failed"
    ]
    assert numbers["episodes/success"] == pytest.approx(2 / 5)
    assert numbers["episodes/turns"] == pytest.approx(11 / 5)
    assert numbers["episodes/invalid_share"] == pytest.approx(4 / 11)
    assert numbers["episodes/unfinished_share"] == pytest.approx(1 / 5)
    assert numbers["episodes/full_share"] == pytest.approx(1 / 5)
    assert numbers["episodes/failed_share"] == pytest.approx(1 / 6)
    squared_deviations = 0.0
    for game in range(3):
        won_flags = [outcome == "won" for g, outcome, _ in not_failed if g == game]
        squared_deviations += (sum(won_flags) - 2 / 5 * len(won_flags)) ** 2
    assert numbers["episodes/success_se"] == pytest.approx(
        math.sqrt(3 / 2 * squared_deviations) / 5
    )


# --- in a run -----------------------------------------------------------------------------------

ECHO = "env:tests.opd.envs.test_rollout:Echo"


def game_config(tiny_pair, out: Path, **changes: object) -> Config:
    defaults = {"task": ECHO, "max_prompt": 200, "max_response": 6, "layout": "trajectory"}
    return settings(tiny_pair, out, **(defaults | changes))


@pytest.mark.parametrize("layout", ["turns", "trajectory"])
def test_a_run_on_games_resumes_to_the_same_bits(tiny_pair, tmp_path: Path, layout: str) -> None:
    options = {"layout": layout, "save_every": 1, "eval_every": 0, "objective": "sampled_token"}
    complete_folder = train(game_config(tiny_pair, tmp_path / "whole", steps=3, **options)).folder
    train(game_config(tiny_pair, tmp_path / "cut", steps=1, **options))
    resumed_folder = train(game_config(tiny_pair, tmp_path / "cut", steps=3, **options)).folder
    assert rows(resumed_folder) == rows(complete_folder)
    weights = [
        (x / "final" / "model.safetensors").read_bytes() for x in (resumed_folder, complete_folder)
    ]
    assert weights[0] == weights[1]
    batch = load_batch(complete_folder / "batches" / "step_000000.safetensors")
    row = rows(complete_folder)[0]
    mean_reward = float(batch.reward[~batch.reward.isnan()].double().mean())
    assert row["episodes/success"] == row["response/reward"] == pytest.approx(mean_reward)
    assert mean_reward > 0
    turns = len(batch) if layout == "turns" else row["episodes/turns"] * len(batch)
    assert row["episodes/turns"] * 6 == pytest.approx(turns)
    assert row["episodes/failed_share"] == row["episodes/full_share"] == 0
    if layout == "turns":
        second_turns = batch.rows((batch.turn == 1).nonzero()[:, 0])
        assert 0 < len(second_turns) < 6
        mean_cost = float(second_turns.log_ratio[second_turns.mask].double().mean())
        assert row["turn=2/divergence/k1"] == pytest.approx(mean_cost, rel=1e-6)
        assert "turn=3/divergence/k1" not in row, "turns 1, 2, 4, 8 and 16 of 30"


def test_one_turn_games_train_alike_in_both_layouts(tiny_pair, tmp_path: Path) -> None:
    options = {"max_turns": 1, "steps": 2, "eval_every": 0}
    folders = [
        train(game_config(tiny_pair, tmp_path / layout, layout=layout, **options)).folder
        for layout in ("turns", "trajectory")
    ]
    weights = [load_model(str(x / "final"), "cpu", "float32")[1].parameters() for x in folders]
    for turn_weights, trajectory_weights in zip(*weights, strict=True):
        assert torch.equal(turn_weights, trajectory_weights)
    losses = [[row["loss"] for row in rows(x)] for x in folders]
    assert losses[0] == losses[1]


def test_games_take_turns_and_mix_with_problems(tiny_pair, tmp_path: Path) -> None:
    tasks = (
        TaskSettings(name="sums", task="lab", max_response=9),
        TaskSettings(name="echo", task=ECHO, max_turns=2, layout="turns"),
    )
    options = {"task": "lab", "layout": "trajectory", "tasks": tasks, "steps": 2, "eval_every": 0}
    folder = train(game_config(tiny_pair, tmp_path / "alternate", **options)).folder
    first, second = rows(folder)
    assert "episodes/turns" not in first
    assert second["task"] == "echo"
    assert 1 <= second["episodes/turns"] <= 2
    evals = [json.loads(x) for x in (folder / "evals.jsonl").read_text().splitlines()]
    assert [("episodes/success" in x, x["task"]) for x in evals[:2]] == [
        (False, "sums"),
        (True, "echo"),
    ]
    assert evals[1]["accuracy"] == evals[1]["episodes/success"]
    options |= {"task_order": "mixed", "prompts_per_step": 4, "save_batch_every": 1}
    folder = train(game_config(tiny_pair, tmp_path / "mixed", **options)).folder
    row = rows(folder)[0]
    batch = load_batch(folder / "batches" / "step_000000.safetensors")
    game_rows = batch.rows((batch.task == 1).nonzero()[:, 0])
    mean_reward = float(game_rows.reward[~game_rows.reward.isnan()].mean())
    assert row["task=echo/episodes/success"] == mean_reward
    assert row["task=echo/episodes/turns"] * 4 == pytest.approx(len(game_rows))
    assert "episodes/success" not in row
    assert len(batch) == 4 + len(game_rows)


def test_held_out_games_are_evaluated(tiny_pair) -> None:
    options = {"device": "cpu", "max_prompt": 200, "max_response": 6, "seed": 0}
    evaluation = EvalConfig(eval_problems=9, eval_samples=2)
    result = evaluate_folder(str(tiny_pair[0]), ECHO, evaluation=evaluation, **options)
    outcomes = [int(x) for x in result["outcomes"].replace(" ", "")]
    assert len(outcomes) == 18
    assert result["accuracy"] == pytest.approx(sum(outcomes) / 18) == result["episodes/success"]
    assert result["low"] < result["accuracy"] < result["high"]
    assert result["truncated"] == 0
    shortened_result = evaluate_folder(
        str(tiny_pair[0]),
        ECHO,
        evaluation=EvalConfig(eval_problems=9),
        games=GamesConfig(max_turns=2),
        **options,
    )
    assert shortened_result["truncated"] == pytest.approx(1 / 3), (
        "games of three turns are cut at two"
    )
    assert shortened_result["problem_set"] == result["problem_set"]


def test_the_doctor_reads_the_openings_of_games(tiny_pair) -> None:
    results = doctor.check_pair(
        *map(str, tiny_pair), task=ECHO, prompts=3, group=1, max_response=4, device="cpu"
    )
    games = GameTask(source="", make=Echo, seed=0)
    texts = [problem.prompt for problem in games.openings(games.train(0, 3))]
    assert {len(text) for text in texts} == {len("Task: 1 words\nSay it.")}
    longest = max(len(encode_prompt(make_tokenizer(), Problem(text, ""))) for text in texts)
    numbers = {finding.item: finding.numbers for finding in results}
    assert numbers["positions"]["prompt"] == longest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grader": "exact"}, "grades its own episodes"),
        ({"eval_task": "lab"}, "remove eval_task='lab'"),
        (
            {"reward_weight": 1.0, "layout": "turns"},
            "reward_weight 1.0 compares .* set layout to trajectory",
        ),
        ({"baseline": "leave_one_out", "layout": "turns", "objective": "sampled_token"}, "layout"),
        ({"task": "env:castle"}, "unknown environment"),
    ],
)
def test_what_games_cannot_have_is_refused(
    tiny_pair, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(game_config(tiny_pair, tmp_path / "run", **changes))


def test_a_reward_of_games_trains_with_whole_episodes(tiny_pair, tmp_path: Path) -> None:
    options = {"reward_weight": 0.5, "objective": "sampled_token", "steps": 1, "eval_every": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(
            rows(train(game_config(tiny_pair, tmp_path / "run", **options)).folder)[0]["loss"]
        )
