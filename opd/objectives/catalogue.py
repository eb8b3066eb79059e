"""Compositions: a credit and a surrogate under one name, and what each is the gradient of.

Shapes: B responses, T positions, K support ids; "..." is (B, T) or flat tokens (N,). p student,
q teacher. Sign: the cost r = log p - log q is minimised; J = E[sum_t r_t] is the sequence KL.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from opd.objectives.credit import (
    check_gamma,
    discounted,
    log_ratio,
    mean_cost,
    no_baseline,
    no_cost,
    no_ratio,
    sampled_cost,
)
from opd.objectives.surrogates import (
    Form,
    VisitedTokens,
    bucket,
    clipped_score,
    full_forward,
    full_mixture,
    full_reverse,
    half_square,
    low_variance,
    nothing,
    plain_score,
    published_tail,
    renormalised,
    renormalised_and_sampled,
    sampled_logp,
    sampled_tail,
    stopped,
    unnormalised,
    weighted_score,
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A named composition.

    support: ids on which both models must be known: "none", "teacher" or "student" (its top-K),
    "union" or "intersection" of the two (`opd.objectives.support`), or "full".
    local, score: Visited -> (...), the two parts of a token's loss: what it is whatever the credit,
    and the score function of the credit. The credit of a token is its `own` cost plus the `later`
    costs discounted by gamma, minus the `baseline`, plus what the `outcome` costs, all Scored ->
    (B, T) over the whole step; ratio: Scored -> (B, T) factor of a token's loss where the sampler
    is not the student.
    normalised: whether the student's `logp` and `support_logp` must be true log-probabilities;
    where False, raw logits of these ids give the same loss and gradient. sampled: whether `logp` is
    read at all. mask_scope: in MASK_SCOPES, what a mask takes away.

    What follows is declared where an objective is made, and never found out by looking at its
    functions, which may be wrapped:
    importance_weighted: whether every part of the loss that reads `logp` is weighted by
    p(y) / p_old(y), so that it may be taken over tokens of an older student. scores_credit: whether
    the credit enters the loss. sampled_own, sampled_later: whether these costs are the log-ratio of
    the sampled token. distributions: whether credit or baseline read whole next-token
    distributions. local_reads_sample, takes_limit, renormalises: of the local part, as in
    `opd.objectives.surrogates.Form`.
    """

    support: str
    local: Callable[[VisitedTokens], Tensor] = nothing
    score: Callable[[VisitedTokens], Tensor] = nothing
    own: Callable[[ScoredRollouts], Tensor] = no_cost
    later: Callable[[ScoredRollouts], Tensor] = no_cost
    gamma: float = 0.0
    baseline: Callable[[ScoredRollouts, Tensor], Tensor] = no_baseline
    outcome: Callable[[ScoredRollouts], Tensor] = no_cost
    ratio: Callable[[ScoredRollouts], Tensor] = no_ratio
    normalised: bool = True
    sampled: bool = True
    mask_scope: str = "cost"
    importance_weighted: bool = False
    scores_credit: bool = False
    sampled_own: bool = False
    sampled_later: bool = False
    distributions: bool = False
    takes_limit: bool = False
    renormalises: bool = False
    local_reads_sample: bool = False

    @property
    def reads_teacher_sample(self) -> bool:
        """Whether the loss reads the teacher's log-probability of the sampled token."""
        later = self.sampled_later and self.gamma > 0
        return self.sampled_own or later or self.local_reads_sample

    @property
    def only_fresh_samples(self) -> bool:
        """Whether the loss is wrong on tokens that an older student drew."""
        return self.sampled and not self.importance_weighted

    def credit(self, batch: ScoredRollouts) -> Tensor:
        """(B, T) own_t + sum_{u > t} gamma^(u-t) later_u - baseline_t + outcome.

        0 where nothing is supervised. Tokens that were sampled and are not supervised add their
        costs to the credit of earlier ones with the mask scope "loss", and nothing with "cost"
        (`MASK_SCOPES`); they advance gamma in both.
        """
        counted = batch.sampled if self.mask_scope == "loss" else batch.mask
        credit = self.own(batch) * counted
        if self.gamma:
            later = self.later(batch) * counted
            credit = credit + discounted(later, batch.sampled, self.gamma) - later
        return (credit - self.baseline(batch, credit) + self.outcome(batch)) * batch.mask

    def surrogate(self, at: VisitedTokens) -> Tensor:
        """(...) loss of a visited token."""
        return self.local(at) + self.score(at)

    def loss(
        self, logp: Tensor | None, support_logp: Tensor | None, batch: ScoredRollouts
    ) -> Tensor:
        """(B, T) unreduced loss of one whole batch; `logp` and `support_logp` carry gradient."""
        return self.local_loss(logp, support_logp, batch, self.credit(batch))

    def local_loss(
        self,
        logp: Tensor | None,
        support_logp: Tensor | None,
        batch: ScoredRollouts,
        credit: Tensor,
    ) -> Tensor:
        """The same with the credit (B, T) given."""
        support = batch.support if self.support != "none" else None
        if self.support != "none":
            source = batch.support.source if batch.support is not None else "none"
            if support is None or support_logp is None or source != self.support:
                raise InvalidInput(f"needs a {self.support!r} support, the batch has {source!r}")
        at = VisitedTokens(
            logp=logp,
            credit=credit,
            teacher_logp=batch.teacher_logp,
            old_logp=batch.student_logp,
            support_logp=support_logp,
            teacher_support_logp=None if support is None else support.teacher_logp,
            present=None if support is None else support.present,
            inside=None if support is None else support.contains(batch.tokens),
        )
        return self.surrogate(at) * self.ratio(batch)


