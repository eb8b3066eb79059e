"""Score a few responses again, one at a time, in evaluation mode and without padding.

The log-probabilities of a response must not depend on other rows of the batch, padding, randomness
or earlier steps. If they do, the same rows are scored in further ways to find the cause.
Differences are root mean squares over sampled tokens, in units of what rounding explains
(`opd.training.checks.expected_loss.ROUNDING`), so that one threshold serves every precision.

Shapes: B responses, T positions, n tokens of a response, D hidden size, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from opd.config.settings import Config
from opd.data.prompts import Prompts
from opd.models.contexts import evaluation_mode
from opd.models.forward import log_probabilities, micro_batches, response_hidden_states
from opd.models.model import CausalLM
from opd.scoring.chosen_ids import query_teacher
from opd.teachers.pair import ModelPair
from opd.teachers.teacher import Capability, Teacher
from opd.tokens.eos import EosMap, teacher_tokens
from opd.training.checks.expected_loss import ROUNDING, rounding_unit

ROWS, MAX_ROWS = 4, 64
FIRST_STEPS = 3
UNITS = ("rescored", "chance", "mask", "padding")
CAUSES = (*UNITS, "exchanged", "training", "precision")
MAX_ROUNDING_UNITS = 3
"""Largest difference, in units of rounding, between two equal scorings of the same tokens."""


def is_rescoring_due(step: int, interval: int) -> bool:
    """Return whether to rescore a step: the first ones (most faults show there), then every n."""
    return interval > 0 and (step < FIRST_STEPS or step % interval == 0)


@torch.no_grad()
def rescoring_columns(
    config: Config, pair: ModelPair, prompts: Prompts, batch: ScoredRollouts
) -> dict[str, float]:
    """Score some rows again, and compare with the batch's scores.

    Args:
        config: Settings of the task.
        pair: Student and teacher.
        prompts: Prompts of the batch.
        batch: Scored rollouts, before any mask.

    Returns:
        Columns of the row for ROLE student and teacher. ROLE_rescored: the difference, healthy
        below MAX_ROUNDING_UNITS. From there on the causes are measured, otherwise they are 0:
        ROLE_chance, difference between two identical passes; ROLE_mask, difference with other ids
        at masked positions; ROLE_padding, difference of padded rows if unpadded rows agree;
        ROLE_exchanged, share of rows with the scores of another row. ROLE_training: number of
        modules in training mode with dropout. ROLE_precision: share of weights with another dtype
        than configured.
    """
    rows, columns = select_rows(config, prompts, batch), dict[str, float]()
    eos_map = pair.eos_map if config.objective.map_eos else None
    for role in ("student", *(["teacher"] if pair.teacher.capabilities else [])):
        role_columns = {f"{role}_{cause}": 0.0 for cause in CAUSES}
        if role == "student":
            role_columns |= model_state(role, pair.student, config.hardware.dtype)
            role_columns |= _compare_local_model(
                config, pair.student, None, role, prompts, batch, rows
            )
        elif Capability.HIDDEN_STATES in pair.teacher.capabilities:
            teacher = pair.teacher
            role_columns |= model_state(role, teacher.model, teacher.dtype or config.hardware.dtype)
            role_columns |= _compare_local_model(
                config, teacher.model, eos_map, role, prompts, batch, rows
            )
        else:
            role_columns |= _compare_remote_teacher(
                config, pair.teacher, eos_map, prompts, batch, rows
            )
        columns |= {
            f"consistency/{name}": floor_units(value) if name.endswith(UNITS) else value
            for name, value in role_columns.items()
        }
    return columns


def floor_units(units: float) -> float:
    """Round down; return a large number if the value is not finite."""
    return float(math.floor(units)) if math.isfinite(units) else 1e9


def select_rows(config: Config, prompts: Prompts, batch: ScoredRollouts) -> list[int]:
    """Select at most ROWS rows, half of them with the most padding in their micro-batch."""
    padding, lengths = left_padding(config, prompts, prompts, batch), batch.mask.sum(1).tolist()
    order = sorted(range(len(padding)), key=padding.__getitem__, reverse=True)
    order = [row for row in order if lengths[row]]
    half = ROWS // 2
    return order if len(order) <= ROWS else order[:half] + order[-half:]


def left_padding(
    config: Config, prompts: Prompts, model_prompts: Prompts, batch: ScoredRollouts
) -> list[int]:
    """Return the left padding of each row's prompt in the micro-batch in which it is scored.

    Args:
        config: Settings of the task.
        prompts: Prompts of the batch, by which it is split.
        model_prompts: Those that the model reads: `prompts`, or the teacher's.
        batch: Scored rollouts.

    Returns:
        Number of padding ids of each row.
    """
    lengths = model_prompts.mask.sum(1).tolist()
    padding = [0] * len(lengths)
    for group in micro_batches(prompts, batch, config.hardware.max_tokens_per_microbatch):
        widest = max(lengths[row] for row in group)
        for row in group:
            padding[row] = widest - lengths[row]
    return padding


def model_state(role: str, model: CausalLM, dtype: str) -> dict[str, float]:
    """Compute ROLE_training and ROLE_precision (see `rescoring_columns`) without a device sync."""
    num_matching = num_other = 0
    for weight in model.network.parameters():
        if weight.is_floating_point():
            matches = weight.dtype is getattr(torch, dtype)
            num_matching, num_other = (
                num_matching + matches * weight.numel(),
                num_other + (not matches) * weight.numel(),
            )
    share = num_other / max(1, num_matching + num_other)
    return {f"{role}_training": float(count_active_dropout(model)), f"{role}_precision": share}


def count_active_dropout(model: CausalLM) -> int:
    """Count the modules in training mode with a positive dropout rate."""
    count = 0
    for module in model.network.modules():
        rates = (getattr(module, name, 0.0) for name in ("p", "dropout", "attention_dropout"))
        count += module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)
    return count


def _score_row(
    config: Config,
    model: CausalLM,
    eos_map: EosMap | None,
    prompts: Prompts,
    batch: ScoredRollouts,
    row: int,
) -> Tensor:
    """Return the (n,) log-probabilities of one row's sampled tokens, scored without padding."""
    prompt, places = prompts.tokens[row][prompts.mask[row]], batch.mask[row].nonzero()[:, 0]
    ids = torch.cat([prompt, batch.tokens[row, : int(places[-1]) + 1]])[None, :-1]
    position = torch.arange(ids.shape[1], device=ids.device)[None]
    tokens = batch.tokens[row, places]
    if eos_map is not None:
        tokens = teacher_tokens(tokens, eos_map)
    with evaluation_mode(model.network):
        states = model.hidden(ids, torch.ones_like(ids), position)
        logp = log_probabilities(
            model, states[0, len(prompt) - 1 + places], config.rollout.temperature
        )
    return logp.gather(1, tokens[:, None])[:, 0]


