"""Distribution statistics against plain sums over the vocabulary, with ids of probability 0."""

import math
from dataclasses import replace

import pytest
import torch

from diagnostics.batch import DistributionStats
from diagnostics.core import distribution_stats
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.records.batch_files import load_batch
from tests.helpers.batches import batch as make_batch

ModelPair = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def pair(dtype: torch.dtype = torch.float64, has_zeros: bool = False) -> ModelPair:
    g = torch.Generator().manual_seed(1)
    p = 3 * torch.randn(5, 3, 9, generator=g, dtype=dtype)
    q = 3 * torch.randn(5, 3, 9, generator=g, dtype=dtype)
    if has_zeros:  # zero for both models, zero for the student, and p = 0 after rounding
        p[..., :2], q[..., 0], p[..., 2], q[..., 2] = -math.inf, -math.inf, -1000.0, -math.inf
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return p, q, torch.randint(3, 9, (5, 3), generator=g)


def stats_by_loop(p: list[float], q: list[float], y: int) -> dict[str, float]:
    """Compute the definitions id by id; ids with p = 0 are excluded from every mean over p."""
    nonzero = [(math.exp(a), a, b) for a, b in zip(p, q, strict=True) if math.exp(a) > 0]
    return {
        "reverse_kl": sum(x * (a - b) for x, a, b in nonzero),
        "ratio_square": sum(x * (a - b) ** 2 for x, a, b in nonzero),
        "student_entropy": -sum(x * a for x, a, _ in nonzero),
        "teacher_entropy": -sum(math.exp(b) * b for b in q if math.exp(b) > 0),
        "surprise_square": sum(x * a * a for x, a, _ in nonzero),
        "collision": sum(x * x for x, _, _ in nonzero),
        "overrated": sum(x for x, a, b in nonzero if a > b),
        "teacher_max": math.exp(max(q)),
        "teacher_rank": 1.0 + sum(b > q[y] for b in q),
        "square_ratio": sum(x * x * (a - b) for x, a, b in nonzero),
        "square_ratio_square": sum((x * (a - b)) ** 2 for x, a, b in nonzero),
        "forward_kl": min(
            1e30, sum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True) if math.exp(b) > 0)
        ),
    }


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("block", [1, 20, 1 << 17])
def test_functionals_equal_loops(
    dtype: torch.dtype,
    tolerance: float,
    has_zeros: bool,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distribution_stats, "_BLOCK", block)
    p, q, y = pair(dtype, has_zeros)
    stats = compute_distribution_stats(p, q, y)
    for i in range(5):
        for t in range(3):
            expected = stats_by_loop(p[i, t].tolist(), q[i, t].tolist(), int(y[i, t]))
            assert expected.keys() == stats.keys()
            for name, value in expected.items():
                assert float(stats[name][i, t]) == pytest.approx(
                    value, rel=tolerance, abs=tolerance
                ), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_id_that_only_the_teacher_lacks_makes_the_divergence_infinite(dtype) -> None:
    p, q, y = pair(dtype)
    q[0, 0, 4] = -math.inf
    stats = compute_distribution_stats(p, q.log_softmax(-1), y)
    for name in ("reverse_kl", "ratio_square", "square_ratio", "square_ratio_square"):
        assert float(stats[name][0, 0]) == math.inf
        assert bool(stats[name].flatten()[1:].isfinite().all())
    assert bool(stats["student_entropy"].isfinite().all())


def test_no_tokens_give_no_numbers() -> None:
    p, q, y = pair()
    assert all(x.shape == (0, 3) for x in compute_distribution_stats(p[:0], q[:0], y[:0]).values())


def test_a_batch_saved_without_the_squares_still_loads(tmp_path) -> None:
    batch = make_batch()
    old_fields = {k: v for k, v in batch.prefix._tensors().items() if not k.startswith("square_")}
    replace(batch, prefix=DistributionStats(**old_fields)).save(tmp_path / "old.safetensors")
    loaded = load_batch(tmp_path / "old.safetensors")
    assert loaded.prefix.square_ratio is None
    assert torch.equal(loaded.prefix.collision, batch.prefix.collision)
