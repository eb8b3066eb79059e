"""Regimes of the map: knobs of a pair of models, one family of them for each knob that varies."""

from dataclasses import dataclass, replace

from opd.experiments.regimes.methods import CORE_METHODS, METHODS
from opd.lab.knobs import PairKnobs

CENTER = PairKnobs(foreign_tags=1.0, tag_log_probability=-12.0)
"""Knobs from which each family departs in one direction."""
PLANE_METHODS = ("sampled", "sampled_mask", "lsm")
"""Methods that are compared over density and strength together."""


@dataclass(frozen=True)
class Regime:
    """A cell of the map: pairs of models that differ by their seed only."""

    family: str
    """What the family of the regime varies, such as density."""
    knobs: PairKnobs
    """Knobs of its pairs."""
    methods: tuple[str, ...] = CORE_METHODS
    """Methods that are run in it."""


def density(foreign_tags: float) -> Regime:
    """Return a regime by the expected number of foreign tags in a response, with all methods."""
    return Regime("density", replace(CENTER, foreign_tags=foreign_tags), tuple(METHODS))


def plane(foreign_tags: float, tag_log_probability: float) -> Regime:
    """Return a regime by density and strength of the mismatch."""
    knobs = replace(CENTER, foreign_tags=foreign_tags, tag_log_probability=tag_log_probability)
    return Regime("plane", knobs, PLANE_METHODS)


REGIMES: dict[str, Regime] = {
    "density-0": density(0.0),
    "density-0.1": density(0.1),
    "density-0.3": density(0.3),
    "density-1": density(1.0),
    "density-2": density(2.0),
    "density-4": density(4.0),
    "strength-2": Regime("strength", replace(CENTER, tag_log_probability=-2.0)),
    "strength-6": Regime("strength", replace(CENTER, tag_log_probability=-6.0)),
    "strength-20": Regime("strength", replace(CENTER, tag_log_probability=-20.0)),
    "plane-0.1-2": plane(0.1, -2.0),
    "plane-0.1-20": plane(0.1, -20.0),
    "plane-4-2": plane(4.0, -2.0),
    "plane-4-6": plane(4.0, -6.0),
    "plane-4-20": plane(4.0, -20.0),
    "ends-1": Regime("ends", replace(CENTER, second_end=True, foreign_ends=1.0)),
    "weakness-short": Regime("weakness", replace(CENTER, student_weakness="short_sighted")),
    "weakness-small": Regime("weakness", replace(CENTER, student_weakness="small")),
    "teacher-errors": Regime("teacher", replace(CENTER, teacher_errors=0.3)),
    "teacher-terse": Regime("teacher", replace(CENTER, teacher_style="terse")),
    "loops-both": Regime("loops", replace(CENTER, student_loops=0.02, teacher_loops=0.02)),
    "budget-hit": Regime(
        "budget", replace(CENTER, student_loops=0.05, teacher_loops=0.02, response_budget=80)
    ),
    "length-160": Regime("length", replace(CENTER, response_tokens=160)),
    "vocabulary-4096": Regime("vocabulary", replace(CENTER, vocabulary=4096)),
}
"""Name of a regime to its knobs; density-1 is CENTER and belongs to every family.

The names begin with the family, by which the figures select them.
"""
