"""Define faults without a visible trend for `benchmarks.faults`: of scores, loss, update and data.

Each is a small patch of the trainer's code, a changed setting or a changed file; those of models
and scores are in `benchmarks.silent_models`.
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

from benchmarks.injected import Fault
from benchmarks.silent_models import (
    StaleHeadEngine,
    cast_teacher,
    change_pairs,
    change_scores,
    change_support,
    enable_dropout,
    enable_dropout_later,
    exchange_roles,
    ignore_mask,
    other_row_scores,
    patch_sampler_softmax,
    positions_from_zero,
    ranks_from_two,
    renormalise,
    repeat_first_id,
    round_weights,
    scale_support_mass,
    score_at_temperature,
    share_head,
    shift_ids,
    stale_teacher_scores,
    support_at_temperature,
)
from opd.data import prompts
from opd.data.grading.graders import Grade
from opd.data.prompts import encode_prompt
from opd.models.forward import response_hidden_states
from opd.models.model import CausalLM
from opd.objectives.factory import make_objective
from opd.objectives.inputs import TokenInputs
from opd.scoring import columns, score
from opd.scoring import loss as scoring_loss
from opd.teachers.pair import ModelPair
from opd.training import setup, shared_pass, step, train, update
from opd.training.checks import step as step_checks
from opd.training.optimizer import Optimizer

WITHOUT_START_CHECKS: dict[str, Any] = {"start_checks": False}
"""Disables the checks before the first step, to simulate a fault that occurs later."""
SEPARATE_PASSES: dict[str, Any] = {"share_forward_pass": False}
"""For faults in scoring alone or in the update alone, which a step with one pass cannot have."""
LEAN_STEPS: dict[str, Any] = {"objective": "teacher_topk", "full_metrics_every": 5}
"""Steps 1 to 4 take the student's softmax from the sampler."""


# --- loss and update ----------------------------------------------------------------------------


@contextmanager
def mean_of_micro_batch_means() -> Iterator[None]:
    """Use the mean of micro-batch means instead of one denominator."""
    plain, groups = scoring_loss.loss_from_hidden, list[int]()
    accumulate = update.accumulate_gradients

    def count_micro_batches(state: Any, task: Any, loss: Any, index: int, weight: float) -> Any:
        groups[:] = [len(loss.micro_batches[index])]
        return accumulate(state, task, loss, index, weight)

    def loss(
        student: Any, objective: Any, hidden: Any, inputs: TokenInputs, **settings: Any
    ) -> Tensor:
        even = torch.full_like(inputs.weight, 1 / len(inputs.weight) / groups[0])
        return plain(student, objective, hidden, replace(inputs, weight=even), **settings)

    with (
        patch.object(scoring_loss, "loss_from_hidden", loss),
        patch.object(update, "accumulate_gradients", count_micro_batches),
    ):
        yield


