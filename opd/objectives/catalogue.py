"""Named objectives: which credit and surrogate each combines, and what its gradient estimates.

Shapes: B responses, T positions, K support ids; "..." is (B, T) or flat tokens (N,). p is the
student, q the teacher. Sign convention: the cost r = log p - log q is minimised; J = E[sum_t r_t]
is the sequence KL.
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
from opd.objectives.requirements import Requirements
from opd.objectives.surrogates import (
    Form,
    VisitedTokens,
    bucket,
    clipped_score,
    full_forward,
    full_mixture,
    full_reverse,
    k2_loss,
    k3_loss,
    no_loss,
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
    """Combination of a credit and a surrogate.

    The credit of a token is its own cost plus the later costs discounted by gamma, minus the
    baseline, plus the cost of the reward. All of these take ScoredRollouts and return (B, T) over
    the whole step. The flags are declared where an objective is defined; they are not derived from
    its functions, which may be wrapped.
    """

    support: str
    """Ids on which both models are compared: "none", "teacher" or "student" (top-K of that model),
    "union" or "intersection" of the two (`opd.objectives.support`), or "full" for the whole
    vocabulary.
    """
    local: Callable[[VisitedTokens], Tensor] = no_loss
    """Part of a token's loss that does not depend on the credit: VisitedTokens -> (...)."""
    score: Callable[[VisitedTokens], Tensor] = no_loss
    """Score function of the credit, the other part of a token's loss: VisitedTokens -> (...)."""
    own_cost: Callable[[ScoredRollouts], Tensor] = no_cost
    """(B, T) cost of the token itself."""
    later_cost: Callable[[ScoredRollouts], Tensor] = no_cost
    """(B, T) cost of a token as it enters the credit of earlier tokens."""
    gamma: float = 0.0
    """Discount of later costs."""
    baseline: Callable[[ScoredRollouts, Tensor], Tensor] = no_baseline
    """(batch, credit) -> (B, T) baseline subtracted from the credit."""
    reward_cost: Callable[[ScoredRollouts], Tensor] = no_cost
    """(B, T) cost of the reward, added to the credit."""
    ratio: Callable[[ScoredRollouts], Tensor] = no_ratio
    """(B, T) factor of a token's loss that corrects for a sampler other than the student."""
    normalised: bool = True
    """Whether `logp` and `support_logp` of the student must be true log-probabilities. Where False,
    raw logits of these ids give the same loss and gradient.
    """
    sampled: bool = True
    """Whether the loss reads `logp`, the sampled token's log-probability."""
    mask_scope: str = "cost"
    """What a mask removes, one of MASK_SCOPES."""
    importance_weighted: bool = False
    """Whether every part of the loss that reads `logp` is weighted by p(y) / p_old(y), so that
    tokens sampled by an older student may be used.
    """
    scores_credit: bool = False
    """Whether the credit enters the loss."""
    sampled_own: bool = False
    """Whether the own cost is the log-ratio of the sampled token."""
    sampled_later: bool = False
    """Whether the later cost is the log-ratio of the sampled token."""
    distributions: bool = False
    """Whether credit or baseline read whole next-token distributions."""
    takes_limit: bool = False
    """Whether the local part accepts a `limit` on its log-ratios
    (`opd.objectives.surrogates.Form`).
    """
    renormalises: bool = False
    """Whether adding a constant to all log-probabilities of a position leaves the local part
    unchanged.
    """
    local_reads_sample: bool = False
    """Whether the local part reads the sampled token's log-probability."""
    whole_groups: bool = False
    """Whether the baseline or the reward of a response reads other responses of the step."""
    support_k: int = 16
    """K, the ids per model of a top-K support; the loss itself takes any number."""

    @property
    def requirements(self) -> Requirements:
        """What the loss reads, and when it is valid."""
        return Requirements(
            support=self.support,
            support_k=self.support_k,
            sampled_logp=self.sampled,
            teacher_sampled_logp=self.reads_teacher_sample,
            normalised=self.normalised,
            distributions=self.distributions,
            whole_groups=self.whole_groups,
            on_policy=self.on_policy_only,
        )

    @property
    def reads_teacher_sample(self) -> bool:
        """Whether the loss reads the teacher's log-probability of the sampled token."""
        reads_later_cost = self.sampled_later and self.gamma > 0
        return self.sampled_own or reads_later_cost or self.local_reads_sample

    @property
    def on_policy_only(self) -> bool:
        """Whether the loss is wrong on tokens that were sampled by an older student."""
        return self.sampled and not self.importance_weighted

    def credit(self, batch: ScoredRollouts) -> Tensor:
        """Compute own_t + sum_{u > t} gamma^(u-t) later_u - baseline_t + reward_cost per token.

        With the mask scope "loss", costs of tokens that were sampled but are not supervised are
        part of the credit of earlier tokens; with "cost" they count as 0 (`MASK_SCOPES`). Such
        tokens advance gamma in both cases.

        Args:
            batch: Scored rollouts of the whole optimizer step.

        Returns:
            (B, T) credit without gradient, 0 where nothing is supervised.
        """
        cost_mask = batch.sampled if self.mask_scope == "loss" else batch.mask
        credit = self.own_cost(batch) * cost_mask
        if self.gamma:
            later_costs = self.later_cost(batch) * cost_mask
            credit = credit + discounted(later_costs, batch.sampled, self.gamma) - later_costs
        return (credit - self.baseline(batch, credit) + self.reward_cost(batch)) * batch.mask

    def surrogate(self, inputs: VisitedTokens) -> Tensor:
        """Return the (...) loss of the visited tokens."""
        return self.local(inputs) + self.score(inputs)

    def loss(
        self, logp: Tensor | None, support_logp: Tensor | None, batch: ScoredRollouts
    ) -> Tensor:
        """Return the (B, T) unreduced loss of a whole batch, with the credit computed from it.

        Args:
            logp: (B, T) student log-probabilities of the sampled tokens, with gradient; None if
                unread.
            support_logp: (B, T, K) student log-probabilities on the support, with gradient, or
                None.
            batch: Scored rollouts of the whole optimizer step.

        Returns:
            (B, T) losses, not masked and not divided by a denominator.
        """
        return self.local_loss(logp, support_logp, batch, self.credit(batch))

    def local_loss(
        self,
        logp: Tensor | None,
        support_logp: Tensor | None,
        batch: ScoredRollouts,
        credit: Tensor,
    ) -> Tensor:
        """Return the (B, T) unreduced loss of a batch for a given credit.

        Args:
            logp: (B, T) student log-probabilities of the sampled tokens, with gradient; None if
                unread.
            support_logp: (B, T, K) student log-probabilities on the support, with gradient, or
                None.
            batch: Scored rollouts.
            credit: (B, T) credit of every token.

        Returns:
            (B, T) losses, not masked and not divided by a denominator.

        Raises:
            InvalidInput: The batch lacks the support of the objective.
        """
        support = batch.support if self.support != "none" else None
        if self.support != "none":
            source = batch.support.source if batch.support is not None else "none"
            if support is None or support_logp is None or source != self.support:
                raise InvalidInput(
                    f"the objective needs a {self.support!r} support, but the batch has "
                    f"{source!r}; score the batch with that support"
                )
        inputs = VisitedTokens(
            logp=logp,
            credit=credit,
            teacher_logp=batch.teacher_logp,
            old_logp=batch.student_logp,
            support_logp=support_logp,
            teacher_support_logp=None if support is None else support.teacher_logp,
            present=None if support is None else support.present,
            inside=None if support is None else support.contains(batch.tokens),
        )
        return self.surrogate(inputs) * self.ratio(batch)