def sampled_token(gamma: float = 0.0) -> Objective:
    """The gamma family: sum_t (sum_{u >= t} gamma^(u-t) r_u) grad log p(y_t).

    gamma = 0: expected gradient of sum_t E[KL(p || q at the prefix)] with the prefix distribution
    frozen; biased for the sequence KL by the missing derivative through the visited prefixes.
    gamma = 1: unbiased for the gradient of the sequence KL, with variance up to cubic in T.
    (arXiv 2603.25562, eq. 1-3.)
    """
    return _family(
        gamma, own=sampled_cost, later=sampled_cost, sampled_own=True, sampled_later=True
    )


def sampled_token_weighted(gamma: float = 0.0) -> Objective:
    """`sampled_token` for several optimizer steps on the same rollouts: rho_t credit_t.

    The same gradient in the first step, where rho = 1. Later the mean over the token is right for
    the credit of the rollouts; that credit and the prefixes stay those of the old student, so that
    the estimate is of the first order in how far the student has moved.
    """
    return replace(sampled_token(gamma), score=weighted_score, importance_weighted=True)


def sampled_token_clipped(
    gamma: float = 0.0, clip: tuple[float, float, float] = (0.2, 0.2, 3.0)
) -> Objective:
    """`sampled_token_weighted` under PPO's clip (low, high, dual), as the paper's baseline ran it.

    The same gradient in the first step, where rho = 1; with one step on each set of rollouts the
    clip has no effect. Later the gradient of a token is 0 once it has moved by more than the clip
    to where its credit wanted it, and where its probability has grown `dual`-fold against its
    credit: a stopping rule, biased on purpose.

    Raises:
      ValueError: low outside (0, 1), high not positive, or dual not above 1 + high.
    """
    low, high, dual = clip
    if not (0 < low < 1 and high > 0 and dual > 1 + high):
        raise InvalidInput(
            f"clip is {clip}; it must be (low, high, dual) with 0 < low < 1, high > 0 and "
            "dual > 1 + high"
        )
    score = partial(clipped_score, low=low, high=high, dual=dual)
    return replace(sampled_token(gamma), score=score, importance_weighted=True)


def mean_future(gamma: float = 0.0) -> Objective:
    """`sampled_token` with later costs replaced by their means at the prefix, K_u for r_u.

    The same expected gradient; the noise of the later tokens' own draws is gone.
    """
    return _family(gamma, own=sampled_cost, later=mean_cost, sampled_own=True, distributions=True)


def full_reverse_kl(gamma: float = 0.0) -> Objective:
    """sum_t KL(p || q) over the whole vocabulary, plus the score function of later mean costs.

    The same expected gradient as `sampled_token(gamma)` without the noise of the sampled token in
    either term. gamma = 0 is the local KL with frozen prefixes.
    """
    return _full_and_future(gamma, later=mean_cost, distributions=True)


def full_sampled_future(gamma: float = 0.0) -> Objective:
    """`full_reverse_kl` with the later costs as sampled: only the immediate term is averaged."""
    return _full_and_future(gamma, later=sampled_cost, sampled_later=True)


def _full_and_future(gamma: float, **later: Any) -> Objective:
    """The KL on the whole vocabulary, and at gamma > 0 the score function of the later costs."""
    check_gamma(gamma)
    made = Objective(support="full", local=full_reverse, takes_limit=True, gamma=gamma, **later)
    if gamma:
        return replace(made, score=plain_score, scores_credit=True)
    return replace(made, sampled=False)


