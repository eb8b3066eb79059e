"""Named objectives: which credit and surrogate each combines, and what its gradient estimates.

Sign convention: the cost r = log p - log q is minimised, p the student and q the teacher;
J = E[sum_t r_t] is the sequence KL. S is the support.
"""

from torch import Tensor

from opd.objectives.credit import MEAN_COST, SAMPLED_COST, log_ratio
from opd.objectives.inputs import TokenInputs, teacher_sampled_logp
from opd.objectives.objective import Objective
from opd.objectives.surrogates import (
    Form,
    Score,
    bucket,
    clipped_score,
    full_forward,
    full_mixture,
    full_reverse,
    k2_loss,
    k3_loss,
    negative_log_likelihood,
    published_tail,
    renormalised,
    renormalised_and_sampled,
    sampled_logp,
    sampled_tail,
    stopped,
    unnormalised,
    weighted_score,
)

FORMS: dict[str, Form] = {
    "": Form(surrogate=renormalised, clippable=True, renormalises=True),
    "_and_sampled": Form(
        surrogate=renormalised_and_sampled, reads_sample=True, clippable=True, renormalises=True
    ),
    "_unnormalised": Form(surrogate=unnormalised, clippable=True),
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

FULL_REVERSE = Form(surrogate=full_reverse, clippable=True)
WEIGHTED_SCORE = Score(function=weighted_score, importance_weighted=True)
CLIPPED_SCORE = Score(function=clipped_score, importance_weighted=True, clippable=True)

OBJECTIVES: dict[str, Objective] = {
    # The gamma family: sum_t (sum_{u >= t} gamma^(u-t) r_u) grad log p(y_t). gamma = 0 is the
    # expected gradient of sum_t E[KL(p || q at the prefix)] with the prefix distribution frozen; it
    # is biased for the sequence KL, whose derivative through the visited prefixes is missing.
    # gamma = 1 is unbiased for the sequence KL, with variance up to cubic in T. (arXiv 2603.25562,
    # eq. 1-3.)
    "sampled_token": Objective(own_cost=SAMPLED_COST, later_cost=SAMPLED_COST),
    # The same for several optimizer steps on the same rollouts: rho_t credit_t. In the first step
    # rho = 1. In later steps the mean over the token is correct for the credit of the rollouts, but
    # credit and prefixes are those of the old student: the estimate is of first order in the change
    # of the student.
    "sampled_token_weighted": Objective(
        own_cost=SAMPLED_COST, later_cost=SAMPLED_COST, score=WEIGHTED_SCORE
    ),
    # The same with PPO's clip, as in the paper's sampled-token runs; with one step per set of
    # rollouts the clip has no effect. In later steps the gradient of a token is 0 once its
    # probability has moved by more than the clip in the direction of its credit, or has grown
    # `dual`-fold against its credit. This stopping rule is deliberately biased.
    "sampled_token_clipped": Objective(
        own_cost=SAMPLED_COST, later_cost=SAMPLED_COST, score=CLIPPED_SCORE
    ),
    # The gamma family with later costs replaced by their means at the prefix, K_u for r_u: the same
    # expected gradient without the noise from sampling the later tokens.
    "mean_future": Objective(own_cost=SAMPLED_COST, later_cost=MEAN_COST),
    # sum_t KL(p || q) over the vocabulary plus the score function of later mean costs: the expected
    # gradient of the gamma family without the noise of the sampled token in either term. gamma = 0
    # is the local KL with frozen prefixes.
    "full_reverse_kl": Objective(support="full", local=FULL_REVERSE, later_cost=MEAN_COST),
    # The same with sampled later costs: only the immediate term is averaged.
    "full_sampled_future": Objective(support="full", local=FULL_REVERSE, later_cost=SAMPLED_COST),
    # sum_t KL(q || p) over the vocabulary on the student's prefixes, which are frozen. The logit
    # gradient p - q is exact for that sum. Mass-covering; its gradient is not that of either
    # sequence KL. Its cost is not an expectation under p, so there is no discounted part.
    "full_forward_kl": Objective(support="full", local=Form(surrogate=full_forward)),
    # sum_t of the generalised Jensen-Shannon divergence on frozen student prefixes, beta KL(q || m)
    # + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. beta = 0 is the forward KL and 1 the
    # reverse KL. Near these ends the divergence and its gradient are small, of the order of beta
    # and 1 - beta. (GKD, arXiv 2306.13649.)
    "full_jsd": Objective(support="full", local=Form(surrogate=full_mixture, mixture=True)),
    "k2": Objective(local=Form(surrogate=k2_loss, reads_sample=True)),
    "k3": Objective(local=Form(surrogate=k3_loss, reads_sample=True)),
    **{
        f"{source}_topk{suffix}": Objective(support=source, local=form)
        for source in SUPPORTS
        for suffix, form in FORMS.items()
    },
}
"""Objectives at gamma 0 without options; `opd.objectives.factory.make_objective` adds them."""


CONTROLS: dict[str, Objective] = {
    # -log p(y) on responses that somebody else wrote: supervised fine-tuning. On the teacher's own
    # samples it is distillation by its samples, whose mean gradient is that of KL(teacher || p) of
    # whole responses.
    "negative_log_likelihood": Objective(
        local=Form(surrogate=negative_log_likelihood, likelihood=True)
    ),
    # Nothing but the reward that `reward_weight` adds: the policy gradient of the expected grade.
    "reward_only": Objective(),
}
"""Objectives that read no teacher, which distillation is compared with."""


def sampled_log_ratio(inputs: TokenInputs) -> Tensor:
    """Return k1 = log p(y) - log q(y) with gradient: differentiated, it ignores the teacher."""
    return log_ratio(sampled_logp(inputs), teacher_sampled_logp(inputs))


KNOWN_ERRORS: dict[str, tuple[Objective, str]] = {
    "k1": (
        Objective(local=Form(surrogate=sampled_log_ratio, reads_sample=True)),
        "differentiating log student - log teacher gives a gradient of mean zero",
    ),
    # At gamma = 0 the mean gradient is zero; at gamma > 0 only the later costs carry a signal.
    "kl_advantage": (
        Objective(own_cost=MEAN_COST, later_cost=MEAN_COST),
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
