"""Multi-turn rollouts: the student plays many text games at once.

In every turn the next responses of all running episodes are sampled in one engine call. Only the
student's responses are supervised. A row of a batch is either one turn, whose prompt is all that
the student read in that turn, or a whole episode, in which the text between responses is masked
(`opd.envs.packing`). For an episode that is one conversation both have the same tokens after the
same prefixes, and therefore the same log-probabilities.

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
from opd.data.prompts import Prompts, decode_response, encode_prompt
from opd.envs.base import Environment, Observation
from opd.envs.task import (
    GameTask,
    continuation_ids,
    format_observation,
    format_prompt,
    parse_action,
    step_environment,
)
from opd.rollouts.base import BatchSlice, Engine

OUTCOMES = ("won", "lost", "unfinished", "full", "failed")
"""How episodes end: the game was won or lost; max_turns was reached; the next prompt would exceed
max_prompt; the environment raised an exception."""


@dataclass(frozen=True)
class Turn:
    """One prompt and response, as token ids."""

    prompt: list[int]
    response: list[int]
    sampler_logp: list[float]
    """Log-probabilities of the response under the distribution that was sampled from."""
    softmax_logp: list[float] | None
    """Log-probabilities of the response under the full softmax."""
    ended: bool
    """Whether the response ended with an EOS."""
    action: str
    admissible: bool
    """Whether the observation admits the action."""
    observation: Observation = field(default_factory=lambda: Observation(text=""))
    """What the player saw before the turn."""


@dataclass(eq=False)
class Episode:
    """A game in progress."""

    game: int
    """Index of the game, shared by all its episodes."""
    seed: int
    environment: Environment
    observation: Observation = field(default_factory=lambda: Observation(text=""))
    goal: str = ""
    past_turns: list[tuple[str, str]] = field(default_factory=list)
    """(observation text, action) of every turn."""
    turns: list[Turn] = field(default_factory=list)
    outcome: str = ""
    """One of OUTCOMES; "" while the episode is running."""
    error: str = ""
    """The exception of a failed episode."""

    @property
    def won(self) -> bool:
        """Whether the game was won."""
        return self.outcome == "won"

    def observe(self, next_observation: Callable[[], Observation]) -> None:
        """Receive the next observation; an exception of the environment ends the episode."""
        try:
            observation = next_observation()
        except Exception as error:  # of the user's environment: counted, and reported at the end
            self.outcome, self.error = "failed", f"{type(error).__name__}: {error}"
            return
        self.observation = observation
        if observation.over:
            self.outcome = "won" if observation.won else "lost"


def play_episodes(
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
    batch_slice: BatchSlice | None = None,
) -> list[Episode]:
    """Play `group` episodes of each game to their end.

    An action that the observation does not admit is not passed to the environment; the observation
    becomes "Nothing happens." with the same actions, and the turn counts. Failures of the
    environment are counted, and reported in a warning.

    Args:
        engine: Samples the responses.
        tokenizer: The student's tokenizer.
        eos: Ids that end a response.
        games: The task.
        seeds: (index, seed) of each game.
        group: Number of episodes per game.
        max_prompt: Maximum prompt length in tokens.
        max_response: Maximum response length of one turn in tokens.
        temperature: Softmax temperature.
        top_p: Probability mass of the nucleus.
        generator: Source of the noise.
        batch_slice: Which episodes of a larger batch these are; they get the same noise as in it.
            None: they are the whole batch. Episodes that have ended leave the noise of their
            remaining turns unused.

    Returns:
        The episodes, in order of `seeds`.

    Raises:
        InvalidInput: The first prompt of a game has more than `max_prompt` tokens.
        OperationFailed: Every episode failed; quotes the first exception.
    """
    episodes = [
        Episode(game=game, seed=seed, environment=games.make())
        for game, seed in seeds
        for _ in range(group)
    ]
    batch_slice = batch_slice or BatchSlice(list(range(len(episodes))), len(episodes))
    for episode in episodes:
        episode.observe(partial(episode.environment.begin, episode.seed))
        episode.goal = episode.observation.goal
    while True:
        requests: list[tuple[Episode, list[int]]] = []
        slice_rows: list[int] = []
        for episode, row in zip(episodes, batch_slice.rows, strict=True):
            if not episode.outcome:
                ids = next_prompt_ids(tokenizer, games, episode)
                if len(ids) > max_prompt:
                    end_overlong_episode(episode, len(ids), max_prompt)
                else:
                    requests.append((episode, ids))
                    slice_rows.append(row)
        if not requests:
            break
        rollouts = engine.sample(
            Prompts.from_ids([ids for _, ids in requests], torch.arange(len(requests))),
            eos,
            max_response=max_response,
            temperature=temperature,
            top_p=top_p,
            generator=generator,
            batch_slice=BatchSlice(slice_rows, batch_slice.total_rows),
        )
        for (episode, ids), response in zip(requests, response_rows(rollouts), strict=True):
            advance_episode(tokenizer, eos, games, episode, ids, *response)
    for episode in episodes:
        episode.environment.close()
    report_failures(episodes, games.source)
    return episodes


def report_failures(episodes: Sequence[Episode], source: str) -> None:
    """Warn about failed episodes.

    Args:
        episodes: All episodes.
        source: The task source, for the message.

    Raises:
        OperationFailed: All episodes failed.
    """
    failed = [episode for episode in episodes if episode.outcome == "failed"]
    if not failed:
        return
    text = f"{len(failed)} of {len(episodes)} episodes of {source} failed, the first (seed "
    text += f"{failed[0].seed}) with {failed[0].error}"
    if len(failed) == len(episodes):
        raise OperationFailed(text)
    warnings.warn(
        f"{text}; they are excluded from the batch and counted in the metrics",
        RuntimeWarning,
        stacklevel=3,
    )


def next_prompt_ids(tokenizer: Any, games: GameTask, episode: Episode) -> list[int]:
    """Return the token ids of an episode's next prompt."""
    if games.layout == "trajectory" and episode.turns:
        last = episode.turns[-1]
        prefix, opening = last.prompt + last.response, games.chat(episode.past_turns[0][0])
        return prefix + continuation_ids(
            tokenizer,
            opening,
            format_observation(episode.observation),
            prefix[-1],
            games.template,
        )
    text = format_prompt(
        episode.goal, tuple(episode.past_turns), episode.observation, games.history
    )
    return encode_prompt(tokenizer, games.problem(text))