def _compare_local_model(
    config: Config,
    model: CausalLM,
    eos_map: EosMap | None,
    role: str,
    prompts: Prompts,
    batch: ScoredRollouts,
    rows: Sequence[int],
) -> dict[str, float]:
    """Return ROLE_rescored, and the causes if it is not below MAX_ROUNDING_UNITS."""
    unit, scores = rounding_unit(config), getattr(batch, f"{role}_logp")
    model_prompts = prompts.teacher_prompts if role == "teacher" else prompts
    logp_by_row = {
        row: _score_row(config, model, eos_map, model_prompts, batch, row) for row in rows
    }
    gaps = {row: scores[row][batch.mask[row]] - logp_by_row[row] for row in rows}
    difference = _rms(list(gaps.values())) / unit
    if difference < MAX_ROUNDING_UNITS:
        return {f"{role}_rescored": difference}
    row_prompts, row_batch = model_prompts.rows(list(rows)), batch.rows(list(rows))
    first_logp, second_logp = (_logp(config, model, row_prompts, row_batch) for _ in range(2))
    with evaluation_mode(model.network):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(model.vocabulary, row_prompts.tokens.shape, generator=generator)
        filled = torch.where(
            row_prompts.mask, row_prompts.tokens, noise.to(row_prompts.tokens.device)
        )
        plain_logp = _logp(config, model, row_prompts, row_batch)
        refilled_logp = _logp(config, model, replace(row_prompts, tokens=filled), row_batch)
    lengths = batch.mask.sum(1).tolist()
    for row in range(min(len(lengths), MAX_ROWS)):
        if lengths[row] and row not in logp_by_row:
            logp_by_row[row] = _score_row(config, model, eos_map, model_prompts, batch, row)
    padding = left_padding(config, prompts, model_prompts, batch)
    return {
        f"{role}_rescored": difference,
        f"{role}_chance": _rms([first_logp - second_logp]) / unit,
        f"{role}_mask": _rms([plain_logp - refilled_logp]) / unit,
        f"{role}_padding": _padding_difference(gaps, padding, unit),
        f"{role}_exchanged": _exchanged_share(
            scores, batch.mask, logp_by_row, rows, MAX_ROUNDING_UNITS * unit
        ),
    }


