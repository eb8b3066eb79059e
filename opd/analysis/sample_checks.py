"""Checks of a pair on a sample of the student's responses: one result per check.

Shapes: B responses, T response positions, N supervised tokens (flat), V shared vocabulary. r = log
student - log teacher of a sampled token is the signal that training would use.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts, ScoredRollouts
from diagnostics.errors import InvalidInput
from opd.analysis.pair_checks import LoadedModel, common_prefix_length
from opd.data.chain_task import Problem
from opd.data.grading.graders import Grader, grade_responses
from opd.data.prompts import Prompts, encode_prompts
from opd.data.teacher_view.values import graded_attempts
from opd.data.teacher_view.view import TeacherView, with_teacher_prompts
from opd.models.forward import log_probabilities, response_hidden_states
from opd.rollouts.hf_engine import sample
from opd.scoring.request import METRICS_ONLY, ScoreRequest
from opd.scoring.score import score_batch
from opd.teachers.pair import ModelPair
from opd.training.checks.check_result import CheckResult

PROMPTS = (
    "What is 12+34?",
    "Name three colours.",
    "Write a function that adds two numbers.",
    "Why is the sky blue?",
    "Translate to French: good morning.",
    "How many letters has the word banana?",
    "Solve x + 3 = 10.",
    "Give me a short recipe for soup.",
)
CONFIDENT, IMPOSSIBLE = 0.5, 1e-4
MAX_RETOKENISED_SHARE, MAX_NOISE_RATIO, MAX_END_GAP = 0.1, 0.1, 2.0
CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class Evidence:
    """A pair, its prompts and the student's responses, scored by both models in one batch."""

    student: LoadedModel
    teacher: LoadedModel
    pair: ModelPair
    prompts: Prompts
    rollouts: Rollouts
    scored: ScoredRollouts


def positions(
    student: LoadedModel, teacher: LoadedModel, prompts: Prompts, budget: int
) -> CheckResult:
    """Check that the longest prompt plus the response budget fits both models' positions."""
    longest = int(prompts.mask.sum(1).max())
    limits = {}
    for name, side in (("student", student), ("teacher", teacher)):
        # not every architecture has a limit
        limit = getattr(side.network.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None:
            limits[name] = limit
    room = min(limits.values(), default=None)
    room = None if room is None else room - longest
    numbers = {"prompt": longest, "budget": budget, "limits": limits, "room": room}
    if room is None or budget <= room:
        message = f"prompt {longest} + response {budget} tokens; " + (
            f"room for {room} response tokens" if room is not None else "no limit is known"
        )
        return CheckResult("positions", "ok", message, "", numbers)
    models_too_short = ", ".join(
        f"{name} {limit}" for name, limit in limits.items() if limit - longest < budget
    )
    return CheckResult(
        "positions",
        "fail",
        f"prompt {longest} + response {budget} tokens exceed the positions of: {models_too_short}",
        f"lower max_response to {max(room, 0)}, or extend the model's positions",
        numbers,
    )


def gather_evidence(
    student: LoadedModel,
    teacher: LoadedModel,
    pair: ModelPair,
    problems: list[Problem],
    *,
    group: int,
    max_response: int,
    seed: int,
    view: TeacherView | None = None,
    grade: Grader | None = None,
) -> Evidence:
    """Sample responses of the student and score them with both models.

    Args:
        student: The student.
        teacher: The teacher.
        pair: Both, as training uses them.
        problems: The problems.
        group: Responses per problem.
        max_response: Largest number of tokens of a response.
        seed: Seed of the sampling.
        view: What the teacher reads in the place of the prompts; None: the same.
        grade: Grader, for a view that uses responses.

    Returns:
        The sample.

    Raises:
        InvalidInput: The student has no end token, or a prompt contains an id without a row.
    """
    prompts = encode_prompts(student.tokenizer, problems, group, 1 << 30)
    ids_without_row = prompts.tokens[prompts.tokens >= pair.student.vocabulary]
    if len(ids_without_row):
        raise InvalidInput(
            f"the prompts contain id {int(ids_without_row[0])}, which has no row in both heads"
        )
    if not pair.eos:
        raise InvalidInput("the student has no end token")
    rollouts = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=max_response,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(seed),
    )
    if view is not None:
        attempts = None
        if view.reads_attempts and grade is not None:
            grades = grade_responses(
                student.tokenizer, rollouts.tokens, rollouts.mask, prompts.answers, grade, pair.eos
            )
            attempts = graded_attempts(
                student.tokenizer, rollouts.tokens, rollouts.mask, grades, pair.eos
            )
        row_problems = [problems[i] for i in prompts.index.tolist()]
        prompts = with_teacher_prompts(view, student.tokenizer, prompts, row_problems, attempts)
    prompts = prompts.to(pair.student.device)
    num_tokens = num_padded_tokens(prompts, rollouts)
    scored = score_with_both(pair, prompts, rollouts, num_tokens)
    return Evidence(student, teacher, pair, prompts, rollouts, scored)


