"""One-line mutations of the objectives and of the exact engine: a test must catch each."""

import inspect
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

from diagnostics import batch as batches
from diagnostics.gradients import credit as shared_credit
from opd.objectives import (
    catalogue,
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
from opd.objectives.catalogue import FORMS
from opd.objectives.reduction import DENOMINATORS
from synthetic import estimators
from synthetic.exact import baselines, moments, recursion
from synthetic.sampling import monte_carlo
from synthetic.sampling import trajectories as sampling
from tests.opd.integrations.verl import test_topk_loss as packed_tests
from tests.opd.objectives import test_baselines as pairs
from tests.opd.objectives import test_factory as choices
from tests.opd.objectives import test_oracle as oracle
from tests.opd.objectives import test_support as lists
from tests.opd.objectives import test_surrogates as dense
from tests.opd.tokens import test_sampled_masks as masks
from tests.opd.training import test_step as step_tests
from tests.opd.training import test_step_wiring as wiring_tests
from tests.synthetic.exact import test_against_enumeration as study
from tests.synthetic.exact import test_moments as moment_tests
from tests.synthetic.learning import test_learning as learning_tests

CREDIT = {
    "sign of the cost": (
        "return student_logp - teacher_logp",
        "return teacher_logp - student_logp",
    ),
    "ratio upside down": (
        "(batch.student_logp - batch.sampler_logp).detach().exp()",
        "(batch.sampler_logp - batch.student_logp).detach().exp()",
    ),
    "sequence ratio of the supervised tokens": (
        "batch.sampler_logp).detach() * batch.sampled",
        "batch.sampler_logp).detach() * batch.mask",
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
    "live teacher": ("student_logp - teacher_logp.detach()", "student_logp - teacher_logp"),
    "direction of the divergence": (
        "p = student_logp.exp()\n    ratio",
        "p = teacher_logp.exp()\n    ratio",
    ),
    "direction of the forward divergence": (
        "q = target_logp.exp()\n    term",
        "q = student_logp.exp()\n    term",
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
        "log_ratio(sampled_logp(inputs), inputs.teacher_logp.detach()).square()",
        "log_ratio(sampled_logp(inputs), inputs.teacher_logp).square()",
    ),
}
REDUCTION = {
    "token mean over responses": (
        "_check_not_empty(batch.mask.sum()).expand(",
        "_check_not_empty(0 * batch.mask.sum() + len(batch)).expand(",
    ),
    "sequence mean without its length": (
        "batch.mask.sum(1).clamp(min=1).to",
        "batch.mask.sum(1).clamp(min=1, max=1).to",
    ),
    "group mean over responses": ("* len(prompts)", "* len(batch)"),
    "group mean without its tokens": ("tokens.clamp(min=1).to", "tokens.clamp(min=1, max=1).to"),
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
EXACT_ENGINE = (recursion, moments, estimators, baselines, monte_carlo, sampling)
"""Modules whose mutations the oracles of the exact engine must catch alone."""

MUTATIONS = [
    pytest.param(module, line, id=f"{module.__name__}: {name}")
    for module, lines in (
        (credit, CREDIT),
        (shared_credit, SHARED_CREDIT),
        (divergences, DIVERGENCES),
        (surrogates, SURROGATES),
        (reduction, REDUCTION),
        (objective, OBJECTIVE),
        (factory, FACTORY),
        (objective, ASSEMBLY),
        (inputs, INPUTS),
        (support, SUPPORTS),
        (token_selection, SELECTION),
        (batches, BATCH),
        (recursion, RECURSION),
        (moments, EXACT),
        (estimators, ESTIMATORS),
        (baselines, BASELINES),
        (monte_carlo, GRADIENTS),
        (sampling, SAMPLE),
    )
    for name, line in lines.items()
]


def check_objectives() -> None:
    """Run the oracles of objectives, credit and reduction, cheap ones first."""
    oracle.test_to_go_credit_is_unbiased_for_the_sequence_kl()
    oracle.test_immediate_credit_is_unbiased_for_the_frozen_kl_only()
    oracle.test_full_kl_and_whole_support_have_the_token_level_mean()
    oracle.test_local_support_matching_is_biased_and_blind_outside_its_support()
    for name in factory.OBJECTIVES:
        oracle.test_no_gradient_reaches_the_teacher(name)
    oracle.test_discount_lies_between_and_skips_masked_positions()
    oracle.test_baselines_average_the_responses_they_say()
    pairs.test_a_baseline_leaves_the_mean_gradient("position_mean", (0, 1), False, "cost")
    for name in DENOMINATORS:
        oracle.test_micro_batches_do_not_change_the_loss(name)
    for name in oracle.FAMILY:
        oracle.test_the_gamma_family_has_the_mean_of_its_definition(name, 0.7)
    oracle.test_other_divergences_are_exact_on_frozen_prefixes()
    oracle.test_the_sampled_tail_is_unbiased_on_every_support("union")
    oracle.test_a_weighted_token_has_the_mean_of_the_student_that_moved()
    oracle.test_a_clipped_token_counts_where_it_has_not_moved_far_enough()
    oracle.test_credit_is_a_constant()
    oracle.test_clipped_costs_have_the_mean_of_the_clipped_ratio()
    for row in dense.RATIO_TABLE:
        dense.test_the_clipped_loss_by_hand(*row)
    dense.test_other_clips_move_the_corners_they_name()
    for beta in (0.0, 0.1, 1.0):
        dense.test_jensen_shannon_is_that_of_the_definition(beta)
    for source in ("union", "intersection"):
        for form in FORMS:
            dense.test_every_form_on_every_support_is_the_dense_one(source, form)
    lists.test_union_and_intersection_are_those_of_sets(3)
    for advantage in choices.SHARES:
        choices.test_an_outcome_adds_the_gradient_of_the_mean_reward("teacher_topk", advantage)
    choices.test_advantages_by_hand()
    for scope in ("cost", "loss"):
        masks.test_the_sequence_ratio_makes_up_for_another_sampler_under_a_mask("id", scope)
        masks.test_masked_tokens_advance_gamma_and_count_as_their_scope_says(0.5, scope)
    choices.test_what_is_not_refused_is_built_as_asked()
    choices.test_the_most_uncertain_tokens_of_the_step_are_kept()


def check_exact_engine() -> None:
    """Run the oracles of the exact engine and of the sampler, cheap ones first."""
    study.test_the_gradient_is_that_of_the_enumerated_sequence_kl("ending")
    for estimator in moment_tests.UNSUPPORTED:
        moment_tests.test_moments_equal_the_sum_over_all_paths("ending", estimator)
    for estimator in moment_tests.SUPPORTED:
        moment_tests.test_supports_of_every_size_equal_the_sum_over_all_paths(estimator)
    for ratio in ("token", "sequence"):
        moment_tests.test_another_sampler_with_and_without_correction("temperature", "plain", ratio)
    moment_tests.test_each_response_divided_by_its_own_length("plain")
    moment_tests.test_shared_parameters_add_up_over_states("plain")
    moment_tests.test_no_baseline_has_less_variance_than_the_optimal_one()
    moment_tests.test_a_leave_one_out_group_equals_the_sum_over_all_groups(2)
    moment_tests.test_a_sampled_leave_one_out_group_has_the_exact_variance()
    moment_tests.test_monte_carlo_agrees_for_other_samplers_and_given_baselines()


def functions(module: ModuleType) -> dict[str, FunctionType]:
    """Every function that a module defines, methods and properties included."""
    by_name = {}
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        parts = vars(value).items() if isinstance(value, type) else [("", value)]
        for part, inner in parts:
            function = inspect.unwrap(inner.fget if isinstance(inner, property) else inner)
            if isinstance(function, FunctionType):
                by_name[f"{name}.{part}"] = function
    return by_name


def mutate(module: ModuleType, line: tuple[str, str], patch: pytest.MonkeyPatch) -> None:
    """Give one function the code of a module with one line changed, wherever it is referred to."""
    source, (original_line, mutated_line) = Path(str(module.__file__)).read_text(), line
    assert original_line in source, "the mutated line no longer exists; update the mutation"
    mutant = ModuleType(module.__name__)
    exec(compile(source.replace(original_line, mutated_line, 1), "mutant", "exec"), vars(mutant))
    num_patched = 0
    mutants = functions(mutant)
    for name, function in functions(module).items():
        if name in mutants and function.__code__.co_filename != "mutant":
            num_patched += 1
            patch.setattr(function, "__code__", mutants[name].__code__)
    assert num_patched


def check(module: ModuleType) -> None:
    """Run the oracles of a module; those of the objectives use the exact engine too."""
    if module not in EXACT_ENGINE:
        check_objectives()
    check_exact_engine()


@pytest.mark.parametrize(("module", "line"), MUTATIONS)
def test_a_mutation_is_caught(
    module: ModuleType, line: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(module, line, monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check(module)


def check_study() -> None:
    """Run the study's gradients, which are the assembly's, against enumeration and each other."""
    moment_tests.test_moments_equal_the_sum_over_all_paths("ending", "plain")
    moment_tests.test_monte_carlo_agrees_for_other_samplers_and_given_baselines()
    learning_tests.test_a_runs_gradient_has_the_exact_mean_and_variance(
        "sampled_token", 1.0, "none", "plain", None
    )


def check_verl() -> None:
    """Run the loss on packed logits against the definition."""
    packed_tests.test_the_divergence_of_packed_logits_is_that_of_the_definition()


@pytest.mark.parametrize("name", [*ASSEMBLY, "mask ignored"])
def test_the_study_catches_a_wrong_assembly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_study()
    mutate(*assembly_mutation(name), monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check_study()


@pytest.mark.parametrize("name", ["sign of the loss", "gradient stopped"])
def test_verls_loss_catches_a_wrong_assembly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl sums and divides itself, so weight and mask are not ours."""
    check_verl()
    mutate(*assembly_mutation(name), monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_verl()


@pytest.mark.parametrize("name", [*ASSEMBLY, "mask ignored"])
def test_the_trainer_catches_a_wrong_assembly(
    tiny_pair: tuple[Path, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates of a run differ from the dense ones; Adam and the clip hide a scale."""
    mutate(*assembly_mutation(name), monkeypatch)
    if name == "denominator dropped":
        with pytest.raises(AssertionError):
            wiring_tests.test_an_update_divides_by_what_it_trains_on(
                tiny_pair, tmp_path, monkeypatch, "sequence_mean"
            )
        return
    with pytest.raises((AssertionError, RuntimeError)):
        step_tests.test_two_clipped_updates_are_the_dense_ones(
            tiny_pair, tmp_path, "loss", "sequence"
        )


def assembly_mutation(name: str) -> tuple[ModuleType, tuple[str, str]]:
    """Return the module and line of a mutation of the assembly or its inputs."""
    return (objective, ASSEMBLY[name]) if name in ASSEMBLY else (inputs, INPUTS[name])


def test_a_wrong_row_of_the_table_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later costs as sampled instead of their mean: the same mean gradient, more noise."""
    row = replace(catalogue.OBJECTIVES["full_reverse_kl"], later_cost=credit.SAMPLED_COST)
    monkeypatch.setitem(estimators.ESTIMATORS, "rb_all", estimators.Estimator(objective=row))
    with pytest.raises(AssertionError):
        check_exact_engine()


def test_the_originals_pass() -> None:
    check_objectives()
    check_exact_engine()
