"""Episodes of text games: rollouts by a script, packing, failures and totals."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.core.totals import compute
from opd.envs.base import Observation
from opd.envs.household import Household
from opd.envs.packing import episode_accumulators, pack_rows, sample_per_episode, samples_per_turn
from opd.envs.rollout import Episode, Turn, play_episodes
from opd.envs.task import GameTask
from opd.lab.build import make_tokenizer
from tests.helpers.games import Echo, Script, play_games


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
