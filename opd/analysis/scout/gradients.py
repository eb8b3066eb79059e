"""Signal-to-noise ratios of one response's gradient, and the discount that a pair asks for."""

import math

import torch

from diagnostics.gradients.bias import recommend_estimator
from diagnostics.gradients.estimators import estimator_index
from diagnostics.gradients.signal_noise import pair_products, signal_noise_estimates
from opd.config.settings import Config
from opd.models.lm_head import LogitsHead
from opd.scoring.score import ScoredBatch
from opd.teachers.pair import ModelPair
from opd.training.probe.gradient_probe import family_gradients

ESTIMATORS = {
    "snr": ("plain", 0.0),
    "snr_full_vocabulary": ("rb_immediate", 0.0),
    "snr_sequence": ("plain", 1.0),
    "snr_sequence_baseline": ("position_mean", 1.0),
}
"""Signal-to-noise ratio -> estimator of the gamma family and its discount."""


def gradient_values(config: Config, pair: ModelPair, batch: ScoredBatch) -> dict[str, float]:
    """Compute signal-to-noise ratios of one response's gradient for several estimators.

    Args:
        config: Settings of the scout.
        pair: Student and teacher.
        batch: Scored rollouts of the student.

    Returns:
        The ratios of ESTIMATORS and best_gamma; NaN for a head that is not a single matrix.
    """
    if isinstance(pair.student.head, LogitsHead):
        return dict.fromkeys([*ESTIMATORS, "best_gamma"], math.nan)
    sketches = family_gradients(
        pair,
        batch,
        max_tokens_per_microbatch=config.hardware.max_tokens_per_microbatch,
        max_logits_per_chunk=config.hardware.max_logits_per_chunk,
    ).sketches
    products = pair_products(sketches.sketches, sketches.prompt)
    values = {}
    for name, estimator in ESTIMATORS.items():
        estimates = signal_noise_estimates(products, estimator_index(sketches, *estimator))
        signal, variance = estimates["signal"].value, estimates["variance"].value
        values[name] = signal / variance if variance > 0 else math.nan
    generator = torch.Generator().manual_seed(config.seed)
    choice = recommend_estimator(products, sketches, len(batch.scored), generator)
    return values | {"best_gamma": choice.gamma}
