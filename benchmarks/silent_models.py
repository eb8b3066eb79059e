"""Faults of models and scores without a visible trend, for `benchmarks.silent`."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.injected import FaultyEngine, patch_engine, sample_unchanged
from diagnostics.batch import Rollouts, ScoredRollouts, Support
from opd.config.settings import Config
from opd.models.forward import response_hidden_states
from opd.models.model import CausalLM, split_head
from opd.rollouts.base import Engine
from opd.scoring import columns, score
from opd.scoring.score import ScoredBatch
from opd.teachers.factory import ModelObjects, make_pairs
from opd.teachers.pair import ModelPair
from opd.training import train
from opd.training.state import TaskState


def change_pairs(change: Callable[[ModelPair], ModelPair | None]) -> AbstractContextManager[Any]:
    """Replace the pairs by those that `change` modified in place or returned."""

    def make_changed_pairs(
        settings: list[Config], objects: ModelObjects, num_chosen: int
    ) -> list[ModelPair]:
        return [change(pair) or pair for pair in make_pairs(settings, objects, num_chosen)]

    return patch.object(train, "make_pairs", make_changed_pairs)


def with_teacher_model(pair: ModelPair, model: CausalLM) -> ModelPair:
    """Return the pair with another model of its teacher, which is on no server."""
    teacher = copy.copy(pair.teacher)
    teacher.model = model
    return replace(pair, teacher=teacher)


def enable_dropout(role: str, pair: ModelPair) -> None:
    """Put a model in training mode, with attention dropout."""
    network = (pair.student if role == "student" else pair.teacher.model).network
    network.train()
    for module in network.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1


def cast_teacher(pair: ModelPair) -> None:
    """Cast the teacher to bfloat16."""
    pair.teacher.model.network.to(torch.bfloat16)


def round_weights(pair: ModelPair) -> None:
    """Round the teacher's weights to bfloat16."""
    for weight in pair.teacher.model.network.parameters():
        weight.data = weight.data.bfloat16().float()


def ignore_mask(pair: ModelPair) -> ModelPair:
    """Let the teacher ignore the attention mask."""
    plain = pair.teacher.model.hidden

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        return plain(ids, torch.ones_like(attention), positions)

    return with_teacher_model(pair, replace(pair.teacher.model, hidden=hidden))


def exchange_roles(pair: ModelPair) -> ModelPair:
    """Swap student and teacher."""
    pair.teacher.model.network.requires_grad_(True)
    return replace(with_teacher_model(pair, pair.student), student=pair.teacher.model)


def share_head(pair: ModelPair) -> ModelPair:
    """Let the teacher's head be the student's own tensor."""
    teacher = pair.teacher.model
    teacher.network.lm_head.weight = pair.student.network.lm_head.weight
    return with_teacher_model(pair, split_head(teacher.network, teacher.vocabulary))


def change_scores(
    change: Callable[[ScoredRollouts, list[ScoredRollouts]], ScoredRollouts],
) -> AbstractContextManager[Any]:
    """Change the scored batches; `change` also receives the unchanged ones of earlier steps."""
    plain, earlier = score.score_batch, list[ScoredRollouts]()

    def score_and_change(*args: Any) -> ScoredBatch:
        batch = plain(*args)
        changed_scores = change(batch.scored, earlier)
        earlier.append(batch.scored)
        return replace(batch, scored=changed_scores)

    return patch.object(train, "score_batch", score_and_change)


def stale_teacher_scores(batch: ScoredRollouts, earlier: list[ScoredRollouts]) -> ScoredRollouts:
    """Use the teacher's log-probabilities of the previous step, as far as positions exist."""
    if not earlier:
        return batch
    old, now = earlier[-1].teacher_logp, torch.zeros_like(batch.teacher_logp)
    width = min(old.shape[1], now.shape[1])
    now[:, :width] = old[:, :width]
    return replace(batch, teacher_logp=torch.where(batch.mask, now, 0.0))


def other_row_scores(batch: ScoredRollouts, _: list[ScoredRollouts]) -> ScoredRollouts:
    """Use the teacher's log-probabilities of the previous row."""
    rolled = batch.teacher_logp.roll(1, 0)
    return replace(batch, teacher_logp=torch.where(batch.mask, rolled, 0.0))


def change_support(change: Callable[[Support], Support]) -> AbstractContextManager[Any]:
    """Change the support of the scored batches."""

    def change_batch(batch: ScoredRollouts, _: list[ScoredRollouts]) -> ScoredRollouts:
        assert batch.support is not None
        return replace(batch, support=change(batch.support))

    return change_scores(change_batch)


