"""Faults that no trend shows for long, for `benchmarks.faults`: of scores, loss, update and data.

Each is a small patch of the trainer's own code, a changed setting or a changed file.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.injected import Fault, Faulty, whole
from diagnostics.batch import ScoredRollouts, Support
from opd.config.settings import Config
from opd.data import tasks
from opd.data.grading.graders import Grade
from opd.data.prompts import encode_one
from opd.models.forward import response_hidden
from opd.models.model import CausalLM, split
from opd.objectives.factory import make
from opd.scoring import score
from opd.teachers.factory import make_pairs
from opd.teachers.pair import ModelPair
from opd.training import step, train, update
from opd.training.optimizer import Optimizer

LATE: dict[str, Any] = {"start_checks": False}
"""Without the checks before the first step, as if the fault came later."""


# --- the pair -----------------------------------------------------------------------------------


def with_pairs(change: Callable[[ModelPair], ModelPair | None]) -> AbstractContextManager[Any]:
    """Pairs of which `change` made something else, in place or anew."""

    def made(settings: list[Config]) -> list[ModelPair]:
        return [change(pair) or pair for pair in make_pairs(settings)]

    return patch.object(train, "make_pairs", made)


def drop_out(role: str, pair: ModelPair) -> None:
    network = getattr(pair, role).network
    network.train()
    for module in network.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1


def cast(pair: ModelPair) -> None:
    pair.teacher.network.to(torch.bfloat16)


def round_weights(pair: ModelPair) -> None:
    for weight in pair.teacher.network.parameters():
        weight.data = weight.data.bfloat16().float()


def ignore_mask(pair: ModelPair) -> ModelPair:
    plain = pair.teacher.hidden

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        return plain(ids, torch.ones_like(attention), positions)

    return replace(pair, teacher=replace(pair.teacher, hidden=hidden))


def exchange_roles(pair: ModelPair) -> ModelPair:
    pair.teacher.network.requires_grad_(True)
    return replace(pair, student=pair.teacher, teacher=pair.student)


def one_network(pair: ModelPair) -> ModelPair:
    """The teacher's head is the student's own tensor."""
    pair.teacher.network.lm_head.weight = pair.student.network.lm_head.weight
    return replace(pair, teacher=split(pair.teacher.network, pair.teacher.vocabulary))


# --- scores -------------------------------------------------------------------------------------


def score_then(
    change: Callable[[ScoredRollouts, list[ScoredRollouts]], ScoredRollouts],
) -> AbstractContextManager[Any]:
    """Scored batches that were changed; `change` also sees the right ones of earlier steps."""
    plain, earlier = score.score, list[ScoredRollouts]()

    def scored(*given: Any, **settings: Any) -> tuple[ScoredRollouts, Any]:
        batch, states = plain(*given, **settings)
        changed = change(batch, earlier)
        earlier.append(batch)
        return changed, states

    return patch.object(step, "score", scored)


def stale(batch: ScoredRollouts, earlier: list[ScoredRollouts]) -> ScoredRollouts:
    """The teacher's log-probabilities of the step before, where there are as many positions."""
    if not earlier:
        return batch
    old, now = earlier[-1].teacher_logp, torch.zeros_like(batch.teacher_logp)
    width = min(old.shape[1], now.shape[1])
    now[:, :width] = old[:, :width]
    return replace(batch, teacher_logp=torch.where(batch.mask, now, 0.0))


def other_rows(batch: ScoredRollouts, _: list[ScoredRollouts]) -> ScoredRollouts:
    rolled = batch.teacher_logp.roll(1, 0)
    return replace(batch, teacher_logp=torch.where(batch.mask, rolled, 0.0))


def support_changed(change: Callable[[Support], Support]) -> AbstractContextManager[Any]:
    def changed(batch: ScoredRollouts, _: list[ScoredRollouts]) -> ScoredRollouts:
        assert batch.support is not None
        return replace(batch, support=change(batch.support))

    return score_then(changed)


