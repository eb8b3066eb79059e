"""One-line mutations of the objectives: each must be caught by an oracle test."""

from pathlib import Path

import pytest

from opd import objectives
from tests import test_objectives as oracle

SOURCE = Path(objectives.__file__).read_text()
MUTATIONS = {
    "sign of the cost": (
        "return student_logp - teacher_logp",
        "return teacher_logp - student_logp",
    ),
    "live weight": ("return logp * weight.detach()", "return logp * weight"),
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


def run_oracles() -> None:
    oracle.test_to_go_credit_is_unbiased_for_the_sequence_kl()
    oracle.test_immediate_credit_is_unbiased_for_the_frozen_kl_only()
    oracle.test_full_kl_and_whole_support_have_the_token_level_mean()
    oracle.test_local_support_matching_is_biased_and_blind_outside_its_support()
    oracle.test_discount_lies_between_and_skips_masked_positions()
    for name in objectives.DENOMINATORS:
        oracle.test_micro_batches_do_not_change_the_loss(name)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = MUTATIONS[name]
    assert before in SOURCE, "the mutated line no longer exists; update the mutation"
    mutant: dict[str, object] = {"__name__": "mutant"}
    monkeypatch.setitem(__import__("sys").modules, "mutant", type(objectives)("mutant"))
    exec(compile(SOURCE.replace(before, after, 1), "mutant", "exec"), mutant)
    for key, value in mutant.items():
        if not key.startswith("__"):
            monkeypatch.setattr(objectives, key, value)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        run_oracles()


def test_the_original_passes() -> None:
    run_oracles()
