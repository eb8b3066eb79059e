"""What a teacher's own view changes: its distributions, the signal, and what responses copy of it.

A teacher may read another prompt than the student (`opd.data.teacher_view`), such as one with a
solution. Shapes: B responses, T positions. p is the student, q the teacher with its view, q' the
same teacher with the student's prompt, y the sampled token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Accumulator, Mean, PositionMean

COPY_LENGTH = 8
"""Consecutive ids that count as a copy."""


def view_effect(
    batch: ScoredRollouts, plain_logp: Tensor, kl: Tensor | None
) -> dict[str, Accumulator]:
    """Compute how far a view moves the teacher, and the part of the signal that depends on it.

    All over the supervised tokens. The signal of a token is s = log q(y) - log p(y), the sum of
    what the teacher says anyway, log q'(y) - log p(y), and of what the view adds, log q(y) - log
    q'(y).

    Access: L0, and both full distributions of the teacher for the KL.
    Source: derived; the KL is what a student that never sees the view cannot follow.
    Healthy: a KL of 0 is a view that the teacher ignores. A KL that is large at the first tokens
    and then falls is a view that decides how to begin; one that stays large is a view that the
    student cannot infer, whose mean is all that it can learn.

    Args:
        batch: Scored rollouts, the teacher's log-probabilities with its view.
        plain_logp: (B, T) log q'(y), 0 where nothing was sampled.
        kl: (B, T) KL(q || q') at each position; None for a teacher without distributions.

    Returns:
        view/kl: Mean KL(q || q'), also by position.
        view/log_ratio: Mean log q(y) - log q'(y): whether what is shown speaks for what the student
            wrote, also by position.
        view/signal_share: sum s (log q(y) - log q'(y)) / sum s^2, the share of the squared signal
            that the view adds; 1 if the teacher without a view is the student.
    """
    added = (batch.teacher_logp - plain_logp).detach()
    signal = -batch.log_ratio
    accumulators: dict[str, Accumulator] = {
        "view/log_ratio": PositionMean.from_values(added, batch.mask, batch.prompt),
        "view/signal_share": Mean.ratio(signal * added, signal.square(), batch.mask, batch.prompt),
    }
    if kl is not None:
        accumulators["view/kl"] = PositionMean.from_values(kl, batch.mask, batch.prompt)
    return accumulators


def view_copying(
    responses: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    cluster: Tensor,
) -> dict[str, Accumulator]:
    """Compute what responses copy of what only the teacher reads.

    A token is copied if it belongs to COPY_LENGTH consecutive ids of the response that are also
    in the teacher's prompt and not in the student's.

    Access: token ids.
    Source: derived; the student never reads the view, so that copies of it are what the teacher's
    scores carry over.
    Healthy: of a view that shows the solution, near the share that solutions of the student share
    with it anyway (compare with the first steps, and with another problem's view); a rise of
    phrases such as "the solution says" is a leak.

    Args:
        responses: B responses, the sampled ids of each.
        prompts: B prompts of the student.
        teacher_prompts: B prompts of the teacher.
        cluster: (B,) long, equal for rows of the same prompt.

    Returns:
        view/copied_share: Share of the tokens that are copied.
        view/longest_copy: Mean over responses of the longest run of copied tokens.
    """
    copied: list[list[bool]] = []
    novel, compared = set[tuple[int, ...]](), None
    for response, *pair in zip(responses, prompts, teacher_prompts, strict=True):
        if pair != compared:  # rows of one prompt follow each other
            novel, compared = novel_sequences(*pair), pair
        copied.append(copied_tokens(response, novel))
    counts = torch.tensor([float(sum(row)) for row in copied])
    lengths = torch.tensor([float(len(row)) for row in copied])
    runs = torch.tensor([float(longest_run(row)) for row in copied])
    has_tokens = lengths > 0
    return {
        "view/copied_share": Mean.ratio(counts, lengths, has_tokens, cluster),
        "view/longest_copy": Mean.from_values(runs, has_tokens, cluster),
    }


def novel_sequences(prompt: Sequence[int], teacher_prompt: Sequence[int]) -> set[tuple[int, ...]]:
    """Return all COPY_LENGTH consecutive ids of a teacher's prompt that the student's lacks."""
    return sequences(teacher_prompt, COPY_LENGTH) - sequences(prompt, COPY_LENGTH)


def copied_tokens(response: Sequence[int], novel: set[tuple[int, ...]]) -> list[bool]:
    """Return whether each id of a response is part of a copy; see `view_copying`."""
    n = COPY_LENGTH
    is_copied = [False] * len(response)
    for start in range(len(response) - n + 1):
        if tuple(response[start : start + n]) in novel:
            is_copied[start : start + n] = [True] * n
    return is_copied


def sequences(ids: Sequence[int], n: int) -> set[tuple[int, ...]]:
    """Return all sequences of n consecutive ids."""
    return {tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)}


def longest_run(flags: Sequence[bool]) -> int:
    """Return the largest number of consecutive True values."""
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest
