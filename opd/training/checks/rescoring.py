"""Scoring a few responses again, each alone, in evaluation mode and without padding.

What a model says of a response must not depend on the rows beside it, on padding, on chance or on
an earlier step. Where it does, the same rows are scored in further ways that say which of these it
is. Differences are root mean squares over sampled tokens, in whole units of what rounding explains
(`opd.training.checks.expected_loss.ROUNDING`), so that one range serves every precision.

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
from opd.models.contexts import evaluating
from opd.models.forward import log_probabilities, micro_batches, response_hidden
from opd.models.model import CausalLM
from opd.teachers.pair import ModelPair
from opd.teachers.remote_scores import asked
from opd.tokens.eos import teacher_tokens
from opd.training.checks.expected_loss import ROUNDING, rounding

ROWS, MOST_ROWS = 4, 64
FIRST_STEPS = 3
UNITS = ("rescored", "chance", "mask", "padding")
CAUSES = (*UNITS, "exchanged", "training", "precision")
LIMIT = 3
"""Units of rounding within which two scorings of the same tokens are the same."""


def is_due(step: int, every: int) -> bool:
    """Whether a step's scores are checked: the first ones, since most faults are there at once."""
    return every > 0 and (step < FIRST_STEPS or step % every == 0)


@torch.no_grad()
def rescored(
    config: Config, pair: ModelPair, prompts: Prompts, batch: ScoredRollouts
) -> dict[str, float]:
    """Columns of the row: what scoring some rows again says about both models' scores.

    For ROLE student and teacher: ROLE_rescored, the difference, healthy below LIMIT. From there on
    its causes are measured too, else they are 0: ROLE_chance, scored twice alike; ROLE_mask, with
    other ids where attention is masked; ROLE_padding, of padded rows where others agree;
    ROLE_exchanged, share of rows whose scores are another row's. ROLE_training: modules in training
    mode that drop something out; ROLE_precision: share of the weights in another precision than
    asked.

    Args:
      batch: every sampled token, scored.
    """
    rows, columns = chosen_rows(config, prompts, batch), dict[str, float]()
    for role in ("student", "teacher"):
        remote = role == "teacher" and pair.remote is not None
        measured = {f"{role}_{cause}": 0.0 for cause in CAUSES}
        if remote:
            measured |= _remote(config, pair, prompts, batch, rows)
        else:
            measured |= model_state(role, getattr(pair, role), config)
            measured |= _compared(config, pair, role, prompts, batch, rows)
        columns |= {
            f"consistency/{name}": whole(value) if name.endswith(UNITS) else value
            for name, value in measured.items()
        }
    return columns


def whole(units: float) -> float:
    """The number without its fraction; a large one where it is not finite."""
    return float(math.floor(units)) if math.isfinite(units) else 1e9


def chosen_rows(config: Config, prompts: Prompts, batch: ScoredRollouts) -> list[int]:
    """At most ROWS rows, half of them those with the most padding where they were scored."""
    padding, lengths = padding_of(config, prompts, batch), batch.mask.sum(1).tolist()
    order = sorted(range(len(padding)), key=padding.__getitem__, reverse=True)
    order = [row for row in order if lengths[row]]
    half = ROWS // 2
    return order if len(order) <= ROWS else order[:half] + order[-half:]


def padding_of(config: Config, prompts: Prompts, batch: ScoredRollouts) -> list[int]:
    """Padding on the left of each row's prompt in the micro-batch that it is scored in."""
    lengths = prompts.mask.sum(1).tolist()
    padding = [0] * len(lengths)
    for group in micro_batches(prompts, batch, config.max_tokens_per_microbatch):
        widest = max(lengths[row] for row in group)
        for row in group:
            padding[row] = widest - lengths[row]
    return padding


def model_state(role: str, model: CausalLM, config: Config) -> dict[str, float]:
    """ROLE_training and ROLE_precision, see `rescored`; no number is read from the device."""
    expected = "float32" if role == "teacher" and config.teacher == "ema" else config.dtype
    right = wrong = 0
    for weight in model.network.parameters():
        if weight.is_floating_point():
            same = weight.dtype is getattr(torch, expected)
            right, wrong = right + same * weight.numel(), wrong + (not same) * weight.numel()
    share = wrong / max(1, right + wrong)
    return {f"{role}_training": float(dropping(model)), f"{role}_precision": share}


def dropping(model: CausalLM) -> int:
    """Number of modules in training mode that drop something out."""
    count = 0
    for module in model.network.modules():
        rates = (getattr(module, name, 0.0) for name in ("p", "dropout", "attention_dropout"))
        count += module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)
    return count


