"""Faults of sampling, of the objective and of the pair, for `benchmarks.faults`.

Each is a small patch of the trainer's own code, or a changed setting. Nothing in the trainer knows
of them; a patch stands where a real mistake would.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from opd.config.settings import Config
from opd.models.forward import response_hidden, spread
from opd.models.model import CausalLM, split
from opd.objectives.catalogue import ERRORS
from opd.objectives.factory import Objective, make
from opd.rollouts.base import Engine
from opd.rollouts.hf_engine import HfEngine
from opd.scoring import score
from opd.teachers.factory import make_pair, make_pairs
from opd.teachers.pair import ModelPair
from opd.training import train

Change = Callable[[Engine, Any, Any, dict[str, Any]], Rollouts]


def top_p(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    """Draw from the 0.9 nucleus and declare the whole softmax."""
    drawn = engine.sample(prompts, eos, **how | {"top_p": 0.9})
    assert drawn.softmax_logp is not None
    return replace(drawn, top_p=1.0, sampler_logp=drawn.softmax_logp)


def temperature(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    """Draw at 0.8 and declare 1."""
    return replace(engine.sample(prompts, eos, **how | {"temperature": 0.8}), temperature=1.0)


def shifted_mask(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    """Supervise positions 1 to L in place of 0 to L - 1."""
    drawn = engine.sample(prompts, eos, **how)
    mask = torch.zeros_like(drawn.mask)
    mask[:, 1:] = drawn.mask[:, :-1]
    return remasked(drawn, mask)


def padding(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    """Supervise what follows the end."""
    drawn = engine.sample(prompts, eos, **how)
    return remasked(drawn, torch.ones_like(drawn.mask))


def remasked(drawn: Rollouts, mask: Tensor) -> Rollouts:
    def cut(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0)

    assert drawn.softmax_logp is not None
    return replace(
        drawn,
        mask=mask,
        sampler_logp=cut(drawn.sampler_logp),
        softmax_logp=cut(drawn.softmax_logp),
    )


def whole(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    return engine.sample(prompts, eos, **how)


class Faulty(HfEngine):
    """The engine with a change to what it samples; `frozen` keeps the weights of the start."""

    def __init__(self, student: CausalLM, change: Change, frozen: bool) -> None:
        super().__init__(student)
        self.change, self.frozen = change, frozen
        if frozen:
            self.model = split(copy.deepcopy(student.network), student.vocabulary)

    def sample(self, prompts: Any, eos: list[int], **settings: Any) -> Rollouts:
        return self.change(HfEngine(self.model), prompts, eos, settings)

    def sync(self, model: CausalLM) -> None:
        if not self.frozen:
            super().sync(model)


def sampled_by(change: Change, frozen: bool = False) -> Any:
    return patch.object(train, "sampler", lambda _, student: Faulty(student, change, frozen))


def late(model: CausalLM, prompts: Any, batch: Rollouts, mask: Tensor) -> Tensor:
    """The states that predict the token after: they have seen the token that they score."""
    states = spread(response_hidden(model, prompts, batch, mask), mask)
    return states.roll(-1, 1)[mask]


def k1(_: Config) -> Objective:
    """k1 differentiated directly: its gradient does not know the teacher, and has mean zero."""
    return ERRORS["k1"][0]()


def upside_down(_: Config) -> Objective:
    made = make("full_reverse_kl")
    return replace(made, local=lambda at: -made.local(at))


def stopped(_: Config) -> Objective:
    """A loss of the right value that no gradient comes from."""
    made = make("full_reverse_kl")
    return replace(made, local=lambda at: made.local(at).detach() + 0 * made.local(at))


def renumbered(settings: list[Config]) -> list[ModelPair]:
    """A teacher with another tokenizer of the same size: its ids are one higher."""
    pairs = make_pairs(settings)
    weight = pairs[0].teacher.network.lm_head.weight
    weight.data = weight.data.roll(1, 0)
    return pairs


def exchanged(ids: Tensor, others: Tensor) -> Callable[[list[Config]], list[ModelPair]]:
    """Pairs whose teacher says each of `others` where it would say the id beside it, and back."""

    def made(settings: list[Config]) -> list[ModelPair]:
        pairs = make_pairs(settings)
        weight = pairs[0].teacher.network.lm_head.weight
        weight.data[torch.cat([ids, others])] = weight.data[torch.cat([others, ids])]
        return pairs

    return made


def ends_renamed(settings: list[Config]) -> list[ModelPair]:
    """A teacher that ends with other ids than the student; both stop at all of them."""
    return exchanged(torch.arange(10), torch.arange(10, 20))(settings)


def tag_renamed(settings: list[Config]) -> list[ModelPair]:
    """A teacher that has other tokens for the three that the student is sure of most often."""
    pair = make_pair(settings[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, pair.student.vocabulary, (64, 16), generator=generator)
    with torch.no_grad():
        p = pair.student.network(ids).logits.softmax(-1)
    sure, said = p.max(-1)
    count = torch.bincount(said[sure > 0.9], minlength=pair.student.vocabulary)
    count[:20] = 0  # ends have a fault of their own
    rare = p.mean((0, 1))
    rare[:20] = 1.0
    return exchanged(count.topk(3).indices, rare.topk(3, largest=False).indices)(settings)


@dataclass(frozen=True)
class Fault:
    """A patch to the trainer and changes to its settings.

    prepare: writes files in a folder, given the student's and the teacher's, and returns settings;
    architecture: of the pair, a `model_type` of transformers.
    """

    patched: Callable[[], Any] = nullcontext
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path, tuple[str, str]], Mapping[str, Any]] = lambda folder, pair: {}
    architecture: str = "qwen2"


def with_pairs_of(made: Callable[[list[Config]], list[ModelPair]]) -> Any:
    return patch.object(train, "make_pairs", made)


OTHER_TEACHER = {"start_checks": False}
"""The patched teacher stands for one that was saved so; the start would see that it was not."""

SAMPLING_FAULTS: dict[str, Fault] = {
    "top-p 0.9, undeclared": Fault(lambda: sampled_by(top_p)),
    "temperature 0.8, undeclared": Fault(lambda: sampled_by(temperature)),
    "mask shifted by one": Fault(lambda: sampled_by(shifted_mask)),
    "padding counted": Fault(lambda: sampled_by(padding)),
    "stale weights": Fault(lambda: sampled_by(whole, frozen=True)),
    "scored one token late": Fault(lambda: patch.object(score, "response_hidden", late)),
    "k1 differentiated": Fault(lambda: patch.object(train, "make_objective", k1)),
    "wrong sign": Fault(lambda: patch.object(train, "make_objective", upside_down)),
    "un-normalised top-K": Fault(
        settings={"objective": "teacher_topk_unnormalised", "allow_collapse": True, "lr": 0.01}
    ),
    "learning rate 3": Fault(settings={"lr": 3.0}),
    "teacher's ids one higher": Fault(lambda: with_pairs_of(renumbered), OTHER_TEACHER),
    "teacher ends otherwise": Fault(lambda: with_pairs_of(ends_renamed), OTHER_TEACHER),
    "teacher's tag is another": Fault(lambda: with_pairs_of(tag_renamed), OTHER_TEACHER),
    "gradient stopped": Fault(lambda: patch.object(train, "make_objective", stopped)),
}
