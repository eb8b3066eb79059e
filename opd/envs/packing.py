"""Packing of episodes into rows of a batch, and their metrics."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diagnostics.batch import Rollouts
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.errors import InvalidInput
from diagnostics.ragged import right_pad
from opd.data.prompts import Prompts
from opd.envs.rollout import OUTCOMES, Episode


@dataclass(frozen=True)
class Sample:
    """A row before padding: a prompt, and tokens of which the student's own are supervised."""

    episode: Episode
    prompt: list[int]
    tokens: list[int]
    supervised: list[bool]
    """Whether each of `tokens` was sampled by the student."""
    sampler_logp: list[float]
    softmax_logp: list[float] | None
    ended: bool
    turn: int = 0
    """Index of the turn in its episode."""
    last: bool = True
    """Whether it is the last row of its episode."""


def samples_per_turn(episode: Episode) -> list[Sample]:
    """Return one row per turn; the reward belongs to the last one."""
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


def sample_per_episode(episode: Episode) -> list[Sample]:
    """Return one row for the whole episode.

    The row counts as ended if the game is over and the last response ended.

    Args:
        episode: An episode of layout "trajectory".

    Returns:
        A list of one row.

    Raises:
        InvalidInput: The turns are not one conversation.
    """
    first, last = episode.turns[0], episode.turns[-1]
    start = len(first.prompt)
    tokens: list[int] = []
    supervised: list[bool] = []
    logp: list[float] = []
    softmax_logp: list[float] = []
    for turn in episode.turns:
        prefix = first.prompt + tokens
        if turn.prompt[: len(prefix)] != prefix:
            raise InvalidInput(
                "the prompt of a turn does not start with the previous turns, so the episode "
                "cannot be one row; use layout turns"
            )
        between = turn.prompt[len(prefix) :]
        tokens = turn.prompt[start:] + turn.response
        supervised += [False] * len(between) + [True] * len(turn.response)
        logp += [0.0] * len(between) + turn.sampler_logp
        softmax_logp += [0.0] * len(between) + (turn.softmax_logp or [])
    ended = last.ended and episode.outcome in ("won", "lost")
    row_softmax_logp = None if last.softmax_logp is None else softmax_logp
    return [Sample(episode, first.prompt, tokens, supervised, logp, row_softmax_logp, ended)]


PACKERS: dict[str, Callable[[Episode], list[Sample]]] = {
    "turns": samples_per_turn,
    "trajectory": sample_per_episode,
}


def episode_samples(episodes: Sequence[Episode], layout: str) -> list[Sample]:
    """Return the rows of all episodes that did not fail, in the order of a batch.

    Args:
        episodes: The episodes.
        layout: "turns" or "trajectory".

    Returns:
        The rows before padding.

    Raises:
        InvalidInput: No episode has a turn.
    """
    played_episodes = [e for e in episodes if e.turns and e.outcome != "failed"]
    if not played_episodes:
        raise InvalidInput(
            f"none of {len(episodes)} episodes had a turn: every game was over before its first "
            "action"
        )
    return [sample for episode in played_episodes for sample in PACKERS[layout](episode)]


def pack_rows(
    episodes: Sequence[Episode], layout: str, *, temperature: float, top_p: float
) -> tuple[Prompts, Rollouts]:
    """Pack all episodes that did not fail into a batch.

    Rows of one game have the same prompt index, the sampling unit. The reward, 1 for a won game, is
    in the last row of an episode and NaN in the others.

    Args:
        episodes: The episodes.
        layout: "turns" or "trajectory".
        temperature: Temperature that they were sampled at.
        top_p: Nucleus that they were sampled from.

    Returns:
        Prompts and rollouts; `turn` counts from 0.

    Raises:
        InvalidInput: No episode has a turn.
    """
    samples = episode_samples(episodes, layout)
    games = [sample.episode.game for sample in samples]
    softmax_logp = [sample.softmax_logp for sample in samples]
    prompts = Prompts.from_ids([sample.prompt for sample in samples], torch.tensor(games))
    rollouts = Rollouts(
        tokens=right_pad([sample.tokens for sample in samples], torch.long),
        mask=right_pad([sample.supervised for sample in samples], torch.bool),
        sampler_logp=right_pad([sample.sampler_logp for sample in samples], torch.float32),
        softmax_logp=None if None in softmax_logp else right_pad(softmax_logp, torch.float32),
        prompt=prompts.index,
        ended=torch.tensor([sample.ended for sample in samples]),
        turn=torch.tensor([sample.turn for sample in samples]),
        reward=torch.tensor([float(s.episode.won) if s.last else math.nan for s in samples]),
        temperature=temperature,
        top_p=top_p,
    )
    return prompts, rollouts


def episode_accumulators(episodes: Sequence[Episode]) -> dict[str, Accumulator]:
    """Compute metrics of episodes, with standard errors over games.

    Args:
        episodes: The episodes.

    Returns:
        Accumulators of, under "episodes/":
        success, fraction of won episodes; turns, mean number of turns; invalid_share, fraction of
        turns with an inadmissible action; unfinished_share, fraction that reached max_turns;
        full_share, fraction whose next prompt exceeded max_prompt (all of them without failed
        episodes); failed_share, fraction of all episodes in which the environment failed.
    """
    game = torch.tensor([episode.game for episode in episodes], dtype=torch.long)
    has_outcome = {
        name: torch.tensor([e.outcome == name for e in episodes], dtype=torch.bool)
        for name in OUTCOMES
    }
    not_failed = ~has_outcome["failed"]
    turns = torch.tensor([float(len(episode.turns)) for episode in episodes])
    invalid = torch.tensor([float(sum(not t.admissible for t in e.turns)) for e in episodes])
    accumulators: dict[str, Accumulator] = {
        "episodes/success": Mean.from_values(has_outcome["won"], not_failed, game),
        "episodes/turns": Mean.from_values(turns, not_failed, game),
        "episodes/invalid_share": Mean.ratio(invalid, turns, not_failed, game),
        "episodes/failed_share": Mean.from_values(
            has_outcome["failed"], torch.ones_like(not_failed), game
        ),
    }
    for name in ("unfinished", "full"):
        accumulators[f"episodes/{name}_share"] = Mean.from_values(
            has_outcome[name], not_failed, game
        )
    return accumulators