def shift_ids(support: Support) -> Support:
    """Use ids and both log-probabilities of the previous position."""
    columns = {k: getattr(support, k).roll(1, 1) for k in ("ids", "student_logp", "teacher_logp")}
    return replace(support, **columns)


def renormalise(support: Support) -> Support:
    """Renormalise both log-probabilities on the support."""
    student_logp, teacher_logp = support.student_logp, support.teacher_logp
    return replace(
        support,
        student_logp=student_logp.log_softmax(-1),
        teacher_logp=teacher_logp.log_softmax(-1),
    )


def scale_support_mass(support: Support) -> Support:
    """Lower both log-probabilities so that only a fifth of the support's mass remains."""
    low = torch.tensor(0.2).log()
    return replace(
        support, student_logp=support.student_logp + low, teacher_logp=support.teacher_logp + low
    )


def repeat_first_id(support: Support) -> Support:
    """Include the most probable id twice."""
    columns = {}
    for name in ("ids", "student_logp", "teacher_logp"):
        x = getattr(support, name).clone()
        x[..., -1] = x[..., 0]
        columns[name] = x
    return replace(support, **columns)


def ranks_from_two(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ranks 2 to K + 1 instead of ranks 1 to K."""
    best = logits.topk(k + 1, -1)
    return best.values[..., 1:], best.indices[..., 1:]


def support_at_temperature(factor: float) -> AbstractContextManager[Any]:
    """Divide the student's logits of the support by another temperature than the sampler's."""
    return patch.object(columns, "apply_temperature", lambda logits, T: logits / (factor * T))


def patch_sampler_softmax() -> AbstractContextManager[Any]:
    """Let the engine return the full softmax of the step before, as far as positions exist."""
    earlier: list[Tensor] = []

    def sample_stale(engine: Engine, prompts: Any, eos: Any, options: dict[str, Any]) -> Rollouts:
        rollouts = engine.sample(prompts, eos, **options)
        now = rollouts.softmax_logp
        assert now is not None
        stale = now.clone()
        if earlier:
            rows, width = (min(x, y) for x, y in zip(now.shape, earlier[-1].shape, strict=True))
            stale[:rows, :width] = earlier[-1][:rows, :width]
        earlier.append(now)
        return replace(rollouts, softmax_logp=torch.where(rollouts.mask, stale, 0.0))

    return patch_engine(sample_stale)


def positions_from_zero(model: CausalLM, prompts: Any, batch: Any, mask: Tensor) -> Tensor:
    """Count padding in the teacher's position ids."""
    if any(weight.requires_grad for weight in model.network.parameters()):
        return response_hidden_states(model, prompts, batch, mask)
    plain = model.hidden

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        return plain(ids, attention, torch.arange(ids.shape[1]).expand_as(ids))

    return response_hidden_states(replace(model, hidden=hidden), prompts, batch, mask)


@contextmanager
def score_at_temperature(factor: float) -> Iterator[None]:
    """Score both models at another temperature than configured."""

    def scaled(plain: Callable[[Any, Tensor, float], Tensor]) -> Callable[..., Tensor]:
        return lambda head, products, temperature: plain(head, products, factor * temperature)

    with (
        patch.object(score, "product_logits", scaled(score.product_logits)),
        patch.object(score, "product_logp", scaled(score.product_logp)),
    ):
        yield


@contextmanager
def enable_dropout_later(role: str) -> Iterator[None]:
    """Put the model in training mode from the second step on."""
    calls = list[int]()

    def later(plain: Callable[..., Any]) -> Callable[..., Any]:
        def with_dropout(first: Any, second: Any, *args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) > 1:  # models, or the states of run and task
                is_task = isinstance(second, TaskState)
                pair = second.pair if is_task else ModelPair(first, second, None, [])
                enable_dropout(role, pair)
            return plain(first, second, *args, **options)

        return with_dropout

    with (
        patch.object(train, "score_batch", later(train.score_batch)),
        patch.object(train, "score_and_sum_gradient", later(train.score_and_sum_gradient)),
    ):
        yield


class StaleHeadEngine(FaultyEngine):
    """An engine that keeps the initial head; all other weights are synchronised."""

    def __init__(self, student: CausalLM) -> None:
        super().__init__(student, sample_unchanged, frozen=True)

    def sync(self, model: CausalLM) -> None:
        engine_parameters = dict(self.model.network.named_parameters())
        with torch.no_grad():
            for name, weight in model.network.named_parameters():
                if "lm_head" not in name:
                    engine_parameters[name].copy_(weight)