def shift_ids(support: Support) -> Support:
    """Ids and both log-probabilities of the position before."""
    columns = {k: getattr(support, k).roll(1, 1) for k in ("ids", "student_logp", "teacher_logp")}
    return replace(support, **columns)


def renormalise(support: Support) -> Support:
    ours, theirs = support.student_logp, support.teacher_logp
    return replace(support, student_logp=ours.log_softmax(-1), teacher_logp=theirs.log_softmax(-1))


def fewer(support: Support) -> Support:
    """A fifth of the mass is missing, and more: both log-probabilities are too low."""
    low = torch.tensor(0.2).log()
    return replace(
        support, student_logp=support.student_logp + low, teacher_logp=support.teacher_logp + low
    )


def double_first(support: Support) -> Support:
    """The most probable id stands twice."""
    columns = {}
    for name in ("ids", "student_logp", "teacher_logp"):
        x = getattr(support, name).clone()
        x[..., -1] = x[..., 0]
        columns[name] = x
    return replace(support, **columns)


def ranks_from_two(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ranks 2 to K + 1 for ranks 1 to K."""
    best = logits.topk(k + 1, -1)
    return best.values[..., 1:], best.indices[..., 1:]


def positions_from_zero(model: CausalLM, prompts: Any, batch: Any, mask: Tensor) -> Tensor:
    """Of the teacher, positions that count padding too."""
    if any(weight.requires_grad for weight in model.network.parameters()):
        return response_hidden(model, prompts, batch, mask)
    plain = model.hidden

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        return plain(ids, attention, torch.arange(ids.shape[1]).expand_as(ids))

    return response_hidden(replace(model, hidden=hidden), prompts, batch, mask)


def at_temperature(factor: float) -> AbstractContextManager[Any]:
    """Both models are scored at another temperature than configured."""
    plain = score.log_probabilities

    def scored(model: CausalLM, hidden: Tensor, temperature: float) -> Tensor:
        return plain(model, hidden, factor * temperature)

    return patch.object(score, "log_probabilities", scored)


@contextmanager
def dropout_later(role: str) -> Iterator[None]:
    """From the second step on, the model is in training mode."""
    plain, calls = score.score, list[int]()

    def scored(pair: ModelPair, *given: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            drop_out(role, pair)
        return plain(pair, *given, **settings)

    with patch.object(step, "score", scored):
        yield


class HeadBehind(Faulty):
    """The engine whose head stays that of the start; everything else is synced."""

    def __init__(self, student: CausalLM) -> None:
        super().__init__(student, whole, frozen=True)

    def sync(self, model: CausalLM) -> None:
        own = dict(self.model.network.named_parameters())
        with torch.no_grad():
            for name, weight in model.network.named_parameters():
                if "lm_head" not in name:
                    own[name].copy_(weight)


# --- loss and update ----------------------------------------------------------------------------


@contextmanager
def micro_means() -> Iterator[None]:
    """The mean of micro-batch means for one denominator."""
    plain, groups = update.loss_from_hidden, list[int]()
    split_up = update.in_step

    def in_step(*given: Any) -> Any:
        found = split_up(*given)
        groups[:] = [len(found)]
        return found

    def loss(pair: Any, objective: Any, hidden: Any, teacher: Any, part: Any, credit: Any,
             weight: Tensor, **settings: Any) -> Tensor:  # fmt: skip
        even = torch.full_like(weight, 1 / len(weight) / groups[0])
        return plain(pair, objective, hidden, teacher, part, credit, even, **settings)

    with (
        patch.object(update, "loss_from_hidden", loss),
        patch.object(update, "in_step", in_step),
    ):
        yield


def loss_times(factor: float) -> AbstractContextManager[Any]:
    plain = update.loss_from_hidden

    def loss(*given: Any, **settings: Any) -> Tensor:
        return factor * plain(*given, **settings)

    return patch.object(update, "loss_from_hidden", loss)


def objective_instead(name: str) -> AbstractContextManager[Any]:
    return patch.object(train, "make_objective", lambda _: make(name))


def no_masters(parameters: Any, betas: Any, decay: float, rounded: bool = False) -> Optimizer:
    """AdamW on the bfloat16 weights themselves."""
    live = [weight for weight in parameters if weight.requires_grad]
    inner = torch.optim.AdamW(live, lr=0.0, betas=betas, weight_decay=decay)
    for weight in live:
        inner.state[weight] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(weight, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(weight, requires_grad=False),
        }
    return Optimizer(live, live, inner, rounded)


def step_with(change: Callable[..., Any]) -> AbstractContextManager[Any]:
    plain = Optimizer.step
    return patch.object(Optimizer, "step", lambda *given: change(plain, *given))


def clip_zero(plain: Any, own: Optimizer, rate: float, clip: float) -> Any:
    return plain(own, rate, 0.0)


def never(plain: Any, own: Optimizer, rate: float, clip: float) -> Any:
    """Reports a step that was not taken."""
    return torch.nn.utils.clip_grad_norm_(own.masters, clip), True


@contextmanager
def zeroed_each_time() -> Iterator[None]:
    """Gradients are zeroed before every backward pass."""
    plain, known = update.loss_from_hidden, list[Optimizer]()
    start = Optimizer.zero_grad

    def zero(own: Optimizer) -> None:
        known[:] = [own]
        start(own)

    def loss(*given: Any, **settings: Any) -> Tensor:
        found = plain(*given, **settings)
        start(known[0])
        return found

    with (
        patch.object(Optimizer, "zero_grad", zero),
        patch.object(update, "loss_from_hidden", loss),
    ):
        yield


def detached(model: CausalLM, prompts: Any, batch: Any) -> Tensor:
    """States without gradient: the head alone is trained."""
    return response_hidden(model, prompts, batch).detach()


@contextmanager
def teacher_trained() -> Iterator[None]:
    """The teacher's weights are the optimizer's too."""
    teachers: list[CausalLM] = []

    def keep(pair: ModelPair) -> None:
        teachers.append(pair.teacher)

    def moved(plain: Any, own: Optimizer, *given: Any) -> Any:
        with torch.no_grad():
            for weight in teachers[-1].network.parameters():
                weight.mul_(1.001)
        return plain(own, *given)

    with with_pairs(keep), step_with(moved):
        yield


# --- data and grading ---------------------------------------------------------------------------


def one_prompt(folder: Path, _: tuple[str, str]) -> Mapping[str, Any]:
    """A data set of a few prompts of which one stands there ninety times."""
    rows = [{"prompt": f"{i}:7*3+8", "answer": "5"} for i in range(10)]
    rows += [{"prompt": "4:2*3+8", "answer": "5"}] * 90
    path = folder / "copies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": str(path), "grader": "exact"}


def graded(reward: float) -> AbstractContextManager[Any]:
    def grade(_: Any, tokens: Tensor, *given: Any) -> list[Grade]:
        return [Grade(reward, None)] * len(tokens)

    return patch.object(step, "verdicts", grade)


@contextmanager
def two_bos() -> Iterator[None]:
    """A tokenizer that adds the BOS that its template wrote."""
    plain = encode_one

    def encode(tokenizer: Any, problem: Any) -> list[int]:
        ids = plain(tokenizer, problem)
        return [ids[0], *ids]

    def name_it(pair: ModelPair) -> None:
        pair.tokenizer.bos_token = "<|im_start|>"

    with patch.object(tasks, "encode_one", encode), with_pairs(name_it):
        yield


def other_file(folder: Path, pair: tuple[str, str]) -> Mapping[str, Any]:
    """Both folders' tokenizer.json lowers text, which the class that loads it does not."""
    made = {}
    for role, old in zip(("student", "teacher"), pair, strict=True):
        new = folder / role
        shutil.copytree(old, new)
        path = new / "tokenizer.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | {"normalizer": {"type": "Lowercase"}}))
        made[role] = str(new)
    return made


SILENT_FAULTS: dict[str, Fault] = {
    "teacher scores with dropout": Fault(lambda: with_pairs(partial(drop_out, "teacher"))),
    "teacher drops out, from step 1": Fault(lambda: dropout_later("teacher"), LATE),
    "student drops out, from step 1": Fault(lambda: dropout_later("student"), LATE),
    "sampler's head not synced": Fault(
        lambda: patch.object(train, "sampler", lambda _, student: HeadBehind(student))
    ),
    "one prompt fills the data": Fault(prepare=one_prompt),
    "grader constant at 1": Fault(lambda: graded(1.0)),
    "grader constant at 0": Fault(lambda: graded(0.0)),
    "rewards are NaN": Fault(lambda: graded(float("nan"))),
    "learning rate 0": Fault(lambda: patch.object(update, "learning_rate", lambda *_: 0.0)),
    "clip at 0": Fault(lambda: step_with(clip_zero)),
    "optimizer step not taken": Fault(lambda: step_with(never)),
    "bfloat16 without masters": Fault(
        lambda: patch.object(train, "adamw", no_masters), {"dtype": "bfloat16", "lr": 1e-5}
    ),
    "weights not published": Fault(
        lambda: patch.object(Optimizer, "publish", lambda _: None), {"dtype": "bfloat16"}
    ),
    "decoder detached": Fault(lambda: patch.object(update, "response_hidden", detached)),
    "gradient not zeroed": Fault(lambda: patch.object(Optimizer, "zero_grad", lambda _: None)),
    "gradient not accumulated": Fault(zeroed_each_time, {"max_tokens_per_microbatch": 256}),
    "teacher moves": Fault(teacher_trained),
    "student and teacher share a head": Fault(lambda: with_pairs(one_network)),
    "student and teacher exchanged": Fault(lambda: with_pairs(exchange_roles)),
    "mean of micro-batch means": Fault(micro_means, {"max_tokens_per_microbatch": 256}),
    "loss twice as large": Fault(lambda: loss_times(2.0)),
    "forward KL for reverse": Fault(lambda: objective_instead("full_forward_kl")),
    "reverse KL for forward": Fault(
        lambda: objective_instead("full_reverse_kl"), {"objective": "full_forward_kl"}
    ),
    "k3 for k2": Fault(lambda: objective_instead("k3"), {"objective": "k2"}),
    "top-K ids a position late": Fault(lambda: support_changed(shift_ids)),
    "top-K ids a rank late": Fault(lambda: patch.object(score, "two_stage_topk", ranks_from_two)),
    "support renormalised twice": Fault(lambda: support_changed(renormalise)),
    "support's mass a fifth": Fault(lambda: support_changed(fewer)),
    "support's mass above 1": Fault(lambda: support_changed(double_first)),
    "two BOS": Fault(two_bos),
    "teacher's positions not shifted": Fault(
        lambda: patch.object(score, "response_hidden", positions_from_zero), architecture="gpt2"
    ),
    "teacher in bfloat16": Fault(lambda: with_pairs(cast)),
    "teacher in bfloat16, unchecked start": Fault(lambda: with_pairs(cast), LATE),
    "teacher rounded to bfloat16": Fault(lambda: with_pairs(round_weights)),
    "tokenizer not as in its file": Fault(prepare=other_file),
    "teacher ignores the mask": Fault(lambda: with_pairs(ignore_mask)),
    "teacher ignores the mask, unchecked start": Fault(lambda: with_pairs(ignore_mask), LATE),
    "teacher's scores of the step before": Fault(lambda: score_then(stale)),
    "teacher's scores of another row": Fault(lambda: score_then(other_rows)),
    "scored at another temperature": Fault(lambda: at_temperature(1.25)),
}
