"""Where the divergence sits (B-5, B-12): between, on and beyond the support; long agreement.

Shapes: B responses, T positions, K support ids. p the student, q the teacher, S the support with
masses P and Q, y the sampled token, r = log p(y) - log q(y).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from diagnostics.core.optional_fields import prefix_of, support_of
from diagnostics.core.totals import Accumulator, Mean, PositionMean
from diagnostics.metrics.repetition import repeated

RUN = 16
AGREEMENT = 0.01


def kl_anatomy(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-5: the reverse KL as binary, head and tail parts, an exact chain rule over the support.

    kl_binary = mean of P log(P/Q) + (1-P) log((1-P)/(1-Q)), over in or out of S;
    kl_head = mean of P KL(p_S || q_S), within S; both exact;
    kl_tail = mean of 1[y not in S] (r - log((1-P)/(1-Q))), an unbiased estimate of the part
    (1-P) KL(p_out || q_out) from the sampled tokens;
    kl_parts = their sum, an unbiased estimate of the reverse KL with less variance than k1;
    kl_binary_share, kl_head_share, kl_tail_share = shares of sums. All over the sampled tokens: the
    tail is unbiased over all that were drawn at a prefix, not over those that a mask leaves.
    For another support than the teacher's, "kl" reads "<source>_kl".
    Access: L1. Source: derived; the chain rule of KL. Masses outside below the rounding of a sum
    of K probabilities count as that rounding.
    Healthy: mostly head. A large binary share means that the student's mass escapes the support,
    which a renormalised top-K loss can neither see nor repair; a large tail share that K is small.
    """
    support = support_of(batch)
    parts = split_divergence(batch)
    name = "kl" if support.source in ("teacher", "full") else f"{support.source}_kl"
    whole = parts["binary"] + parts["head"] + parts["tail"]
    found: dict[str, Accumulator] = {f"divergence/{name}_parts": _profile(batch, whole)}
    for part, x in parts.items():
        found[f"divergence/{name}_{part}"] = _profile(batch, x)
        share = Mean.ratio(x, whole, batch.sampled, batch.prompt)
        found[f"divergence/{name}_{part}_share"] = share
    return found


def split_divergence(batch: ScoredRollouts) -> dict[str, Tensor]:
    """The parts "binary", "head", "tail" of each token, (B, T) float64 each; see `kl_anatomy`."""
    support = support_of(batch)
    if support.source == "full":
        head = (support.student_logp.double().exp() * _ratio(support)).sum(-1)
        return {"binary": torch.zeros_like(head), "head": head, "tail": torch.zeros_like(head)}
    least = 4 * torch.finfo(support.student_logp.dtype).eps
    p = support.student_logp.detach().double().exp()
    q = support.teacher_logp.detach().double().exp()
    if support.present is not None:
        p, q = p * support.present, q * support.present
    inside, theirs = p.sum(-1), q.sum(-1)
    out, beyond = ((1 - x).clamp(min=least) for x in (inside, theirs))
    between = torch.where(inside > 0, inside * (inside / theirs.clamp(min=1e-300)).log(), 0.0)
    escape = (out / beyond).log()
    outside = ~support.contains(batch.tokens) & batch.sampled
    return {
        "binary": between + out * escape,
        "head": (p * _ratio(support)).sum(-1) - between,
        "tail": torch.where(outside, batch.log_ratio.double() - escape, 0.0),
    }


def agreement(
    threshold: float = AGREEMENT, run: int = RUN
) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """B-12: long runs of tokens at which both models agree, and how repetitive they are.

    A run is at least `run` consecutive tokens of the student's own, supervised or not (an
    environment's text is skipped), with KL(p || q) < threshold nats. agreeing_share = share of the
    tokens in runs; agreeing_repeated_share = share of those that close a repeated 8-gram;
    agreeing_runs = number of runs a response; agreeing_run_length = mean length of a run.
    Access: L2; the row sorts of `repeated`. Source: 2606.09471, where stopping at such runs cut
    responses by 60 % and raised accuracy.
    Healthy: a low KL is not good by itself, a teacher that follows a broken prefix also agrees. A
    growing share that is mostly repeated is a loop that the teacher approves of. Split it by
    outcome: `by(agreement(), "reward", {1: "right", 0: "wrong"})`.
    """

    def measured(batch: ScoredRollouts) -> dict[str, Accumulator]:
        member, start = _runs(prefix_of(batch).reverse_kl < threshold, batch.sampled, run)
        again = repeated(batch.tokens, batch.sampled)
        runs = start.sum(1).double()
        some = batch.sampled.any(1)
        lengths = member.sum(1).double()
        return {
            "divergence/agreeing_share": _profile(batch, member),
            "divergence/agreeing_repeated_share": Mean.of(again, member, batch.prompt),
            "divergence/agreeing_runs": Mean.of(runs, some, batch.prompt),
            "divergence/agreeing_run_length": Mean.ratio(lengths, runs, some, batch.prompt),
        }

    return measured


def _runs(low: Tensor, mask: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """(B, T) bool: the token is in a run of `run` or more low ones; it is the first of such."""
    width = mask.shape[1]
    slot = torch.where(mask, mask.cumsum(1) - 1, width)
    own = mask.new_zeros(len(mask), width + 1)
    own = own.scatter(1, slot, low & mask)[:, :width]
    place = torch.arange(width, device=mask.device).expand_as(own)
    last_break = torch.where(own, -1, place).cummax(1).values
    next_break = torch.where(own, width, place).flip(1).cummin(1).values.flip(1)
    member = own & (next_break - last_break - 1 >= run)
    first = member & (place == last_break + 1)
    back = slot.clamp(max=width - 1)
    return member.gather(1, back) & mask, first.gather(1, back) & mask


def _ratio(support: Support) -> Tensor:
    ratio = (support.student_logp - support.teacher_logp).detach().double()
    return ratio if support.present is None else torch.where(support.present, ratio, 0.0)


def _profile(batch: ScoredRollouts, x: Tensor) -> PositionMean:
    return PositionMean.of(x, batch.sampled, batch.prompt)