def sampled_token(gamma: float = 0.0) -> Objective:
    """Build the gamma family: sum_t (sum_{u >= t} gamma^(u-t) r_u) grad log p(y_t).

    gamma = 0 is the expected gradient of sum_t E[KL(p || q at the prefix)] with the prefix
    distribution frozen. It is biased for the sequence KL: the derivative through the visited
    prefixes is missing. gamma = 1 is unbiased for the gradient of the sequence KL, with variance up
    to cubic in T. (arXiv 2603.25562, eq. 1-3.)

    Args:
        gamma: Discount of later costs, in [0, 1].

    Returns:
        The objective.
    """
    return _score_function_objective(
        gamma, own_cost=sampled_cost, later_cost=sampled_cost, sampled_own=True, sampled_later=True
    )


def sampled_token_weighted(gamma: float = 0.0) -> Objective:
    """Build `sampled_token` for several optimizer steps on the same rollouts: rho_t credit_t.

    In the first step rho = 1 and the gradient is that of `sampled_token`. In later steps the mean
    over the token is correct for the credit of the rollouts, but credit and prefixes are those of
    the old student: the estimate is of first order in the change of the student.

    Args:
        gamma: Discount of later costs, in [0, 1].

    Returns:
        The objective.
    """
    return replace(sampled_token(gamma), score=weighted_score, importance_weighted=True)


