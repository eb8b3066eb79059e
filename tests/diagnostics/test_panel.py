"""Panel values recomputed, under splits and padding; the sampler check on good and bad samples."""

import math
from dataclasses import replace

import pytest
import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.monitor import Monitor
from diagnostics.records.batch_files import load_batch
from tests.helpers.batches import batch


def test_values_by_hand() -> None:
    b, row = batch(), Monitor()(0, [batch()])
    r = b.log_ratio[b.mask]
    x = r.abs().double()
    assert row["signal/negative_share"] == pytest.approx((r > 0).double().mean().item())
    assert row["signal/negative_share_null"] == pytest.approx(
        b.prefix.overrated[b.mask].double().mean().item()
    )
    assert row["divergence/k1"] == pytest.approx(r.double().mean().item())
    assert row["divergence/reverse_kl"] == pytest.approx(
        b.prefix.reverse_kl[b.mask].double().mean().item()
    )
    share = (x.sum() ** 2 / (len(x) * x.square().sum())).item()
    assert any(math.isclose(v, share, rel_tol=1e-6) for k, v in row.items() if "n_eff" in k)
    assert row["response/length"] == pytest.approx(b.mask.sum(1).double().mean().item())
    assert row["response/truncated_share"] == pytest.approx((~b.ended).double().mean().item())


def test_micro_batches_padding_and_order_change_nothing() -> None:
    b = batch()
    expected = Monitor()(0, [b])
    split = Monitor()(0, [b.rows([4, 5, 0, 1]), b.rows([2, 3]), b.rows(slice(6, 12))])
    padded = b._map(lambda x: torch.cat([x, torch.zeros_like(x)], 1) if x.dim() > 1 else x)
    for row in (split, Monitor()(0, [padded])):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), name


def test_the_sampler_check_is_quiet_on_p_and_fires_on_top_p() -> None:
    healthy = Monitor()(0, [batch(seed=s, size=50) for s in range(4)])
    wrong = Monitor()(0, [batch(seed=s, size=50, top_p=0.9) for s in range(4)])
    (name,) = [k for k in healthy if k.lower().endswith("z_h")]
    assert abs(healthy[name]) < 4
    assert abs(wrong[name]) > 5
    excess, error = (healthy["signal/negative_share_excess" + s] for s in ("", "_se"))
    assert abs(excess) < 4 * error


def test_a_batch_survives_the_disk(tmp_path) -> None:
    b = batch()
    b.save(tmp_path / "b.safetensors")
    loaded = load_batch(tmp_path / "b.safetensors")
    assert isinstance(loaded, ScoredRollouts)
    assert torch.equal(loaded.support.ids, b.support.ids)
    assert torch.equal(loaded.prefix.collision, b.prefix.collision)
    assert loaded.support.source == "teacher"
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]


def test_bad_values_are_refused_with_their_place() -> None:
    b = batch()
    i, t = (int(x) for x in b.mask.nonzero()[3])
    for value, pattern in ((math.nan, "1 of 480 .* not finite"), (0.5, "positive")):
        x = b.teacher_logp.clone()
        x[i, t] = value
        with pytest.raises(ValueError, match=f"teacher_logp: .*{pattern}|teacher_logp: {pattern}"):
            replace(b, teacher_logp=x).validate()
    x = b.teacher_logp.clone()
    i, t = (int(v) for v in (~b.mask).nonzero()[0])
    x[i, t] = -1.0
    with pytest.raises(ValueError, match="not 0 where the mask is False"):
        replace(b, teacher_logp=x).validate()
    with pytest.raises(ValueError, match=r"\(12, 39\), expected \(12, 40\)"):
        replace(b, mask=b.mask[:, 1:])
