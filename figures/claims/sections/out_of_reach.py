"""Claims that cannot be measured here."""

from figures.claims.claim import Claim
from figures.claims.measures import (
    not_testable,
)

OUT_OF_REACH = (
    Claim(
        "Scores of 7B students on MATH500, AIME, Minerva, OlympiadBench, ALFWorld",
        "tables 1 to 4",
        "",
        not_testable(
            "models, data and hardware not available; `opd train paper-math` has the settings"
        ),
    ),
    Claim(
        "On WebShop local support beats sampled tokens (57.8 against 50.0)",
        "table A2",
        "",
        not_testable("WebShop is not available"),
    ),
    Claim(
        "Teachers lost on filler words, endless checks and gibberish late in training",
        "figures A7 to A9",
        "",
        not_testable(
            "these toy models do not write natural language; `opd report RUN` shows rollouts by "
            "token"
        ),
    ),
)
