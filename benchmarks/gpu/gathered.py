"""Proof: the K gathered head rows against dense products in float32, forward and backward."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import embedding

from benchmarks.gpu.networks import normal, relative
from benchmarks.gpu.result import Check, Omission, Row
from benchmarks.gpu.setting import Setting
from benchmarks.head import distinct_ids, zipf_ids
from opd.models import gathered_head
from opd.models.lm_head import LmHead

VALUE_LIMIT = 2e-5
"""Relative error of the products, which are float32 sums in any dtype."""
GRADIENT_LIMITS = {torch.float32: 5e-5, torch.bfloat16: 8e-3}
"""Relative error of gradients; in bfloat16 they are rounded once, by at most 2^-8."""
TIED_LIMITS = {torch.float32: 5e-5, torch.bfloat16: 2e-2}
"""With tied weights two gradients are rounded and then added."""


@dataclass(frozen=True)
class HeadCase:
    """Sizes of a comparison; no size is a multiple of a block of the kernels."""

    ids: str
    k: int
    dtype: torch.dtype
    tied: bool = False
    bias: bool = False
    softcap: float | None = None

    @property
    def label(self) -> str:
        """What is compared."""
        options = [
            *(["tied"] * self.tied),
            *(["bias"] * self.bias),
            *([f"soft-cap {self.softcap:g}"] if self.softcap else []),
        ]
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join([f"K = {self.k}, ids {self.ids}, {dtype}", *options])


HALF, FULL = torch.bfloat16, torch.float32
CASES = (
    *(HeadCase(ids, k, HALF) for k in (1, 8, 32, 64) for ids in ("all distinct", "as in text")),
    HeadCase("all distinct", 32, FULL),
    HeadCase("as in text", 32, FULL),
    HeadCase("a single one", 17, FULL),
    HeadCase("as in text", 32, HALF, tied=True),
    HeadCase("as in text", 8, FULL, tied=True, bias=True, softcap=3.0),
    HeadCase("all distinct", 32, HALF, bias=True),
    HeadCase("as in text", 8, HALF, softcap=3.0),
)


def prove(setting: Setting) -> Iterator[Row]:
    """Compare the kernels of this device, and on a CPU also Triton's in its interpreter."""
    kind = "Triton" if uses_triton(setting) else "torch"
    cases = CASES if setting.device == "cuda" else CASES[-9:]
    for case in cases:
        yield from compare(setting, case, kind)
    if setting.device == "cuda":
        if kind == "torch":
            yield Omission("Triton kernels", "triton is not installed; torch was checked")
        return
    if find_spec("triton") is None:
        yield Omission("Triton in its interpreter", "triton is not installed")
    elif os.environ.get("TRITON_INTERPRET") != "1":
        yield Omission("Triton in its interpreter", "TRITON_INTERPRET is not 1")
    else:
        with triton_kernels():
            for case in CASES[-5:]:
                yield from compare(setting, case, "Triton, interpreted")


def uses_triton(setting: Setting) -> bool:
    """Return whether the head's kernels on this device are Triton's."""
    probe = torch.empty(1, device=setting.device)
    return gathered_head.select_kernels(probe) is not gathered_head._TORCH


@contextmanager
def triton_kernels() -> Iterator[None]:
    """Use Triton's kernels inside the block on a CPU too, where its interpreter runs them."""
    from opd.models import gathered_head_triton as kernels

    previous = gathered_head.select_kernels
    gathered_head.select_kernels = lambda hidden: gathered_head.Kernels(
        kernels.product, kernels.hidden_gradient, kernels.weight_gradient
    )
    try:
        yield
    finally:
        gathered_head.select_kernels = previous


def compare(setting: Setting, case: HeadCase, kind: str) -> Iterator[Row]:
    """Compare the product and its gradients with those of all logits in float32."""
    n, d, v = setting.choose((5, 20, 90), (1027, 904, 32_003))
    weight = normal(setting, v, d, seed=1, dtype=case.dtype) * (2 / d**0.5)
    bias = normal(setting, v, seed=2, dtype=case.dtype) if case.bias else None
    tokens = torch.randint(v, (n,), generator=torch.Generator().manual_seed(3)).to(setting.device)
    hidden = normal(setting, n, d, seed=4, dtype=case.dtype)
    ids = make_ids(case, n, v).to(setting.device)
    dz = normal(setting, n, case.k, seed=5)

    def run(width: torch.dtype, dense: bool) -> list[Tensor]:
        sources = [hidden, weight] + ([] if bias is None else [bias])
        leaves = [x.detach().to(width, copy=True).requires_grad_() for x in sources]
        states = leaves[0] + embedding(tokens, leaves[1]) if case.tied else leaves[0]
        head = LmHead(leaves[1], v, leaves[2] if case.bias else None, softcap=case.softcap)
        if dense:
            logits = states @ head.weight.T
            logits = logits if head.bias is None else logits + head.bias
            if case.softcap:
                logits = case.softcap * (logits / case.softcap).tanh()
            z = logits.gather(1, ids)
        else:
            z = head.gather(states, ids)
        return [z.detach(), *torch.autograd.grad((z * dz).sum(), leaves)]

    result, exact = run(case.dtype, dense=False), run(torch.float32, dense=True)
    # a sum of half-precision states and embeddings is rounded before the head reads it
    rounds_states = case.tied and case.dtype == HALF
    deviation = relative(result[0], exact[0])
    yield Check(f"{kind}: values, {case.label}", deviation, 4e-3 if rounds_states else VALUE_LIMIT)
    limits = TIED_LIMITS if case.tied or case.softcap else GRADIENT_LIMITS
    deviation = max(relative(a, b) for a, b in zip(result[1:], exact[1:], strict=True))
    yield Check(f"{kind}: gradients, {case.label}", deviation, limits[case.dtype])
    if case.tied or case.bias:  # torch's own gradients by these need not be deterministic
        return
    again = run(case.dtype, dense=False)
    changed = sum(int((a != b).sum()) for a, b in zip(result, again, strict=True))
    yield Check(f"{kind}: numbers that differ in a second run, {case.label}", changed, 0)


def make_ids(case: HeadCase, n: int, v: int) -> Tensor:
    """Return (N, K) ids on the CPU."""
    generator = torch.Generator().manual_seed(6)
    if case.ids == "a single one":
        return torch.full((n, case.k), v // 2)
    make = distinct_ids if case.ids == "all distinct" else zipf_ids
    return make(n, v, case.k, generator)
