"""Objectives of on-policy distillation: pure functions, the same for the exact study and the LLM.

A method is three choices. The **credit** spreads the tokens' costs over the tokens that caused them
(once per optimizer step, over the whole batch, no gradient; `opd.credit`); the **surrogate** turns
it into a loss whose gradient is the estimate (token by token, with gradient; `opd.surrogates`); the
**reduction** divides by an explicit denominator. Named compositions stand in `OBJECTIVES`,
reductions in `DENOMINATORS`.

Shapes: B responses, T positions, K support ids; "..." is (B, T) or flat tokens (N,).
Sign: the cost r = log student - log teacher is minimised. J = E[sum_t r_t] is the sequence KL.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from diagnostics.batch import Scored
from opd.credit import (
    BASELINES,
    RATIOS,
    check_gamma,
    discounted,
    log_ratio,
    mean_cost,
    no_baseline,
    no_cost,
    no_ratio,
    sampled_cost,
)
from opd.surrogates import (
    Visited,
    bucket,
    half_square,
    low_variance,
    pair,
    published_tail,
    renormalised,
    renormalised_and_sampled,
    reverse_kl,
    sampled_tail,
    score_function,
    stopped,
    unnormalised,
)

# --- reduction ----------------------------------------------------------------------------------


def reduce(loss: Tensor, mask: Tensor, denominator: Tensor) -> Tensor:
    """sum_{i,t} mask loss / denominator_i: (B, T), (B, T), (B,) -> scalar.

    The denominator is an argument: computed once over the whole optimizer step, so that the split
    into micro-batches changes nothing.
    """
    return (torch.where(mask, loss, torch.zeros_like(loss)) / denominator[:, None]).sum()


def token_mean(batch: Scored) -> Tensor:
    """(B,) every token weighs the same: the number of supervised tokens of the step."""
    return _positive(batch.mask.sum()).expand(len(batch)).to(batch.student_logp.dtype)


def sequence_sum(batch: Scored) -> Tensor:
    """(B,) every response weighs its length: the mean over responses of token sums, as in J."""
    _positive(batch.mask.sum())
    return batch.student_logp.new_full((len(batch),), float(len(batch)))


def sequence_mean(batch: Scored) -> Tensor:
    """(B,) every response weighs the same: B times its own length.

    Its gradient is not that of E[mean_t K_t]: the length's own derivative is left out.
    """
    _positive(batch.mask.sum())
    return batch.lengths.clamp(min=1).to(batch.student_logp.dtype) * len(batch)


def _positive(count: Tensor) -> Tensor:
    if int(count) == 0:
        raise ValueError(
            "the mask is empty: 0 supervised tokens in the whole step; look at the mask rule and "
            "at whether responses are empty"
        )
    return count


DENOMINATORS: dict[str, Callable[[Scored], Tensor]] = {
    "token_mean": token_mean,
    "sequence_sum": sequence_sum,
    "sequence_mean": sequence_mean,
}

# --- compositions -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A named composition.

    support: ids on which both models must be known: "none", "teacher" or "student" (its top-K),
    or "full". The credit of a token is its `own` cost plus the `later` costs discounted by gamma,
    minus the `baseline`, all Scored -> (B, T) over the whole step; surrogate: Visited -> (...)
    loss; ratio: Scored -> (B, T) factor of a token's loss where the sampler is not the student.
    """

    support: str
    surrogate: Callable[[Visited], Tensor]
    own: Callable[[Scored], Tensor] = no_cost
    later: Callable[[Scored], Tensor] = no_cost
    gamma: float = 0.0
    baseline: Callable[[Scored, Tensor], Tensor] = no_baseline
    ratio: Callable[[Scored], Tensor] = no_ratio

    def credit(self, batch: Scored) -> Tensor:
        """(B, T) own_t + sum_{u > t} gamma^(u-t) later_u - baseline_t; 0 where masked."""
        credit = self.own(batch) * batch.mask
        if self.gamma:
            later = self.later(batch) * batch.mask
            credit = credit + discounted(later, batch.mask, self.gamma) - later
        return (credit - self.baseline(batch, credit)) * batch.mask

    def loss(self, logp: Tensor, support_logp: Tensor | None, batch: Scored) -> Tensor:
        """(B, T) unreduced loss of one whole batch; `logp` and `support_logp` carry gradient."""
        return self.local_loss(logp, support_logp, batch, self.credit(batch))

    def local_loss(
        self, logp: Tensor, support_logp: Tensor | None, batch: Scored, credit: Tensor
    ) -> Tensor:
        """The same with the credit (B, T) given."""
        ids = None
        if self.support != "none":
            source = batch.support.source if batch.support is not None else "none"
            if batch.support is None or support_logp is None or source != self.support:
                raise ValueError(f"needs a {self.support!r} support, the batch has {source!r}")
            ids = batch.support.ids
        at = Visited(
            logp=logp,
            credit=credit,
            teacher_logp=batch.teacher_logp,
            support_logp=support_logp,
            teacher_support_logp=None if batch.support is None else batch.support.teacher_logp,
            inside=None if ids is None else (ids == batch.tokens[..., None]).any(-1),
        )
        return self.surrogate(at) * self.ratio(batch)


def _weighted(at: Visited) -> Tensor:
    return score_function(at.logp, at.credit)