def _logp(config: Config, model: CausalLM, prompts: Prompts, batch: ScoredRollouts) -> Tensor:
    """Return the (N,) log-probabilities of the sampled tokens of a padded batch."""
    logp = log_probabilities(
        model, response_hidden_states(model, prompts, batch), config.rollout.temperature
    )
    return logp.gather(1, batch.tokens[batch.mask][:, None])[:, 0]


def _rms(parts: Sequence[Tensor]) -> float:
    """Return the root mean square over all elements; 0 without tensors."""
    return float(torch.cat(list(parts)).double().square().mean().sqrt()) if parts else 0.0


def _padding_difference(gaps: dict[int, Tensor], padding: Sequence[int], unit: float) -> float:
    """Return the difference of padded rows if the unpadded rows agree, otherwise 0."""
    padded = [gap for row, gap in gaps.items() if padding[row]]
    unpadded = [gap for row, gap in gaps.items() if not padding[row]]
    if not padded or not unpadded or _rms(unpadded) > MAX_ROUNDING_UNITS * unit:
        return 0.0
    return _rms(padded) / unit


def _exchanged_share(
    scores: Tensor, mask: Tensor, logp_by_row: dict[int, Tensor], rows: Sequence[int], limit: float
) -> float:
    """Compute the share of rows that have the scores of another row.

    Args:
        scores: (B, T) log-probabilities of the batch.
        mask: (B, T) mask of `scores`.
        logp_by_row: (n,) correct log-probabilities by row.
        rows: Rows to check.
        limit: Largest difference in nats between equal scores.

    Returns:
        The share.
    """

    def equal(first: Tensor, second: Tensor) -> bool:
        size = min(len(first), len(second))
        return _rms([first[:size] - second[:size]]) <= limit

    exchanged = 0
    for row in rows:
        row_scores = scores[row][mask[row]]
        exchanged += not equal(row_scores, logp_by_row[row]) and any(
            equal(row_scores, other_logp)
            for other_row, other_logp in logp_by_row.items()
            if other_row != row
        )
    return exchanged / max(1, len(rows))


def _compare_remote_teacher(
    config: Config,
    teacher: Teacher,
    eos_map: EosMap | None,
    prompts: Prompts,
    batch: ScoredRollouts,
    rows: Sequence[int],
) -> dict[str, float]:
    """Query a remote teacher again, one row at a time: teacher_rescored and teacher_exchanged."""
    unit = ROUNDING["bfloat16"]  # the precision of the server is not known
    logp_by_row = {}
    for row in rows:
        answers = query_teacher(
            teacher,
            prompts.teacher_prompts.rows([row]),
            batch.rows([row]),
            config.objective.support_k,
            eos_map,
        )
        logp_by_row[row] = answers.sampled
    gaps = [batch.teacher_logp[row][batch.mask[row]] - logp_by_row[row] for row in rows]
    exchanged = _exchanged_share(
        batch.teacher_logp, batch.mask, logp_by_row, rows, MAX_ROUNDING_UNITS * unit
    )
    return {"teacher_rescored": _rms(gaps) / unit, "teacher_exchanged": exchanged}
