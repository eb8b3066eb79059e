"""Scoring: both models' log-probabilities of what the student sampled, without keeping (tokens, V).

Shapes: B responses, T positions, N sampled tokens, n tokens of a chunk, D and D' hidden sizes
of student and teacher, V shared vocabulary, K support ids.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, Rollouts, ScoredRollouts, Support
from diagnostics.core.distribution_stats import functionals
from diagnostics.errors import InvalidInput
from opd.data.prompts import Prompts
from opd.models.forward import log_probabilities, micro_batches, response_hidden, spread
from opd.models.lm_head import chunks, cooled, full_logits, gathered_logits, two_stage_topk
from opd.objectives.support import JOINED
from opd.teachers.pair import ModelPair
from opd.teachers.remote_scores import TeacherScores
from opd.tokens.eos import EosMap, student_support, teacher_tokens

Measure = Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]
"""(n, D) student and (n, D') teacher states, (n,) tokens and their places -> (n, ...) columns."""


@torch.no_grad()
def score(
    pair: ModelPair,
    prompts: Prompts,
    batch: Rollouts,
    *,
    k: int,
    source: str = "teacher",
    temperature: float,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
    keep_teacher: bool,
    endings: EosMap | None = None,
) -> tuple[ScoredRollouts, Tensor | None]:
    """Put both models' log-probs, a support and the prefix functionals on a batch.

    The support holds the K most probable ids of the `source`, "teacher" or "student", or the
    "union" or "intersection" of both lists (`opd.objectives.support`).

    Logits exist for one chunk of tokens at a time. With `keep_teacher`, the teacher's hidden
    states (N, D'), row-major over `sampled`, are returned for losses that need its whole
    vocabulary.

    With `endings`, the teacher is read at its own end where the student used a foreign one, and the
    student at its own end where the teacher's top-K holds a foreign one; the prefix functionals
    compare id with id all the same. (Paper's code at the commits of figure 5's fix.)

    Raises:
      ValueError: k is larger than the vocabulary, a source is unknown, or endings are given with a
        source other than the teacher.
    """
    _check(pair, k, source)
    if endings is not None and source != "teacher":
        raise InvalidInput(
            f"ends are exchanged in the teacher's top-K only, not in the {source!r} support; set "
            "map_eos off, or use the teacher's"
        )

    def measure(ours: Tensor, theirs: Tensor, tokens: Tensor, _: Tensor) -> dict[str, Tensor]:
        p = log_probabilities(pair.student, ours, temperature)
        q = log_probabilities(pair.teacher, theirs, temperature)
        theirs_on, present = _support_ids(p, q, k, source)
        ids, y = theirs_on, tokens[:, None]
        theirs_at = y
        if endings is not None:
            theirs_at = teacher_tokens(y, endings)
            ids, present = student_support(theirs_on, endings)
        found = {
            "student_logp": p.gather(-1, y)[:, 0],
            "teacher_logp": q.gather(-1, theirs_at)[:, 0],
            "support.ids": ids,
            "support.student_logp": p.gather(-1, ids),
            "support.teacher_logp": q.gather(-1, theirs_on),
        }
        if present is not None:
            found["support.present"] = present
        if pair.endings is not None:
            ends = (pair.endings.student, pair.endings.teacher)
            for name, logp, own in zip(("student", "teacher"), (p, q), ends, strict=True):
                found[f"prefix.{name}_end"] = logp[:, list(own)].logsumexp(-1)
            own_ends = torch.tensor(pair.endings.student, device=tokens.device)
            found["prefix.ending"] = torch.isin(tokens, own_ends).to(p.dtype)
        return found | {f"prefix.{name}": x for name, x in functionals(p, q, tokens).items()}

    columns, kept = _columns(
        pair, prompts, batch, measure, max_tokens_per_microbatch, max_logits_per_chunk, keep_teacher
    )
    return _scored(batch, columns, source, temperature), kept


@torch.no_grad()
def score_support(
    pair: ModelPair,
    prompts: Prompts,
    batch: Rollouts,
    *,
    k: int,
    temperature: float,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
    told: TeacherScores | None = None,
) -> ScoredRollouts:
    """The same with the teacher's top-K and without prefix functionals: V for the teacher only.

    For steps without diagnostics of objectives that are not `normalised`. `student_logp` is the
    sampler's own `softmax_logp`, and the student's log-probabilities on the support follow from it
    and from K + 1 head rows: log p(v) = log p(y) + z_v - z_y. So they are those of the student only
    if it sampled the batch with its present weights, and they hide what a foreign engine rounds
    differently; `score` measures that. With `told`, the teacher is another's and not run.

    Raises:
      ValueError: k is larger than the vocabulary, or the sampler kept no whole softmax at this
        temperature.
    """
    _check(pair, k, "teacher")
    if told is not None and temperature != 1:
        raise InvalidInput(f"temperature is {temperature}; a teacher elsewhere tells that of 1")
    if batch.softmax_logp is None or batch.temperature != temperature:
        raise InvalidInput(
            f"the sampler ran at temperature {batch.temperature} and "
            f"{'kept no' if batch.softmax_logp is None else 'kept the'} whole softmax; without the "
            f"student's log-probabilities at temperature {temperature} use `score`"
        )
    sampled = batch.softmax_logp[batch.sampled]

    def measure(ours: Tensor, theirs: Tensor, tokens: Tensor, place: Tensor) -> dict[str, Tensor]:
        y, logp = tokens[:, None], sampled[place].float()
        if told is not None:
            ids, best, theirs_at = told.at(place)
        else:
            logits = cooled(full_logits(theirs, pair.teacher.head), temperature)
            normaliser = logits.logsumexp(-1, keepdim=True)
            best, ids = two_stage_topk(logits, k)
            best, theirs_at = best - normaliser, (logits.gather(-1, y) - normaliser)[:, 0]
        some = gathered_logits(ours, pair.student.head, torch.cat([y, ids], 1))
        z = cooled(some, temperature)
        return {
            "student_logp": logp,
            "teacher_logp": theirs_at,
            "support.ids": ids,
            "support.student_logp": (logp[:, None] + z[:, 1:] - z[:, :1]).clamp(max=0.0),
            "support.teacher_logp": best,
        }

    columns, _ = _columns(
        pair,
        prompts,
        batch,
        measure,
        max_tokens_per_microbatch,
        max_logits_per_chunk,
        False,
        told is None,
    )
    return _scored(batch, columns, "teacher", temperature)


@torch.no_grad()
def score_told(
    pair: ModelPair,
    prompts: Prompts,
    batch: Rollouts,
    told: TeacherScores,
    *,
    source: str,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
) -> ScoredRollouts:
    """The student's whole softmax beside a teacher elsewhere; temperature 1, no prefix functionals.

    The support is the teacher's K ids, or with the source "intersection" those of them that are
    among the student's K.

    Raises:
      ValueError: another source, whose ids the teacher was not asked about.
    """
    if source not in ("teacher", "intersection"):
        raise InvalidInput(f"a teacher elsewhere tells its own top-K, not the support {source!r}")

    def measure(ours: Tensor, _: Tensor, tokens: Tensor, place: Tensor) -> dict[str, Tensor]:
        p = log_probabilities(pair.student, ours, 1.0)
        ids, theirs_on, theirs_at = told.at(place)
        found = {
            "student_logp": p.gather(-1, tokens[:, None])[:, 0],
            "teacher_logp": theirs_at,
            "support.ids": ids,
            "support.student_logp": p.gather(-1, ids),
            "support.teacher_logp": theirs_on,
        }
        if source == "intersection":
            best = two_stage_topk(p, ids.shape[1])[1]
            found["support.present"] = JOINED[source](ids, best)[1]
        return found

    columns, _ = _columns(
        pair, prompts, batch, measure, max_tokens_per_microbatch, max_logits_per_chunk, False, False
    )
    return _scored(batch, columns, source, 1.0)


def _check(pair: ModelPair, k: int, source: str) -> None:
    size = pair.student.vocabulary
    if k > size:
        raise InvalidInput(f"support_k is {k}, but the shared vocabulary has {size} tokens")
    known = ("teacher", "student", *JOINED)
    if source not in known:
        raise InvalidInput(f"unknown support source {source!r}; known: {', '.join(known)}")


def _support_ids(p: Tensor, q: Tensor, k: int, source: str) -> tuple[Tensor, Tensor | None]:
    """Ids (n, K or 2K) of the source, and which of them count (all if None)."""
    if source in JOINED:
        return JOINED[source](two_stage_topk(q, k)[1], two_stage_topk(p, k)[1])
    return two_stage_topk(q if source == "teacher" else p, k)[1], None


def _columns(
    pair: ModelPair,
    prompts: Prompts,
    batch: Rollouts,
    measure: Measure,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
    keep_teacher: bool,
    run_teacher: bool = True,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Measured columns (N, ...) of all sampled tokens, and the teacher's states if kept.

    A teacher that is not run has states of no width.
    """
    n, device = int(batch.sampled.sum()), batch.tokens.device
    slot = (batch.sampled.flatten().cumsum(0) - 1).reshape(batch.mask.shape)
    flat: dict[str, Tensor] = {}

    def put(name: str, where: Tensor, value: Tensor) -> None:
        if name not in flat:
            flat[name] = torch.zeros((n, *value.shape[1:]), dtype=value.dtype, device=device)
        flat[name][where] = value

    for rows in micro_batches(prompts, batch, max_tokens_per_microbatch):
        part = batch.rows(rows).trimmed()
        some = prompts.rows(rows)
        sampled = part.sampled
        where = slot[rows][:, : sampled.shape[1]][sampled]
        ours = response_hidden(pair.student, some, part, sampled)
        theirs = response_hidden(pair.teacher, some, part, sampled) if run_teacher else ours[:, :0]
        tokens = part.tokens[sampled]
        if keep_teacher:
            put("teacher_hidden", where, theirs)
        for c in chunks(len(tokens), pair.student.vocabulary, max_logits_per_chunk):
            for name, value in measure(ours[c], theirs[c], tokens[c], where[c]).items():
                put(name, where[c], value)
    return flat, flat.pop("teacher_hidden", None)


def _scored(
    batch: Rollouts, columns: dict[str, Tensor], source: str, temperature: float
) -> ScoredRollouts:
    full = {name: spread(value, batch.sampled) for name, value in columns.items()}
    prefix = _under(full, "prefix.")
    scored = ScoredRollouts(
        **vars(batch),
        student_logp=full["student_logp"],
        teacher_logp=full["teacher_logp"],
        support=Support(source=source, **_under(full, "support.")),
        prefix=DistributionStats(**prefix) if prefix else None,
        score_temperature=temperature,
    )
    return scored.checked()


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
