"""Pack the turns of text games into rows of a batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diagnostics.batch import Rollouts
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.errors import InvalidInput
from opd.data.prompts import Prompts
from opd.envs.rollout import OUTCOMES, Episode, padded, right


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


def totals(episodes: Sequence[Episode]) -> dict[str, Accumulator]:
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
    found: dict[str, Accumulator] = {
        "episodes/success": Mean.of(ways["won"], played, game),
        "episodes/turns": Mean.of(turns, played, game),
        "episodes/invalid_share": Mean.ratio(invalid, turns, played, game),
        "episodes/failed_share": Mean.of(ways["failed"], torch.ones_like(played), game),
    }
    for name in ("unfinished", "full"):
        found[f"episodes/{name}_share"] = Mean.of(ways[name], played, game)
    return found