def sampled_token_clipped(
    gamma: float = 0.0, clip: tuple[float, float, float] = (0.2, 0.2, 3.0)
) -> Objective:
    """Build `sampled_token_weighted` with PPO's clip, as in the paper's sampled-token runs.

    In the first step rho = 1 and the gradient is that of `sampled_token`; with one step per set of
    rollouts the clip has no effect. In later steps the gradient of a token is 0 once its
    probability has moved by more than the clip in the direction of its credit, or has grown
    `dual`-fold against its credit. This stopping rule is deliberately biased.

    Args:
        gamma: Discount of later costs, in [0, 1].
        clip: (low, high, dual): rho is clipped to [1 - low, 1 + high]; dual bounds rho where the
            credit is positive.

    Returns:
        The objective.

    Raises:
        InvalidInput: low is outside (0, 1), high is not positive, or dual is not above 1 + high.
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
    """Build `sampled_token` with later costs replaced by their means at the prefix, K_u for r_u.

    The expected gradient is the same; the noise from sampling the later tokens is removed.

    Args:
        gamma: Discount of later costs, in [0, 1].

    Returns:
        The objective.
    """
    return _score_function_objective(
        gamma, own_cost=sampled_cost, later_cost=mean_cost, sampled_own=True, distributions=True
    )


def full_reverse_kl(gamma: float = 0.0) -> Objective:
    """Build sum_t KL(p || q) over the vocabulary plus the score function of later mean costs.

    The expected gradient is that of `sampled_token(gamma)`, without the noise of the sampled token
    in either term. gamma = 0 is the local KL with frozen prefixes.

    Args:
        gamma: Discount of later costs, in [0, 1].

    Returns:
        The objective.
    """
    return _full_and_future(gamma, later_cost=mean_cost, distributions=True)


def full_sampled_future(gamma: float = 0.0) -> Objective:
    """Build `full_reverse_kl` with sampled later costs: only the immediate term is averaged."""
    return _full_and_future(gamma, later_cost=sampled_cost, sampled_later=True)


def _full_and_future(gamma: float, **options: Any) -> Objective:
    """Build the full-vocabulary KL and, at gamma > 0, the score function of the later costs."""
    check_gamma(gamma)
    objective = Objective(
        support="full", local=full_reverse, takes_limit=True, gamma=gamma, **options
    )
    if gamma:
        return replace(objective, score=plain_score, scores_credit=True)
    return replace(objective, sampled=False)


def _score_function_objective(gamma: float, **options: Any) -> Objective:
    """Build a score function of a credit without a local part."""
    check_gamma(gamma)
    return Objective(support="none", gamma=gamma, score=plain_score, scores_credit=True, **options)


def full_forward_kl() -> Objective:
    """Build sum_t KL(q || p) over the vocabulary on the student's prefixes, which are frozen.

    The logit gradient p - q is exact for that sum. The objective is mass-covering and its gradient
    is not that of either sequence KL. Its cost is not an expectation under p, so there is no
    discounted part.

    Returns:
        The objective.
    """
    return local("full", Form(surrogate=full_forward))


def full_jsd(beta: float = 0.5) -> Objective:
    """Build sum_t of the generalised Jensen-Shannon divergence on frozen student prefixes.

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. beta = 0 is the forward
    KL and beta = 1 the reverse KL. Near these ends the divergence and its gradient are small, of
    the order of beta and 1 - beta. (GKD, arXiv 2306.13649.)

    Args:
        beta: Weight of the teacher in the mixture, in [0, 1].

    Returns:
        The objective.

    Raises:
        InvalidInput: beta is outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise InvalidInput(f"beta is {beta}; it must lie in [0, 1], 0 forward and 1 reverse KL")
    return local("full", Form(surrogate=partial(full_mixture, beta=beta)))


