"""Episodes of text games: played by a script and by real tiny models, packed, trained on."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.batch import Rollouts, ScoredRollouts
from diagnostics.core.totals import read
from diagnostics.monitor import Monitor
from diagnostics.records.batch_files import load
from opd.analysis import doctor
from opd.config.settings import Config, TaskSettings
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_one
from opd.envs.base import Observation
from opd.envs.household import Household
from opd.envs.packing import as_one, by_turn, rows_of, totals
from opd.envs.rollout import Episode, Turn, play
from opd.envs.task import GameTask
from opd.evaluation.evaluate import evaluate_folder
from opd.lab.build import make_tokenizer
from opd.models.forward import log_probabilities, response_hidden
from opd.models.loading import load as load_model
from opd.rollouts.hf_engine import HfEngine
from opd.scoring.score import score
from opd.teachers.pair import load_pair
from opd.training.optimizer import adamw
from opd.training.setup import make_objective
from opd.training.state import ScoredTaskBatch
from opd.training.train import train
from opd.training.update import backward, shared_out
from tests.opd.training.test_train import rows, settings


class Echo:
    """Answers any text with its length; over after 1 to 3 of them, won if the last was odd."""

    closed = False

    def begin(self, seed: int) -> Observation:
        self.left = seed // 2 % 3 + 1
        return Observation("Say it.", goal=f"{self.left} words")

    def act(self, action: str) -> Observation:
        self.left -= 1
        return Observation(f"{len(action)}!", over=not self.left, won=bool(len(action) % 2))

    def close(self) -> None:
        self.closed = True


class Broken(Echo):
    """Fails at the start in the game of seed 2, at the first action in that of seed 4."""

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
    """An engine that says what `say(row, call)` says, with log-probabilities that tell where."""

    def __init__(self, say: Any, end: bool = True) -> None:
        self.say, self.end, self.tokenizer = say, end, make_tokenizer()
        self.read: list[list[str]] = []

    def sample(self, prompts: Prompts, eos: list[int], **_: Any) -> Rollouts:
        call = len(self.read)
        pairs = zip(prompts.tokens, prompts.mask, strict=True)
        self.read.append([self.tokenizer.decode(ids[real]) for ids, real in pairs])
        said = [self.tokenizer.encode(self.say(i, call)) for i in range(len(prompts))]
        said = [ids + [eos[0]] * self.end for ids in said]
        width = max(map(len, said))
        tokens = torch.zeros(len(said), width, dtype=torch.long)
        mask = torch.zeros(len(said), width, dtype=torch.bool)
        for i, ids in enumerate(said):
            tokens[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = True
        place = -torch.arange(1.0, width + 1).expand_as(mask) - 100 * call
        return Rollouts(
            tokens=tokens,
            mask=mask,
            sampler_logp=place * mask,
            softmax_logp=2 * place * mask,
            prompt=prompts.index,
            ended=torch.full((len(said),), self.end),
        )

    def sync(self, model: Any) -> None:
        pass

    def close(self) -> None:
        pass


def played(engine: Any, games: GameTask, seeds: list[int], group: int = 1, **how: Any) -> list[Any]:
    tokenizer = make_tokenizer()
    fixed = {"max_prompt": 4000, "max_response": 60, "temperature": 1.0, "top_p": 1.0}
    return play(
        engine,
        tokenizer,
        [tokenizer.eos_token_id],
        games,
        list(enumerate(seeds)),
        group,
        generator=torch.Generator().manual_seed(0),
        **(fixed | how),
    )


def test_an_expert_wins_in_words_with_one_call_a_turn() -> None:
    made: list[Household] = []

    class Watched(Household):
        over = False

        def begin(self, seed: int) -> Observation:
            made.append(self)
            return self.noted(super().begin(seed))

        def act(self, action: str) -> Observation:
            return self.noted(super().act(action))

        def noted(self, scene: Observation) -> Observation:
            self.over = scene.over
            return scene

    def say(row: int, call: int) -> str:
        live = [rooms for rooms in made if not rooms.over]
        return f"<think>so</think>{[x.expert() for x in live][row].upper()}"

    ways: list[list[str]] = []
    for seed in (1, 3, 5):
        rooms, way = Household(), []
        scene = rooms.begin(seed)
        while not scene.over:
            way.append(rooms.expert())
            scene = rooms.act(way[-1])
        ways += [way, way]
    for layout in ("turns", "trajectory"):
        made.clear()
        engine = Script(say)
        found = played(engine, GameTask(source="", make=Watched, layout=layout), [1, 3, 5], 2)
        assert [[turn.action for turn in episode.turns] for episode in found] == ways
        assert {episode.outcome for episode in found} == {"won"}
        assert [len(x) for x in engine.read] == [
            sum(len(way) > call for way in ways) for call in range(max(map(len, ways)))
        ]


def test_a_prompt_of_its_own_tells_the_recent_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Script(lambda row, call: ["a", "bc", "def"][call])
    games = GameTask(source="", make=Echo, history=1, system="Play.")
    [episode] = played(engine, games, [4])
    frame = "<|im_start|>system\nPlay.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    frame += "<|im_start|>assistant\n"
    assert [texts[0] for texts in engine.read] == [
        frame.format("Task: 3 words\nSay it."),
        frame.format("Task: 3 words\n1. Say it.\n> a\n1!"),
        frame.format("Task: 3 words\n2. 1!\n> bc\n2!"),
    ]
    assert episode.outcome == "won"
    prompts, rollouts = rows_of([episode], "turns", temperature=1.0, top_p=1.0)
    assert rollouts.turn.tolist() == [0, 1, 2]
    assert rollouts.reward.isnan().tolist() == [True, True, False]
    assert float(rollouts.reward[2]) == 1
    assert prompts.index.tolist() == rollouts.prompt.tolist() == [0, 0, 0]
    words = [engine.tokenizer.decode(x[m]) for x, m in zip(*both(rollouts), strict=True)]
    assert words == ["a<|im_end|>", "bc<|im_end|>", "def<|im_end|>"]
    assert rollouts.sampler_logp[1].tolist() == [-101, -102, -103, 0]
    assert rollouts.softmax_logp is not None
    assert rollouts.softmax_logp[1].tolist() == [-202, -204, -206, 0]


def both(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    return rollouts.tokens, rollouts.mask


@pytest.mark.parametrize("end", [True, False])
def test_a_trajectory_is_the_chat_as_the_template_renders_it(end: bool) -> None:
    said = ["a", "<think>b</think>c", "def"]
    engine = Script(lambda row, call: said[call], end)
    games = GameTask(source="", make=Echo, layout="trajectory", system="Play.")
    [episode] = played(engine, games, [4])
    prompts, rollouts = rows_of([episode], "trajectory", temperature=1.0, top_p=1.0)
    chat = [{"role": "system", "content": "Play."}]
    for text, answer in zip(("Task: 3 words\nSay it.", "1!", "1!"), said, strict=True):
        chat += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    rendered = engine.tokenizer.apply_chat_template(chat, tokenize=False)
    rendered = rendered.removesuffix("\n" if end else "<|im_end|>\n")
    whole = torch.cat([prompts.tokens[0], rollouts.tokens[0]])
    assert whole.tolist() == engine.tokenizer.encode(rendered)
    closing = "<|im_end|>" if end else ""
    own = engine.tokenizer.decode(rollouts.tokens[0][rollouts.mask[0]])
    assert own == closing.join([*said, ""])
    places = rollouts.sampler_logp[0][rollouts.mask[0]].tolist()
    sizes = [len(engine.tokenizer.encode(text)) + end for text in said]
    assert places == [-100 * call - t - 1 for call, n in enumerate(sizes) for t in range(n)]
    assert bool(rollouts.ended[0]) == end
    assert rollouts.reward.tolist() == [1.0]


def test_a_tokenizer_without_a_template_goes_on_in_lines() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    engine = Script(lambda row, call: "ab")
    [episode] = play(
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
    """A pair and conversations of its student, with games of 1, 2 and 3 turns."""
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    games = GameTask(source="", make=Echo, layout="trajectory")
    found = played(HfEngine(pair.student), games, [0, 2, 4], 2, max_response=7)
    assert [len(episode.turns) for episode in found] == [1, 1, 2, 2, 3, 3]
    return pair, found


def scored(pair: Any, prompts: Prompts, rollouts: Rollouts) -> tuple[ScoredRollouts, Tensor | None]:
    return score(
        pair,
        prompts,
        rollouts,
        k=6,
        temperature=1.0,
        max_tokens_per_microbatch=900,
        max_logits_per_chunk=1 << 20,
        keep_teacher=True,
    )


def test_turns_and_trajectories_have_the_same_numbers(conversation) -> None:
    pair, episodes = conversation
    flat: list[dict[str, Tensor]] = []
    for layout in ("turns", "trajectory"):
        batch, _ = scored(pair, *rows_of(episodes, layout, temperature=1.0, top_p=1.0))
        assert batch.prefix is not None
        assert batch.support is not None
        columns = {name: getattr(batch, name) for name in ("tokens", "sampler_logp")}
        columns |= {"student": batch.student_logp, "teacher": batch.teacher_logp}
        columns |= {"kl": batch.prefix.reverse_kl, "ids": batch.support.ids}
        flat.append({name: x[batch.mask] for name, x in columns.items()})
        gap = (batch.sampler_logp - batch.student_logp)[batch.mask].abs().max()
        assert gap < 1e-5, "what was sampled is what is scored"
    assert len(flat[0]["tokens"]) > 40
    for name in flat[0]:
        torch.testing.assert_close(flat[0][name], flat[1][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", ["sampled_token", "teacher_topk", "full_reverse_kl"])
def test_turns_and_trajectories_have_one_gradient(
    conversation, tiny_pair, tmp_path: Path, objective: str
) -> None:
    """At gamma 0; and it is that of the dense loss, written out turn by turn."""
    pair, episodes = conversation
    config = settings(tiny_pair, tmp_path, objective=objective, support_k=6)
    network = pair.student.network
    found = []
    for layout in ("turns", "trajectory"):
        prompts, rollouts = rows_of(episodes, layout, temperature=1.0, top_p=1.0)
        whole, hidden = scored(pair, prompts, rollouts)
        part = made_part(config, pair, prompts, whole, hidden)
        network.zero_grad()
        loss, _ = backward(part, shared_out(part)[0], 1.0)
        found.append([p.grad.clone() for p in network.parameters()] + [loss])
    turns = [turn for episode in episodes for turn in episode.turns]
    count = sum(len(turn.response) for turn in turns)
    network.zero_grad()
    dense = sum(by_hand(pair, turn, objective) for turn in turns) / count
    dense.backward()
    expected = [p.grad.clone() for p in network.parameters()] + [dense.detach()]
    if objective == "sampled_token":  # a score function's loss has no meaning, only its gradient
        found, expected = [x[:-1] for x in found], expected[:-1]
    for ours in found:
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-3)


def made_part(
    config: Config, pair: Any, prompts: Prompts, whole: ScoredRollouts, hidden: Tensor | None
) -> ScoredTaskBatch:
    from opd.training.prefetch import RolloutPrefetcher
    from opd.training.state import TaskRun

    run = TaskRun(
        config=config,
        folder=Path(config.out),
        pair=pair,
        task=GameTask(source="", make=Echo),
        engine=HfEngine(pair.student),
        ahead=RolloutPrefetcher(lambda step: [], lambda: None, depth=0, steps=1, updates=1),
        objective=make_objective(config),
        masks=[],
        optimizer=adamw(pair.student.network.parameters(), (0.9, 0.999), 0.0),
        monitor=Monitor({}),
    )
    return ScoredTaskBatch(run=run, prompts=prompts, scored=whole, teacher_hidden=hidden, played={})


def by_hand(pair: Any, turn: Turn, objective: str) -> Tensor:
    """Sum of one turn's losses from whole logits."""
    ids, n = torch.tensor([turn.prompt + turn.response]), len(turn.response)
    p = pair.student.network(ids).logits[0, -n - 1 : -1].log_softmax(-1)
    with torch.no_grad():
        q = pair.teacher.network(ids).logits[0, -n - 1 : -1].log_softmax(-1)
    if objective == "sampled_token":
        y = ids[0, -n:, None]
        cost = (p.detach() - q).gather(1, y)
        return (cost * p.gather(1, y)).sum()
    if objective == "teacher_topk":
        best, support = q.topk(6)
        p, q = p.gather(1, support).log_softmax(-1), best.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def test_what_was_read_is_not_supervised(conversation) -> None:
    pair, episodes = conversation
    prompts, rollouts = rows_of(episodes, "trajectory", temperature=1.0, top_p=1.0)
    holes = (~rollouts.mask) & (rollouts.mask.long().flip(1).cumsum(1).flip(1) > 0)
    assert bool(holes.any())
    assert float(rollouts.sampler_logp[holes].abs().max()) == 0
    assert bool((rollouts.tokens[holes] != 0).any())
    states = response_hidden(pair.student, prompts, rollouts)
    logp = log_probabilities(pair.student, states, 1.0).gather(
        1, rollouts.tokens[rollouts.mask][:, None]
    )
    torch.testing.assert_close(
        logp[:, 0], rollouts.sampler_logp[rollouts.mask], atol=1e-5, rtol=1e-5
    )


