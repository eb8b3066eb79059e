"""Head and loss, forward and backward, against dense logits and the fused rivals, in one process.

    python -m benchmarks.head [--tokens 512 --hidden 896 --vocabulary 151936 --k 32]

Extra memory is the peak of what was alive at once beyond the inputs and the two gradients: CUDA's
own count, or on a CPU the tensors that operations returned. Gradient errors are in units of the
largest entry, against the dense loss in float32 on the same numbers. TRL is needed for its rows
only, Liger and CUDA for Liger's. Full-vocabulary rows and the one with the teacher's top-K include
the teacher's head.

Shapes: N tokens, D hidden size, V vocabulary, K support ids.
"""

import argparse
import platform
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.study import cpu
from diagnostics.batch import ScoredRollouts, Support
from opd.models.lm_head import LmHead, full_logits, two_stage_topk
from opd.models.model import CausalLM
from opd.objectives.divergences import renormalise, reverse_kl
from opd.objectives.factory import OBJECTIVES
from opd.scoring.loss import loss_from_hidden
from opd.teachers.pair import ModelPair


@dataclass(frozen=True, eq=False)
class Case:
    """hidden, taught: (N, D); ours, theirs: (V, D); ids, teacher_logp: (N, K); tokens: (N,)."""

    hidden: Tensor
    ours: Tensor
    taught: Tensor
    theirs: Tensor
    ids: Tensor
    teacher_logp: Tensor
    tokens: Tensor
    max_logits_per_chunk: int


def case(n: int, d: int, v: int, k: int, ids: str, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * size).to(dtype)

    hidden, ours = normal(n, d), normal(v, d, size=2 / d**0.5)
    taught, theirs = normal(n, d), normal(v, d, size=2 / d**0.5)
    picked = text_like(n, v, k, generator) if ids == "as in text" else distinct(n, v, k, generator)
    logp = -torch.rand((n, k), generator=generator, device=device) * 8 - 1
    tokens = picked[:, 0].contiguous()
    elements = 2**24 if device == "cpu" else 2**28
    return Case(hidden, ours, taught, theirs, picked, logp, tokens, elements)