def local(support: str, form: Form) -> Objective:
    """Build an objective of prefix and sampled token only; gamma and baselines do not apply.

    Args:
        support: Ids on which the models are compared, as in `Objective.support`.
        form: The local surrogate and its properties.

    Returns:
        The objective.
    """
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
"""Local surrogates of top-K objectives by the suffix of the objective's name. (V1 to V5 of the
paper: teacher_topk, student_topk_and_sampled, teacher_topk_and_sampled,
student_topk_published_tail and teacher_topk_published_tail.)
"""

SUPPORTS = ("teacher", "student", "union", "intersection")
"""Supports of top-K objectives, the prefix of the objective's name."""

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sampled_token": sampled_token,
    "sampled_token_weighted": sampled_token_weighted,
    "sampled_token_clipped": sampled_token_clipped,
    "mean_future": mean_future,
    "full_reverse_kl": full_reverse_kl,
    "full_sampled_future": full_sampled_future,
    "full_forward_kl": full_forward_kl,
    "full_jsd": full_jsd,
    "k2": partial(local, "none", Form(surrogate=k2_loss, reads_sample=True)),
    "k3": partial(local, "none", Form(surrogate=k3_loss, reads_sample=True)),
    **{
        f"{source}_topk{end}": partial(local, source, form)
        for source in SUPPORTS
        for end, form in FORMS.items()
    },
}


def k1() -> Objective:
    """Build k1 differentiated directly: a score function of mean zero, which learns nothing."""

    def sampled_log_ratio(inputs: VisitedTokens) -> Tensor:
        """Return log p(y) - log q(y) with gradient."""
        return log_ratio(sampled_logp(inputs), inputs.teacher_logp.detach())

    return local("none", Form(surrogate=sampled_log_ratio, reads_sample=True))


def kl_advantage(gamma: float = 0.0) -> Objective:
    """Build the local KL as advantage of the sampled token: equal for all tokens at a prefix.

    At gamma = 0 the mean gradient is zero; at gamma > 0 only the later costs carry a signal.

    Args:
        gamma: Discount of later costs, in [0, 1].

    Returns:
        The objective.
    """
    return _score_function_objective(
        gamma, own_cost=mean_cost, later_cost=mean_cost, distributions=True
    )


KNOWN_ERRORS: dict[str, tuple[Callable[..., Objective], str]] = {
    "k1": (k1, "differentiating log student - log teacher gives a gradient of mean zero"),
    "kl_advantage": (
        kl_advantage,
        "an advantage that is the same for every token of a prefix gives a gradient of mean zero",
    ),
}
"""Mistakes found in published trainers, kept for study; `make_objective` refuses them."""

COLLAPSING: dict[str, str] = {
    "_unnormalised": "descent ends at p(S) = q(S)/e, pushing the student out of the support S even "
    "where it equals the teacher",
    "_published_tail": "its gradient is off by grad p(S): descent ends at p(S) = q(S)/(q(S) + "
    "e - e q(S)), pushing the student out of the support S even where it equals the teacher",
}
"""Forms whose minimum is not the teacher; `make_objective` requires allow_collapse=True."""
