"""A text game, an engine that answers by a script, and rollouts of the game."""

from typing import Any

import torch

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.envs.base import Observation
from opd.envs.rollout import Episode, play_episodes
from opd.envs.task import GameTask
from opd.lab.build import make_tokenizer

ECHO = "env:tests.helpers.games:Echo"


def play_games(
    engine: Any, games: GameTask, seeds: list[int], group: int = 1, **options: Any
) -> list[Episode]:
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
