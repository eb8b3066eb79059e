"""What a privileged teacher can teach: it reads a context that the student does not read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from synthetic.analysis.summary import interval
from synthetic.estimators import ESTIMATORS
from synthetic.exact import contexts
from synthetic.sampling.free_logits import expected_gradients
from synthetic.worlds.contexts import ContextWorld, random_contexts

CLAIM = (
    "The forward KL that the best student leaves to a teacher that reads a hidden context is a "
    "conditional mutual information, of the context and the teacher's next token given the prefix. "
    "On the teacher's prefixes it is at most the entropy of the context; on the student's, which "
    "never tell the context, it grows with every token, and the student learns to ignore what its "
    "own prefix says. The reverse KL leaves a log-normaliser and rests at a geometric mixture, a "
    "different one for every discount. The context of another problem teaches exactly the same "
    "where the prompt does not tell the context. The gradient's noise does not vanish at the best "
    "student."
)
KEYS = ["strength", "horizon", "student", "informed", "view", "estimator", "gamma"]
STRENGTH = 2.0
INFORMED = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Weight that the prompt gives to its own context; the rest is spread over all contexts evenly."""
COMPARED = (
    ("plain", 0.0),
    ("plain", 0.5),
    ("plain", 1.0),
    ("value", 1.0),
    ("rb_all", 0.0),
    ("rb_all", 1.0),
    ("rb_all_value", 1.0),
    ("k2", 0.0),
    ("k3", 0.0),
    ("full_forward_kl", 0.0),
    ("full_jsd", 0.0),
    ("teacher_topk", 0.0),
    ("teacher_topk_bucket", 0.0),
    ("teacher_topk_stopped", 0.0),
    ("teacher_topk_sampled_tail", 0.0),
    ("student_topk", 0.0),
    ("student_topk_bucket", 0.0),
)
"""Estimators and discounts whose bias and noise are computed."""
REVERSE = ("k2", "teacher_topk_sampled_tail")
"""Local objectives with the expected gradient of the reverse KL at each prefix."""
FORWARD = ("k3", "full_forward_kl")
"""Those with the expected gradient of the forward KL."""
RATE = 2.0
_LENGTH: dict[str, Any] = {"strength": STRENGTH, "quantity": "remaining", "horizon": 8}
_ESTIMATOR: dict[str, Any] = {"estimator": "plain", "gamma": 0.0}
HEADLINES: dict[str, dict[str, Any]] = {
    "remaining KL minus conditional mutual information, at most: {} nats": {
        "quantity": "error",
    },
    "8 tokens, 4 contexts, forward KL on the teacher's prefixes: {} nats remain": {
        **_LENGTH,
        "student": "teacher_prefixes",
    },
    "on the student's prefixes: {}": {**_LENGTH, "student": "student_prefixes"},
    "reverse KL, sequence level: {}": {**_LENGTH, "student": "sequence"},
    "nats that a response tells of the context, learned on the teacher's prefixes: {}": {
        **_LENGTH,
        "quantity": "context_in_response",
        "student": "teacher_prefixes",
    },
    "share of it that is lost on the student's own, reverse KL at token level: {}": {
        **_LENGTH,
        "quantity": "context_lost",
        "student": "token",
    },
    "another problem's context, prompt tells nothing: {} nats worse than the right one": {
        "quantity": "excess_by_view",
        "informed": 0.0,
        "view": "other",
    },
    "prompt tells the context: {}": {
        "quantity": "excess_by_view",
        "informed": 1.0,
        "view": "other",
    },
    "no context, prompt tells nothing: {}": {
        "quantity": "excess_by_view",
        "informed": 0.0,
        "view": "empty",
    },
    "noise of the sampled token at the best student, of that at the start: {}": {
        "quantity": "noise_left",
        **_ESTIMATOR,
    },
    "with mean costs: {}": {"quantity": "noise_left", "estimator": "rb_all", "gamma": 0.0},
}


def _settings(seeds: int, horizons: tuple[int, ...], **options: Any) -> list[dict[str, Any]]:
    return [{"seed": seed, "horizons": list(horizons), **options} for seed in range(seeds)]


