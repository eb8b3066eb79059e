"""Exact bias and noise of gradients by prefix source, as the student moves to its teacher."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from synthetic.analysis.summary import interval
from synthetic.analysis.tradeoff import crossover_batch_size
from synthetic.exact.moments import expected_gradient, moments, sequence_kl
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair

CLAIM = (
    "How biased a prefix source is depends on how far the student is from who wrote the prefixes: "
    "the bias grows as the square root of the KL of a response, whoever wrote it. On the teacher's "
    "text the bias of an offline KL and of SFT therefore vanishes as the student approaches the "
    "teacher, on another model's text it stays, and on replayed rollouts of an older student it "
    "grows, without ratios beyond the gradient itself. Token ratios leave the prefixes biased. "
    "Ratios of whole responses remove that too, with less noise than token ratios until the "
    "student has moved by half a nat, and with exponentially more after that."
)
MIXED = 0.5
"""Share of the responses that the teacher writes, of mixed prefixes."""
TINY = 1e-9
"""Nats below which the student has not moved, so that no ratio is needed."""
OFFLINE = ("teacher", "dataset")
KEYS = ["horizon", "source", "loss", "gamma", "ratio", "moved"]
_LONG: dict[str, Any] = {"horizon": 32}
_REPLAY: dict[str, Any] = {**_LONG, "source": "replay", "loss": "sampled_token", "gamma": 1.0}
HEADLINES: dict[str, dict[str, Any]] = {
    "bias of the KL on teacher's text, student at the start: {} of the gradient": {
        "quantity": "bias",
        **_LONG,
        "source": "teacher",
        "loss": "reverse_kl",
        "moved": 0.0,
    },
    "the same nine tenths of the way: {}": {
        "quantity": "bias",
        **_LONG,
        "source": "teacher",
        "loss": "reverse_kl",
        "moved": 0.9,
    },
    "SFT on teacher's text at the start: {}": {
        "quantity": "bias",
        **_LONG,
        "source": "teacher",
        "loss": "sft",
        "moved": 0.0,
    },
    "nine tenths of the way: {}": {
        "quantity": "bias",
        **_LONG,
        "source": "teacher",
        "loss": "sft",
        "moved": 0.9,
    },
    "replayed rollouts of the start, nine tenths of the way, no ratio: {}": {
        "quantity": "bias",
        **_REPLAY,
        "ratio": "none",
        "moved": 0.9,
    },
    "with token ratios: {}": {"quantity": "bias", **_REPLAY, "ratio": "token", "moved": 0.9},
    "with response ratios: {}": {"quantity": "bias", **_REPLAY, "ratio": "sequence", "moved": 0.9},
    "exponent of the prefixes' bias in the KL, replayed rollouts: {}": {
        "quantity": "exponent",
        **_REPLAY,
        "gamma": 0.0,
        "ratio": "token",
        "moved": 0.5,
    },
    "teacher's text: {}": {
        "quantity": "exponent",
        **_LONG,
        "source": "teacher",
        "moved": 0.5,
    },
    "variance of response ratios over that of on-policy, half-way: {}": {
        "quantity": "variance_ratio",
        **_REPLAY,
        "ratio": "sequence",
        "moved": 0.5,
    },
    "nats that the student has moved there: {}": {
        "quantity": "kl_source",
        **_REPLAY,
        "ratio": "sequence",
        "moved": 0.5,
    },
    "responses from which response ratios err less than token ratios there: {}": {
        "quantity": "ratio_batch",
        **_REPLAY,
        "ratio": "sequence",
        "moved": 0.5,
    },
}


def _settings(
    seeds: int, shape: tuple[int, int], horizons: tuple[int, ...], moved: tuple[float, ...]
) -> list[dict[str, Any]]:
    sizes = {"states": shape[0], "actions": shape[1], "horizons": list(horizons)}
    return [{"seed": seed, **sizes, "moved": list(moved)} for seed in range(seeds)]


MOVED = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, (2, 2), (32,), (0.0, 0.2, 0.5, 0.9)),
    "quick": _settings(8, (6, 5), (8, 32), (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)),
    "paper": _settings(24, (8, 6), (8, 32), MOVED),
}

Row = dict[str, Any]
Moments = tuple[Tensor, Tensor]
"""Mean (S, A) and total variance () of one response's gradient."""


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Compute bias and variance of every source in one random world along the student's path.

    Args:
        setting: One of `SETTINGS`.
        generator: Source of randomness.

    Returns:
        One row per horizon, source, loss, ratio and point of the path.
    """
    rows: list[Row] = []
    longest = random_chain(
        setting["states"], setting["actions"], max(setting["horizons"]), generator, 0.1
    )
    start, teacher = random_pair(longest, generator, 0.7, 0.5)
    offset = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    writers = {"teacher": teacher, "dataset": start + 0.7 * offset, "replay": start}
    for horizon in setting["horizons"]:
        mdp = TabularMDP(longest.transition, longest.start, horizon)
        for moved in setting["moved"]:
            student = moved_student(start, teacher, moved)
            labels = {"seed": setting["seed"], "horizon": horizon, "moved": moved}
            rows += [labels | row for row in source_rows(mdp, student, teacher, writers)]
    return rows


def moved_student(start: Tensor, teacher: Tensor, moved: float) -> Tensor:
    """Return the student on its way to the teacher, p proportional to start^(1-x) teacher^x.

    This is the path of natural-gradient descent on the KL at each prefix: d log p / dt =
    -(log p/q - KL) has the solution x = 1 - exp(-t).

    Args:
        start: (S, A) logits of the student before training.
        teacher: (S, A) logits.
        moved: x in [0, 1): 0 is the start, 1 the teacher.

    Returns:
        (S, A) log-probabilities.
    """
    mixture = (1 - moved) * start.log_softmax(-1) + moved * teacher.log_softmax(-1)
    return mixture.log_softmax(-1)


def source_rows(
    mdp: TabularMDP, student: Tensor, teacher: Tensor, writers: dict[str, Tensor]
) -> list[Row]:
    """Compare the gradient of every source and loss with the on-policy one.

    Args:
        mdp: The world.
        student: (S, A) logits of the current student.
        teacher: (S, A) logits.
        writers: (S, A) logits of who wrote the prefixes, by source.

    Returns:
        One row per source, loss, discount and ratio: `bias`, the distance of the mean from the
        gradient of the sequence KL, relative to its length; `cosine` of the two; `bias_stated`, the
        same distance from what the loss states, see `stated_gradients`; `variance` over the squared
        length; `variance_ratio` over the variance on policy; `kl_source` and `kl_teacher`, the
        student's sequence KL from the writer and from the teacher; and `ratio_batch`.
    """
    truth = expected_gradient(mdp, student, teacher, 1.0)
    stated = stated_gradients(mdp, student, teacher)
    computed = all_moments(mdp, student, teacher, writers)
    distance = float(sequence_kl(mdp, student, teacher).total)
    rows: list[Row] = []
    for (source, loss, gamma, ratio), (mean, variance) in computed.items():
        target = stated[loss, gamma]
        on_policy = computed.get(("student", loss, gamma, "none"))
        row: Row = {
            **{"source": source, "loss": loss, "gamma": gamma, "ratio": ratio},
            "bias": float((mean - truth).norm() / truth.norm()),
            "cosine": float((mean * truth).sum() / (mean.norm() * truth.norm())),
            "bias_stated": float((mean - target).norm() / target.norm()),
            "variance": float(variance / truth.square().sum()),
            "kl_teacher": distance,
        }
        if source in writers:
            row["kl_source"] = float(sequence_kl(mdp, student, writers[source]).total)
        if on_policy is not None:
            row["variance_ratio"] = float(variance / on_policy[1])
        if ratio == "sequence" and gamma == 1 and row["kl_source"] > TINY:
            by_token = computed[source, loss, gamma, "token"]
            bias2 = (by_token[0] - truth).square().sum()
            batch = crossover_batch_size(bias2.numpy(), by_token[1].numpy(), variance.numpy())
            row["ratio_batch"] = float(batch)
        rows.append(row)
    return rows


def stated_gradients(
    mdp: TabularMDP, student: Tensor, teacher: Tensor
) -> dict[tuple[str, float], Tensor]:
    """Return the exact gradient of what each loss states, by loss and discount.

    Sampled tokens and reverse KL: the gamma family on the student's own prefixes. Forward KL: that
    of each prefix, on the student's own. SFT: the sequence KL of the teacher from the student.

    Args:
        mdp: The world.
        student: (S, A) logits.
        teacher: (S, A) logits.

    Returns:
        (S, A) gradients.
    """
    token, sequence = expected_gradient(mdp, student, teacher, [0.0, 1.0])
    visits, teacher_visits = (
        sequence_kl(mdp, writer, teacher).occupancy.sum(0)[:, None] for writer in (student, teacher)
    )
    difference = student.softmax(-1) - teacher.softmax(-1)
    return {
        ("sampled_token", 0.0): token,
        ("sampled_token", 1.0): sequence,
        ("reverse_kl", 0.0): token,
        ("forward_kl", 0.0): visits * difference,
        ("sft", 0.0): teacher_visits * difference,
    }


def all_moments(
    mdp: TabularMDP, student: Tensor, teacher: Tensor, writers: dict[str, Tensor]
) -> dict[tuple[str, str, float, str], Moments]:
    """Return the exact moments by source, loss, discount and ratio.

    Args:
        mdp: The world.
        student: (S, A) logits.
        teacher: (S, A) logits.
        writers: (S, A) logits of who wrote the prefixes, by source.

    Returns:
        Mean and variance of one response's gradient.
    """
    computed: dict[tuple[str, str, float, str], Moments] = {}
    local = {"reverse_kl": "full_reverse_kl", "forward_kl": "full_forward_kl"}

    def add(source: str, sampler: Tensor | None, ratio: str) -> None:
        means, variances = moments(
            mdp, student, teacher, "plain", [0.0, 1.0], sampler=sampler, ratio=ratio
        )
        for i, gamma in enumerate((0.0, 1.0)):
            computed[source, "sampled_token", gamma, ratio] = means[i], variances[i]

    def add_local(source: str, sampler: Tensor | None, estimators: dict[str, str]) -> None:
        means, variances = moments(
            mdp, student, teacher, tuple(estimators.values()), sampler=sampler
        )
        for loss, mean, variance in zip(estimators, means, variances, strict=True):
            computed[source, loss, 0.0, "none"] = mean, variance

    add("student", None, "none")
    add_local("student", None, local)
    for source in OFFLINE:
        sft = {"sft": "negative_log_likelihood"}
        add_local(source, writers[source].softmax(-1), local | sft)
    for loss in local:
        computed["mixed", loss, 0.0, "none"] = mix(
            computed["student", loss, 0.0, "none"], computed["teacher", loss, 0.0, "none"], MIXED
        )
    for ratio in ("none", "token", "sequence"):
        add("replay", writers["replay"].softmax(-1), ratio)
    return computed


def mix(first: Moments, second: Moments, share: float) -> Moments:
    """Return the moments of an estimate whose source is drawn per response.

    Args:
        first: Moments under the first source.
        second: Moments under the second source.
        share: Probability of the second source.

    Returns:
        Mean, and variance by the law of total variance.
    """
    mean = (1 - share) * first[0] + share * second[0]
    between = share * (1 - share) * (first[0] - second[0]).square().sum()
    return mean, (1 - share) * first[1] + share * second[1] + between


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over worlds as medians, with bootstrap intervals that resample worlds.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals; `exponent` is that of the bias in the KL.
    """
    names = [c for c in rows.columns if c not in ("seed", *KEYS)]
    parts = [interval(rows.dropna(subset=[name]), name, KEYS, np.median) for name in names]
    parts.append(interval(prefix_exponents(rows), "exponent", KEYS, np.median))
    return pd.concat(parts, ignore_index=True)


def prefix_exponents(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the exponents of the prefixes' bias in the KL between student and writer.

    Of the local reverse KL, whose bias against its own prefixes is that of the prefixes alone: on
    the teacher's text, and on replayed rollouts with token ratios.

    Args:
        rows: Rows of `measure`.

    Returns:
        The rows with `exponent`, d log bias / d log KL between neighbouring points of the path.
    """
    on_teacher = (rows["source"] == "teacher") & (rows["loss"] == "reverse_kl")
    on_replay = (rows["source"] == "replay") & (rows["gamma"] == 0) & (rows["ratio"] == "token")
    selected = rows[(on_teacher | on_replay) & (rows["kl_source"] > TINY)].sort_values("moved")
    by_curve = selected.groupby(["seed", "horizon", "source"])
    rise, run = (
        by_curve[name].transform(lambda x: np.log(x).diff())
        for name in ("bias_stated", "kl_source")
    )
    return selected.assign(exponent=rise / run).dropna(subset=["exponent"])