def num_padded_tokens(prompts: Prompts, rollouts: Rollouts) -> int:
    """Return the padded tokens of all rows in one micro-batch."""
    width = max(prompts.tokens.shape[1], prompts.teacher_prompts.tokens.shape[1])
    return len(prompts) * (width + rollouts.tokens.shape[1])


def score_with_both(
    pair: ModelPair, prompts: Prompts, rollouts: Rollouts, max_tokens_per_microbatch: int
) -> ScoredRollouts:
    """Score with both models, in micro-batches of a limited number of padded tokens."""
    request = ScoreRequest(
        requirements=replace(METRICS_ONLY, support_k=1),
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        max_logits_per_chunk=CHUNK,
    )
    return score_batch(pair.student, pair.teacher, prompts, rollouts, request).scored


def retokenisation(evidence: Evidence) -> CheckResult:
    """Measure the share of responses whose text is encoded to other ids than were sampled."""
    tokenizer, num_different, example = evidence.student.tokenizer, 0, ""
    num_nameless = 0
    rows = zip(
        evidence.scored.tokens.tolist(),
        evidence.scored.lengths.tolist(),
        evidence.scored.ended,
        strict=True,
    )
    for tokens, length, ended in rows:
        ids = tokens[:length] if ended else drop_partial_character(tokenizer, tokens[:length])
        num_nameless += sum(v >= len(evidence.student.table) for v in ids)
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ids_again = tokenizer.encode(text, add_special_tokens=False)
        if ids_again != ids:
            num_different += 1
            example = example or show_difference(evidence.student, ids, ids_again)
    share = num_different / len(evidence.scored)
    numbers = {
        "responses": len(evidence.scored),
        "different": num_different,
        "nameless": num_nameless,
    }
    message = f"{num_different} of {len(evidence.scored)} responses are encoded to other ids"
    message += f", first: {example}" if num_different else ""
    message += f"; {num_nameless} sampled ids have no token" if num_nameless else ""
    if share <= MAX_RETOKENISED_SHARE and not num_nameless:
        return CheckResult("re-tokenisation", "ok", message, "", numbers)
    return CheckResult(
        "re-tokenisation",
        "warn",
        message,
        "the student writes token sequences that the tokenizer would not produce and the teacher "
        "has not seen; sample at a lower temperature or top-p, or mask the strings concerned",
        numbers,
    )


def drop_partial_character(tokenizer: Any, ids: list[int]) -> list[int]:
    """Remove the bytes of an incomplete last character of a truncated response."""
    for drop in range(4):
        shortened = ids[: len(ids) - drop]
        if not tokenizer.decode(shortened).endswith("\ufffd"):
            return shortened
    return ids


def show_difference(side: LoadedModel, sampled: list[int], ids_again: list[int]) -> str:
    """Show both tokenisations from the first difference."""
    position = common_prefix_length(sampled, ids_again)
    pieces = [
        " ".join(side.token(v).split(" ", 1)[1] for v in ids[position : position + 4])
        for ids in (sampled, ids_again)
    ]
    return f"{pieces[0]} -> {pieces[1]}"


def teacher_noise(evidence: Evidence) -> CheckResult:
    """Check that the teacher's log-probabilities do not depend on chance or on the batch.

    Scores the same responses again in the same batch, and each response alone, without padding.
    Reports the largest and the root mean square difference, next to the root mean square of the
    signal.

    Args:
        evidence: The sample.

    Returns:
        The result.
    """
    mask, teacher_logp = evidence.scored.mask, evidence.scored.teacher_logp
    num_tokens = num_padded_tokens(evidence.prompts, evidence.rollouts)
    numbers: dict[str, float] = {"signal_rms": rms(evidence.scored.log_ratio[mask])}
    for name, size in (("again", num_tokens), ("alone", 1)):
        logp_again = score_with_both(
            evidence.pair, evidence.prompts, evidence.rollouts, size
        ).teacher_logp
        gap = (logp_again - teacher_logp)[mask].double()
        numbers |= {f"{name}_max": float(gap.abs().max()), f"{name}_rms": rms(gap)}
    noise, signal = max(numbers["again_rms"], numbers["alone_rms"]), numbers["signal_rms"]
    message = (
        f"rms {numbers['again_rms']:.1e} again (max {numbers['again_max']:.1e}), "
        f"{numbers['alone_rms']:.1e} alone (max {numbers['alone_max']:.1e}); "
        f"signal rms {signal:.2g}"
    )
    if noise <= max(MAX_NOISE_RATIO * signal, 1e-4):
        return CheckResult("teacher noise", "ok", message, "", numbers)
    return CheckResult(
        "teacher noise",
        "fail" if noise > signal else "warn",
        message,
        "the teacher's scores depend on more than the text; use float32, a fixed batch size, or a "
        "model whose routing does not depend on the batch",
        numbers,
    )


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return float(x.double().square().mean().sqrt())


