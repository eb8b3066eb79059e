"""Define faults of sampling, objective and pair for `benchmarks.faults`.

Each is a small patch of the trainer's code, or a changed setting. The trainer contains no support
for them; a patch replaces the code where a real mistake would be.
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
from diagnostics.ragged import scatter_to_mask
from opd.config.settings import Config
from opd.models.forward import response_hidden_states
from opd.models.model import CausalLM, split_head
from opd.objectives.catalogue import KNOWN_ERRORS
from opd.objectives.factory import make_objective
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import Objective
from opd.rollouts.base import Engine
from opd.rollouts.hf_engine import HfEngine
from opd.scoring import score
from opd.teachers.factory import ModelObjects, make_pair, make_pairs
from opd.teachers.pair import ModelPair
from opd.training import setup, train

Change = Callable[[Engine, Any, Any, dict[str, Any]], Rollouts]


def sample_top_p(engine: Engine, prompts: Any, eos: Any, options: dict[str, Any]) -> Rollouts:
    """Sample from the 0.9 nucleus and declare the full softmax."""
    rollouts = engine.sample(prompts, eos, **options | {"top_p": 0.9})
    assert rollouts.softmax_logp is not None
    return replace(rollouts, top_p=1.0, sampler_logp=rollouts.softmax_logp)


def sample_tempered(engine: Engine, prompts: Any, eos: Any, options: dict[str, Any]) -> Rollouts:
    """Sample at temperature 0.8 and declare 1."""
    return replace(engine.sample(prompts, eos, **options | {"temperature": 0.8}), temperature=1.0)


def supervise_shifted(engine: Engine, prompts: Any, eos: Any, options: dict[str, Any]) -> Rollouts:
    """Supervise positions 1 to L instead of 0 to L - 1."""
    rollouts = engine.sample(prompts, eos, **options)
    mask = torch.zeros_like(rollouts.mask)
    mask[:, 1:] = rollouts.mask[:, :-1]
    return with_new_mask(rollouts, mask)


def supervise_padding(engine: Engine, prompts: Any, eos: Any, options: dict[str, Any]) -> Rollouts:
    """Supervise the positions after the end too."""
    rollouts = engine.sample(prompts, eos, **options)
    return with_new_mask(rollouts, torch.ones_like(rollouts.mask))


def with_new_mask(rollouts: Rollouts, mask: Tensor) -> Rollouts:
    """Return the rollouts with another mask."""

    def apply_mask(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0)

    assert rollouts.softmax_logp is not None
    return replace(
        rollouts,
        mask=mask,
        sampler_logp=apply_mask(rollouts.sampler_logp),
        softmax_logp=apply_mask(rollouts.softmax_logp),
    )


def sample_unchanged(engine: Engine, prompts: Any, eos: Any, options: dict[str, Any]) -> Rollouts:
    """Sample without a fault."""
    return engine.sample(prompts, eos, **options)


class FaultyEngine(HfEngine):
    """An engine whose samples are changed; with `frozen`, it keeps the initial weights."""

    def __init__(self, student: CausalLM, change: Change, frozen: bool) -> None:
        super().__init__(student)
        self.change, self.frozen = change, frozen
        if frozen:
            self.model = split_head(copy.deepcopy(student.network), student.vocabulary)

    def sample(self, prompts: Any, eos: list[int], **settings: Any) -> Rollouts:
        return self.change(HfEngine(self.model), prompts, eos, settings)

    def sync(self, model: CausalLM) -> None:
        if not self.frozen:
            super().sync(model)


def patch_engine(change: Change, frozen: bool = False) -> Any:
    """Replace the rollout engine by a faulty one."""
    return patch.object(
        train, "make_rollout_engine", lambda _, student: FaultyEngine(student, change, frozen)
    )


def late_hidden_states(model: CausalLM, prompts: Any, batch: Rollouts, mask: Tensor) -> Tensor:
    """Return the hidden states one position late, which contain the token that they score."""
    states = scatter_to_mask(response_hidden_states(model, prompts, batch, mask), mask)
    return states.roll(-1, 1)[mask]


def k1_objective(_: Config) -> Objective:
    """Return k1 differentiated directly: its gradient ignores the teacher and has mean zero."""
    return KNOWN_ERRORS["k1"][0]


def negated_objective(_: Config) -> Objective:
    """Return the full reverse KL with the wrong sign."""
    objective = make_objective("full_reverse_kl")
    negated = replace(objective.local, surrogate=lambda inputs: -objective.local.surrogate(inputs))
    return replace(objective, local=negated)


def detached_objective(_: Config) -> Objective:
    """Return an objective with the right value and no gradient."""
    objective = make_objective("full_reverse_kl")

    def surrogate(inputs: TokenInputs) -> Tensor:
        loss = objective.local.surrogate(inputs)
        return loss.detach() + 0 * loss

    return replace(objective, local=replace(objective.local, surrogate=surrogate))


MakePairs = Callable[[list[Config], ModelObjects, int], list[ModelPair]]
"""Takes the place of `opd.teachers.factory.make_pairs`."""


def with_shifted_ids(
    settings: list[Config], objects: ModelObjects, num_chosen: int
) -> list[ModelPair]:
    """Return a teacher with another tokenizer of the same size: its ids are one higher."""
    pairs = make_pairs(settings, objects, num_chosen)
    weight = pairs[0].teacher.model.network.lm_head.weight
    weight.data = weight.data.roll(1, 0)
    return pairs


def with_swapped_ids(ids: Tensor, other_ids: Tensor) -> MakePairs:
    """Return a factory of pairs whose teacher has `ids` and `other_ids` swapped."""

    def make_swapped_pairs(
        settings: list[Config], objects: ModelObjects, num_chosen: int
    ) -> list[ModelPair]:
        pairs = make_pairs(settings, objects, num_chosen)
        weight = pairs[0].teacher.model.network.lm_head.weight
        weight.data[torch.cat([ids, other_ids])] = weight.data[torch.cat([other_ids, ids])]
        return pairs

    return make_swapped_pairs


def with_other_eos(
    settings: list[Config], objects: ModelObjects, num_chosen: int
) -> list[ModelPair]:
    """Return a teacher with other EOS ids than the student; generation stops at all of them."""
    return with_swapped_ids(torch.arange(10), torch.arange(10, 20))(settings, objects, num_chosen)


def with_other_tag(
    settings: list[Config], objects: ModelObjects, num_chosen: int
) -> list[ModelPair]:
    """Return a teacher with other ids for the three tokens most often predicted confidently."""
    pair = make_pair(settings[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, pair.student.vocabulary, (64, 16), generator=generator)
    with torch.no_grad():
        p = pair.student.network(ids).logits.softmax(-1)
    sure, top_ids = p.max(-1)
    count = torch.bincount(top_ids[sure > 0.9], minlength=pair.student.vocabulary)
    count[:20] = 0  # EOS ids have a separate fault
    rare = p.mean((0, 1))
    rare[:20] = 1.0
    return with_swapped_ids(count.topk(3).indices, rare.topk(3, largest=False).indices)(
        settings, objects, num_chosen
    )


@dataclass(frozen=True)
class Fault:
    """A patch to the trainer and changes to its settings."""

    patched: Callable[[], Any] = nullcontext
    """Context manager that applies the patch."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Changed settings."""
    prepare: Callable[[Path, tuple[str, str]], Mapping[str, Any]] = lambda folder, pair: {}
    """Write files to a folder, given the student's and the teacher's, and return settings."""
    architecture: str = "qwen2"
    """`model_type` of the pair in transformers."""


