"""A wrong assembly is caught by the tests of each that uses it: study, verl's loss, trainer."""

from pathlib import Path
from types import ModuleType

import pytest

from opd.objectives import inputs, objective
from tests.opd.integrations.verl import test_topk_loss as packed_tests
from tests.opd.training import test_step as step_tests
from tests.opd.training import test_step_wiring as wiring_tests
from tests.repo.mutations.mutate import mutate
from tests.repo.mutations.objectives import ASSEMBLY, INPUTS
from tests.synthetic.exact import test_moments as moment_tests
from tests.synthetic.learning import test_learning as learning_tests


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
