"""Comparison of log-probabilities of probe tokens."""

import numpy as np
import pytest
import torch

from opd.serving.fingerprint import check_same_model, probe_tokens


def check(actual, expected) -> None:
    check_same_model(actual, expected, tolerance=0.25, problem="URL is another", remedy="Restart")


def test_the_probe_is_the_same_every_time_and_has_the_largest_id() -> None:
    probe = probe_tokens(50, 32)
    assert probe == probe_tokens(50, 32)
    assert len(probe) == 32
    assert probe[-1] == 49
    assert len(set(probe)) > 10


def test_the_mean_absolute_difference_decides() -> None:
    check([-1.0, -2.0], torch.tensor([-1.3, -1.9]))
    with pytest.raises(
        RuntimeError,
        match=r"URL is another: .* 2 tokens differ by 0.3 nats .* is 0.25 nats. Restart",
    ):
        check(np.array([-1.0, -2.0]), [-1.5, -1.9])
    with pytest.raises(RuntimeError, match="nan"):
        check([float("nan"), -2.0], [-1.0, -2.0])
