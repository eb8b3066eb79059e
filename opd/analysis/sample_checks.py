"""What a sample of the student's responses says about the pair: one finding an item.

Shapes: B responses, T response positions, N supervised tokens (flat), V shared vocabulary.
r = log student - log teacher of a sampled token is the signal that training would use.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import Rollouts, ScoredRollouts
from diagnostics.errors import InvalidInput
from opd.analysis.pair_checks import LoadedModel, same_from_start
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode
from opd.models.forward import log_probabilities, response_hidden
from opd.models.loading import head_rows
from opd.models.model import split
from opd.rollouts.hf_engine import sample
from opd.scoring.score import score
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
HABITS, NOISE, NAMING = 0.1, 0.1, 2.0
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


def make_pair(student: LoadedModel, teacher: LoadedModel) -> ModelPair:
    """Both models cut to the rows that they share, whatever their tokenizers say."""
    rows = min(head_rows(side.network) for side in (student, teacher))
    teacher.network.requires_grad_(False)
    models = [split(side.network, rows) for side in (student, teacher)]
    return ModelPair(models[0], models[1], student.tokenizer, list(student.eos))


def positions(
    student: LoadedModel, teacher: LoadedModel, prompts: Prompts, budget: int
) -> CheckResult:
    """The longest prompt and the budget of a response against both models' positions."""
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
        found = f"prompt {longest} + response {budget} tokens; " + (
            f"room for {room} response tokens" if room is not None else "no limit is known"
        )
        return CheckResult("positions", "ok", found, "", numbers)
    who = ", ".join(f"{name} {limit}" for name, limit in limits.items() if limit - longest < budget)
    return CheckResult(
        "positions",
        "fail",
        f"prompt {longest} + response {budget} tokens exceed the positions of: {who}",
        f"lower max_response to {max(room, 0)}, or extend the model's positions",
        numbers,
    )


def gather(
    student: LoadedModel,
    teacher: LoadedModel,
    problems: list[Problem],
    *,
    group: int,
    max_response: int,
    seed: int,
) -> Evidence:
    """Sample `group` responses to each problem and score them with both models.

    Raises:
      ValueError: the student has no end token, or a prompt holds an id without a row.
    """
    pair = make_pair(student, teacher)
    prompts = encode(student.tokenizer, problems, group, 1 << 30)
    beyond = prompts.tokens[prompts.tokens >= pair.student.vocabulary]
    if len(beyond):
        raise InvalidInput(f"prompts hold id {int(beyond[0])}, which has no row in both heads")
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
    prompts = prompts.to(pair.student.device)
    everything = prompts.tokens.numel() + rollouts.tokens.numel()
    scored = scores(pair, prompts, rollouts, everything)
    return Evidence(student, teacher, pair, prompts, rollouts, scored)


def scores(
    pair: ModelPair, prompts: Prompts, rollouts: Rollouts, max_tokens_per_microbatch: int
) -> ScoredRollouts:
    """Both models' log-probs, in micro-batches of at most so many padded tokens."""
    scored, _ = score(
        pair,
        prompts,
        rollouts,
        k=1,
        temperature=1.0,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        max_logits_per_chunk=CHUNK,
        keep_teacher=False,
    )
    return scored


def retokenisation(at: Evidence) -> CheckResult:
    """Share of responses whose text, encoded again, gives other ids than were sampled."""
    tokenizer, differ, example = at.student.tokenizer, 0, ""
    nameless = 0
    rows = zip(at.scored.tokens.tolist(), at.scored.lengths.tolist(), at.scored.ended, strict=True)
    for tokens, length, ended in rows:
        ids = tokens[:length] if ended else whole_characters(tokenizer, tokens[:length])
        nameless += sum(v >= len(at.student.table) for v in ids)
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again = tokenizer.encode(text, add_special_tokens=False)
        if again != ids:
            differ += 1
            example = example or cut_difference(at.student, ids, again)
    share = differ / len(at.scored)
    numbers = {"responses": len(at.scored), "different": differ, "nameless": nameless}
    found = f"{differ} of {len(at.scored)} responses come back with other ids"
    found += f", first: {example}" if differ else ""
    found += f"; {nameless} sampled ids have no token" if nameless else ""
    if share <= HABITS and not nameless:
        return CheckResult("re-tokenisation", "ok", found, "", numbers)
    return CheckResult(
        "re-tokenisation",
        "warn",
        found,
        "the student writes text in pieces that the tokenizer would not choose, and the teacher "
        "has not seen; sample at a lower temperature or top-p, or mask the strings concerned",
        numbers,
    )


def whole_characters(tokenizer: Any, ids: list[int]) -> list[int]:
    """A response cut at its budget without the bytes of an unfinished last character."""
    for drop in range(4):
        kept = ids[: len(ids) - drop]
        if not tokenizer.decode(kept).endswith("\ufffd"):
            return kept
    return ids


def cut_difference(side: LoadedModel, sampled: list[int], again: list[int]) -> str:
    at = same_from_start(sampled, again)
    pieces = [
        " ".join(side.token(v).split(" ", 1)[1] for v in ids[at : at + 4])
        for ids in (sampled, again)
    ]
    return f"{pieces[0]} -> {pieces[1]}"