@contextmanager
def patch_loss(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the loss of every micro-batch, of steps with one and with two forward passes."""
    plain = scoring_loss.loss_from_hidden

    def loss(*args: Any, **settings: Any) -> Tensor:
        return change(plain(*args, **settings))

    with (
        patch.object(scoring_loss, "loss_from_hidden", loss),
        patch.object(shared_pass, "loss_from_hidden", loss),
    ):
        yield


def replace_objective(name: str) -> AbstractContextManager[Any]:
    """Train with another objective than configured."""
    return patch.object(setup, "objective_from_config", lambda _: make_objective(name))


def optimizer_without_masters(
    parameters: Any, betas: Any, decay: float, rounded: bool = False
) -> Optimizer:
    """Return AdamW on the bfloat16 weights themselves."""
    live = [weight for weight in parameters if weight.requires_grad]
    inner = torch.optim.AdamW(live, lr=0.0, betas=betas, weight_decay=decay)
    for weight in live:
        inner.state[weight] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(weight, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(weight, requires_grad=False),
        }
    return Optimizer(live, live, inner, rounded)


def change_step(change: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Replace the optimizer's step."""
    plain = Optimizer.step
    return patch.object(Optimizer, "step", lambda *args: change(plain, *args))


def clip_to_zero(plain: Any, optimizer: Optimizer, rate: float, clip: float) -> Any:
    """Take a step with a gradient clipped to zero."""
    return plain(optimizer, rate, 0.0)


def skip_step(plain: Any, optimizer: Optimizer, rate: float, clip: float) -> Any:
    """Report a step without taking it."""
    return torch.nn.utils.clip_grad_norm_(optimizer.master_weights, clip), True


@contextmanager
def zero_before_each_backward() -> Iterator[None]:
    """Zero the gradients before each backward pass, so that they do not accumulate."""
    last_optimizer = list[Optimizer]()
    start = Optimizer.zero_grad

    def zero(optimizer: Optimizer) -> None:
        last_optimizer[:] = [optimizer]
        start(optimizer)

    def zero_before_backward(loss: Tensor) -> Tensor:
        start(last_optimizer[0])
        return loss

    with patch.object(Optimizer, "zero_grad", zero), patch_loss(zero_before_backward):
        yield


def detached_hidden_states(model: CausalLM, prompts: Any, batch: Any) -> Tensor:
    """Return hidden states without gradient, so that only the head is trained."""
    return response_hidden_states(model, prompts, batch).detach()


@contextmanager
def train_teacher_too() -> Iterator[None]:
    """Change the teacher's weights at every step."""
    teachers: list[CausalLM] = []

    def keep(pair: ModelPair) -> None:
        teachers.append(pair.teacher.model)

    def change_teacher(plain: Any, optimizer: Optimizer, *args: Any) -> Any:
        with torch.no_grad():
            for weight in teachers[-1].network.parameters():
                weight.mul_(1.001)
        return plain(optimizer, *args)

    with change_pairs(keep), change_step(change_teacher):
        yield


# --- data and grading ---------------------------------------------------------------------------


def repeat_one_prompt(folder: Path, _: tuple[str, str]) -> Mapping[str, Any]:
    """Write a data set of a few prompts in which one is repeated ninety times."""
    rows = [{"prompt": f"{i}:7*3+8", "answer": "5"} for i in range(10)]
    rows += [{"prompt": "4:2*3+8", "answer": "5"}] * 90
    path = folder / "copies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": str(path), "grader": "exact"}


@contextmanager
def constant_reward(reward: float) -> Iterator[None]:
    """Grade every response with the same reward."""

    def grade(_: Any, tokens: Tensor, *args: Any) -> list[Grade]:
        return [Grade(reward, None)] * len(tokens)

    with (
        patch.object(step, "grade_responses", grade),
        patch.object(step_checks, "grade_responses", grade),
    ):
        yield


@contextmanager
def add_second_bos() -> Iterator[None]:
    """Add a second BOS, as a tokenizer does whose chat template already contains one."""
    plain = encode_prompt

    def encode(tokenizer: Any, problem: Any) -> list[int]:
        ids = plain(tokenizer, problem)
        return [ids[0], *ids]

    def name_it(pair: ModelPair) -> None:
        pair.tokenizer.bos_token = "<|im_start|>"

    with patch.object(prompts, "encode_prompt", encode), change_pairs(name_it):
        yield


def change_tokenizer_file(folder: Path, pair: tuple[str, str]) -> Mapping[str, Any]:
    """Add lower-casing to both tokenizer.json files, which the loading class does not apply."""
    settings = {}
    for role, old in zip(("student", "teacher"), pair, strict=True):
        new = folder / role
        shutil.copytree(old, new)
        path = new / "tokenizer.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | {"normalizer": {"type": "Lowercase"}}))
        settings[role] = str(new)
    return settings


