"""What a step's rows say about themselves, at no forward pass: prompts, sampler, grader.

Shapes: B responses of this process, P prompt positions, T response positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.gradients.distributed import rows_of_ranks
from opd.config.settings import Config
from opd.data.grading.graders import GYM_PROBLEM
from opd.data.prompts import Prompts
from opd.envs.task import is_games
from opd.runtime import distributed
from opd.training.checks.expected_loss import rounding

MULTIPLIER = 6364136223846793005
"""Odd, and so that its powers modulo 2^64 repeat late: of Knuth's linear congruential generator."""


def prompt_hashes(prompts: Prompts) -> Tensor:
    """(B,) polynomial hash modulo 2^64 of each prompt's ids, whatever its padding on the left."""
    tokens = prompts.tokens
    powers = torch.full_like(tokens[0], MULTIPLIER).cumprod(0).flip(0)
    return torch.where(prompts.mask, (tokens + 1) * powers, 0).sum(1)


def prompt_numbers(config: Config, prompts: Prompts, bos: int | None) -> dict[str, Tensor]:
    """Columns of the row about the prompts of one task's step, the same on every process.

    repeated_prompts: share of the step's prompts that are copies of another one of it;
    prompts_on_several_ranks: share that another process has too; doubled_bos: share that begins
    with the BOS token twice. Of games the last alone: their rows are turns.
    """
    columns: dict[str, Tensor] = {}
    if not is_games(config.task):
        hashes = prompt_hashes(prompts)
        parts = rows_of_ranks(hashes) if distributed.size() > 1 else [hashes]
        distinct = torch.stack([_distinct(part) for part in parts]).sum()
        once = _distinct(torch.cat(parts))
        columns["data/repeated_prompts"] = 1 - distinct / config.prompts_per_step
        columns["data/prompts_on_several_ranks"] = 1 - once / distinct
    if bos is not None:
        first = prompts.mask.long().argmax(1)
        pair = torch.stack([first, (first + 1).clamp(max=prompts.tokens.shape[1] - 1)], 1)
        doubled = (prompts.tokens.gather(1, pair) == bos).all(1) & (pair[:, 0] != pair[:, 1])
        columns["data/doubled_bos"] = doubled.double().mean()
    return {name: x.double() for name, x in columns.items()}


def _distinct(hashes: Tensor) -> Tensor:
    """0-d float64 number of different hashes, without a host sync."""
    ordered = hashes.sort().values
    return 1 + (ordered[1:] != ordered[:-1]).sum().double()


def sampler_numbers(config: Config, batch: ScoredRollouts) -> dict[str, Tensor]:
    """sampler_error: root mean square of log student - log sampler, in whole units of rounding.

    Of every sampled token of the present weights. Nothing where the sampler's own softmax is not
    known at the temperature that is scored.

    Args:
      batch: every sampled token, scored by the student itself.
    """
    sampler = batch.sampler_logp if batch.softmax_logp is None else batch.softmax_logp
    known = batch.softmax_logp is not None or batch.top_p >= 1
    if not known or batch.temperature != batch.score_temperature:
        return {}
    fresh = batch.sampled & (batch.age == 0)[:, None]
    gap = torch.where(fresh, batch.student_logp - sampler, 0.0).double()
    size = (gap.square().sum() / fresh.sum().clamp(min=1)).sqrt()
    return {"consistency/sampler_error": size.div(rounding(config)).floor()}


RIGHT = ("<think></think>{}", "\\boxed{{{}}}")
"""Responses that give an answer in the way of one grader or another."""
WRONG = ("", "I do not know.")


def grader_numbers(
    answers: list[str], reward: Tensor, grade: Callable[[list[str], str], list[float]]
) -> dict[str, Tensor]:
    """Columns of the row about the grader, from this process's rewards (B,) and one of its answers.

    grader_constant: 1 if all responses of the step have one reward, and so have a right answer and
    no answer at all; else 0. grader_missing: share of responses without a reward.

    Args:
      grade: texts of responses and the answer to compare with -> rewards, in the way of the step.
    """
    missing = reward.isnan()
    columns = {"consistency/grader_missing": missing.double().mean()}
    answer = GYM_PROBLEM.sub("", answers[0]) if answers else ""
    constant = torch.zeros_like(columns["consistency/grader_missing"])
    if answer.strip():
        texts = [text.format(answer) for text in RIGHT] + list(WRONG)
        rewards = grade(texts, answers[0])
        if len(set(rewards)) == 1:
            constant = (reward == rewards[0]).all().double()
    return columns | {"consistency/grader_constant": constant}
