"""Padding and flat order of rows of different lengths, against plain loops."""

import pytest
import torch

from diagnostics.ragged import flat_index, left_pad, right_pad, scatter_to_mask, up_to_last

MASK = torch.tensor(
    [[False, True, False, True, False], [False] * 5, [True] * 5, [False, False, False, False, True]]
)


@pytest.mark.parametrize("inner", [(), (2,)])
def test_padding_is_zero_on_one_side(inner: tuple[int, ...]) -> None:
    rows = [torch.rand((n, *inner)).double().numpy() for n in (2, 5, 0, 1)]
    for pad, on_left in ((right_pad, False), (left_pad, True)):
        padded = pad(rows, torch.float32)
        expected = torch.zeros((4, 5, *inner))
        for i, row in enumerate(rows):
            start = 5 - len(row) if on_left else 0
            for t, value in enumerate(row):
                expected[i, start + t] = torch.tensor(value)
        assert padded.dtype == torch.float32
        assert torch.equal(padded, expected)


def test_a_row_extends_to_its_last_true_position() -> None:
    assert up_to_last(MASK).sum(1).tolist() == [4, 0, 5, 5]
    assert up_to_last(MASK)[0].tolist() == [True, True, True, True, False]


def test_flat_index_and_scatter_invert_the_selection_of_a_mask() -> None:
    x = torch.rand(4, 5, 3)
    flat = x[MASK]
    index = flat_index(MASK)
    for i, t in MASK.nonzero().tolist():
        assert torch.equal(flat[index[i, t]], x[i, t])
    assert torch.equal(scatter_to_mask(flat, MASK), torch.where(MASK[..., None], x, 0.0))