def distinct(n: int, v: int, k: int, generator: torch.Generator) -> Tensor:
    """(N, K) ids, none twice while they last."""
    some = [
        torch.randperm(v, generator=generator, device=generator.device)
        for _ in range(-(-n * k // v))
    ]
    return torch.cat(some)[: n * k].view(n, k)


def text_like(n: int, v: int, k: int, generator: torch.Generator) -> Tensor:
    """(N, K) ids, different within a row, drawn by Zipf's law: the r-th has weight 1 / r."""
    weight = 1 / torch.arange(1, v + 1, device=generator.device, dtype=torch.float32)
    rows = [
        weight.expand(min(64, n - i), v).multinomial(k, generator=generator)
        for i in range(0, n, 64)
    ]
    return torch.cat(rows)


# --- what is compared ---------------------------------------------------------------------------


def pair_of(at: Case) -> ModelPair:
    def model(weight: Tensor) -> CausalLM:
        head = LmHead(weight, len(weight))
        return CausalLM(None, lambda *_: weight, lambda: head, len(weight))

    return ModelPair(model(at.ours), model(at.theirs), None, [0])


def scored(at: Case) -> ScoredRollouts:
    row = at.teacher_logp[None, :, 0]
    return ScoredRollouts(
        tokens=at.tokens[None],
        mask=torch.ones_like(at.tokens, dtype=torch.bool)[None],
        sampler_logp=row,
        student_logp=row,
        teacher_logp=row,
        prompt=torch.zeros_like(at.tokens[:1]),
        ended=torch.ones_like(at.tokens[:1], dtype=torch.bool),
        support=Support(
            ids=at.ids[None],
            student_logp=at.teacher_logp[None],
            teacher_logp=at.teacher_logp[None],
            source="teacher",
        ),
    )


def our_loss(name: str) -> Callable[[Case], Tensor]:
    def loss(at: Case) -> Tensor:
        one = torch.ones_like(at.tokens, dtype=torch.float32)
        taught = at.taught if name.startswith("full") else None
        given = (pair_of(at), OBJECTIVES[name](), at.hidden, taught, scored(at), one[None], one)
        return loss_from_hidden(*given, max_logits_per_chunk=at.max_logits_per_chunk)

    return loss


def with_teacher(at: Case) -> Tensor:
    """The teacher's exact top-K in chunks, then the loss on it."""
    head, k = LmHead(at.theirs, len(at.theirs)), at.ids.shape[1]
    step = max(1, at.max_logits_per_chunk // len(at.theirs))
    found = []
    with torch.no_grad():
        for h in at.taught.split(step):
            logits = full_logits(h, head)
            best, ids = two_stage_topk(logits, k)
            found.append((ids, best - logits.logsumexp(-1, keepdim=True)))
    ids, logp = (torch.cat(x) for x in zip(*found, strict=True))
    return our_loss("teacher_topk")(replace(at, ids=ids, teacher_logp=logp))


def dense_topk(at: Case) -> Tensor:
    return reverse_kl(
        renormalise((at.hidden @ at.ours.T).gather(1, at.ids).float()), renormalise(at.teacher_logp)
    ).sum()


def dense_topk_normalised(at: Case) -> Tensor:
    """All logits, their logsumexp, and the K of them: as the paper's official code works."""
    logits = (at.hidden @ at.ours.T).float()
    logp = logits.gather(1, at.ids) - logits.logsumexp(-1, keepdim=True)
    return reverse_kl(renormalise(logp), renormalise(at.teacher_logp)).sum()


def dense_full(at: Case) -> Tensor:
    with torch.no_grad():
        theirs = (at.taught @ at.theirs.T).float().log_softmax(-1)
    return reverse_kl((at.hidden @ at.ours.T).float().log_softmax(-1), theirs).sum()


def dense_sampled(at: Case) -> Tensor:
    logp = (at.hidden @ at.ours.T).float().log_softmax(-1)
    return logp.gather(1, at.tokens[:, None]).sum()


def trl_full(at: Case) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    found = ChunkedDivergenceFunction.apply(
        at.hidden, at.ours, None, at.taught, at.theirs, None, 1.0
    )
    return found[0].sum()


def trl_sampled(at: Case) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    given = (at.hidden, at.ours, None, at.tokens, 1.0, 32_768, None, 1.0, ())
    return ChunkedLogProbFunction.apply(*given)[0].sum()


def liger_full(at: Case) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    given = (at.hidden, at.ours, at.taught, at.theirs, at.tokens)
    return loss(*given) * len(at.tokens)


def matmul(at: Case) -> Tensor:
    with torch.no_grad():
        return (at.hidden @ at.ours.T)[0, 0]


TOPK = {
    "bare hidden @ head.T": matmul,
    "dense logits, gather K, logsumexp (official code)": dense_topk_normalised,
    "dense logits, gather K": dense_topk,
    "ours: K gathered head rows": our_loss("teacher_topk"),
}
FULL = {
    "ours: teacher's top-K and K gathered head rows": with_teacher,
    "full reverse KL, dense": dense_full,
    "full reverse KL, TRL chunked_divergence": trl_full,
    "full reverse KL, Liger chunked JSD": liger_full,
    "full reverse KL, ours in chunks": our_loss("full_reverse_kl"),
    "sampled log-prob, dense": dense_sampled,
    "sampled log-prob, TRL chunked_logprob": trl_sampled,
    "sampled log-prob, ours in chunks": our_loss("sampled_token"),
}
REFERENCE = {
    dense_topk: dense_topk,
    dense_topk_normalised: dense_topk,
    TOPK["ours: K gathered head rows"]: dense_topk,
    dense_full: dense_full,
    trl_full: dense_full,
    liger_full: dense_full,
    FULL["full reverse KL, ours in chunks"]: dense_full,
    dense_sampled: dense_sampled,
    trl_sampled: dense_sampled,
    FULL["sampled log-prob, ours in chunks"]: dense_sampled,
}


def usable(loss: Callable[[Case], Tensor], device: str) -> bool:
    if loss is liger_full:
        return device == "cuda" and find_spec("liger_kernel") is not None
    return loss not in (trl_full, trl_sampled) or find_spec("trl") is not None


# --- measuring ----------------------------------------------------------------------------------


def gradients(loss: Callable[[Case], Tensor], at: Case) -> list[Tensor]:
    """Of hidden and ours; of nothing if the loss has none."""
    live = replace(at, hidden=at.hidden.requires_grad_(), ours=at.ours.requires_grad_())
    value = loss(live)
    return list(torch.autograd.grad(value, (live.hidden, live.ours))) if value.requires_grad else []


def milliseconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call after one that is not counted; on a CPU of the one thread's work."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(repeats + 1):
        wait(device)
        begin = clock()
        work()
        wait(device)
        times.append(1000 * (clock() - begin))
    return sorted(times[1:])[repeats // 2]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations returned and that still live; their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in filter(is_tensor, tree_leaves(out)):
            storage = x.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self.seen:
                self.seen[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.seen.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.seen.values()))
        return out


def is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


@contextmanager
def extra_memory(device: str) -> Iterator[Callable[[], float]]:
    """Yields a function that tells the peak beyond the start, in MiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        with Alive() as alive:
            yield lambda: alive.peak / 2**20


def error(loss: Callable[[Case], Tensor], at: Case) -> float:
    """Largest relative gradient error against the float32 dense loss."""
    wide = {
        name: x.float() for name, x in vars(at).items() if is_tensor(x) and x.is_floating_point()
    }
    exact = gradients(REFERENCE[loss], replace(at, **wide))
    found = gradients(loss, at)
    pairs = zip(found, exact, strict=True)
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)


def table(rows: dict[str, Callable[[Case], Tensor]], at: Case, device: str, repeats: int) -> None:
    bare = milliseconds(lambda: matmul(at), device, repeats)
    for name, loss in rows.items():
        if not usable(loss, device):
            print(f"| {name} | not available here | | |")
            continue
        with extra_memory(device) as peak:
            found = gradients(loss, at)
            mib = peak() - sum(x.nbytes for x in found) / 2**20
        spent = milliseconds(lambda loss=loss: gradients(loss, at), device, repeats)
        print(f"| {name} | {spent:,.0f} ms | {spent / bare:.2f} | {mib:,.0f} MiB |", flush=True)


def errors(device: str) -> None:
    print("\n| largest relative gradient error | float32 | bfloat16 |\n|---|---|---|")
    for name, loss in {**TOPK, **FULL}.items():
        if loss in REFERENCE and usable(loss, device):
            found = [
                error(loss, case(256, 128, 8192, 32, "as in text", dtype, device))
                for dtype in (torch.float32, torch.bfloat16)
            ]
            print(f"| {name} | {found[0]:.0e} | {found[1]:.0e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (("tokens", 512), ("hidden", 896), ("vocabulary", 151_936), ("k", 32)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else cpu()
    torch.set_num_threads(1)
    rivals = [
        f"{x} {version(x)}"
        for x in ("trl", "liger-kernel", "triton")
        if find_spec(x.replace("-", "_"))
    ]
    print(f"{where}, one thread, python {platform.python_version()}, "
          f"torch {torch.__version__}, {', '.join(rivals)}")  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    n, d, v, k = given.tokens, given.hidden, given.vocabulary, given.k
    errors(device)
    for ids in ("as in text", "all distinct"):
        at = case(n, d, v, k, ids, dtype, device)
        rows = len(at.ids.unique())
        print(f"\n{dtype}, N = {n}, D = {d}, V = {v:,}, K = {k}, ids {ids}: {rows:,} head rows")
        print("| forward and backward | time | in bare matmuls | extra memory |\n|---|---|---|---|")
        table(TOPK if ids == "as in text" else {**TOPK, **FULL}, at, device, given.repeats)


if __name__ == "__main__":
    main()
