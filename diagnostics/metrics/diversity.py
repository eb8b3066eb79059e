"""Diversity over the rollouts of one prompt (D-5): is there still more than one answer?

All rollouts of a prompt must be in one batch. Shapes: B responses, T positions, C prompts.
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import prefix_of
from diagnostics.core.totals import Accumulator, Mean, cluster_numbers

GRAM, FIRST = 4, 64


def distinct(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-5: how many of the 4-grams that the rollouts of a prompt contain are different.

    distinct_4 = sum over prompts of the number of different 4-grams of sampled tokens, over the
    sum of their number; prompts with one rollout are left out.
    Access: tokens. Source: distinct-n, pooled over prompts; falls with the number of rollouts and
    their length, so compare runs of one group size.
    Healthy: steady. A fall at a steady length is a student that gives one answer only.
    """
    grams, owner, used = windows(batch.tokens, batch.sampled, GRAM)
    prompt = cluster_numbers(batch.prompt)
    several = torch.bincount(prompt, minlength=len(batch))[prompt] > 1
    kept = used & several[owner]
    rows = torch.cat([prompt[owner][:, None], grams], 1)[kept]
    count = torch.zeros(len(batch), device=rows.device, dtype=torch.float64)
    every = count.index_add(0, rows[:, 0], torch.ones(len(rows), device=rows.device).double())
    fresh = rows.unique(dim=0)
    new = count.index_add(0, fresh[:, 0], torch.ones(len(fresh), device=rows.device).double())
    there = torch.ones(len(batch), dtype=torch.bool, device=rows.device)
    return {"diversity/distinct_4": Mean.ratio(new, every, there)}


def windows(tokens: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every window of `size` tokens of the mask: ids (N, size), row (N,), and which are whole."""
    order = (~mask).long().argsort(dim=1, stable=True)  # tokens of the mask first, in their order
    own = tokens.gather(1, order)
    length = mask.sum(1)
    if own.shape[1] < size:
        own = torch.nn.functional.pad(own, (0, size - own.shape[1]))
    grams = own.unfold(1, size, 1)
    start = torch.arange(grams.shape[1], device=tokens.device)
    whole = start + size <= length[:, None]
    row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(whole)
    return grams.flatten(0, 1), row.flatten(), whole.flatten()


def second_try(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-5: what a second rollout adds, pass@2 - pass@1, over prompts with two graded ones or more.

    With c of n rollouts right: pass@1 = c / n, pass@2 = 1 - C(n - c, 2) / C(n, 2), both unbiased;
    pass_1, pass_2 and their difference second_try = c (n - c) / (n (n - 1)) are means over prompts.
    Access: rewards. Source: the estimator of 2107.03374.
    Healthy: 0 where every prompt is always or never solved. Falling while pass_1 rises little is
    sharpening: the student bets on fewer answers.
    """
    graded = ~batch.reward.isnan()
    prompt = cluster_numbers(batch.prompt)
    zero = torch.zeros(len(batch), dtype=torch.float64, device=prompt.device)
    n = zero.index_add(0, prompt, graded.double())
    right = (graded & (batch.reward >= 1)).double()
    c = zero.index_add(0, prompt, right)
    known = n >= 2
    m = n.clamp(min=2)
    first, more = c / m, c * (m - c) / (m * (m - 1))
    return {
        "diversity/pass_1": Mean.of(first, known),
        "diversity/pass_2": Mean.of(first + more, known),
        "diversity/second_try": Mean.of(more, known),
    }


def branching(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-5: the student's mean entropy over the first 64 positions, where responses part.

    Over all sampled tokens.

    early_entropy, nats. Access: L2. Source: ours, after where 2604.13016 sees branches.
    Healthy: falls slowly. Near 0 all rollouts of a prompt begin alike, whatever comes later.
    """
    entropy = prefix_of(batch).student_entropy
    early = batch.sampled & (torch.arange(batch.mask.shape[1], device=entropy.device) < FIRST)
    return {"diversity/early_entropy": Mean.of(entropy, early, batch.prompt)}
