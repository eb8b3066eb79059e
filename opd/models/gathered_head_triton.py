"""The products of `opd.models.gathered_head` as Triton kernels, without atomics and in fixed order.

Inputs are contiguous, ids long; sums are float32. For dW the N K entries are sorted by id. A run of
one id is a segment, cut into pieces of at most _PIECE entries, so that a frequent id is no long
serial sum. A segment of one piece is written directly to its row of dW; the pieces of other
segments go to float32 slots, which a second kernel sums in order. No count is read back by the
host: grids have the maximum size that can be needed, and surplus programs return at once.

Shapes: N tokens, K ids per token, D hidden size, V rows of the head, E = N K entries, P pieces.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 256
_BLOCK_K, _BLOCK_D, _BLOCK_E = 16, 256, 4


@triton.jit
def _product(h, w, ids, z, K, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = k < K
    row = tl.load(ids + n * K + k, mask=live, other=0)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(h + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        in_bounds = live[:, None] & (d < D)[None, :]
        y = tl.load(w + row[:, None] * D + d[None, :], mask=in_bounds, other=0.0).to(tl.float32)
        total += x[None, :] * y
    tl.store(z + n * K + k, tl.sum(total, 1), mask=live)


@triton.jit
def _hidden(dz, w, ids, dh, K, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live = k < K
        row = tl.load(ids + n * K + k, mask=live, other=0)
        g = tl.load(dz + n * K + k, mask=live, other=0.0)
        in_bounds = live[:, None] & (d < D)[None, :]
        y = tl.load(w + row[:, None] * D + d[None, :], mask=in_bounds, other=0.0).to(tl.float32)
        total += tl.sum(g[:, None] * y, 0)
    tl.store(dh + n * D + d, total.to(dh.dtype.element_ty), mask=d < D)


@triton.jit
def _weight(  # type: ignore[no-untyped-def]
    dz,
    h,
    order,
    piece_begin,
    piece_row,
    piece_slot,
    dw,
    slots,
    K,
    D,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    row = tl.load(piece_row + p)
    if row >= 0:
        begin, end = tl.load(piece_begin + p), tl.load(piece_begin + p + 1)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(begin, end, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            entry = tl.load(order + e, mask=e < end, other=0)
            g = tl.load(dz + entry, mask=e < end, other=0.0)
            in_bounds = (e < end)[:, None] & (d < D)[None, :]
            offsets = (entry // K)[:, None] * D + d[None, :]
            total += tl.sum(
                g[:, None] * tl.load(h + offsets, mask=in_bounds, other=0.0).to(tl.float32), 0
            )
        slot = tl.load(piece_slot + p)
        if slot < 0:
            tl.store(dw + row * D + d, total.to(dw.dtype.element_ty), mask=d < D)
        else:
            tl.store(slots + slot * D + d, total, mask=d < D)


@triton.jit
def _sum_slots(slots, slot_row, dw, D, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    s = tl.program_id(0).to(tl.int64)
    row = tl.load(slot_row + s)
    previous_row = tl.load(slot_row + s - 1, mask=s > 0, other=-1)
    if (row >= 0) & (row != previous_row):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), tl.float32)
        while tl.load(slot_row + s) == row:  # the last slot's row is -1
            total += tl.load(slots + s * D + d, mask=d < D, other=0.0)
            s += 1
        tl.store(dw + row * D + d, total.to(dw.dtype.element_ty), mask=d < D)


@dataclass(frozen=True, eq=False)
class TilePlan:
    """How the entries, sorted by id, are summed.

    Piece p covers order[begin[p]:begin[p + 1]] of the head row row[p].
    """

    order: Tensor
    """(E,) entry numbers n K + k, by id and then by number."""
    begin: Tensor
    """(P + 1,) first entry of each piece."""
    row: Tensor
    """(P,) head row of each piece, -1 if there is no such piece."""
    slot: Tensor
    """(P,) slot for the partial sum of a piece, -1 if it is the only piece of its segment."""
    slot_row: Tensor
    """Head row of each slot, -1 if unused, with one unused slot at the end."""


def plan_tiles(ids: Tensor, rows: int, piece: int) -> TilePlan:
    """Cut (E,) ids, each below `rows`, into pieces of at most `piece` entries, without host sync.

    Args:
        ids: (E,) head row of every entry.
        rows: Rows of the head.
        piece: Entries per piece.

    Returns:
        The plan.
    """
    count, device = len(ids), ids.device
    by_id, order = ids.sort(stable=True)
    number = torch.arange(count, device=device)
    first = torch.ones_like(by_id, dtype=torch.bool)
    first[1:] = by_id[1:] != by_id[:-1]
    within = number - torch.where(first, number, 0).cummax(0).values
    begins = within % piece == 0
    max_pieces = min(count, rows + count // piece)
    # entries that begin no piece are scattered to an extra place after the last one
    target = torch.where(begins, begins.cumsum(0) - 1, max_pieces + 1)
    begin = torch.full((max_pieces + 2,), count, device=device).scatter_(0, target, number)[
        : max_pieces + 1
    ]
    begin[max_pieces] = count
    row = torch.where(begin[:-1] < count, by_id[begin[:-1].clamp(max=count - 1)], -1)
    same_row = (row[1:] == row[:-1]) & (row[1:] >= 0)
    split = torch.zeros_like(row, dtype=torch.bool)
    split[1:] |= same_row
    split[:-1] |= same_row
    slot = torch.where(split, split.cumsum(0) - 1, -1)
    # a segment of two pieces or more has over `piece` entries, so its pieces are under 2 E / piece
    slots = min(max_pieces, 2 * (count // piece))
    slot_row = torch.full((slots + 2,), -1, device=device)
    slot_row.scatter_(0, torch.where(split, slot, slots + 1), torch.where(split, row, -1))
    return TilePlan(order, begin, row, slot, slot_row[: slots + 1])


def product(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Return z, (N, K) float32."""
    (count, k), d = ids.shape, weight.shape[1]
    z = torch.empty((count, k), dtype=torch.float32, device=hidden.device)
    if z.numel():
        grid = (count, triton.cdiv(k, _BLOCK_K))
        _launch(_product, grid, hidden, weight, ids, z, k, d, BLOCK_K=_BLOCK_K, BLOCK_D=_BLOCK_D)
    return z


