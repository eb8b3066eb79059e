"""Supports made of two lists of ids, and a batch's support whose ids are not all present."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diagnostics.batch import ScoredRollouts, Support, concatenate
from diagnostics.records.batch_files import load
from opd.objectives import support
from tests.opd.objectives.test_surrogates import N, V, seeded


@pytest.mark.parametrize("k", [1, 3, V])
def test_union_and_intersection_are_those_of_sets(k: int) -> None:
    lists = torch.rand(2, 4, N, V, generator=seeded(1)).argsort(-1)[..., :k]
    for name, joined in (("union", set.union), ("intersection", set.intersection)):
        ids, present = support.JOINED[name](*lists)
        sizes = set()
        for i in range(4):
            for n in range(N):
                found = ids[i, n][present[i, n]].tolist()
                assert len(found) == len(set(found))
                assert set(found) == joined(*(set(x[i, n].tolist()) for x in lists))
                sizes.add(len(found))
        assert k == V or len(sizes) > 1


def supported(width: int, seed: int) -> ScoredRollouts:
    mask = torch.rand(3, width, generator=seeded(seed)) > 0.3
    mask[:, -1] = False
    ours, theirs = (-2 - torch.rand(2, 3, width, 4, generator=seeded(seed + 1))) * mask[..., None]
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
            student_logp=ours.clone(),
            teacher_logp=theirs.clone(),
            source="union",
            present=torch.rand(3, width, 4, generator=seeded(seed + 4)) > 0.5,
        ),
    ).checked()


def test_a_support_keeps_which_ids_are_present(tmp_path: Path) -> None:
    first, second = supported(6, 10), supported(4, 20)
    first.save(tmp_path / "x.safetensors")
    again = load(tmp_path / "x.safetensors")
    torch.testing.assert_close(again.support.present, first.support.present)
    assert again.support.source == "union"
    joined = concatenate([first, second])
    torch.testing.assert_close(joined.support.present[3:, :4], second.support.present)
    assert not joined.support.present[3:, 4:].any()
    part = first.rows([2, 0]).trimmed()
    width = part.mask.shape[1]
    assert width < 6
    torch.testing.assert_close(part.support.present, first.support.present[[2, 0], :width])
    masses = first.support.masses()
    for i in range(3):
        for t in range(6):
            there = first.support.present[i, t].tolist()
            assert first.support.sizes[i, t] == sum(there)
            for found, x in zip(
                masses, (first.support.student_logp, first.support.teacher_logp), strict=True
            ):
                each = [math.exp(float(x[i, t, j])) for j in range(4) if there[j]]
                assert float(found[i, t]) == pytest.approx(sum(each))
            pairs = zip(first.support.ids[i, t], first.support.present[i, t], strict=True)
            want = any(bool(there) and id == first.tokens[i, t] for id, there in pairs)
            assert bool(first.support.contains(first.tokens)[i, t]) == want
    assert first.support.contains(first.tokens).any()
    everything = replace(first.support, present=None)
    assert everything.sizes.eq(4).all()
    torch.testing.assert_close(everything.masses()[0], everything.student_logp.exp().sum(-1))
    assert everything.contains(first.tokens).sum() > first.support.contains(first.tokens).sum()
    with pytest.raises(ValueError, match=r"support\.present has shape"):
        replace(first.support, present=first.support.present[..., :2])
    with pytest.raises(TypeError, match="expected bool"):
        replace(first.support, present=first.support.ids)
