"""Mutations of the objectives, and of what the trainer and the study share with them."""

from functools import partial

from diagnostics import batch as batches
from diagnostics.gradients import credit as shared_credit
from opd.objectives import (
    credit,
    divergences,
    factory,
    inputs,
    objective,
    reduction,
    support,
    surrogates,
    token_selection,
)
from tests.opd.objectives import test_factory as choices
from tests.opd.objectives import test_oracle as oracle
from tests.opd.objectives import test_support as lists
from tests.opd.objectives import test_surrogates as dense
from tests.opd.tokens import test_sampled_masks as masks
from tests.repo.mutations.mutate import Mutations
from tests.synthetic.exact import test_moments as moment_tests

CREDIT = {
    "sign of the cost": (
        "return student_logp - teacher_logp",
        "return teacher_logp - student_logp",
    ),
    "ratio upside down": (
        "return (batch.student_logp - batch.sampler_logp).detach()",
        "return (batch.sampler_logp - batch.student_logp).detach()",
    ),
    "sequence ratio of the supervised tokens": (
        "sampler_log_ratio(batch) * batch.sampled",
        "sampler_log_ratio(batch) * batch.mask",
    ),
    "the own reward is in its baseline": (
        "(group_totals(reward, group) - reward)",
        "group_totals(reward, group)",
    ),
    "reward as a cost": (
        "(-weight * advantage(batch))",
        "(weight * advantage(batch))",
    ),
    "clipped from one side": (
        ".clamp(-limit, limit)",
        ".clamp(max=limit)",
    ),
    "live cost": (
        "log_ratio(batch.student_logp, batch.teacher_logp).detach()",
        "log_ratio(batch.student_logp, batch.teacher_logp)",
    ),
    "deviation of the population": (
        "/ (size - 1)).sqrt()",
        "/ size).sqrt()",
    ),
}
SHARED_CREDIT = {
    "costs so far instead of to go": (
        "(cost * sampled).flip(1).cumsum(1).flip(1) * sampled",
        "(cost * sampled).cumsum(1) * sampled",
    ),
    "mask dropped from to-go": (
        "flip(1).cumsum(1).flip(1) * sampled",
        "flip(1).cumsum(1).flip(1)",
    ),
    "discount twice": (
        "cost[:, t] + gamma * running, running",
        "cost[:, t] + gamma**2 * running, running",
    ),
    "masked positions discount": (
        "cost[:, t] + gamma * running, running",
        "cost[:, t] + gamma * running, gamma * running",
    ),
    "the own rollout is in its baseline": (
        "(group_totals(sampled_credit, group) - sampled_credit)",
        "group_totals(sampled_credit, group)",
    ),
    "divided by the whole group": (
        "/ (size - 1).view(broadcast_shape)",
        "/ size.view(broadcast_shape)",
    ),
    "the own prompt is in its position mean": (
        "values.sum(0) - group_totals(values, group)",
        "values.sum(0).expand_as(values)",
    ),
    "ended responses count in the position mean": (
        "count.clamp(min=1)",
        "(count + 1)",
    ),
}
DIVERGENCES = {
    "live teacher": ("_finite(teacher_logp.detach())", "_finite(teacher_logp)"),
    "direction of the divergence": (
        "_infinite_if_huge((student_logp.exp() * ratio)",
        "_infinite_if_huge((teacher_logp.exp() * ratio)",
    ),
    "direction of the forward divergence": (
        "_infinite_if_huge((target_logp.exp() * ratio)",
        "_infinite_if_huge((student_logp.exp() * ratio)",
    ),
    "live teacher of the mixture": (
        "target_logp = teacher_logp.detach()\n    mixture",
        "target_logp = teacher_logp\n    mixture",
    ),
    "mixture the other way round": (
        "target_logp + math.log(beta), student_logp + math.log1p(-beta)",
        "student_logp + math.log(beta), target_logp + math.log1p(-beta)",
    ),
    "ends of the mixture exchanged": ("if beta == 0:", "if beta == 1:"),
    "no renormalisation": ("return logp.log_softmax(-1)", "return logp"),
}
SURROGATES = {
    "live weight": ("return logp * weight.detach()", "return logp * weight"),
    "sign of the surrogate": ("return logp * weight.detach()", "return -logp * weight.detach()"),
    "live old student": ("inputs.old_logp.detach()", "inputs.old_logp"),
    "live credit of a ratio": (
        "importance(inputs) * inputs.credit.detach()",
        "importance(inputs) * inputs.credit",
    ),
    "ratio upside down": (
        "log_ratio(sampled_logp(inputs), inputs.old_logp.detach())",
        "-log_ratio(sampled_logp(inputs), inputs.old_logp.detach())",
    ),
    "the better bound instead of the worse": (
        "torch.maximum(cost * rho",
        "torch.minimum(cost * rho",
    ),
    "dual bound for every token": ("torch.where(cost > 0, torch", "torch.where(cost > -9, torch"),
    "dual bound of the other sign": ("torch.where(cost > 0, torch", "torch.where(cost < 0, torch"),
    "ends of the clip exchanged": ("rho.clamp(1 - low, 1 + high)", "rho.clamp(1 - high, 1 + low)"),
    "live head": ("(student_logp - teacher_logp).detach()", "(student_logp - teacher_logp)"),
    "tail also inside": (
        "torch.where(inside_support(inputs), torch.zeros_like(cost), cost)",
        "cost",
    ),
    "sampled token counted twice": (
        "outside = ~inside_support(inputs)",
        "outside = torch.ones_like(inside_support(inputs))",
    ),
    "no tail bucket": ("torch.cat([logp, _log_tail_mass(logp)], -1)", "logp"),
    "absent ids count for the student": (
        "_fill_absent(inputs.present, student_logp), _fill_absent",
        "student_logp, _fill_absent",
    ),
    "absent ids count for the teacher": (
        "_fill_absent(inputs.present, teacher_logp)\n",
        "teacher_logp\n",
    ),
    "k3 backwards": ("torch.expm1(-r) + r", "torch.expm1(r) - r"),
    "live teacher of k2": (
        "log_ratio(sampled_logp(inputs), teacher_sampled_logp(inputs)).square()",
        "log_ratio(sampled_logp(inputs), inputs.teacher_logp).square()",
    ),
}
REDUCTION = {
    "token mean over responses": (
        "_check_not_empty(batch.mask.sum()).expand(",
        "_check_not_empty(0 * batch.mask.sum() + len(batch)).expand(",
    ),
    "sequence mean without its length": (
        "batch.mask.sum(1).clamp(min=1) *",
        "batch.mask.sum(1).clamp(min=1, max=1) *",
    ),
    "group mean over responses": ("* (sampled > 0).sum()", "* _responses(batch)"),
    "group mean without its tokens": ("tokens.clamp(min=1) *", "tokens.clamp(min=1, max=1) *"),
}
OBJECTIVE = {
    "masked costs always counted": ('self.mask_scope == "loss"', "True"),
    "masked costs never counted": ('self.mask_scope == "loss"', "False"),
    "masked tokens do not advance gamma": (
        "discounted(later_costs, batch.sampled, self.gamma)",
        "discounted(later_costs, batch.mask, self.gamma)",
    ),
    "loss at masked tokens": ("return credit * batch.mask", "return credit"),
    "own cost as later cost": ("self.gamma) - later_costs", "self.gamma)"),
    "baseline added": ("credit - self.baseline", "credit + self.baseline"),
    "outcome dropped": ("credit + self.reward_cost(batch)", "credit"),
    "score dropped": ("return local + self.score.function(inputs) if", "return local if"),
}
FACTORY = {
    "clip not passed on": ("low=low, high=high, dual=dual", "low=0.2, high=0.2, dual=3.0"),
}
ASSEMBLY = {
    "sign of the loss": ("(inputs) * inputs.weight", "(inputs) * -inputs.weight"),
    "weight dropped": ("(inputs) * inputs.weight", "(inputs)"),
    "gradient stopped": ("(inputs) * inputs.weight", "(inputs).detach() * inputs.weight"),
    "denominator dropped": ("return ratio / denominator[:, None]", "return ratio"),
    "ratio dropped": (
        "return ratio / denominator[:, None]",
        "return 0 * ratio + 1 / denominator[:, None]",
    ),
}
"""Mutations of the assembly that study, trainer and verl share."""
INPUTS = {
    "mask ignored": ("batch.mask.flatten()", "(batch.mask | True).flatten()"),
    "credit of another token": ("credit=select(credit)", "credit=select(credit.flip(0))"),
    "absent ids not passed on": ("None if present is None else select(present)", "None"),
}
SUPPORTS = {
    "both lists whole": (
        "new = ~_contained_in(student_ids, teacher_ids)",
        "new = _contained_in(student_ids, student_ids)",
    ),
    "the other's ids": (
        "teacher_ids, _contained_in(teacher_ids, student_ids)",
        "student_ids, _contained_in(teacher_ids, student_ids)",
    ),
    "not sorted": ("reference_ids.sort(-1).values", "reference_ids"),
}
SELECTION = {
    "the most certain": (
        "sort(descending=True)",
        "sort(descending=False)",
    ),
    "one more": ("count - int(clearly_above", "count + 1 - int(clearly_above"),
    "a fraction of all positions": ("int(batch.mask.sum())", "batch.mask.numel()"),
}
BATCH = {
    "mask not narrowed": ('"mask": self.mask & keep', '"mask": self.mask'),
    "sampled tokens lost": ('"sampled_mask": self.sampled}', '"sampled_mask": self.mask & keep}'),
}


