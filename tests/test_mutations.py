"""One-line mutations of the objectives and of the exact engine: a test must catch each."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from opd import objectives
from synthetic import exact, terms
from tests import test_objectives as oracle
from tests import test_synthetic as study

OBJECTIVES = {
    "sign of the cost": (
        "return student_logp - teacher_logp",
        "return teacher_logp - student_logp",
    ),
    "live weight": ("return logp * weight.detach()", "return logp * weight"),
    "live teacher": ("(student_logp - teacher_logp.detach())", "(student_logp - teacher_logp)"),
    "sign of the surrogate": ("return logp * weight.detach()", "return -logp * weight.detach()"),
    "direction of the divergence": ("p = student_logp.exp()", "p = teacher_logp.exp()"),
    "no renormalisation": ("return logp.log_softmax(-1)", "return logp"),
    "costs so far instead of to go": (
        "(cost * mask).flip(1).cumsum(1).flip(1) * mask",
        "(cost * mask).cumsum(1) * mask",
    ),
    "mask dropped from to-go": ("flip(1).cumsum(1).flip(1) * mask", "flip(1).cumsum(1).flip(1)"),
    "discount twice": (
        "cost[:, t] + gamma * running, running",
        "cost[:, t] + gamma**2 * running, running",
    ),
    "masked positions discount": (
        "cost[:, t] + gamma * running, running",
        "cost[:, t] + gamma * running, gamma * running",
    ),
    "mask dropped from the sum": ("torch.where(mask, loss, torch.zeros_like(loss))", "loss"),
    "token mean over responses": (
        "_positive(batch.mask.sum()).expand(",
        "_positive(0 * batch.mask.sum() + len(batch)).expand(",
    ),
    "sequence mean without its length": (
        "batch.lengths.clamp(min=1).to",
        "batch.lengths.clamp(min=1, max=1).to",
    ),
}


EXACT = {
    "score after instead of before": (
        "z_own - (at.p * z_own).sum(-1, keepdim=True)",
        "z_own",
    ),
    "cross term once": ("+ 2 * (fz * gz[..., None]", "+ (fz * gz[..., None]"),
    "discount not squared": ("column**2 * zz", "column * zz"),
    "norm of the score": ("ss = 1 - 2 * at.p", "ss = 1 - at.p"),
    "score and vector": ("sv = v - (at.p * v).sum(-1, keepdim=True)", "sv = v"),
    "vector dropped from the second moment": ("2 * w * sv + vv", "2 * w * sv"),
    "baseline of the first step": (
        "baseline[:, t, :, None]) * on",
        "baseline[:, 0, :, None]) * on",
    ),
    "baseline added": ("(of.weight - baseline[:", "(of.weight + baseline[:"),
    "future one step late": ("at.values[:, 1:])", "at.values[:, :-1])"),
    "gradient not centred": ("at.p * (cost - mean)", "at.p * cost"),
}
TERMS = {
    "local gradient not centred": ("self.r - self.local[:, None]", "self.r"),
    "value of the next step": ("baseline=at.values[:, :-1])", "baseline=at.values[:, 1:])"),
    "next value not discounted": ("at.gammas[:, None, None] * (at.values", "(at.values"),
    "mean over the dead": ("alive = at.occupancy * at.active", "alive = at.occupancy"),
    "cost at the end state": ("(student - teacher) * mdp.active[:, None]", "(student - teacher)"),
    "undiscounted values": ("local + gamma[:, None] * (values", "local + (values"),
}


def check_objectives() -> None:
    oracle.test_to_go_credit_is_unbiased_for_the_sequence_kl()
    oracle.test_immediate_credit_is_unbiased_for_the_frozen_kl_only()
    oracle.test_full_kl_and_whole_support_have_the_token_level_mean()
    oracle.test_local_support_matching_is_biased_and_blind_outside_its_support()
    for name in objectives.OBJECTIVES:
        oracle.test_no_gradient_reaches_the_teacher(name)
    oracle.test_discount_lies_between_and_skips_masked_positions()
    for name in objectives.DENOMINATORS:
        oracle.test_micro_batches_do_not_change_the_loss(name)


def check_exact() -> None:
    study.test_the_gradient_is_that_of_the_enumerated_sequence_kl("ending")
    for estimator in exact.ESTIMATORS:
        study.test_moments_equal_the_sum_over_all_paths("ending", estimator)


def mutate(
    module: ModuleType, line: tuple[str, str], users: list[ModuleType], patch: pytest.MonkeyPatch
) -> None:
    """Put the module with one line changed in the place of the original, there and at its users."""
    source, (before, after) = Path(str(module.__file__)).read_text(), line
    assert before in source, "the mutated line no longer exists; update the mutation"
    mutant = ModuleType("mutant")
    patch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(before, after, 1), "mutant", "exec"), vars(mutant))
    for key, value in vars(mutant).items():
        for place in (module, *users):
            if not key.startswith("__") and hasattr(place, key):
                patch.setattr(place, key, value)


CAUGHT = (AssertionError, ValueError, RuntimeError)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_mutated_objective_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(objectives, OBJECTIVES[name], [], monkeypatch)
    with pytest.raises(CAUGHT):
        check_objectives()


@pytest.mark.parametrize("name", EXACT)
def test_a_mutated_recursion_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(exact, EXACT[name], [], monkeypatch)
    with pytest.raises(CAUGHT):
        check_exact()


@pytest.mark.parametrize("name", TERMS)
def test_a_mutated_estimator_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(terms, TERMS[name], [exact], monkeypatch)
    with pytest.raises(CAUGHT):
        check_exact()


def test_the_originals_pass() -> None:
    check_objectives()
    check_exact()