def _alone(
    config: Config, pair: ModelPair, role: str, prompts: Prompts, batch: ScoredRollouts, row: int
) -> Tensor:
    """(n,) log-probabilities of one row's sampled tokens, from a sequence without padding."""
    model: CausalLM = getattr(pair, role)
    prompt, places = prompts.tokens[row][prompts.mask[row]], batch.mask[row].nonzero()[:, 0]
    ids = torch.cat([prompt, batch.tokens[row, : int(places[-1]) + 1]])[None, :-1]
    position = torch.arange(ids.shape[1], device=ids.device)[None]
    tokens = batch.tokens[row, places]
    if role == "teacher" and config.map_eos and pair.endings is not None:
        tokens = teacher_tokens(tokens, pair.endings)
    with evaluating(model.network):
        states = model.hidden(ids, torch.ones_like(ids), position)
        logp = log_probabilities(model, states[0, len(prompt) - 1 + places], config.temperature)
    return logp.gather(1, tokens[:, None])[:, 0]


def _compared(
    config: Config,
    pair: ModelPair,
    role: str,
    prompts: Prompts,
    batch: ScoredRollouts,
    rows: Sequence[int],
) -> dict[str, float]:
    """ROLE_rescored, and the causes where it is beyond LIMIT."""
    model: CausalLM = getattr(pair, role)
    unit, scores = rounding(config), getattr(batch, f"{role}_logp")
    alone = {row: _alone(config, pair, role, prompts, batch, row) for row in rows}
    gaps = {row: scores[row][batch.mask[row]] - alone[row] for row in rows}
    size = _rms(list(gaps.values())) / unit
    if size < LIMIT:
        return {f"{role}_rescored": size}
    some, own = prompts.rows(list(rows)), batch.rows(list(rows))
    first, second = (_logp(config, model, some, own) for _ in range(2))
    with evaluating(model.network):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(model.vocabulary, some.tokens.shape, generator=generator)
        filled = torch.where(some.mask, some.tokens, noise.to(some.tokens.device))
        plain = _logp(config, model, some, own)
        other = _logp(config, model, replace(some, tokens=filled), own)
    lengths = batch.mask.sum(1).tolist()
    for row in range(min(len(lengths), MOST_ROWS)):
        if lengths[row] and row not in alone:
            alone[row] = _alone(config, pair, role, prompts, batch, row)
    return {
        f"{role}_rescored": size,
        f"{role}_chance": _rms([first - second]) / unit,
        f"{role}_mask": _rms([plain - other]) / unit,
        f"{role}_padding": _padding(gaps, padding_of(config, prompts, batch), unit),
        f"{role}_exchanged": _exchanged(scores, batch.mask, alone, rows, LIMIT * unit),
    }


def _logp(config: Config, model: CausalLM, prompts: Prompts, batch: ScoredRollouts) -> Tensor:
    """(N,) log-probabilities of the sampled tokens of a padded batch, as scoring makes them."""
    logp = log_probabilities(model, response_hidden(model, prompts, batch), config.temperature)
    return logp.gather(1, batch.tokens[batch.mask][:, None])[:, 0]


def _rms(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts)).double().square().mean().sqrt()) if parts else 0.0


def _padding(gaps: dict[int, Tensor], padding: Sequence[int], unit: float) -> float:
    """The difference of rows with padding, where rows without any agree; else 0."""
    padded = [gap for row, gap in gaps.items() if padding[row]]
    plain = [gap for row, gap in gaps.items() if not padding[row]]
    if not padded or not plain or _rms(plain) > LIMIT * unit:
        return 0.0
    return _rms(padded) / unit


def _exchanged(
    scores: Tensor, mask: Tensor, alone: dict[int, Tensor], rows: Sequence[int], limit: float
) -> float:
    """Share of the rows whose scores belong to another row, whose own scores are others.

    scores, mask: (B, T); alone: (n,) right scores by row; limit: nats between equal ones.
    """

    def equal(one: Tensor, other: Tensor) -> bool:
        size = min(len(one), len(other))
        return _rms([one[:size] - other[:size]]) <= limit

    exchanged = 0
    for row in rows:
        kept = scores[row][mask[row]]
        exchanged += not equal(kept, alone[row]) and any(
            equal(kept, right) for other, right in alone.items() if other != row
        )
    return exchanged / max(1, len(rows))


def _remote(
    config: Config, pair: ModelPair, prompts: Prompts, batch: ScoredRollouts, rows: Sequence[int]
) -> dict[str, float]:
    """teacher_rescored of a teacher on a server, each row asked of alone, and teacher_exchanged."""
    assert pair.remote is not None
    unit = ROUNDING["bfloat16"]  # its own precision is not known
    alone = {}
    for row in rows:
        told = asked(pair.remote, prompts.rows([row]), batch.rows([row]), config.support_k)
        alone[row] = told.sampled
    gaps = [batch.teacher_logp[row][batch.mask[row]] - alone[row] for row in rows]
    exchanged = _exchanged(batch.teacher_logp, batch.mask, alone, rows, LIMIT * unit)
    return {"teacher_rescored": _rms(gaps) / unit, "teacher_exchanged": exchanged}
