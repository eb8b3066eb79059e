"""Mutations of the exact engine and of the sampler, which the study's own tests must catch."""

from functools import partial

from synthetic import estimators
from synthetic.exact import baselines, moments, recursion
from synthetic.sampling import monte_carlo, trajectories
from tests.repo.mutations.mutate import Mutations
from tests.synthetic.exact import test_moments as moment_tests

RECURSION = {
    "cross term once": ("2 * gammas * cost\n", "gammas * cost\n"),
    "discount not squared": ("gammas**2 * cost2", "gammas * cost2"),
    "vector dropped from the second moment": ("n * (vv - 2 * b * sv", "n * (-2 * b * sv"),
    "baseline of the first step": ("rows.baseline[:, t, :", "rows.baseline[:, 0, :"),
    "baseline added": ("new_steps = new_steps - rows", "new_steps = new_steps + rows"),
    "baseline not squared": ("b.square() * ss", "b * ss"),
    "length not squared": ("by_length[1:].square()", "by_length[1:]"),
    "one token too few": ("mean += by_length[t + 1]", "mean += by_length[t]"),
    "jacobian once": ("right @ self.jacobian)).sum", "right @ self.jacobian).abs()).sum"),
    "later cost of no score": (
        "rows.step), rows.later * gammas",
        "rows.step), 0 * rows.later * gammas",
    ),
}
EXACT = {
    "future one step late": ("values.append(local + gammas", "values.append(0 * local + gammas"),
    "gradient not centred": ("p * (credit - (p * credit)", "p * (credit - 0 * (p * credit)"),
    "ratio not squared": ("token_terms.ratio.square()", "token_terms.ratio"),
}
ESTIMATORS = {
    "undiscounted values": ("mean_later + gammas[:, None] * (values", "mean_later + (values"),
    "next value not discounted": ("self.gammas[:, None, None, None] * self.next", "self.next"),
    "score of the wrong credit": ("score = gradients[1] - gradients[0]", "score = gradients[0]"),
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
        "acting = mdp.behaviour(student_logits, sampler)\n    return",
        "acting = mdp.behaviour(student_logits, None)\n    return",
    ),
    "support of the other model": ('"student": student_logits}', '"student": teacher_logits}'),
}
BASELINES = {
    "mean over the dead": ("visits = terms.occupancy * terms.active", "visits = terms.occupancy"),
    "nothing to come": (
        "future_gradient = apply_transition(future_gradient, terms.move.T) + ",
        "future_gradient = ",
    ),
    "no earlier scores": (
        "gamma_column * (terms.later + future",
        "0 * gamma_column * (terms.later + future",
    ),
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


check_lengths = partial(moment_tests.test_each_response_divided_by_its_own_length, "plain")
check_optimum = moment_tests.test_no_baseline_has_less_variance_than_the_optimal_one
check_sampled_moments = moment_tests.test_monte_carlo_agrees_for_other_samplers_and_given_baselines
check_groups = partial(moment_tests.test_a_leave_one_out_group_equals_the_sum_over_all_groups, 2)
check_support = partial(
    moment_tests.test_supports_of_every_size_equal_the_sum_over_all_paths, "union_topk_and_sampled"
)

EXACT_MUTATIONS = (
    Mutations(recursion, RECURSION, (check_lengths, check_optimum)),
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
