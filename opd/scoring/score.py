"""Score rollouts: log-probabilities of both models without storing (tokens, V) logits.

Shapes: B responses, T positions, N sampled tokens, n tokens of a chunk, D and D' hidden sizes of
student and teacher, V shared vocabulary, K support ids.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, Rollouts, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.errors import InvalidInput
from diagnostics.ragged import flat_index, scatter_to_mask
from opd.data.prompts import Prompts
from opd.models.forward import (
    log_probabilities,
    micro_batches,
    response_hidden_states,
)
from opd.models.lm_head import (
    apply_temperature,
    chunk_slices,
    full_logits,
    gathered_logits,
    two_stage_topk,
)
from opd.objectives.support import JOINT_SUPPORTS
from opd.teachers.pair import ModelPair
from opd.teachers.remote_scores import TeacherScores
from opd.tokens.eos import EosMap, student_support, teacher_tokens

Measure = Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]
"""Function of (n, D) student and (n, D') teacher states, (n,) tokens and their (n,) positions among
the N sampled tokens that returns named (n, ...) columns.
"""


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
    eos_map: EosMap | None = None,
) -> tuple[ScoredRollouts, Tensor | None]:
    """Compute both models' log-probabilities, a support and distribution statistics of a batch.

    The support holds the K most probable ids of the `source`. Logits exist for one chunk of tokens
    at a time.

    With `eos_map`, the teacher is read at its own EOS where the student used another one, and the
    student at its own EOS where the teacher's top-K holds another one; the distribution statistics
    still compare id with id. (The published code of arXiv 2603.25562 does so since its fix for
    figure 5.)

    Args:
        pair: Student and teacher.
        prompts: Prompts of the batch.
        batch: Rollouts.
        k: Number of support ids per model.
        source: "teacher" or "student" for the top-K of that model, "union" or "intersection" for
            both (`opd.objectives.support`).
        temperature: Temperature of the log-probabilities.
        max_tokens_per_microbatch: Tokens in a forward pass.
        max_logits_per_chunk: Logits that exist at once.
        keep_teacher: Return the teacher's hidden states, for losses on its whole vocabulary.
        eos_map: EOS ids of both models; None to compare id with id.

    Returns:
        The scored rollouts, and the (N, D') teacher states, row-major over `sampled`, if kept.

    Raises:
        InvalidInput: k is larger than the vocabulary, the source is unknown, or eos_map is given
            with a source other than the teacher.
    """
    _check_support(pair, k, source)
    if eos_map is not None and source != "teacher":
        raise InvalidInput(
            f"EOS ids can be mapped in the teacher's top-K only, not in the {source!r} support; "
            "set map_eos to False, or use a teacher support"
        )

    def measure(
        student_states: Tensor, teacher_states: Tensor, tokens: Tensor, _: Tensor
    ) -> dict[str, Tensor]:
        p = log_probabilities(pair.student, student_states, temperature)
        q = log_probabilities(pair.teacher, teacher_states, temperature)
        support_ids, present = _support_ids(p, q, k, source)
        ids, y = support_ids, tokens[:, None]
        teacher_token = y
        if eos_map is not None:
            teacher_token = teacher_tokens(y, eos_map)
            ids, present = student_support(support_ids, eos_map)
        fields = {
            "student_logp": p.gather(-1, y)[:, 0],
            "teacher_logp": q.gather(-1, teacher_token)[:, 0],
            "support.ids": ids,
            "support.student_logp": p.gather(-1, ids),
            "support.teacher_logp": q.gather(-1, support_ids),
        }
        if present is not None:
            fields["support.present"] = present
        if pair.eos_map is not None:
            eos_pair = (pair.eos_map.student, pair.eos_map.teacher)
            for name, logp, model_eos in zip(("student", "teacher"), (p, q), eos_pair, strict=True):
                fields[f"prefix.{name}_end"] = logp[:, list(model_eos)].logsumexp(-1)
            student_eos = torch.tensor(pair.eos_map.student, device=tokens.device)
            fields["prefix.ending"] = torch.isin(tokens, student_eos).to(p.dtype)
        return fields | {
            f"prefix.{name}": x for name, x in compute_distribution_stats(p, q, tokens).items()
        }

    columns, teacher_hidden = _score_in_chunks(
        pair, prompts, batch, measure, max_tokens_per_microbatch, max_logits_per_chunk, keep_teacher
    )
    return _to_scored_rollouts(batch, columns, source, temperature), teacher_hidden


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
    teacher_scores: TeacherScores | None = None,
) -> ScoredRollouts:
    """Score with the teacher's top-K, without distribution statistics: all V for the teacher only.

    For steps without full metrics of objectives that are not `normalised`. `student_logp` is the
    sampler's `softmax_logp`, and the student's log-probabilities on the support follow from it and
    from K + 1 head rows: log p(v) = log p(y) + z_v - z_y. They are therefore those of the student
    only if it sampled the batch with its present weights, and rounding differences of another
    inference engine stay hidden; `score` measures those.

    Args:
        pair: Student and teacher.
        prompts: Prompts of the batch.
        batch: Rollouts with `softmax_logp`.
        k: Number of support ids.
        temperature: Temperature of the log-probabilities.
        max_tokens_per_microbatch: Tokens in a forward pass.
        max_logits_per_chunk: Logits that exist at once.
        teacher_scores: Scores of a remote teacher; the local teacher is then not run.

    Returns:
        The scored rollouts.

    Raises:
        InvalidInput: k is larger than the vocabulary, the temperature of a remote teacher is not 1,
            or the sampler kept no full softmax at this temperature.
    """
    _check_support(pair, k, "teacher")
    if teacher_scores is not None and temperature != 1:
        raise InvalidInput(f"temperature is {temperature}, but a remote teacher scores at 1; set 1")
    if batch.softmax_logp is None or batch.temperature != temperature:
        raise InvalidInput(
            f"the sampler ran at temperature {batch.temperature} and "
            f"{'kept no' if batch.softmax_logp is None else 'kept the'} full softmax; without the "
            f"student's log-probabilities at temperature {temperature} use `score`"
        )
    sampled_logp = batch.softmax_logp[batch.sampled]

    def measure(
        student_states: Tensor, teacher_states: Tensor, tokens: Tensor, positions: Tensor
    ) -> dict[str, Tensor]:
        y, logp = tokens[:, None], sampled_logp[positions].float()
        if teacher_scores is not None:
            ids, support_logp, teacher_logp = teacher_scores.select(positions)
        else:
            logits = apply_temperature(full_logits(teacher_states, pair.teacher.head), temperature)
            normaliser = logits.logsumexp(-1, keepdim=True)
            support_logp, ids = two_stage_topk(logits, k)
            support_logp, teacher_logp = (
                support_logp - normaliser,
                (logits.gather(-1, y) - normaliser)[:, 0],
            )
        support_logits = gathered_logits(student_states, pair.student.head, torch.cat([y, ids], 1))
        z = apply_temperature(support_logits, temperature)
        return {
            "student_logp": logp,
            "teacher_logp": teacher_logp,
            "support.ids": ids,
            "support.student_logp": (logp[:, None] + z[:, 1:] - z[:, :1]).clamp(max=0.0),
            "support.teacher_logp": support_logp,
        }

    columns, _ = _score_in_chunks(
        pair,
        prompts,
        batch,
        measure,
        max_tokens_per_microbatch,
        max_logits_per_chunk,
        False,
        teacher_scores is None,
    )
    return _to_scored_rollouts(batch, columns, "teacher", temperature)


@torch.no_grad()
def score_with_remote_teacher(
    pair: ModelPair,
    prompts: Prompts,
    batch: Rollouts,
    teacher_scores: TeacherScores,
    *,
    source: str,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
) -> ScoredRollouts:
    """Score with the student's full softmax and a remote teacher, without distribution statistics.

    The temperature is 1. The support is the teacher's K ids, or with the source "intersection"
    those of them that are among the student's K.

    Args:
        pair: The student; the local teacher is not run.
        prompts: Prompts of the batch.
        batch: Rollouts.
        teacher_scores: Scores of the remote teacher.
        source: "teacher" or "intersection".
        max_tokens_per_microbatch: Tokens in a forward pass.
        max_logits_per_chunk: Logits that exist at once.

    Returns:
        The scored rollouts.

    Raises:
        InvalidInput: Another source, for whose ids the remote teacher has no log-probabilities.
    """
    if source not in ("teacher", "intersection"):
        raise InvalidInput(
            f"remote teachers return only their own top-K, not a {source!r} support; use a "
            "teacher_topk objective or a local teacher"
        )

    def measure(
        student_states: Tensor, _: Tensor, tokens: Tensor, positions: Tensor
    ) -> dict[str, Tensor]:
        p = log_probabilities(pair.student, student_states, 1.0)
        ids, support_logp, teacher_logp = teacher_scores.select(positions)
        fields = {
            "student_logp": p.gather(-1, tokens[:, None])[:, 0],
            "teacher_logp": teacher_logp,
            "support.ids": ids,
            "support.student_logp": p.gather(-1, ids),
            "support.teacher_logp": support_logp,
        }
        if source == "intersection":
            student_ids = two_stage_topk(p, ids.shape[1])[1]
            fields["support.present"] = JOINT_SUPPORTS[source](ids, student_ids)[1]
        return fields

    columns, _ = _score_in_chunks(
        pair, prompts, batch, measure, max_tokens_per_microbatch, max_logits_per_chunk, False, False
    )
    return _to_scored_rollouts(batch, columns, source, 1.0)


def _check_support(pair: ModelPair, k: int, source: str) -> None:
    """Refuse a K larger than the vocabulary and an unknown source."""
    size = pair.student.vocabulary
    if k > size:
        raise InvalidInput(
            f"support_k is {k}, but the shared vocabulary has {size} tokens; lower support_k"
        )
    known_sources = ("teacher", "student", *JOINT_SUPPORTS)
    if source not in known_sources:
        raise InvalidInput(f"unknown support source {source!r}; known: {', '.join(known_sources)}")


def _support_ids(p: Tensor, q: Tensor, k: int, source: str) -> tuple[Tensor, Tensor | None]:
    """Return ids (n, K or 2K) of the source, and which of them count (all if None)."""
    if source in JOINT_SUPPORTS:
        return JOINT_SUPPORTS[source](two_stage_topk(q, k)[1], two_stage_topk(p, k)[1])
    return two_stage_topk(q if source == "teacher" else p, k)[1], None


def _score_in_chunks(
    pair: ModelPair,
    prompts: Prompts,
    batch: Rollouts,
    measure: Measure,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
    keep_teacher: bool,
    run_teacher: bool = True,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return columns (N, ...) measured on all sampled tokens, and the teacher's states if kept.

    If the teacher is not run, its states have width 0.
    """
    n, device = int(batch.sampled.sum()), batch.tokens.device
    index = flat_index(batch.sampled)
    flat: dict[str, Tensor] = {}

    def store(name: str, positions: Tensor, value: Tensor) -> None:
        if name not in flat:
            flat[name] = torch.zeros((n, *value.shape[1:]), dtype=value.dtype, device=device)
        flat[name][positions] = value

    for rows in micro_batches(prompts, batch, max_tokens_per_microbatch):
        micro_batch = batch.rows(rows).trim()
        micro_prompts = prompts.rows(rows)
        sampled = micro_batch.sampled
        positions = index[rows][:, : sampled.shape[1]][sampled]
        student_states = response_hidden_states(pair.student, micro_prompts, micro_batch, sampled)
        teacher_states = (
            response_hidden_states(pair.teacher, micro_prompts, micro_batch, sampled)
            if run_teacher
            else student_states[:, :0]
        )
        tokens = micro_batch.tokens[sampled]
        if keep_teacher:
            store("teacher_hidden", positions, teacher_states)
        for c in chunk_slices(len(tokens), pair.student.vocabulary, max_logits_per_chunk):
            for name, value in measure(
                student_states[c], teacher_states[c], tokens[c], positions[c]
            ).items():
                store(name, positions[c], value)
    return flat, flat.pop("teacher_hidden", None)


def _to_scored_rollouts(
    batch: Rollouts, columns: dict[str, Tensor], source: str, temperature: float
) -> ScoredRollouts:
    """Build ScoredRollouts from flat (N, ...) columns."""
    tensors = {name: scatter_to_mask(value, batch.sampled) for name, value in columns.items()}
    prefix = _select_by_prefix(tensors, "prefix.")
    scored = ScoredRollouts(
        **vars(batch),
        student_logp=tensors["student_logp"],
        teacher_logp=tensors["teacher_logp"],
        support=Support(source=source, **_select_by_prefix(tensors, "support.")),
        prefix=DistributionStats(**prefix) if prefix else None,
        score_temperature=temperature,
    )
    return scored.validate()


def _select_by_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with the prefix, under the rest of their name."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
