"""Headline columns: the few that a logger shows by default. The record always has all columns."""

from collections.abc import Collection, Mapping
from typing import TypeVar

Value = TypeVar("Value")

HEADLINE: Mapping[str, str] = {
    "divergence/tokens": "how many tokens the means are over; a mean of few tokens is noise",
    "divergence/k1": "the reverse KL from sampled tokens: there at every access level",
    "divergence/k1_se": "its standard error over prompts: whether a change of k1 is one",
    "divergence/reverse_kl": "the exact reverse KL, what most losses minimise",
    "divergence/teacher_prob": "how probable the teacher finds what the student writes",
    "divergence/outside_topk": "tokens that a top-K loss never sees",
    "divergence/overlap_ratio": "agreement of both top-K; stays low where distillation fails",
    "divergence/student_entropy": "falls to 0 when the student collapses",
    "divergence/teacher_entropy": "the entropy that the student's is compared with",
    "signal/negative_share": "share of tokens that the loss pushes down",
    "signal/signal_n_eff_share": "small when a few tokens carry the whole gradient",
    "tokens/one_id_signal": "large when a single token id carries it, as a wrong EOS does",
    "tokens/confident_impossible_share": "tokens that the teacher rules out: a wrong template",
    "response/length": "the first curve that runs away",
    "response/truncated_share": "responses without an end, whose costs are cut off",
    "repetition/repeated_share": "loops, which a low divergence can hide",
    "response/reward": "the task itself, where something grades it",
    "consistency/z_H": "test that the sampler is the scored student; healthy within 4",
    "consistency/age": "updates since the rollouts were sampled",
    "consistency/sampler_log_ratio_square": "distance of the engine's log-probabilities",
}
"""Column of the panel -> the reason why it is shown."""

RUN_HEADLINE: Mapping[str, str] = {
    "loss": "what is minimised",
    "grad_norm": "spikes come before a loss that diverges",
    "lr": "the learning rate",
    "skipped": "optimizer steps lost to a non-finite gradient",
    "grading/readable_share": "answers that the grader can read; at 0 the reward says nothing",
    "episodes/success": "of games: the share won",
    "view/kl": "how far its own view moves the teacher; 0 if it ignores what it is shown",
    "view/copied_share": "what responses copy of a view that the student never reads",
    "consistency/loss_error": "the loss recomputed independently; healthy 0",
    "seconds/rollout": "time of sampling",
    "seconds/update": "time of gradients and of the optimizer",
}
"""Column of a run of `opd train`, besides `HEADLINE` -> the reason why it is shown."""

RUN_COLUMNS = (*HEADLINE, *RUN_HEADLINE)
"""What the loggers of `opd train` show by default."""


def select_columns(row: Mapping[str, Value], columns: Collection[str] | None) -> dict[str, Value]:
    """Select columns of a row of `opd train`, also those of one of several tasks.

    Evaluations, whose columns begin with `eval/`, are selected whole: they are few.

    Args:
        row: Column name to value; names may begin with `task=NAME/`.
        columns: The names to select; all if None.

    Returns:
        The selected columns, in the order of the row.
    """
    if columns is None:
        return dict(row)
    endings = tuple(f"/{name}" for name in columns)
    return {
        name: value
        for name, value in row.items()
        if name in columns
        or name.startswith("eval/")
        or (name.startswith("task=") and name.endswith(endings))
    }


def headline_tables() -> str:
    """Return both lists as a Markdown table."""
    rows = [*HEADLINE.items(), *RUN_HEADLINE.items()]
    lines = [f"| {name} | {reason} |" for name, reason in rows]
    return "\n".join(["| column | why it is shown |", "|---|---|", *lines])
