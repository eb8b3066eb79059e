"""Mutations of the exact engine and of the sampler, which the study's own tests must catch."""

from functools import partial

from synthetic import estimators
from synthetic.exact import baselines, moments, parameters, recursion, returns
from synthetic.sampling import monte_carlo, trajectories
from synthetic.worlds import transitions
from tests.repo.mutations.mutate import Mutations
from tests.synthetic.exact import test_moments as moment_tests
from tests.synthetic.exact import test_sparse as sparse_tests

RECURSION = {
    "cross term once": ("(sources + 2 * products)", "(sources + products)"),
    "discount not squared": ("discounts**2 * (sources", "discounts * (sources"),
    "vector dropped from the second moment": ("square = vv * weight + 2", "square = 2"),
    "baseline of the first step": ("rows.baseline[:, :, steps,", "rows.baseline[:, :, :1,"),
    "baseline added": ("centred = first - b * weight", "centred = first + b * weight"),
    "baseline not squared": ("second - b * (first + centred)", "second - b * (2 * first - weight)"),
    "baseline of earlier steps added": ("square[subtracted] -= (", "square[subtracted] += ("),
    "length not squared": ("squares = by_length.square()", "squares = by_length"),
    "one token too many": ("length_weights[:-1, None]", "length_weights[1:, None]"),
    "later cost of no score": ("+ scores_paid * scored", "+ 0 * scores_paid * scored"),
    "earlier cost of no score": ("+ along_score * paid)", "+ 0 * along_score * paid)"),
    "scores of the wrong age": (
        "torch.arange(horizon - 1, dtype",
        "torch.arange(1, horizon, dtype",
    ),
    "shift of the wrong step": ("powers.cumsum(1).flip(1), (0, 1))", "powers.cumsum(1), (0, 1))"),
}
RETURNS = {
    "future and past exchanged": ("right.flip(1)", "right"),
    "cost not discounted": (
        "moved[:, 1:] *= discounts[",
        "moved[:, 1:] *= torch.ones_like(discounts)[",
    ),
    "cost of the last step only": ("moved[:, 1:] += paid", "moved[:, 1:] = paid"),
}
PARAMETERS = {
    "jacobian once": ("right @ self.jacobian)).sum", "right @ self.jacobian).abs()).sum"),
    "products with the wrong sign": ('...ca", vectors', '...ca", -vectors'),
}
TRANSITIONS = {
    "first step for the last": ("reversed(sources.unbind())", "sources.unbind()"),
    "first successor only": ("range(1, successors.shape[-1])", "range(1, 1)"),
    "successor of the first state": (
        "columns[successors, :, own]",
        "columns[successors, :, 0 * own]",
    ),
}
EXACT = {
    "future one step late": ("torch.addcmul(local, gammas", "torch.addcmul(0 * local, gammas"),
    "gradient not centred": ("p * (credit - (p * credit)", "p * (credit - 0 * (p * credit)"),
    "ratio not squared": ("token_terms.ratio.square()", "token_terms.ratio"),
}
ESTIMATORS = {
    "undiscounted values": (
        "sources, self.gammas[:, None], last",
        "sources, self.gammas[:, None] ** 0, last",
    ),
    "next value not discounted": (
        "sum(-1) + self.gammas[:, None, None] * later",
        "sum(-1) + later",
    ),
    "score of the wrong credit": ("score = once - step", "score = step"),
}
GRADIENTS = {
    "softmax not differentiated": (
        "return gradient - table.exp()",
        "return gradient - 0 * table.exp()",
    ),
    "support without gradient": (
        "zip(leaf_indices, leaf_gradients, strict=True)",
        "zip(leaf_indices[:1], leaf_gradients[:1], strict=True)",
    ),
    "mean instead of its square": (
        "self.mean.square().sum((-1, -2)) -",
        "self.mean.abs().sum((-1, -2)) -",
    ),
}
SAMPLE = {
    "the student acts": (
        "acting = mdp.behaviour(student_logits, sampler)\n    states",
        "acting = mdp.behaviour(student_logits, None)\n    states",
    ),
    "scored as if the student acted": (
        "acting = mdp.behaviour(student_logits, sampler)\n    trajectories",
        "acting = mdp.behaviour(student_logits, None)\n    trajectories",
    ),
    "support of the other model": ('"student": student_logits}', '"student": teacher_logits}'),
}
BASELINES = {
    "mean over the dead": ("visits = terms.occupancy * terms.active", "visits = terms.occupancy"),
    "nothing to come": ("projections = terms.occupancy * later", "projections = 0 * later"),
    "no earlier scores": (
        "per_action += (terms.later + future)",
        "per_action += 0 * (terms.later + future)",
    ),
    "later steps of the wrong time": (".sum(-1).flip(1)", ".sum(-1)"),
    "undiscounted past": ("terms.gammas**lag * (products", "(products"),
    "group of one more": ("num_others = group - 1", "num_others = group"),
    "no cross term": ("+ cross) / num_others", ") / num_others"),
    "credit is the later cost": (
        "credit_squares.append(means[0])",
        "credit_squares.append(means[0] + 1)",
    ),
}


def check_moments(estimator: str) -> partial[None]:
    """Return the test of an estimator's moments against the sum over all paths."""
    return partial(moment_tests.test_moments_equal_the_sum_over_all_paths, "ending", estimator)


def check_other_sampler(ratio: str) -> partial[None]:
    """Return the test of the moments of responses of another sampler."""
    test = moment_tests.test_another_sampler_with_and_without_correction
    return partial(test, "temperature", "plain", ratio)


check_chain = partial(moment_tests.test_moments_equal_the_sum_over_all_paths, "chain", "value")
check_sparse = sparse_tests.test_a_sparse_world_has_the_moments_of_its_enumeration
check_shared = partial(moment_tests.test_shared_parameters_add_up_over_states, "plain")
check_lengths = partial(moment_tests.test_each_response_divided_by_its_own_length, "plain")
check_optimum = moment_tests.test_no_baseline_has_less_variance_than_the_optimal_one
check_sampled_moments = moment_tests.test_monte_carlo_agrees_for_other_samplers_and_given_baselines
check_groups = partial(moment_tests.test_a_leave_one_out_group_equals_the_sum_over_all_groups, 2)
check_support = partial(
    moment_tests.test_supports_of_every_size_equal_the_sum_over_all_paths, "union_topk_and_sampled"
)

EXACT_MUTATIONS = (
    Mutations(
        recursion, RECURSION, (check_lengths, check_optimum, check_moments("value"), check_chain)
    ),
    Mutations(returns, RETURNS, (check_moments("plain"), check_sparse)),
    Mutations(transitions, TRANSITIONS, (check_sparse,)),
    Mutations(parameters, PARAMETERS, (check_shared,)),
    Mutations(moments, EXACT, (check_other_sampler("sequence"),)),
    Mutations(estimators, ESTIMATORS, (check_moments("position_value"),)),
    Mutations(
        baselines,
        BASELINES,
        (
            check_optimum,
            check_moments("position_value"),
            moment_tests.test_a_sampled_leave_one_out_group_has_the_exact_variance,
            check_groups,
        ),
    ),
    Mutations(monte_carlo, GRADIENTS, (check_moments("full_forward_kl"), check_sampled_moments)),
    Mutations(
        trajectories,
        SAMPLE,
        (check_other_sampler("token"), check_support, check_sampled_moments),
    ),
)