SILENT_FAULTS: dict[str, Fault] = {
    "teacher scores with dropout": Fault(lambda: change_pairs(partial(enable_dropout, "teacher"))),
    "teacher drops out, from step 1": Fault(
        lambda: enable_dropout_later("teacher"), WITHOUT_START_CHECKS
    ),
    "student drops out, from step 1": Fault(
        lambda: enable_dropout_later("student"), WITHOUT_START_CHECKS
    ),
    "sampler's head not synced": Fault(
        lambda: patch.object(
            train, "make_rollout_engine", lambda _, student: StaleHeadEngine(student)
        )
    ),
    "one prompt fills the data": Fault(prepare=repeat_one_prompt),
    "grader constant at 1": Fault(lambda: constant_reward(1.0)),
    "grader constant at 0": Fault(lambda: constant_reward(0.0)),
    "rewards are NaN": Fault(lambda: constant_reward(float("nan"))),
    "learning rate 0": Fault(lambda: patch.object(update, "learning_rate", lambda *_: 0.0)),
    "clip at 0": Fault(lambda: change_step(clip_to_zero)),
    "optimizer step not taken": Fault(lambda: change_step(skip_step)),
    "bfloat16 without masters": Fault(
        lambda: patch.object(train, "make_optimizer", optimizer_without_masters),
        {"dtype": "bfloat16", "lr": 1e-5},
    ),
    "weights not published": Fault(
        lambda: patch.object(Optimizer, "copy_to_model", lambda _: None), {"dtype": "bfloat16"}
    ),
    "decoder detached": Fault(
        lambda: patch.object(scoring_loss, "response_hidden_states", detached_hidden_states),
        SEPARATE_PASSES,
    ),
    "gradient not zeroed": Fault(lambda: patch.object(Optimizer, "zero_grad", lambda _: None)),
    "gradient not accumulated": Fault(
        zero_before_each_backward, {"max_tokens_per_microbatch": 256}
    ),
    "teacher moves": Fault(train_teacher_too),
    "student and teacher share a head": Fault(lambda: change_pairs(share_head)),
    "student and teacher exchanged": Fault(lambda: change_pairs(exchange_roles)),
    "mean of micro-batch means": Fault(
        mean_of_micro_batch_means, SEPARATE_PASSES | {"max_tokens_per_microbatch": 256}
    ),
    "loss twice as large": Fault(lambda: patch_loss(lambda loss: 2.0 * loss)),
    "forward KL for reverse": Fault(lambda: replace_objective("full_forward_kl")),
    "reverse KL for forward": Fault(
        lambda: replace_objective("full_reverse_kl"), {"objective": "full_forward_kl"}
    ),
    "k3 for k2": Fault(lambda: replace_objective("k3"), {"objective": "k2"}),
    "top-K ids a position late": Fault(lambda: change_support(shift_ids), SEPARATE_PASSES),
    "top-K ids a rank late": Fault(lambda: patch.object(columns, "two_stage_topk", ranks_from_two)),
    "support renormalised twice": Fault(lambda: change_support(renormalise), SEPARATE_PASSES),
    "support's mass a fifth": Fault(lambda: change_support(scale_support_mass), SEPARATE_PASSES),
    "support's mass above 1": Fault(lambda: change_support(repeat_first_id), SEPARATE_PASSES),
    "support at another temperature": Fault(lambda: support_at_temperature(1.25), LEAN_STEPS),
    "softmax of the step before": Fault(patch_sampler_softmax, LEAN_STEPS),
    "two BOS": Fault(add_second_bos),
    "teacher's positions not shifted": Fault(
        lambda: patch.object(score, "response_hidden_states", positions_from_zero),
        architecture="gpt2",
    ),
    "teacher in bfloat16": Fault(lambda: change_pairs(cast_teacher)),
    "teacher in bfloat16, unchecked start": Fault(
        lambda: change_pairs(cast_teacher), WITHOUT_START_CHECKS
    ),
    "teacher rounded to bfloat16": Fault(lambda: change_pairs(round_weights)),
    "tokenizer not as in its file": Fault(prepare=change_tokenizer_file),
    "teacher ignores the mask": Fault(lambda: change_pairs(ignore_mask)),
    "teacher ignores the mask, unchecked start": Fault(
        lambda: change_pairs(ignore_mask), WITHOUT_START_CHECKS
    ),
    "teacher's scores of the step before": Fault(
        lambda: change_scores(stale_teacher_scores), SEPARATE_PASSES
    ),
    "teacher's scores of another row": Fault(
        lambda: change_scores(other_row_scores), SEPARATE_PASSES
    ),
    "scored at another temperature": Fault(lambda: score_at_temperature(1.25), SEPARATE_PASSES),
}
