"""Joint supports of two top-K lists, and supports whose ids are not all present."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diagnostics.batch import ScoredRollouts, Support
from diagnostics.concatenation import concatenate
from diagnostics.records.batch_files import load_batch
from opd.objectives import support
from tests.opd.objectives.test_surrogates import N, V, seeded


@pytest.mark.parametrize("k", [1, 3, V])
def test_union_and_intersection_are_those_of_sets(k: int) -> None:
    lists = torch.rand(2, 4, N, V, generator=seeded(1)).argsort(-1)[..., :k]
    for name, set_operation in (("union", set.union), ("intersection", set.intersection)):
        ids, present = support.JOINT_SUPPORTS[name](*lists)
        sizes = set()
        for i in range(4):
            for n in range(N):
                present_ids = ids[i, n][present[i, n]].tolist()
                assert len(present_ids) == len(set(present_ids))
                assert set(present_ids) == set_operation(*(set(x[i, n].tolist()) for x in lists))
                sizes.add(len(present_ids))
        assert k == V or len(sizes) > 1


def supported(width: int, seed: int) -> ScoredRollouts:
    mask = torch.rand(3, width, generator=seeded(seed)) > 0.3
    mask[:, -1] = False
    student_logp, teacher_logp = (
        -2 - torch.rand(2, 3, width, 4, generator=seeded(seed + 1))
    ) * mask[..., None]
    tokens = torch.randint(V, (3, width), generator=seeded(seed + 2))
    return ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=torch.zeros(3, width),
        prompt=torch.arange(3),
        ended=mask.any(1),
        student_logp=torch.zeros(3, width),
        teacher_logp=torch.zeros(3, width),
        support=Support(
            ids=torch.rand(3, width, V, generator=seeded(seed + 3)).argsort(-1)[..., :4],
            student_logp=student_logp.clone(),
            teacher_logp=teacher_logp.clone(),
            source="union",
            present=torch.rand(3, width, 4, generator=seeded(seed + 4)) > 0.5,
        ),
    ).validate()


def test_a_support_keeps_which_ids_are_present(tmp_path: Path) -> None:
    first, second = supported(6, 10), supported(4, 20)
    first.save(tmp_path / "x.safetensors")
    loaded = load_batch(tmp_path / "x.safetensors")
    torch.testing.assert_close(loaded.support.present, first.support.present)
    assert loaded.support.source == "union"
    batches_concatenated = concatenate([first, second])
    torch.testing.assert_close(batches_concatenated.support.present[3:, :4], second.support.present)
    assert not batches_concatenated.support.present[3:, 4:].any()
    part = first.rows([2, 0]).trim()
    width = part.mask.shape[1]
    assert width < 6
    torch.testing.assert_close(part.support.present, first.support.present[[2, 0], :width])
    masses = first.support.masses()
    for i in range(3):
        for t in range(6):
            is_present = first.support.present[i, t].tolist()
            assert first.support.sizes[i, t] == sum(is_present)
            for mass, x in zip(
                masses, (first.support.student_logp, first.support.teacher_logp), strict=True
            ):
                probabilities = [math.exp(float(x[i, t, j])) for j in range(4) if is_present[j]]
                assert float(mass[i, t]) == pytest.approx(sum(probabilities))
            pairs = zip(first.support.ids[i, t], first.support.present[i, t], strict=True)
            want = any(bool(is_present) and id == first.tokens[i, t] for id, is_present in pairs)
            assert bool(first.support.contains(first.tokens)[i, t]) == want
    assert first.support.contains(first.tokens).any()
    full_support = replace(first.support, present=None)
    assert full_support.sizes.eq(4).all()
    torch.testing.assert_close(full_support.masses()[0], full_support.student_logp.exp().sum(-1))
    assert full_support.contains(first.tokens).sum() > first.support.contains(first.tokens).sum()
    with pytest.raises(ValueError, match=r"support\.present has shape"):
        replace(first.support, present=first.support.present[..., :2])
    with pytest.raises(TypeError, match="expected bool"):
        replace(first.support, present=first.support.ids)