def _family(gamma: float, **parts: Any) -> Objective:
    """A score function of a credit, without a local part."""
    check_gamma(gamma)
    return Objective(support="none", gamma=gamma, score=plain_score, scores_credit=True, **parts)


def full_forward_kl() -> Objective:
    """sum_t KL(q || p) over the whole vocabulary on the student's prefixes, which are frozen.

    Logit gradient p - q: exact for that sum, mass-covering, and not the gradient of either sequence
    KL. Its cost is not E_p[anything], so it has no discounted part.
    """
    return local("full", Form(surrogate=full_forward))


def full_jsd(beta: float = 0.5) -> Objective:
    """sum_t of the generalised Jensen-Shannon divergence on the student's prefixes, frozen.

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p; beta = 0 is the forward
    KL, beta = 1 the reverse, and close to them the divergence and its gradient are small: they are
    of the order of beta and 1 - beta. (GKD, arXiv 2306.13649.)

    Raises:
      ValueError: beta is outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise InvalidInput(f"beta is {beta}; it must lie in [0, 1], 0 forward and 1 reverse KL")
    return local("full", Form(surrogate=partial(full_mixture, beta=beta)))


def local(support: str, form: Form) -> Objective:
    """An objective of the prefix and the sampled token alone; gamma and baselines do not apply."""
    return Objective(
        support=support,
        local=form.surrogate,
        normalised=not form.renormalises,
        sampled=form.reads_sample,
        local_reads_sample=form.reads_sample,
        takes_limit=form.takes_limit,
        renormalises=form.renormalises,
    )


FORMS: dict[str, Form] = {
    "": Form(surrogate=renormalised, takes_limit=True, renormalises=True),
    "_and_sampled": Form(
        surrogate=renormalised_and_sampled, reads_sample=True, takes_limit=True, renormalises=True
    ),
    "_unnormalised": Form(surrogate=unnormalised, takes_limit=True),
    "_stopped": Form(surrogate=stopped),
    "_bucket": Form(surrogate=bucket),
    "_sampled_tail": Form(surrogate=sampled_tail, reads_sample=True),
    "_published_tail": Form(surrogate=published_tail, reads_sample=True),
}
"""What a top-K objective does with its support; the name's ending. (Paper's V1 to V5: teacher_topk,
student_topk_and_sampled, teacher_topk_and_sampled, student_ and teacher_topk_published_tail.)"""

SUPPORTS = ("teacher", "student", "union", "intersection")
"""Whose top-K ids a top-K objective is about; the name's beginning."""

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sampled_token": sampled_token,
    "sampled_token_weighted": sampled_token_weighted,
    "sampled_token_clipped": sampled_token_clipped,
    "mean_future": mean_future,
    "full_reverse_kl": full_reverse_kl,
    "full_sampled_future": full_sampled_future,
    "full_forward_kl": full_forward_kl,
    "full_jsd": full_jsd,
    "k2": partial(local, "none", Form(surrogate=half_square, reads_sample=True)),
    "k3": partial(local, "none", Form(surrogate=low_variance, reads_sample=True)),
    **{
        f"{source}_topk{end}": partial(local, source, form)
        for source in SUPPORTS
        for end, form in FORMS.items()
    },
}


def k1() -> Objective:
    """k1 differentiated as it stands: the score alone, whose mean is zero. Nothing is learned."""

    def log_ratio_itself(visited: VisitedTokens) -> Tensor:
        return log_ratio(sampled_logp(visited), visited.teacher_logp.detach())

    return local("none", Form(surrogate=log_ratio_itself, reads_sample=True))


def kl_advantage(gamma: float = 0.0) -> Objective:
    """The local KL as the advantage of the sampled token: equal for all tokens of a prefix.

    At gamma = 0 its mean is zero; at gamma > 0 only the later costs teach anything.
    """
    return _family(gamma, own=mean_cost, later=mean_cost, distributions=True)


ERRORS: dict[str, tuple[Callable[..., Objective], str]] = {
    "k1": (k1, "differentiating log student - log teacher gives a gradient of mean zero"),
    "kl_advantage": (
        kl_advantage,
        "an advantage that is the same for every token of a prefix gives a gradient of mean zero",
    ),
}
"""Found in real trainers and studied here; `make` refuses to train with them."""

COLLAPSING: dict[str, str] = {
    "_unnormalised": "descent ends at p(S) = q(S)/e, pushing the student out of the support S even "
    "where it equals the teacher",
    "_published_tail": "its gradient is off by grad p(S): descent ends at p(S) = q(S)/(q(S) + "
    "e - e q(S)), pushing the student out of the support S even where it equals the teacher",
}
"""Forms whose minimum is not the teacher; `make` asks for a word of consent."""