def test_rows_of_a_history_are_not_one_conversation() -> None:
    [episode] = played(Script(lambda row, call: "ab"), GameTask(source="", make=Echo), [4])
    assert len(by_turn(episode)) == 3
    with pytest.raises(ValueError, match="do not begin with the turns before"):
        as_one(episode)


def test_failures_of_the_environment_are_left_out_and_counted() -> None:
    games = GameTask(source="env:broken", make=Broken)
    engine = Script(lambda row, call: "abc")
    with pytest.warns(RuntimeWarning, match=r"3 of 5 episodes .* \(seed 2\) with OSError: no such"):
        found = played(engine, games, [0, 2, 4, 6, 2])
    assert [e.outcome for e in found] == ["won", "failed", "failed", "won", "failed"]
    assert [e.error[:8] for e in found] == ["", "OSError:", "KeyError", "", "OSError:"]
    assert all(episode.environment.closed for episode in found)
    _, rollouts = rows_of(found, "turns", temperature=1.0, top_p=1.0)
    assert rollouts.prompt.tolist() == [0, 3]
    numbers = read(totals(found))
    assert numbers["episodes/failed_share"] == pytest.approx(3 / 5)
    assert numbers["episodes/success"] == 1
    with pytest.raises(RuntimeError, match="2 of 2 episodes of env:broken failed"):
        played(engine, games, [2, 4])