def teacher_noise(at: Evidence) -> CheckResult:
    """Do the teacher's log-probs depend on chance, or on the batch that a response stands in?

    Scores the same responses again in the same batch, and each response alone, without padding.
    Reports the largest and the root mean square difference beside the signal's root mean square.
    """
    mask, first = at.scored.mask, at.scored.teacher_logp
    everything = at.prompts.tokens.numel() + at.scored.tokens.numel()
    numbers: dict[str, float] = {"signal_rms": rms(at.scored.log_ratio[mask])}
    for name, size in (("again", everything), ("alone", 1)):
        other = scores(at.pair, at.prompts, at.rollouts, size).teacher_logp
        gap = (other - first)[mask].double()
        numbers |= {f"{name}_max": float(gap.abs().max()), f"{name}_rms": rms(gap)}
    noise, signal = max(numbers["again_rms"], numbers["alone_rms"]), numbers["signal_rms"]
    found = (
        f"rms {numbers['again_rms']:.1e} again (max {numbers['again_max']:.1e}), "
        f"{numbers['alone_rms']:.1e} alone (max {numbers['alone_max']:.1e}); "
        f"signal rms {signal:.2g}"
    )
    if noise <= max(NOISE * signal, 1e-4):
        return CheckResult("teacher noise", "ok", found, "", numbers)
    return CheckResult(
        "teacher noise",
        "fail" if noise > signal else "warn",
        found,
        "the teacher's scores depend on more than the text; use float32, one batch size, or a "
        "model without routing that depends on the batch",
        numbers,
    )


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def endings(at: Evidence) -> CheckResult:
    """Where the student ended: does the teacher want to go on, or end under another id?

    Compares log q(the student's id) with log of the teacher's mass on all its own end ids.
    """
    ended = at.scored.ended.nonzero()[:, 0].tolist()
    if not ended:
        found = f"no response ended within {at.scored.tokens.shape[1]} tokens"
        return CheckResult("endings", "ok", found, "", {"ended": 0})
    logq, ids = teacher_at_the_end(at, ended)
    own = logq.gather(1, ids[:, None])[:, 0]
    known = [v for v in at.teacher.eos if v < logq.shape[1]]
    listed = logq[:, known].logsumexp(1) if known else own
    gap = float((listed - own).mean())
    numbers = {"ended": len(ended), "own": float(own.mean()), "listed": float(listed.mean())}
    found = (
        f"{len(ended)} of {len(at.scored)} responses ended; teacher's log-prob of the student's "
        f"end {numbers['own']:.1f}, of any end of its own {numbers['listed']:.1f}"
    )
    if gap <= NAMING:
        return CheckResult("endings", "ok", found, "", numbers)
    return CheckResult(
        "endings",
        "warn",
        found,
        "the teacher would end here too, under another id: read it at its own end "
        "(opd.tokens.masking.Endings), or mask the end (role:eos)",
        numbers,
    )


@torch.no_grad()
def teacher_at_the_end(at: Evidence, rows: list[int]) -> tuple[Tensor, Tensor]:
    """(n, V) teacher's log-probs of the last token of these responses, and (n,) its id."""
    part = at.rollouts.rows(rows)
    last = (
        torch.arange(part.tokens.shape[1], device=part.tokens.device) == part.lengths[:, None] - 1
    )
    part = replace(part, mask=last)
    hidden = response_hidden(at.pair.teacher, at.prompts.rows(rows), part)
    return log_probabilities(at.pair.teacher, hidden, 1.0), part.tokens[last]


def impossible_tokens(at: Evidence) -> CheckResult:
    """Sampled tokens that the student is sure of and the teacher excludes, by id.

    p(y) > 0.5 and q(y) < 1e-4: a handful of such tokens, often parts of tags and ends, carries most
    of a one-token signal (2603.25562, figure 5).
    """
    p, q, mask = at.scored.student_logp.exp(), at.scored.teacher_logp.exp(), at.scored.mask
    wrong = (p > CONFIDENT) & (q < IMPOSSIBLE) & mask
    counts = Counter(at.scored.tokens[wrong].tolist())
    size = at.scored.log_ratio.abs()
    share = float(size[wrong].sum() / size[mask].sum().clamp(min=1e-30))
    numbers = {
        "tokens": int(wrong.sum()),
        "of": int(mask.sum()),
        "signal_share": share,
        "by_id": {str(v): n for v, n in counts.most_common()},
    }
    if not counts:
        found = f"none of {int(mask.sum())} sampled tokens (p > {CONFIDENT}, q < {IMPOSSIBLE:g})"
        return CheckResult("impossible tokens", "ok", found, "", numbers)
    some = ", ".join(f"{at.student.token(v)} x{n}" for v, n in counts.most_common(5))
    rules = " ".join(f"id:{v}" for v, _ in counts.most_common(3))
    return CheckResult(
        "impossible tokens",
        "warn",
        f"{numbers['tokens']} of {numbers['of']} sampled tokens, {share:.0%} of the signal: {some}",
        f"look whether the teacher writes the same thing in other tokens; if so mask: {rules}",
        numbers,
    )


CHECKS: tuple[Callable[[Evidence], CheckResult], ...] = (
    retokenisation,
    endings,
    impossible_tokens,
    teacher_noise,
)
