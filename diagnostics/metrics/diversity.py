"""Diversity metrics over the rollouts of one prompt (D-5).

All rollouts of a prompt must be in one batch. Shapes: B responses, T positions, C prompts.
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.cluster_sums import cluster_indices
from diagnostics.core.optional_fields import require_distribution_stats
from diagnostics.core.totals import Accumulator, Mean

NGRAM_SIZE, EARLY_POSITIONS = 4, 64


def distinct(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-5: Compute the share of distinct 4-grams in the rollouts of a prompt.

    Prompts with one rollout are left out.

    Access: tokens.
    Source: distinct-n, pooled over prompts; it falls with the number of rollouts and their length,
    so compare runs with the same group size.
    Healthy: steady. A fall at a steady length means that the student gives only one answer.

    Args:
        batch: Scored rollouts.

    Returns:
        diversity/distinct_4: Sum over prompts of the number of different 4-grams of sampled tokens,
            divided by the sum of the number of 4-grams.
    """
    grams, row_index, complete = ngram_windows(batch.tokens, batch.sampled, NGRAM_SIZE)
    prompt = cluster_indices(batch.prompt)
    has_siblings = torch.bincount(prompt, minlength=len(batch))[prompt] > 1
    selected = complete & has_siblings[row_index]
    rows = torch.cat([prompt[row_index][:, None], grams], 1)[selected]
    zeros = torch.zeros(len(batch), device=rows.device, dtype=torch.float64)
    num_ngrams = zeros.index_add(0, rows[:, 0], torch.ones(len(rows), device=rows.device).double())
    unique_rows = rows.unique(dim=0)
    num_distinct = zeros.index_add(
        0, unique_rows[:, 0], torch.ones(len(unique_rows), device=rows.device).double()
    )
    all_rows = torch.ones(len(batch), dtype=torch.bool, device=rows.device)
    return {"diversity/distinct_4": Mean.ratio(num_distinct, num_ngrams, all_rows)}


def ngram_windows(tokens: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return every window of `size` consecutive tokens of the mask.

    Args:
        tokens: (B, T) ids.
        mask: (B, T) bool, the tokens that form the sequence; others are skipped.
        size: Number of tokens in a window.

    Returns:
        Ids (N, size), row index (N,), and (N,) bool: the window lies within the response.
    """
    order = (~mask).long().argsort(dim=1, stable=True)  # moves the tokens of the mask to the front
    packed = tokens.gather(1, order)
    length = mask.sum(1)
    if packed.shape[1] < size:
        packed = torch.nn.functional.pad(packed, (0, size - packed.shape[1]))
    grams = packed.unfold(1, size, 1)
    start = torch.arange(grams.shape[1], device=tokens.device)
    complete = start + size <= length[:, None]
    row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(complete)
    return grams.flatten(0, 1), row.flatten(), complete.flatten()


def second_try(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-5: Compute the gain of a second rollout, pass@2 - pass@1.

    With c of n rollouts correct (a reward of at least 1): pass@1 = c / n and
    pass@2 = 1 - C(n - c, 2) / C(n, 2), both unbiased. All are means over prompts with two graded
    rollouts or more.

    Access: rewards.
    Source: the estimator of 2107.03374.
    Healthy: 0 where every prompt is always or never solved. A fall while pass_1 rises little is
    sharpening: the student concentrates on fewer answers.

    Args:
        batch: Scored rollouts.

    Returns:
        diversity/pass_1: pass@1.
        diversity/pass_2: pass@2.
        diversity/second_try: Their difference, c (n - c) / (n (n - 1)).
    """
    graded = ~batch.reward.isnan()
    prompt = cluster_indices(batch.prompt)
    zero = torch.zeros(len(batch), dtype=torch.float64, device=prompt.device)
    n = zero.index_add(0, prompt, graded.double())
    correct = (graded & (batch.reward >= 1)).double()
    c = zero.index_add(0, prompt, correct)
    has_two_graded = n >= 2
    m = n.clamp(min=2)
    pass_1, gain = c / m, c * (m - c) / (m * (m - 1))
    return {
        "diversity/pass_1": Mean.from_values(pass_1, has_two_graded),
        "diversity/pass_2": Mean.from_values(pass_1 + gain, has_two_graded),
        "diversity/second_try": Mean.from_values(gain, has_two_graded),
    }


def branching(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-5: Compute the student's mean entropy over the first 64 positions, where responses diverge.

    Access: L2.
    Source: this toolkit, after 2604.13016, which locates the branches there.
    Healthy: falls slowly. Near 0 all rollouts of a prompt begin alike, whatever follows.

    Args:
        batch: Scored rollouts.

    Returns:
        diversity/early_entropy: Mean over all sampled tokens of these positions, nats.
    """
    entropy = require_distribution_stats(batch).student_entropy
    early = batch.sampled & (
        torch.arange(batch.mask.shape[1], device=entropy.device) < EARLY_POSITIONS
    )
    return {"diversity/early_entropy": Mean.from_values(entropy, early, batch.prompt)}
