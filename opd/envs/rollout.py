"""Episodes: games that the student plays in text, all live ones at once, and their rows.

Every turn the live episodes ask the engine for their next response in one call. Only what the
student said is supervised. A row is one turn, whose prompt is all that the student read then; or a
whole episode, in which what it read in between is masked. Of an episode that is one conversation
both have the same tokens after the same tokens, and so the same log-probabilities.

Shapes: B rows, T positions.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput, OperationFailed
from opd.data.prompts import Prompts, encode_one, response_text
from opd.envs.base import Environment, Observation
from opd.envs.task import GameTask, action_of, answered, continued, now, told
from opd.rollouts.base import BatchSlice, Engine

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
    scene: Observation = field(default_factory=lambda: Observation(text=""))
    goal: str = ""
    past: list[tuple[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    outcome: str = ""
    error: str = ""

    @property
    def won(self) -> bool:
        return self.outcome == "won"

    def show(self, play: Callable[[], Observation]) -> None:
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
    games: GameTask,
    seeds: Sequence[tuple[int, int]],
    group: int,
    *,
    max_prompt: int,
    max_response: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    share: BatchSlice | None = None,
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
    share = share or BatchSlice(list(range(len(episodes))), len(episodes))
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
            share=BatchSlice(places, share.of),
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


def reading(tokenizer: Any, games: GameTask, episode: Episode) -> list[int]:
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
    games: GameTask,
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