def test_an_endless_episode_is_cut_and_a_full_one_too() -> None:
    class Endless(Echo):
        def act(self, action: str) -> Observation:
            return Observation("more")

    for layout in ("turns", "trajectory"):
        games = GameTask(source="", make=Endless, layout=layout, max_turns=4)
        [episode] = played(Script(lambda row, call: "x"), games, [0])
        assert (episode.outcome, len(episode.turns)) == ("unfinished", 4)
        _, rollouts = rows_of([episode], layout, temperature=1.0, top_p=1.0)
        assert rollouts.ended.tolist() == [layout == "turns"] * len(rollouts)
        assert rollouts.reward[-1] == 0
    [episode] = played(Script(lambda row, call: "x"), games, [0], max_prompt=70)
    assert (episode.outcome, len(episode.turns)) == ("full", 2)
    assert all(len(turn.prompt) <= 70 for turn in episode.turns)
    with pytest.raises(ValueError, match="seed 0 has 40 tokens, max_prompt is 20"):
        played(Script(lambda row, call: "x"), games, [0], max_prompt=20)


def test_actions_that_are_not_admitted_change_nothing_and_count() -> None:
    class Strict(Household):
        def act(self, action: str) -> Observation:
            assert action.startswith("go to "), "others never get here"
            return super().act(action)

    engine = Script(lambda row, call: ["fly", "go to " + target][call])
    rooms = Household()
    target = rooms.begin(2).actions[0].removeprefix("go to ")
    games = GameTask(source="", make=Strict, max_turns=2)
    [episode] = played(engine, games, [2])
    assert [(turn.action, turn.admitted) for turn in episode.turns] == [
        ("fly", False),
        (f"go to {target}", True),
    ]
    assert "Nothing happens.\nActions: go to " in engine.read[1][0]
    assert episode.environment.at == target
    assert read(totals([episode]))["episodes/invalid_share"] == 0.5


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
        episode.turns += [replace(turn, admitted=bool(x)) for x in admitted]
        episodes.append(episode)
    numbers = read(totals(episodes))
    kept = [(game, outcome, admitted) for game, outcome, admitted in table if outcome != "failed"]
    assert numbers["episodes/success"] == pytest.approx(2 / 5)
    assert numbers["episodes/turns"] == pytest.approx(11 / 5)
    assert numbers["episodes/invalid_share"] == pytest.approx(4 / 11)
    assert numbers["episodes/unfinished_share"] == pytest.approx(1 / 5)
    assert numbers["episodes/full_share"] == pytest.approx(1 / 5)
    assert numbers["episodes/failed_share"] == pytest.approx(1 / 6)
    away = 0.0
    for game in range(3):
        mine = [outcome == "won" for g, outcome, _ in kept if g == game]
        away += (sum(mine) - 2 / 5 * len(mine)) ** 2
    assert numbers["episodes/success_se"] == pytest.approx(math.sqrt(3 / 2 * away) / 5)