def patch_pairs(make_pairs_patched: MakePairs) -> Any:
    """Replace the factory of pairs."""
    return patch.object(train, "make_pairs", make_pairs_patched)


OTHER_TEACHER = {"start_checks": False}
"""The start checks would detect the patched teacher; it simulates one that was saved like this."""

SAMPLING_FAULTS: dict[str, Fault] = {
    "top-p 0.9, undeclared": Fault(lambda: patch_engine(sample_top_p)),
    "temperature 0.8, undeclared": Fault(lambda: patch_engine(sample_tempered)),
    "mask shifted by one": Fault(lambda: patch_engine(supervise_shifted)),
    "padding counted": Fault(lambda: patch_engine(supervise_padding)),
    "stale weights": Fault(lambda: patch_engine(sample_unchanged, frozen=True)),
    "scored one token late": Fault(
        lambda: patch.object(score, "response_hidden_states", late_hidden_states)
    ),
    "k1 differentiated": Fault(lambda: patch.object(setup, "objective_from_config", k1_objective)),
    "wrong sign": Fault(lambda: patch.object(setup, "objective_from_config", negated_objective)),
    "un-normalised top-K": Fault(
        settings={"objective": "teacher_topk_unnormalised", "allow_collapse": True, "lr": 0.01}
    ),
    "learning rate 3": Fault(settings={"lr": 3.0}),
    "teacher's ids one higher": Fault(lambda: patch_pairs(with_shifted_ids), OTHER_TEACHER),
    "teacher ends otherwise": Fault(lambda: patch_pairs(with_other_eos), OTHER_TEACHER),
    "teacher's tag is another": Fault(lambda: patch_pairs(with_other_tag), OTHER_TEACHER),
    "gradient stopped": Fault(
        lambda: patch.object(setup, "objective_from_config", detached_objective)
    ),
}