def end_overlong_episode(episode: Episode, num_tokens: int, max_prompt: int) -> None:
    """End an episode whose next prompt is too long.

    Args:
        episode: The episode; its outcome becomes "full".
        num_tokens: Length of the prompt.
        max_prompt: Maximum prompt length in tokens.

    Raises:
        InvalidInput: It is the first prompt.
    """
    if not episode.turns:
        raise InvalidInput(
            f"the first prompt of the game with seed {episode.seed} has {num_tokens} tokens, but "
            f"max_prompt is {max_prompt}; increase max_prompt"
        )
    episode.outcome = "full"


def response_rows(
    rollouts: Rollouts,
) -> list[tuple[list[int], list[float], list[float] | None, bool]]:
    """Return ids, sampler_logp, softmax_logp and ended of each response, without padding."""
    sizes = rollouts.lengths.tolist()
    columns = [rollouts.tokens, rollouts.sampler_logp, rollouts.softmax_logp]
    lists = [[None] * len(sizes) if x is None else x.tolist() for x in columns]
    rows = zip(sizes, *lists, rollouts.ended.tolist(), strict=True)
    return [
        (ids[:n], logp[:n], softmax_logp and softmax_logp[:n], ended)
        for n, ids, logp, softmax_logp, ended in rows
    ]


def advance_episode(
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
    """Parse the action from a response, take it, and store the turn.

    Args:
        tokenizer: The student's tokenizer.
        eos: Ids that end a response.
        games: The task.
        episode: The episode.
        prompt: Ids of the prompt.
        response: Ids of the response.
        sampler_logp: Log-probabilities of the response when it was sampled.
        softmax_logp: Log-probabilities under the full softmax.
        ended: Whether the response ended with an EOS.
    """
    action, admissible = parse_action(
        decode_response(tokenizer, response, eos), episode.observation
    )
    episode.turns.append(
        Turn(
            prompt,
            response,
            sampler_logp,
            softmax_logp,
            ended,
            action,
            admissible,
            episode.observation,
        )
    )
    episode.past_turns.append((episode.observation.text, action))
    episode.observe(
        partial(step_environment, episode.environment, episode.observation, action, admissible)
    )
    if not episode.outcome and len(episode.turns) == games.max_turns:
        episode.outcome = "unfinished"