# --- in a run -----------------------------------------------------------------------------------

ECHO = "env:tests.opd.envs.test_rollout:Echo"


def game_run(tiny_pair, out: Path, **changes: object) -> Config:
    fixed = {"task": ECHO, "max_prompt": 200, "max_response": 6, "layout": "trajectory"}
    return settings(tiny_pair, out, **(fixed | changes))


@pytest.mark.parametrize("layout", ["turns", "trajectory"])
def test_a_run_on_games_resumes_to_the_same_bits(tiny_pair, tmp_path: Path, layout: str) -> None:
    how = {"layout": layout, "save_every": 1, "eval_every": 0, "objective": "sampled_token"}
    whole = train(game_run(tiny_pair, tmp_path / "whole", steps=3, **how))
    train(game_run(tiny_pair, tmp_path / "cut", steps=1, **how))
    cut = train(game_run(tiny_pair, tmp_path / "cut", steps=3, **how))
    assert rows(cut) == rows(whole)
    weights = [(x / "final" / "model.safetensors").read_bytes() for x in (cut, whole)]
    assert weights[0] == weights[1]
    batch = load(whole / "batches" / "step_000000.safetensors")
    row = rows(whole)[0]
    won = float(batch.reward[~batch.reward.isnan()].double().mean())
    assert row["episodes/success"] == row["response/reward"] == pytest.approx(won)
    assert won > 0
    turns = len(batch) if layout == "turns" else row["episodes/turns"] * len(batch)
    assert row["episodes/turns"] * 6 == pytest.approx(turns)
    assert row["episodes/failed_share"] == row["episodes/full_share"] == 0
    if layout == "turns":
        second = batch.rows((batch.turn == 1).nonzero()[:, 0])
        assert 0 < len(second) < 6
        cost = float(second.log_ratio[second.mask].double().mean())
        assert row["turn=2/divergence/k1"] == pytest.approx(cost, rel=1e-6)
        assert "turn=3/divergence/k1" not in row, "turns 1, 2, 4, 8 and 16 of 30"


