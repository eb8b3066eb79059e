"""Checks of a step's batch: its prompts, sampler and grader, and where due its scores.

All but the scores (`opd.training.checks.rescoring`) need no forward pass.

Shapes: B responses of this rank, P prompt positions, T response positions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.gradients.distributed import all_gather_rows
from diagnostics.ragged import right_pad
from opd.config.prefixes import parse_prefixes
from opd.config.settings import Config
from opd.data.grading.graders import GYM_PROBLEM, grade_responses
from opd.data.prompts import Prompts
from opd.envs.task import GameTask, is_games
from opd.runtime import distributed
from opd.scoring.score import ScoredBatch
from opd.training.checks.expected_loss import rounding_unit
from opd.training.checks.rescoring import is_rescoring_due, rescoring_columns
from opd.training.checks.update import changed_weight_share
from opd.training.state import TaskState, TrainState

MULTIPLIER = 6364136223846793005
"""Knuth's linear congruential multiplier: odd, with powers that repeat late modulo 2^64."""


def check_batch(
    state: TrainState, task: TaskState, task_step: int, batch: ScoredBatch
) -> dict[str, Tensor]:
    """Compute health checks of prompts, grader, sampler and scores.

    Args:
        state: State of the run.
        task: The task.
        task_step: Number of the task's previous steps.
        batch: Scored batch, before any mask.

    Returns:
        Columns of the row, as scalars.
    """
    config, scored = task.config, batch.scored
    bos = task.pair.tokenizer.bos_token_id
    columns = prompt_check_columns(config, batch.prompts, bos)
    if not batch.reuses_sampler:
        columns |= sampler_check_columns(config, scored)
    if not isinstance(task.problems, GameTask):
        grade = partial(grade_texts, task)
        columns |= grader_check_columns(batch.prompts.answers, scored.reward, grade)
    if is_rescoring_due(task_step, config.record.rescore_every):
        state.prefetcher.wait()  # the client of a remote teacher is not thread-safe
        differences = rescoring_columns(config, task.pair, batch.prompts, scored)
        columns |= {
            name: scored.student_logp.new_tensor(value).double()
            for name, value in differences.items()
        }
    if task.teacher_sample is not None:
        columns["consistency/teacher_moved"] = changed_weight_share(task.teacher_sample).to(
            scored.tokens.device
        )
    return columns


def prompt_hashes(prompts: Prompts) -> Tensor:
    """Return the (B,) polynomial hash modulo 2^64 of each prompt's ids, ignoring padding."""
    tokens = prompts.tokens
    powers = torch.full_like(tokens[0], MULTIPLIER).cumprod(0).flip(0)
    return torch.where(prompts.mask, (tokens + 1) * powers, 0).sum(1)


def prompt_check_columns(config: Config, prompts: Prompts, bos: int | None) -> dict[str, Tensor]:
    """Check the prompts of one task's step.

    Args:
        config: Settings of the task.
        prompts: Prompts of this rank.
        bos: BOS token id, if the tokenizer has one.

    Returns:
        Columns of the row. repeated_prompts: share of the step's prompts that duplicate another
        one. prompts_on_several_ranks: share of distinct prompts that another rank has too.
        doubled_bos: share of prompts of this rank that start with two BOS tokens. Games have the
        last one only, since their rows are turns, and so have responses from a dataset, which may
        give several to a prompt.
    """
    columns: dict[str, Tensor] = {}
    is_checked = not parse_prefixes(config.rollout.prefixes).reads_data
    if is_checked and not is_games(config.data.task):
        hashes = prompt_hashes(prompts)
        parts = all_gather_rows(hashes) if distributed.world_size() > 1 else [hashes]
        distinct = torch.stack([_count_distinct(part) for part in parts]).sum()
        total_distinct = _count_distinct(torch.cat(parts))
        columns["data/repeated_prompts"] = 1 - distinct / config.data.prompts_per_step
        columns["data/prompts_on_several_ranks"] = 1 - total_distinct / distinct
    if bos is not None:
        first = prompts.mask.long().argmax(1)
        pair = torch.stack([first, (first + 1).clamp(max=prompts.tokens.shape[1] - 1)], 1)
        has_double_bos = (prompts.tokens.gather(1, pair) == bos).all(1) & (pair[:, 0] != pair[:, 1])
        columns["data/doubled_bos"] = has_double_bos.double().mean()
    return {name: x.double() for name, x in columns.items()}