def sampled_token(gamma: float = 0.0) -> Objective:
    """The gamma family: sum_t (sum_{u >= t} gamma^(u-t) r_u) grad log p(y_t).

    gamma = 0: expected gradient of sum_t E[KL(p || q at the prefix)] with the prefix distribution
    frozen; biased for the sequence KL by the missing derivative through the visited prefixes.
    gamma = 1: unbiased for the gradient of the sequence KL, with variance up to cubic in T.
    (arXiv 2603.25562, eq. 1-3.)
    """
    return _family(gamma, own=sampled_cost, later=sampled_cost, surrogate=_weighted)


def mean_future(gamma: float = 0.0) -> Objective:
    """`sampled_token` with later costs replaced by their means at the prefix, K_u for r_u.

    The same expected gradient; the noise of the later tokens' own draws is gone.
    """
    return _family(gamma, own=sampled_cost, later=mean_cost, surrogate=_weighted)


def full_reverse_kl(gamma: float = 0.0) -> Objective:
    """sum_t KL(p || q) over the whole vocabulary, plus the score function of later mean costs.

    The same expected gradient as `sampled_token(gamma)` without the noise of the sampled token in
    either term. gamma = 0 is the local KL with frozen prefixes.
    """
    return _family(gamma, own=no_cost, later=mean_cost, support="full", surrogate=_full_and_future)


def full_sampled_future(gamma: float = 0.0) -> Objective:
    """`full_reverse_kl` with the later costs as sampled: only the immediate term is averaged."""
    later = sampled_cost
    return _family(gamma, own=no_cost, later=later, support="full", surrogate=_full_and_future)


def _full_and_future(at: Visited) -> Tensor:
    return reverse_kl(*pair(at)) + score_function(at.logp, at.credit)


def _family(gamma: float, support: str = "none", **parts: Callable[..., Tensor]) -> Objective:
    check_gamma(gamma)
    return Objective(support=support, gamma=gamma, **parts)


def local(support: str, surrogate: Callable[[Visited], Tensor]) -> Objective:
    """An objective of the prefix and the sampled token alone; gamma and baselines do not apply."""
    return Objective(support=support, surrogate=surrogate)


FORMS: dict[str, Callable[[Visited], Tensor]] = {
    "": renormalised,
    "_and_sampled": renormalised_and_sampled,
    "_unnormalised": unnormalised,
    "_stopped": stopped,
    "_bucket": bucket,
    "_sampled_tail": sampled_tail,
    "_published_tail": published_tail,
}
"""What a top-K objective does with its support; the name's ending. (Paper's V1 to V5: teacher_topk,
student_topk_and_sampled, teacher_topk_and_sampled, student_ and teacher_topk_published_tail.)"""

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sampled_token": sampled_token,
    "mean_future": mean_future,
    "full_reverse_kl": full_reverse_kl,
    "full_sampled_future": full_sampled_future,
    "k2": partial(local, "none", half_square),
    "k3": partial(local, "none", low_variance),
    **{f"teacher_topk{end}": partial(local, "teacher", form) for end, form in FORMS.items()},
    **{f"student_topk{end}": partial(local, "student", form) for end, form in FORMS.items()},
}


def k1() -> Objective:
    """k1 differentiated as it stands: the score alone, whose mean is zero. Nothing is learned."""
    return local("none", lambda at: log_ratio(at.logp, at.teacher_logp.detach()))


def kl_advantage(gamma: float = 0.0) -> Objective:
    """The local KL as the advantage of the sampled token: equal for all tokens of a prefix.

    At gamma = 0 its mean is zero; at gamma > 0 only the later costs teach anything.
    """
    return _family(gamma, own=mean_cost, later=mean_cost, surrogate=_weighted)


ERRORS: dict[str, tuple[Callable[..., Objective], str]] = {
    "k1": (k1, "differentiating log student - log teacher gives a gradient of mean zero"),
    "kl_advantage": (
        kl_advantage,
        "an advantage that is the same for every token of a prefix gives a gradient of mean zero",
    ),
}
"""Found in real trainers and studied here; `make` refuses to train with them."""


def make(name: str, gamma: float = 0.0, baseline: str = "none", ratio: str = "none") -> Objective:
    """The objective called `name`; refuses what it would silently ignore, and known errors.

    Raises:
      ValueError: unknown name, gamma outside [0, 1], or a gamma or a baseline for a purely local
        objective.
    """
    if name in ERRORS:
        raise ValueError(f"{name} is a known error: {ERRORS[name][1]}; use sampled_token")
    for kind, chosen, known in (
        ("objective", name, OBJECTIVES),
        ("baseline", baseline, BASELINES),
        ("ratio", ratio, RATIOS),
    ):
        if chosen not in known:
            raise ValueError(f"unknown {kind} {chosen!r}; known: {', '.join(known)}")
    check_gamma(gamma)
    constructor = OBJECTIVES[name]
    family = "gamma" in inspect.signature(constructor).parameters
    if gamma and not family:
        raise ValueError(f"{name} is local, gamma = {gamma} would have no effect; use gamma = 0")
    if baseline != "none" and not family:
        raise ValueError(f"{name} has no credit from which to subtract the baseline {baseline!r}")
    made = constructor(gamma=gamma) if family else constructor()
    return replace(made, baseline=BASELINES[baseline], ratio=RATIOS[ratio])