def test_one_turn_games_train_alike_in_both_layouts(tiny_pair, tmp_path: Path) -> None:
    how = {"max_turns": 1, "steps": 2, "eval_every": 0}
    found = [
        train(game_run(tiny_pair, tmp_path / layout, layout=layout, **how))
        for layout in ("turns", "trajectory")
    ]
    both = [load_model(str(x / "final"), "cpu", "float32")[1].parameters() for x in found]
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours, theirs)
    losses = [[row["loss"] for row in rows(x)] for x in found]
    assert losses[0] == losses[1]


def test_games_take_turns_and_mix_with_problems(tiny_pair, tmp_path: Path) -> None:
    tasks = (
        TaskSettings(name="sums", task="lab", max_response=9),
        TaskSettings(name="echo", task=ECHO, max_turns=2, layout="turns"),
    )
    how = {"task": "lab", "layout": "trajectory", "tasks": tasks, "steps": 2, "eval_every": 0}
    folder = train(game_run(tiny_pair, tmp_path / "alternate", **how))
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
    how |= {"task_order": "mixed", "prompts_per_step": 4, "save_batch_every": 1}
    folder = train(game_run(tiny_pair, tmp_path / "mixed", **how))
    row = rows(folder)[0]
    batch = load(folder / "batches" / "step_000000.safetensors")
    mine = batch.rows((batch.task == 1).nonzero()[:, 0])
    won = float(mine.reward[~mine.reward.isnan()].mean())
    assert row["task=echo/episodes/success"] == won
    assert row["task=echo/episodes/turns"] * 4 == pytest.approx(len(mine))
    assert "episodes/success" not in row
    assert len(batch) == 4 + len(mine)