def hidden_gradient(dz: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Return dh, (N, D) in the dtype of the weight."""
    (count, k), d = ids.shape, weight.shape[1]
    dh = torch.empty((count, d), dtype=weight.dtype, device=weight.device)
    if dh.numel():
        grid = (count, triton.cdiv(d, _BLOCK_D))
        _launch(_hidden, grid, dz, weight, ids, dh, k, d, BLOCK_K=_BLOCK_K, BLOCK_D=_BLOCK_D)
    return dh


def weight_gradient(
    dz: Tensor, hidden: Tensor, ids: Tensor, rows: int, piece: int = _PIECE
) -> Tensor:
    """Return dW, (V, D) in the dtype of hidden, with zeros for rows that no token uses."""
    k, d = ids.shape[1], hidden.shape[1]
    dw = torch.zeros((rows, d), dtype=hidden.dtype, device=hidden.device)
    if not ids.numel():
        return dw
    plan = plan_tiles(ids.flatten(), rows, piece)
    slots = torch.empty((len(plan.slot_row) - 1, d), dtype=torch.float32, device=hidden.device)
    blocks = triton.cdiv(d, _BLOCK_D)
    tables = (plan.order, plan.begin, plan.row, plan.slot, dw, slots)
    grid = (len(plan.row), blocks)
    _launch(_weight, grid, dz, hidden, *tables, k, d, BLOCK_E=_BLOCK_E, BLOCK_D=_BLOCK_D)
    if len(slots):
        _launch(_sum_slots, (len(slots), blocks), slots, plan.slot_row, dw, d, BLOCK_D=_BLOCK_D)
    return dw


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **blocks: int) -> None:
    """Launch a kernel on the device of the first tensor, whichever device is current."""
    device = arguments[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **blocks)
    else:  # Triton's interpreter
        kernel[grid](*arguments, **blocks)