def _count_distinct(hashes: Tensor) -> Tensor:
    """Return the 0-d float64 number of distinct hashes, without a host sync."""
    sorted_hashes = hashes.sort().values
    return 1 + (sorted_hashes[1:] != sorted_hashes[:-1]).sum().double()


def sampler_check_columns(config: Config, batch: ScoredRollouts) -> dict[str, Tensor]:
    """Compare the student's log-probabilities with the sampler's, on tokens of the current weights.

    Args:
        config: Settings of the task.
        batch: Scored rollouts before any mask, scored by the student itself.

    Returns:
        sampler_error: root mean square of log student - log sampler over tokens sampled from the
            current weights, in units of rounding, rounded down. Empty if the sampler's full
            softmax is not known at the temperature of the scores, or the student samples nothing.
    """
    if not parse_prefixes(config.rollout.prefixes).has_own:
        return {}
    sampler = batch.sampler_logp if batch.softmax_logp is None else batch.softmax_logp
    has_full_softmax = batch.softmax_logp is not None or batch.top_p >= 1
    if not has_full_softmax or batch.temperature != batch.score_temperature:
        return {}
    fresh = batch.own_tokens & (batch.age == 0)[:, None]
    log_ratio = torch.where(fresh, batch.student_logp - sampler, 0.0).double()
    root_mean_square = (log_ratio.square().sum() / fresh.sum().clamp(min=1)).sqrt()
    return {"consistency/sampler_error": root_mean_square.div(rounding_unit(config)).floor()}


CORRECT_TEMPLATES = ("<think></think>{}", "\\boxed{{{}}}")
"""Templates of a correct response for the different graders."""
UNANSWERED_RESPONSES = ("", "I do not know.")
"""Responses without an answer."""


def grader_check_columns(
    answers: list[str], reward: Tensor, grade: Callable[[list[str], str], list[float]]
) -> dict[str, Tensor]:
    """Check the grader with this rank's rewards and one of its reference answers.

    Args:
        answers: Reference answers of this rank.
        reward: (B,) rewards; NaN if a response was not graded, as without an answer.
        grade: Maps texts of responses and a reference answer to rewards, as the step does.

    Returns:
        Columns of the row. grader_constant: 1 if all responses have the same reward and the grader
        gives it to correct and empty responses alike, otherwise 0. grader_missing: share without
        a reward of the responses to problems with an answer; 0 if there are none.
    """
    has_answer = torch.tensor([bool(text.strip()) for text in answers], device=reward.device)
    num_missing = (reward.isnan() & has_answer).double().sum()
    columns = {"consistency/grader_missing": num_missing / has_answer.sum().clamp(min=1)}
    answer = GYM_PROBLEM.sub("", answers[0]) if answers else ""
    constant = torch.zeros_like(columns["consistency/grader_missing"])
    if answer.strip():
        texts = [text.format(answer) for text in CORRECT_TEMPLATES] + list(UNANSWERED_RESPONSES)
        rewards = grade(texts, answers[0])
        if len(set(rewards)) == 1:
            constant = (reward == rewards[0]).all().double()
    return columns | {"consistency/grader_constant": constant}


def grade_texts(task: TaskState, texts: list[str], answer: str) -> list[float]:
    """Grade texts as responses to one problem, as the step's responses are graded.

    Responses end at an EOS id. If a text itself holds such an id, no text is truncated.

    Args:
        task: The task.
        texts: Texts of the responses.
        answer: Reference answer of the problem.

    Returns:
        One reward per text.
    """
    assert not isinstance(task.problems, GameTask)
    tokenizer = task.pair.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    eos_ids = task.pair.eos
    if any(set(text) & set(eos_ids) for text in ids):
        eos_ids = []
    ids = [text + eos_ids[:1] for text in ids]
    tokens = right_pad(ids, torch.long)
    mask = right_pad([[True] * len(row) for row in ids], torch.bool)
    answers = [answer] * len(texts)
    grades = grade_responses(tokenizer, tokens, mask, answers, task.problems.grade, eos_ids)
    return [grade.reward for grade in grades]