_SMALL = {"contexts": 2, "actions": 2, "tokens": 2, "iterations": 10}
_LARGE = {"contexts": 4, "actions": 4, "tokens": 3, "estimators": COMPARED}


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(
        2, (2, 8), **_SMALL, estimators=(*COMPARED[:1], *COMPARED[4:5], COMPARED[-1])
    ),
    "quick": _settings(6, (1, 2, 4, 8), **_LARGE, iterations=100),
    "paper": _settings(24, (1, 2, 3, 4, 5, 6, 7, 8), **_LARGE, iterations=400),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Measure lengths, controls and estimators in random worlds; all values are exact.

    Args:
        setting: One of `SETTINGS`.
        generator: Source of randomness.

    Returns:
        Rows by length and best student, by control, and by estimator.
    """
    shape = (setting["contexts"], setting["actions"])
    rows: list[Row] = []
    for strength in (0.5, 1.0, STRENGTH):
        longest = random_contexts(*shape, max(setting["horizons"]), generator, strength)
        for horizon in setting["horizons"]:
            rows += remaining_rows(shortened(longest, horizon), strength)
    world = random_contexts(*shape, setting["tokens"], generator, STRENGTH)
    rows += control_rows(world)
    rows += estimator_rows(world, setting["estimators"], setting["iterations"])
    return [{"seed": setting["seed"], **row} for row in rows]


def shortened(world: ContextWorld, horizon: int) -> ContextWorld:
    """Return the same world with responses of `horizon` tokens."""
    prefixes = world.levels[horizon - 1].stop
    return replace(world, teacher_logp=world.teacher_logp[:, :prefixes], horizon=horizon)


# --- what remains, by length --------------------------------------------------------------------


def remaining_rows(world: ContextWorld, strength: float) -> list[Row]:
    """Compute what each best student leaves of its own objective, in nats per response.

    Args:
        world: The world.
        strength: Standard deviation of the contexts' logits, a label.

    Returns:
        One row per best student: `remaining`; `error`, its distance from the closed form (mutual
        information or log-normaliser); `context_in_response`, what its responses tell of the
        context, and `context_lost`, the share that they tell less than the teacher's do.
    """
    teacher_joint = contexts.joint_on_teacher_prefixes(world)
    marginal = contexts.arithmetic_student(world, contexts.context_weights(teacher_joint))
    mixture = contexts.arithmetic_student(world, contexts.prior_weights(world))
    student_joint = contexts.joint_on_student_prefixes(world, mixture)
    sequence, costs = contexts.geometric_student(world, 1.0)
    token, local_costs = contexts.geometric_student(world, 0.0)
    token_visits = contexts.prefix_probabilities(world, token)
    students = {
        "teacher_prefixes": (
            marginal,
            (teacher_joint * contexts.forward_kl(world, marginal)).sum(),
            contexts.conditional_information(world, teacher_joint),
        ),
        "student_prefixes": (
            mixture,
            (student_joint * contexts.forward_kl(world, mixture)).sum(),
            contexts.conditional_information(world, student_joint),
        ),
        "token": (
            token,
            contexts.mean_sequence_kl(world, token),
            token_visits @ local_costs,
        ),
        "sequence": (sequence, contexts.mean_sequence_kl(world, sequence), costs[0]),
    }
    rows: list[Row] = []
    most = float(contexts.response_information(world, marginal))
    for name, (logp, remaining, closed_form) in students.items():
        context_in_response = float(contexts.response_information(world, logp))
        rows.append(
            {
                "strength": strength,
                "horizon": world.horizon,
                "student": name,
                "remaining": float(remaining),
                "error": float((remaining - closed_form).abs()),
                "context_in_response": context_in_response,
                "context_lost": 1 - context_in_response / most,
            }
        )
    return rows


# --- controls -----------------------------------------------------------------------------------


def control_rows(world: ContextWorld) -> list[Row]:
    """Compare what the right context, another problem's and none teach.

    A prompt gives the weight `informed` to its own context and spreads the rest over all. The
    teacher reads a context that fits the prompt; one of any problem, whatever the prompt; or none,
    where it is the marginal of the informed teacher given prompt and prefix. The student is the one
    at which the token-level reverse KL rests.

    Args:
        world: A world whose contexts all problems share.

    Returns:
        Rows by `informed` and view: `kl_by_view`, the mean sequence KL of the student from the
        teacher that reads the right context, and `excess_by_view`, over the right context's
        student.
    """
    rows: list[Row] = []
    of_any_problem = torch.full_like(world.prior, 1 / len(world.prior))
    for informed in INFORMED:
        own = torch.zeros_like(world.prior)
        own[0] = 1.0
        prompt = replace(world, prior=informed * own + (1 - informed) * of_any_problem)
        joint = contexts.joint_on_teacher_prefixes(prompt)
        students = {
            "right": contexts.geometric_student(prompt, 0.0)[0],
            "other": contexts.geometric_student(replace(world, prior=of_any_problem), 0.0)[0],
            "empty": contexts.arithmetic_student(prompt, contexts.context_weights(joint)),
        }
        values = {
            view: float(contexts.mean_sequence_kl(prompt, logp)) for view, logp in students.items()
        }
        rows += [
            {
                "informed": informed,
                "view": view,
                "kl_by_view": value,
                "excess_by_view": value - values["right"],
            }
            for view, value in values.items()
        ]
    return rows


# --- estimators ---------------------------------------------------------------------------------


def estimator_rows(
    world: ContextWorld, estimators: Sequence[tuple[str, float]], iterations: int
) -> list[Row]:
    """Compute bias and noise of every estimator, and where its descent rests.

    The start is the teacher without a context, its marginal given the prefix: self-distillation
    from a model that is calibrated. Biases and variances are relative to the gradient of the mean
    sequence KL there.

    Args:
        world: The world.
        estimators: Names in `synthetic.estimators.ESTIMATORS`, and discounts.
        iterations: Number of updates of an objective without a resting point in closed form.

    Returns:
        One row per estimator: `bias` at the start; `within` and `between`, the variances within and
        between contexts, at the start and, with the suffix `_at_rest`, where its descent ends;
        `noise_left`, their sum at rest over that at the start; `gradient_at_rest`, the length of
        the mean there; and `excess`, the mean sequence KL at rest above the least possible one.
    """
    joint = contexts.joint_on_teacher_prefixes(world)
    start = contexts.arithmetic_student(world, contexts.context_weights(joint))
    truth = contexts.sequence_gradient(world, start, 1.0)
    least = contexts.mean_sequence_kl(world, contexts.geometric_student(world, 1.0)[0])
    k = world.num_actions // 2
    size2 = truth.square().sum()
    at_start: dict[tuple[str, float], tuple[Tensor, ...]] = {}
    for gamma in {gamma for _, gamma in estimators}:
        names = [name for name, discount in estimators if discount == gamma]
        parts = contexts.context_moments(world, start, names, gamma, k)
        for name, *values in zip(names, *parts, strict=True):
            at_start[name, gamma] = tuple(values)
    rows: list[Row] = []
    for name, gamma in estimators:
        support = k if "topk" in name else None
        rest = resting_student(world, start, name, gamma, iterations)
        mean, within, between = at_start[name, gamma]
        rest_mean, rest_within, rest_between = contexts.context_moments(
            world, rest, name, gamma, support
        )
        rows.append(
            {
                "estimator": name,
                "gamma": gamma,
                "bias": float((mean - truth).norm() / truth.norm()),
                "within": float(within / size2),
                "between": float(between / size2),
                "within_at_rest": float(rest_within / size2),
                "between_at_rest": float(rest_between / size2),
                "gradient_at_rest": float(rest_mean.norm() / truth.norm()),
                "noise_left": float((rest_within + rest_between) / (within + between)),
                "excess": float(contexts.mean_sequence_kl(world, rest) - least),
            }
        )
    return rows


def resting_student(
    world: ContextWorld, start: Tensor, name: str, gamma: float, iterations: int
) -> Tensor:
    """Return where descent on an estimator's expected gradient rests, (S, A) log-probabilities.

    In closed form where it is known; otherwise by descent at every prefix, since the rest of a
    local objective does not depend on how often a prefix occurs.

    Args:
        world: The world.
        start: (S, A) log-probabilities.
        name: A name in `synthetic.estimators.ESTIMATORS`.
        gamma: Discount.
        iterations: Number of updates where there is no closed form.

    Returns:
        (S, A) log-probabilities.
    """
    if ESTIMATORS[name].family or name in REVERSE:
        return contexts.geometric_student(world, gamma)[0]
    if name in FORWARD:
        return contexts.arithmetic_student(world, contexts.prior_weights(world))
    return descended_student(world, start, name, iterations)


def descended_student(world: ContextWorld, start: Tensor, name: str, iterations: int) -> Tensor:
    """Descend on a local objective at every prefix, on its mean over contexts.

    Args:
        world: The world.
        start: (S, A) log-probabilities.
        name: A local estimator in `synthetic.estimators.ESTIMATORS`.
        iterations: Number of updates.

    Returns:
        (S, A) log-probabilities after the last update.
    """
    objective, student = ESTIMATORS[name].objective, start
    k = world.num_actions // 2 if "topk" in name else None
    num_contexts = len(world.prior)
    for _ in range(iterations):
        gradients = expected_gradients(
            student.repeat(num_contexts, 1), world.teacher_logp.flatten(0, 1), objective, k
        ).view_as(world.teacher_logp)
        student = student - RATE * torch.einsum("c,csa->sa", world.prior, gradients)
    return student.log_softmax(-1)


# --- summary ------------------------------------------------------------------------------------


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over worlds as medians with bootstrap intervals; `error` as the largest of all.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    names = [c for c in rows.columns if c not in ("seed", "error", *KEYS)]
    parts = [interval(rows.dropna(subset=[name]), name, KEYS, np.median) for name in names]
    errors = rows.dropna(subset=["error"]).groupby("seed", as_index=False)["error"].max()
    parts.append(interval(errors, "error", KEYS, np.max))
    return pd.concat(parts, ignore_index=True)
