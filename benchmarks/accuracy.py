"""Largest deviations of the exact engine from enumeration and from finite differences.

python -m benchmarks.accuracy
"""

import torch

from synthetic.estimators import ESTIMATORS
from synthetic.exact import moments
from synthetic.worlds.mdp import TabularMDP
from tests.helpers import mdp_enumeration as by_hand
from tests.helpers.worlds import GAMMAS, pair, worlds


def deviations(name: str) -> tuple[float, float]:
    """Return the largest deviations of an estimator's exact moments from enumeration.

    Over all small worlds and discounts: absolute for the mean, relative for the variance.
    """
    absolute, relative = 0.0, 0.0
    for mdp in worlds().values():
        student, teacher = pair(mdp)
        for gamma in GAMMAS if ESTIMATORS[name].family else (0.0,):
            k = 1 if "topk" in name else None
            mean, variance = moments.moments(mdp, student, teacher, name, gamma, k=k)
            expected = by_hand.mean_and_variance(mdp, student, teacher, name, gamma, 1)
            absolute = max(absolute, float((mean - expected[0]).abs().max()))
            if expected[1] > 1e-20:
                relative = max(relative, float((variance / expected[1] - 1).abs()))
    return absolute, relative


def finite_difference(mdp: TabularMDP, step: float = 1e-3) -> float:
    """Return the largest deviation of the gradient at gamma = 1 from finite differences.

    The reference is a fourth-order central difference of the sequence KL.
    """
    student, teacher = pair(mdp)
    gradient = moments.expected_gradient(mdp, student, teacher, 1.0)
    largest = 0.0
    for state in range(mdp.num_states):
        for token in range(mdp.num_actions):
            unit = torch.zeros_like(student)
            unit[state, token] = step
            near, far = (
                float(
                    moments.sequence_kl(mdp, student + x * unit, teacher).total
                    - moments.sequence_kl(mdp, student - x * unit, teacher).total
                )
                for x in (1, 2)
            )
            slope = (8 * near - far) / (12 * step)
            largest = max(largest, abs(slope - float(gradient[state, token])))
    return largest


def main() -> None:
    print("estimator, largest |mean - enumeration|, largest relative |variance - enumeration|")
    for name in ESTIMATORS:
        if name != "leave_one_out":
            absolute, relative = deviations(name)
            print(f"{name:32} {absolute:.1e} {relative:.1e}")
    for name, mdp in worlds().items():
        print(f"finite differences of the sequence KL, {name}: {finite_difference(mdp):.1e}")


if __name__ == "__main__":
    main()