def endings(evidence: Evidence) -> CheckResult:
    """Check whether the teacher would end where the student ended, possibly with another id.

    Compares log q(the student's id) with the log of the teacher's mass on all of its EOS ids.

    Args:
        evidence: The sample.

    Returns:
        The result.
    """
    ended = evidence.scored.ended.nonzero()[:, 0].tolist()
    if not ended:
        message = f"no response ended within {evidence.scored.tokens.shape[1]} tokens"
        return CheckResult("endings", "ok", message, "", {"ended": 0})
    logq, ids = teacher_logp_at_end(evidence, ended)
    student_end_logp = logq.gather(1, ids[:, None])[:, 0]
    known_ids = [v for v in evidence.teacher.eos if v < logq.shape[1]]
    teacher_end_logp = logq[:, known_ids].logsumexp(1) if known_ids else student_end_logp
    gap = float((teacher_end_logp - student_end_logp).mean())
    numbers = {
        "ended": len(ended),
        "own": float(student_end_logp.mean()),
        "listed": float(teacher_end_logp.mean()),
    }
    message = (
        f"{len(ended)} of {len(evidence.scored)} responses ended; teacher's log-prob of the "
        f"student's "
        f"EOS {numbers['own']:.1f}, of any EOS of its own {numbers['listed']:.1f}"
    )
    if gap <= MAX_END_GAP:
        return CheckResult("endings", "ok", message, "", numbers)
    return CheckResult(
        "endings",
        "warn",
        message,
        "the teacher would end here too, with another id: map its EOS (--map-eos), or mask EOS "
        "(role:eos)",
        numbers,
    )


@torch.no_grad()
def teacher_logp_at_end(evidence: Evidence, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return (n, V) teacher log-probabilities at the last token of responses, and its (n,) id."""
    selected = evidence.rollouts.rows(rows)
    is_last = (
        torch.arange(selected.tokens.shape[1], device=selected.tokens.device)
        == selected.lengths[:, None] - 1
    )
    selected = replace(selected, mask=is_last)
    teacher = evidence.pair.teacher.model
    prompts = evidence.prompts.teacher_prompts.rows(rows)
    hidden = response_hidden_states(teacher, prompts, selected)
    return log_probabilities(teacher, hidden, 1.0), selected.tokens[is_last]


def impossible_tokens(evidence: Evidence) -> CheckResult:
    """Find tokens that the student is confident of and the teacher excludes, by id.

    p(y) > 0.5 and q(y) < 1e-4: a few such tokens, often parts of tags and end tokens, carry most of
    the signal of a sampled-token objective (2603.25562, figure 5).

    Args:
        evidence: The sample.

    Returns:
        The result.
    """
    p, q, mask = (
        evidence.scored.student_logp.exp(),
        evidence.scored.teacher_logp.exp(),
        evidence.scored.mask,
    )
    is_impossible = (p > CONFIDENT) & (q < IMPOSSIBLE) & mask
    counts = Counter(evidence.scored.tokens[is_impossible].tolist())
    signal = evidence.scored.log_ratio.abs()
    share = float(signal[is_impossible].sum() / signal[mask].sum().clamp(min=1e-30))
    numbers = {
        "tokens": int(is_impossible.sum()),
        "of": int(mask.sum()),
        "signal_share": share,
        "by_id": {str(v): n for v, n in counts.most_common()},
    }
    if not counts:
        message = f"none of {int(mask.sum())} sampled tokens (p > {CONFIDENT}, q < {IMPOSSIBLE:g})"
        return CheckResult("impossible tokens", "ok", message, "", numbers)
    examples = ", ".join(f"{evidence.student.token(v)} x{n}" for v, n in counts.most_common(5))
    rules = " ".join(f"id:{v}" for v, _ in counts.most_common(3))
    return CheckResult(
        "impossible tokens",
        "warn",
        f"{numbers['tokens']} of {numbers['of']} sampled tokens, {share:.0%} of the signal: "
        f"{examples}",
        f"check whether the teacher writes the same text in other tokens; if so mask: {rules}",
        numbers,
    )


CHECKS: tuple[Callable[[Evidence], CheckResult], ...] = (
    retokenisation,
    endings,
    impossible_tokens,
    teacher_noise,
)
