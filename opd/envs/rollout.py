"""Episodes: games that the student plays in text, all live ones at once, and their rows.

Every turn the live episodes ask the engine for their next response in one call. Only what the
student said is supervised. A row is one turn, whose prompt is all that the student read then; or a
whole episode, in which what it read in between is masked. Of an episode that is one conversation
both have the same tokens after the same tokens, and so the same log-probabilities.

Shapes: B rows, T positions.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from diagnostics.batch import Rollouts
from diagnostics.core.totals import Mean, Total
from diagnostics.errors import InvalidInput, OperationFailed
from opd.data.tasks import Prompts, encode_one, response_text
from opd.envs.base import Environment, Scene
from opd.envs.task import Games, action_of, answered, continued, now, told
from opd.rollouts.factory import Engine
from opd.rollouts.hf_engine import Share

OUTCOMES = ("won", "lost", "unfinished", "full", "failed")
"""How episodes end: by the game; after max_turns; no room for the next prompt; by its failure."""


@dataclass(frozen=True)
class Turn:
    """What the student read and said, in ids; the sampler's log-probabilities of what it said."""

    prompt: list[int]
    response: list[int]
    sampler_logp: list[float]
    softmax_logp: list[float] | None
    ended: bool
    action: str
    admitted: bool


@dataclass(eq=False)
class Episode:
    """A game being played; game: its number, shared by all episodes of that game."""

    game: int
    seed: int
    environment: Environment
    scene: Scene = field(default_factory=lambda: Scene(text=""))
    goal: str = ""
    past: list[tuple[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    outcome: str = ""
    error: str = ""

    @property
    def won(self) -> bool:
        return self.outcome == "won"

    def show(self, play: Callable[[], Scene]) -> None:
        """Take the next scene; what the environment raises ends the episode."""
        try:
            scene = play()
        except Exception as error:  # of code that is not ours: counted, and told by `play`
            self.outcome, self.error = "failed", f"{type(error).__name__}: {error}"
            return
        self.scene = scene
        if scene.over:
            self.outcome = "won" if scene.won else "lost"


def play(
    engine: Engine,
    tokenizer: Any,
    eos: list[int],
    games: Games,
    seeds: Sequence[tuple[int, int]],
    group: int,
    *,
    max_prompt: int,
    max_response: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    share: Share | None = None,
) -> list[Episode]:
    """`group` episodes of the game of each (number, seed), in order, played to their end.

    share: these episodes among those of a larger batch, whose noise they have; the number of each
    episode otherwise. An episode that is over leaves the noise of its further turns unused.

    An action that the scene does not admit is not handed to the environment; the scene stays, under
    "Nothing happens.", and the turn counts. Failures of the environment are warned of and counted.

    Raises:
      ValueError: an opening has more than `max_prompt` tokens.
      RuntimeError: every episode failed; has the first one's error.
    """
    episodes = [
        Episode(game=game, seed=seed, environment=games.make())
        for game, seed in seeds
        for _ in range(group)
    ]
    share = share or Share(list(range(len(episodes))), len(episodes))
    for episode in episodes:
        episode.show(partial(episode.environment.begin, episode.seed))
        episode.goal = episode.scene.goal
    while True:
        asked: list[tuple[Episode, list[int]]] = []
        places: list[int] = []
        for episode, place in zip(episodes, share.rows, strict=True):
            if not episode.outcome:
                ids = reading(tokenizer, games, episode)
                if len(ids) > max_prompt:
                    overflow(episode, len(ids), max_prompt)
                else:
                    asked.append((episode, ids))
                    places.append(place)
        if not asked:
            break
        rollouts = engine.sample(
            padded([ids for _, ids in asked], list(range(len(asked)))),
            eos,
            max_response=max_response,
            temperature=temperature,
            top_p=top_p,
            generator=generator,
            share=Share(places, share.of),
        )
        for (episode, ids), said in zip(asked, spoken(rollouts), strict=True):
            advance(tokenizer, eos, games, episode, ids, *said)
    for episode in episodes:
        episode.environment.close()
    tell_failures(episodes, games.source)
    return episodes


def tell_failures(episodes: Sequence[Episode], source: str) -> None:
    """Warn of failed episodes; an error if all are."""
    failed = [episode for episode in episodes if episode.outcome == "failed"]
    if not failed:
        return
    text = f"{len(failed)} of {len(episodes)} episodes of {source} failed, the first (seed "
    text += f"{failed[0].seed}) with {failed[0].error}"
    if len(failed) == len(episodes):
        raise OperationFailed(text)
    warnings.warn(f"{text}; they are left out, and counted", RuntimeWarning, stacklevel=3)


def reading(tokenizer: Any, games: Games, episode: Episode) -> list[int]:
    """Ids that the student reads before its next response."""
    if games.layout == "trajectory" and episode.turns:
        last = episode.turns[-1]
        so_far, opening = last.prompt + last.response, games.chat(episode.past[0][0])
        return so_far + continued(tokenizer, opening, now(episode.scene), so_far[-1])
    text = told(episode.goal, tuple(episode.past), episode.scene, games.history)
    return encode_one(tokenizer, games.question(text))


def overflow(episode: Episode, tokens: int, max_prompt: int) -> None:
    if not episode.turns:
        raise InvalidInput(
            f"the opening of the game of seed {episode.seed} has {tokens} tokens, max_prompt is "
            f"{max_prompt}; raise it"
        )
    episode.outcome = "full"


def spoken(rollouts: Rollouts) -> list[tuple[list[int], list[float], list[float] | None, bool]]:
    """Of each row the ids, the sampler's log-probabilities (both kinds), and whether it ended."""
    sizes = rollouts.lengths.tolist()
    columns = [rollouts.tokens, rollouts.sampler_logp, rollouts.softmax_logp]
    told = [[None] * len(sizes) if x is None else x.tolist() for x in columns]
    rows = zip(sizes, *told, rollouts.ended.tolist(), strict=True)
    return [(ids[:n], logp[:n], soft and soft[:n], end) for n, ids, logp, soft, end in rows]


def advance(
    tokenizer: Any,
    eos: Sequence[int],
    games: Games,
    episode: Episode,
    prompt: list[int],
    response: list[int],
    sampler_logp: list[float],
    softmax_logp: list[float] | None,
    ended: bool,
) -> None:
    """One turn of an episode: the action is read from the response, and taken."""
    action, admitted = action_of(response_text(tokenizer, response, eos), episode.scene)
    episode.turns.append(
        Turn(prompt, response, sampler_logp, softmax_logp, ended, action, admitted)
    )
    episode.past.append((episode.scene.text, action))
    episode.show(partial(answered, episode.environment, episode.scene, action, admitted))
    if not episode.outcome and len(episode.turns) == games.max_turns:
        episode.outcome = "unfinished"


# --- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A row before padding: ids read first, then ids with what the student said marked."""

    episode: Episode
    prompt: list[int]
    tokens: list[int]
    own: list[bool]
    sampler_logp: list[float]
    softmax_logp: list[float] | None
    ended: bool
    turn: int = 0
    last: bool = True


def by_turn(episode: Episode) -> list[Sample]:
    """A row for each turn; the last one has the reward."""
    return [
        Sample(
            episode,
            turn.prompt,
            turn.response,
            [True] * len(turn.response),
            turn.sampler_logp,
            turn.softmax_logp,
            turn.ended,
            number,
            last=number == len(episode.turns) - 1,
        )
        for number, turn in enumerate(episode.turns)
    ]


def as_one(episode: Episode) -> list[Sample]:
    """One row for the whole episode; it ended if the game did, and the last response.

    Raises:
      ValueError: its turns are not one conversation.
    """
    first, last = episode.turns[0], episode.turns[-1]
    start = len(first.prompt)
    tokens: list[int] = []
    own: list[bool] = []
    logp: list[float] = []
    soft: list[float] = []
    for turn in episode.turns:
        so_far = first.prompt + tokens
        if turn.prompt[: len(so_far)] != so_far:
            raise InvalidInput("turns that do not begin with the turns before cannot be one row")
        between = turn.prompt[len(so_far) :]
        tokens = turn.prompt[start:] + turn.response
        own += [False] * len(between) + [True] * len(turn.response)
        logp += [0.0] * len(between) + turn.sampler_logp
        soft += [0.0] * len(between) + (turn.softmax_logp or [])
    ended = last.ended and episode.outcome in ("won", "lost")
    whole = None if last.softmax_logp is None else soft
    return [Sample(episode, first.prompt, tokens, own, logp, whole, ended)]


PACKED: dict[str, Callable[[Episode], list[Sample]]] = {"turns": by_turn, "trajectory": as_one}


def rows_of(
    episodes: Sequence[Episode], layout: str, *, temperature: float, top_p: float
) -> tuple[Prompts, Rollouts]:
    """All rows of episodes that did not fail.

    Rows of one game share their prompt's number, the sampling unit; `turn` counts from 0. The
    reward, 1 for a game that was won, stands in an episode's last row, NaN in others.

    Raises:
      ValueError: no episode has a turn.
    """
    played = [e for e in episodes if e.turns and e.outcome != "failed"]
    if not played:
        raise InvalidInput(f"none of {len(episodes)} episodes had a turn; the games begin ended")
    samples = [sample for episode in played for sample in PACKED[layout](episode)]
    games = [sample.episode.game for sample in samples]
    soft = [sample.softmax_logp for sample in samples]
    prompts = padded([sample.prompt for sample in samples], games)
    rollouts = Rollouts(
        tokens=right([sample.tokens for sample in samples], torch.long),
        mask=right([sample.own for sample in samples], torch.bool),
        sampler_logp=right([sample.sampler_logp for sample in samples], torch.float32),
        softmax_logp=None if None in soft else right(soft, torch.float32),
        prompt=prompts.index,
        ended=torch.tensor([sample.ended for sample in samples]),
        turn=torch.tensor([sample.turn for sample in samples]),
        reward=torch.tensor([float(s.episode.won) if s.last else math.nan for s in samples]),
        temperature=temperature,
        top_p=top_p,
    )
    return prompts, rollouts


def padded(prompts: Sequence[list[int]], index: list[int]) -> Prompts:
    """Prompts padded on the left."""
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, ids in enumerate(prompts):
        tokens[i, width - len(ids) :] = torch.tensor(ids)
        mask[i, width - len(ids) :] = True
    return Prompts(tokens=tokens, mask=mask, index=torch.tensor(index), answers=[""] * len(prompts))


def right(rows: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    """(B, T) of rows of numbers, padded on the right with zeros."""
    found = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row, dtype=dtype)
    return found


def totals(episodes: Sequence[Episode]) -> dict[str, Total]:
    """What became of the episodes, with errors over games.

    success: share of all won, failed ones aside; turns: mean number of an episode; invalid_share:
    of turns, whose action the scene did not admit; unfinished_share: cut at max_turns; full_share:
    no room for the next prompt; failed_share: of all, those that the environment failed in.
    """
    game = torch.tensor([episode.game for episode in episodes], dtype=torch.long)
    ways = {
        name: torch.tensor([e.outcome == name for e in episodes], dtype=torch.bool)
        for name in OUTCOMES
    }
    played = ~ways["failed"]
    turns = torch.tensor([float(len(episode.turns)) for episode in episodes])
    invalid = torch.tensor([float(sum(not t.admitted for t in e.turns)) for e in episodes])
    found: dict[str, Total] = {
        "episodes/success": Mean.of(ways["won"], played, game),
        "episodes/turns": Mean.of(turns, played, game),
        "episodes/invalid_share": Mean.ratio(invalid, turns, played, game),
        "episodes/failed_share": Mean.of(ways["failed"], torch.ones_like(played), game),
    }
    for name in ("unfinished", "full"):
        found[f"episodes/{name}_share"] = Mean.of(ways[name], played, game)
    return found
