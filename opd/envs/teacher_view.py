"""The teacher's prompts in games: its view of every turn, or of the beginning of an episode.

With layout "turns" every row is a turn, whose view is rendered from the state of the game before
it. With layout "trajectory" a row is an episode, whose view is that of its first turn; the text
between the student's responses is the same for both models.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from opd.data.prompts import Prompts, decode_response
from opd.data.sources import DatasetProblem
from opd.data.teacher_view.values import Attempt
from opd.data.teacher_view.view import TeacherView, encode_teacher_prompt, teacher_problem
from opd.envs.packing import Sample, episode_samples
from opd.envs.rollout import Episode
from opd.envs.task import GameTask, format_observation, format_prompt

FEEDBACK = {
    "won": "The game was won in {} turns.",
    "lost": "The game was lost after {} turns.",
    "unfinished": "The game was not won within {} turns.",
    "full": "The game was not won within {} turns.",
}
"""Outcome of an episode -> what is said of it."""


def with_game_views(
    view: TeacherView,
    tokenizer: Any,
    eos: Sequence[int],
    games: GameTask,
    episodes: Sequence[Episode],
    prompts: Prompts,
) -> Prompts:
    """Put the teacher's prompts beside those of the student.

    Args:
        view: The view.
        tokenizer: The student's tokenizer.
        eos: Ids that end a response.
        games: The task.
        episodes: The episodes that the prompts were packed from.
        prompts: B prompts of `opd.envs.packing.pack_rows`.

    Returns:
        The prompts, whose `view` is what the teacher reads.
    """
    samples = episode_samples(episodes, games.layout)
    attempts = {id(s.episode): episode_attempt(s.episode) for s in samples}
    episodes_by_game: dict[int, list[Episode]] = {}
    for episode in dict.fromkeys(sample.episode for sample in samples):
        episodes_by_game.setdefault(episode.game, []).append(episode)
    decode = partial(decode_response, tokenizer, eos_ids=eos)
    ids = []
    for sample in samples:
        attempt = attempts[id(sample.episode)]
        if games.layout == "turns":
            attempt = replace(attempt, response=decode(sample.tokens))
        peers = [
            attempts[id(episode)]
            for episode in episodes_by_game[sample.episode.game]
            if episode is not sample.episode
        ]
        viewed_problem = teacher_problem(
            view,
            turn_problem(games, sample),
            attempt if view.reads_attempts else None,
            peers,
            turn_state(sample.episode, sample.turn),
        )
        ids.append(encode_teacher_prompt(view, tokenizer, viewed_problem))
    return replace(prompts, view=Prompts.from_ids(ids, prompts.index, prompts.answers))


def turn_problem(games: GameTask, sample: Sample) -> DatasetProblem:
    """Return the prompt of a row as the student read it."""
    episode, number = sample.episode, sample.turn
    past_turns = tuple(episode.past_turns[:number])
    observation = episode.turns[number].observation
    return games.problem(format_prompt(episode.goal, past_turns, observation, games.history))


def turn_state(episode: Episode, number: int) -> list[tuple[str, Any]]:
    """Return the state of a game before a turn, by the names that a view may use.

    Args:
        episode: The episode.
        number: Number of the turn, from 0 on.

    Returns:
        goal; observation, with the admissible actions; and turns, the previous ones, each with its
        observation and action.
    """
    turns = [
        {"observation": text, "action": action} for text, action in episode.past_turns[:number]
    ]
    observation = format_observation(episode.turns[number].observation)
    return [("goal", episode.goal), ("observation", observation), ("turns", turns)]


def episode_attempt(episode: Episode) -> Attempt:
    """Return an episode as an attempt: its observations and actions, and whether it was won."""
    lines = [
        f"{number}. {text}\n> {action}"
        for number, (text, action) in enumerate(episode.past_turns, 1)
    ]
    feedback = FEEDBACK[episode.outcome].format(len(episode.turns))
    return Attempt("\n".join(lines), float(episode.won), feedback)


def opening_view(
    view: TeacherView, games: GameTask, seed: int
) -> tuple[DatasetProblem, DatasetProblem]:
    """Return the first prompt of a game as the teacher and as the student read it.

    Args:
        view: The view.
        games: The task.
        seed: Seed of the game.

    Returns:
        The teacher's and the student's prompt, with an empty response if the view uses responses.

    Raises:
        InvalidInput: The template fails.
    """
    environment = games.make()
    observation = environment.begin(seed)
    environment.close()
    problem = games.problem(format_prompt(observation.goal, (), observation, 0))
    state = [
        ("goal", observation.goal),
        ("observation", format_observation(observation)),
        ("turns", []),
    ]
    attempt = Attempt("", 0.0, "")
    viewed_problem = teacher_problem(
        view, problem, attempt if view.reads_attempts else None, [attempt], state
    )
    return viewed_problem, problem