def check_clipped_losses() -> None:
    """Compare the clipped loss with all rows of a table by hand."""
    for row in dense.RATIO_TABLE:
        dense.test_the_clipped_loss_by_hand(*row)


def check_jensen_shannon() -> None:
    """Compare the divergence with its definition, inside and at both ends."""
    for beta in (0.0, 0.1, 1.0):
        dense.test_jensen_shannon_is_that_of_the_definition(beta)


def check_micro_batches() -> None:
    """Compare the losses of micro-batches with those of the batch, for every denominator."""
    for name in reduction.DENOMINATORS:
        oracle.test_micro_batches_do_not_change_the_loss(name)


def check_mask_scopes() -> None:
    """Check both scopes of a mask."""
    for scope in ("cost", "loss"):
        masks.test_masked_tokens_advance_gamma_and_count_as_their_scope_says(0.5, scope)


check_sequence_ratio = partial(
    masks.test_the_sequence_ratio_makes_up_for_another_sampler_under_a_mask, "id", "loss"
)
check_forms = [
    partial(dense.test_every_form_on_every_support_is_the_dense_one, source, form)
    for source in ("union", "intersection")
    for form in ("_and_sampled", "_bucket", "_sampled_tail")
]

OBJECTIVE_MUTATIONS = (
    Mutations(
        credit,
        CREDIT,
        (
            oracle.test_credit_is_a_constant,
            oracle.test_to_go_credit_is_unbiased_for_the_sequence_kl,
            choices.test_advantages_by_hand,
            check_sequence_ratio,
            oracle.test_clipped_costs_have_the_mean_of_the_clipped_ratio,
            partial(
                moment_tests.test_another_sampler_with_and_without_correction,
                *("temperature", "plain", "token"),
            ),
        ),
    ),
    Mutations(
        shared_credit,
        SHARED_CREDIT,
        (
            oracle.test_discount_lies_between_and_skips_masked_positions,
            oracle.test_baselines_average_the_responses_they_say,
        ),
    ),
    Mutations(
        divergences,
        DIVERGENCES,
        (
            check_jensen_shannon,
            oracle.test_local_support_matching_is_biased_and_blind_outside_its_support,
        ),
    ),
    Mutations(
        surrogates,
        SURROGATES,
        (
            check_clipped_losses,
            dense.test_other_clips_move_the_corners_they_name,
            partial(oracle.test_no_gradient_reaches_the_teacher, "k2"),
            partial(oracle.test_the_sampled_tail_is_unbiased_on_every_support, "union"),
            *check_forms,
            oracle.test_other_divergences_are_exact_on_frozen_prefixes,
        ),
    ),
    Mutations(reduction, REDUCTION, (check_micro_batches,)),
    Mutations(
        objective,
        OBJECTIVE,
        (
            check_mask_scopes,
            check_micro_batches,
            choices.test_advantages_by_hand,
            moment_tests.test_a_sampled_leave_one_out_group_has_the_exact_variance,
        ),
    ),
    Mutations(
        factory, FACTORY, (oracle.test_a_clipped_token_counts_where_it_has_not_moved_far_enough,)
    ),
    Mutations(
        objective,
        ASSEMBLY,
        (
            check_micro_batches,
            partial(oracle.test_no_gradient_reaches_the_teacher, "sampled_token"),
            check_sequence_ratio,
        ),
    ),
    Mutations(
        inputs,
        INPUTS,
        (
            check_micro_batches,
            oracle.test_to_go_credit_is_unbiased_for_the_sequence_kl,
            partial(oracle.test_the_sampled_tail_is_unbiased_on_every_support, "union"),
        ),
    ),
    Mutations(
        support,
        SUPPORTS,
        (*check_forms, partial(lists.test_union_and_intersection_are_those_of_sets, 3)),
    ),
    Mutations(
        token_selection,
        SELECTION,
        (choices.test_the_most_uncertain_tokens_of_the_step_are_kept,),
    ),
    Mutations(batches, BATCH, (check_mask_scopes,)),
)
