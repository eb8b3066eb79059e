"""One claim of the paper."""

from dataclasses import dataclass

from figures.claims.measures import Measure


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and how it is measured."""

    text: str
    """What the paper says, with its numbers in percent."""
    location: str
    """Section, figure or table of the paper."""
    figure: str
    """Name of the figure of this project; empty if there is none."""
    measure: Measure
    """Computes the measurement and its verdict from the recorded tables."""
