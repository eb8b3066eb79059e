"""Synthetic banks of runs with a known truth, for tests of the scout's forecasts."""

import csv
import math
from pathlib import Path

import numpy as np

from opd.analysis.scout.bank import FEATURES, Bank

NUM_FEATURES = len(FEATURES)
START = 0.4
SCALES = {"length": 100.0, "reverse_kl": 0.2, "forward_kl": 0.1, "outside_top16": 0.003}
SCALES["snr"] = 0.01
"""Typical values of measurements whose features are logarithms."""

EFFECTS = {
    "continuation_gain": 0.06,
    "accuracy_gap": 0.05,
    "log_reverse_kl": -0.05,
    "special_signal": -0.05,
    "log_snr": 0.04,
}
"""What features add to the gain of a pair, per standard deviation, in a bank of a known truth."""


def synthetic_bank(
    seed: int,
    *,
    effects: dict[str, float],
    families: int = 5,
    pairs: int = 6,
    methods: int = 4,
    pair_noise: float = 0.02,
    run_noise: float = 0.03,
    features: str = "normal",
    shared_seeds: bool = False,
) -> Bank:
    """Draw a bank whose gains are linear in features, with an average of each method.

    Args:
        seed: Seed.
        effects: Feature -> gain per unit of it; other features have no effect.
        families: Number of families, whose features have different means.
        pairs: Number of pairs of each.
        methods: Number of methods; their averages rise by 0.03.
        pair_noise: Standard deviation of what else the runs of a pair share.
        run_noise: Standard deviation of a run.
        features: "normal", or "codes": one number for each pair, which identifies it, and no other.
        shared_seeds: Number the pairs of each family alike; by default every seed is of one pair.

    Returns:
        The bank; a run has collapsed if its gain is below -0.1.
    """
    generator = np.random.default_rng(seed)
    columns: dict[str, list] = {name: [] for name in Bank.__annotations__}
    weights = np.array([effects.get(name, 0.0) for name in FEATURES])
    for family in range(families):
        centre = 0.5 * generator.normal(size=NUM_FEATURES)
        for number in range(pairs):
            x = centre + generator.normal(size=NUM_FEATURES)
            if features == "codes":
                x = np.full(NUM_FEATURES, float(family * pairs + number))
            shared = x @ weights + pair_noise * generator.normal()
            for method in range(methods):
                gain = 0.03 * method + shared + run_noise * generator.normal()
                row = {
                    "pair": f"pair-{family}-{number}",
                    "family": f"family-{family}",
                    "seed": str(number if shared_seeds else family * pairs + number),
                    "method": f"method-{method}",
                    "features": x,
                    "start": START,
                    "gain": float(np.clip(gain, -START, 1 - START)),
                }
                row["collapsed"] = row["gain"] < -0.1
                for name, value in row.items():
                    columns[name].append(value)
    return Bank(**{name: np.array(column) for name, column in columns.items()})


def measurements(x: np.ndarray) -> dict[str, float]:
    """Return measurements whose features are near (d,) standard normal values."""
    values = {}
    for number, (measurement, _) in zip(x, FEATURES.values(), strict=True):
        if measurement in SCALES:
            values[measurement] = SCALES[measurement] * math.exp(0.5 * number)
        elif measurement == "student_accuracy":
            values[measurement] = START
        else:
            values[measurement] = 0.2 + 0.1 * float(number)
    return values


def write_bank(path: Path, bank: Bank) -> None:
    """Write a bank as the table that `read_bank` reads."""
    with path.open("w", newline="") as file:
        names = [name for name, _ in FEATURES.values()]
        header = ["pair", "family", "seed", "method", "start", "final", "gain", "collapsed", *names]
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        for i in range(len(bank)):
            writer.writerow(
                {
                    "pair": bank.pair[i],
                    "family": bank.family[i],
                    "seed": bank.seed[i],
                    "method": bank.method[i],
                    "start": bank.start[i],
                    "final": bank.start[i] + bank.gain[i],
                    "gain": bank.gain[i],
                    "collapsed": str(bool(bank.collapsed[i])).lower(),
                    **measurements(bank.features[i]),
                }
            )