def test_held_out_games_are_evaluated(tiny_pair) -> None:
    how = {"device": "cpu", "max_prompt": 200, "max_response": 6, "temperature": 1.0, "seed": 0}
    found = evaluate_folder(str(tiny_pair[0]), ECHO, problems=9, samples=2, **how)
    outcomes = [int(x) for x in found["outcomes"].replace(" ", "")]
    assert len(outcomes) == 18
    assert found["accuracy"] == pytest.approx(sum(outcomes) / 18) == found["episodes/success"]
    assert found["low"] < found["accuracy"] < found["high"]
    assert found["truncated"] == 0
    cut = evaluate_folder(str(tiny_pair[0]), ECHO, problems=9, max_turns=2, **how)
    assert cut["truncated"] == pytest.approx(1 / 3), "games of three turns are cut at two"
    assert cut["problem_set"] == found["problem_set"]


def test_the_doctor_reads_the_openings_of_games(tiny_pair) -> None:
    found = doctor.examine(
        *map(str, tiny_pair), task=ECHO, prompts=3, group=1, max_response=4, device="cpu"
    )
    games = GameTask(source="", make=Echo, seed=0)
    texts = [problem.prompt for problem in games.openings(games.train(0, 3))]
    assert {len(text) for text in texts} == {len("Task: 1 words\nSay it.")}
    longest = max(len(encode_one(make_tokenizer(), Problem(text, ""))) for text in texts)
    numbers = {finding.item: finding.numbers for finding in found}
    assert numbers["positions"]["prompt"] == longest


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"grader": "exact"}, "says itself who won"),
        ({"eval_task": "lab"}, "leave out eval_task='lab'"),
        (
            {"reward_weight": 1.0, "layout": "turns"},
            "reward_weight 1.0 compares .* set layout to trajectory",
        ),
        ({"baseline": "leave_one_out", "layout": "turns", "objective": "sampled_token"}, "layout"),
        ({"task": "env:castle"}, "unknown environment"),
    ],
)
def test_what_games_cannot_have_is_refused(
    tiny_pair, tmp_path: Path, changes: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(ValueError, match=wrong):
        train(game_run(tiny_pair, tmp_path / "run", **changes))


def test_a_reward_of_games_trains_with_whole_episodes(tiny_pair, tmp_path: Path) -> None:
    how = {"reward_weight": 0.5, "objective": "sampled_token", "steps": 1, "eval_every": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(rows(train(game_run(tiny_pair, tmp_path / "run", **how)))[0]["loss"])
