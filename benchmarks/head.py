"""Compare head and loss, forward and backward, with dense logits and other fused implementations.

    python -m benchmarks.head [--tokens 512 --hidden 896 --vocabulary 151936 --k 32]

All run in one process, on a CPU; `python -m benchmarks.gpu` measures the same on a GPU. Extra
memory is the peak of simultaneously allocated memory beyond the inputs and the two gradients:
CUDA's own count, or on a CPU the tensors returned by operations. Gradient errors are relative to
the largest entry, against the dense loss in float32 on the same numbers. TRL is needed for its rows
only, Liger and CUDA for Liger's. Rows with the full vocabulary and with the teacher's top-K include
the teacher's head.

Shapes: N tokens, D hidden size, V vocabulary, K support ids.
"""

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.study import cpu_name
from benchmarks.timing import extra_memory, is_tensor, milliseconds
from diagnostics.batch import ScoredRollouts, Support
from opd.models.lm_head import LmHead, two_stage_topk
from opd.models.model import CausalLM
from opd.objectives.catalogue import OBJECTIVES
from opd.objectives.divergences import renormalise, reverse_kl
from opd.objectives.inputs import TokenInputs
from opd.scoring.loss import loss_from_hidden
from opd.teachers.pair import ModelPair
from opd.teachers.teacher import LocalTeacher


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one comparison."""

    hidden: Tensor
    """(N, D) hidden states of the student."""
    student_head: Tensor
    """(V, D)."""
    teacher_hidden: Tensor
    """(N, D) hidden states of the teacher."""
    teacher_head: Tensor
    """(V, D)."""
    ids: Tensor
    """(N, K) support ids."""
    teacher_logp: Tensor
    """(N, K) the teacher's log-probabilities on the support."""
    tokens: Tensor
    """(N,) sampled tokens."""
    max_logits_per_chunk: int
    """Largest number of logits at a time."""


def make_case(n: int, d: int, v: int, k: int, ids: str, dtype: torch.dtype, device: str) -> Case:
    """Return random inputs."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * size).to(dtype)

    hidden, student_head = normal(n, d), normal(v, d, size=2 / d**0.5)
    teacher_hidden, teacher_head = normal(n, d), normal(v, d, size=2 / d**0.5)
    picked = (
        zipf_ids(n, v, k, generator) if ids == "as in text" else distinct_ids(n, v, k, generator)
    )
    logp = -torch.rand((n, k), generator=generator, device=device) * 8 - 1
    tokens = picked[:, 0].contiguous()
    elements = 2**24 if device == "cpu" else 2**28
    return Case(hidden, student_head, teacher_hidden, teacher_head, picked, logp, tokens, elements)


def distinct_ids(n: int, v: int, k: int, generator: torch.Generator) -> Tensor:
    """Return (N, K) ids, all different if the vocabulary is large enough."""
    permutations = [
        torch.randperm(v, generator=generator, device=generator.device)
        for _ in range(-(-n * k // v))
    ]
    return torch.cat(permutations)[: n * k].view(n, k)


def zipf_ids(n: int, v: int, k: int, generator: torch.Generator) -> Tensor:
    """Return (N, K) ids, different within a row, sampled by Zipf's law with weight 1 / rank."""
    weight = 1 / torch.arange(1, v + 1, device=generator.device, dtype=torch.float32)
    rows = [
        weight.expand(min(64, n - i), v).multinomial(k, generator=generator)
        for i in range(0, n, 64)
    ]
    return torch.cat(rows)


# --- implementations ----------------------------------------------------------------------------


def make_pair(inputs: Case) -> ModelPair:
    """Return a pair of models with the heads and no decoders."""

    def model(weight: Tensor) -> CausalLM:
        head = LmHead(weight, len(weight))
        return CausalLM(None, lambda *_: weight, lambda: head, len(weight))

    teacher = LocalTeacher("", model(inputs.teacher_head))
    return ModelPair(model(inputs.student_head), teacher, None, [0])


def scored_batch(inputs: Case) -> ScoredRollouts:
    """Return the inputs as a scored batch of one response."""
    row = inputs.teacher_logp[None, :, 0]
    return ScoredRollouts(
        tokens=inputs.tokens[None],
        mask=torch.ones_like(inputs.tokens, dtype=torch.bool)[None],
        sampler_logp=row,
        student_logp=row,
        teacher_logp=row,
        prompt=torch.zeros_like(inputs.tokens[:1]),
        ended=torch.ones_like(inputs.tokens[:1], dtype=torch.bool),
        support=Support(
            ids=inputs.ids[None],
            student_logp=inputs.teacher_logp[None],
            teacher_logp=inputs.teacher_logp[None],
            source="teacher",
        ),
    )


def toolkit_loss(name: str) -> Callable[[Case], Tensor]:
    """Return the toolkit's loss of an objective."""

    def loss(inputs: Case) -> Tensor:
        ones = torch.ones_like(inputs.tokens, dtype=torch.float32)[None]
        pair, objective = make_pair(inputs), OBJECTIVES[name]
        return loss_from_hidden(
            pair.student,
            objective,
            inputs.hidden,
            TokenInputs.of(scored_batch(inputs), objective.support, ones, ones),
            teacher=pair.teacher.model,
            teacher_hidden=inputs.teacher_hidden,
            temperature=1.0,
            max_logits_per_chunk=inputs.max_logits_per_chunk,
        )

    return loss


def loss_with_teacher_topk(inputs: Case) -> Tensor:
    """Compute the teacher's exact top-K in chunks, then the loss on it."""
    head, k = LmHead(inputs.teacher_head, len(inputs.teacher_head)), inputs.ids.shape[1]
    step = max(1, inputs.max_logits_per_chunk // len(inputs.teacher_head))
    topk_chunks = []
    with torch.no_grad():
        for h in inputs.teacher_hidden.split(step):
            logits = head.logits(h)
            best, ids = two_stage_topk(logits, k)
            topk_chunks.append((ids, best - logits.logsumexp(-1, keepdim=True)))
    ids, logp = (torch.cat(x) for x in zip(*topk_chunks, strict=True))
    return toolkit_loss("teacher_topk")(replace(inputs, ids=ids, teacher_logp=logp))


def dense_topk(inputs: Case) -> Tensor:
    return reverse_kl(
        renormalise((inputs.hidden @ inputs.student_head.T).gather(1, inputs.ids).float()),
        renormalise(inputs.teacher_logp),
    ).sum()


def dense_topk_normalised(inputs: Case) -> Tensor:
    """Compute all logits, their logsumexp, and K of them, as in the paper's official code."""
    logits = (inputs.hidden @ inputs.student_head.T).float()
    logp = logits.gather(1, inputs.ids) - logits.logsumexp(-1, keepdim=True)
    return reverse_kl(renormalise(logp), renormalise(inputs.teacher_logp)).sum()


def dense_full(inputs: Case) -> Tensor:
    with torch.no_grad():
        teacher_logp = (inputs.teacher_hidden @ inputs.teacher_head.T).float().log_softmax(-1)
    return reverse_kl(
        (inputs.hidden @ inputs.student_head.T).float().log_softmax(-1), teacher_logp
    ).sum()


def dense_sampled(inputs: Case) -> Tensor:
    logp = (inputs.hidden @ inputs.student_head.T).float().log_softmax(-1)
    return logp.gather(1, inputs.tokens[:, None]).sum()


def trl_full(inputs: Case) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    outputs = ChunkedDivergenceFunction.apply(
        inputs.hidden,
        inputs.student_head,
        None,
        inputs.teacher_hidden,
        inputs.teacher_head,
        None,
        1.0,
    )
    return outputs[0].sum()


def trl_sampled(inputs: Case) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    arguments = (
        inputs.hidden,
        inputs.student_head,
        None,
        inputs.tokens,
        1.0,
        32_768,
        None,
        1.0,
        (),
    )
    return ChunkedLogProbFunction.apply(*arguments)[0].sum()


def liger_full(inputs: Case) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    arguments = (
        inputs.hidden,
        inputs.student_head,
        inputs.teacher_hidden,
        inputs.teacher_head,
        inputs.tokens,
    )
    return loss(*arguments) * len(inputs.tokens)


def matmul(inputs: Case) -> Tensor:
    with torch.no_grad():
        return (inputs.hidden @ inputs.student_head.T)[0, 0]


TOPK = {
    "bare hidden @ head.T": matmul,
    "dense logits, gather K, logsumexp (official code)": dense_topk_normalised,
    "dense logits, gather K": dense_topk,
    "ours: K gathered head rows": toolkit_loss("teacher_topk"),
}
FULL = {
    "ours: teacher's top-K and K gathered head rows": loss_with_teacher_topk,
    "full reverse KL, dense": dense_full,
    "full reverse KL, TRL chunked_divergence": trl_full,
    "full reverse KL, Liger chunked JSD": liger_full,
    "full reverse KL, ours in chunks": toolkit_loss("full_reverse_kl"),
    "sampled log-prob, dense": dense_sampled,
    "sampled log-prob, TRL chunked_logprob": trl_sampled,
    "sampled log-prob, ours in chunks": toolkit_loss("sampled_token"),
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


def is_available(loss: Callable[[Case], Tensor], device: str) -> bool:
    """Return whether the implementation is installed and supports the device."""
    if loss is liger_full:
        return device == "cuda" and find_spec("liger_kernel") is not None
    return loss not in (trl_full, trl_sampled) or find_spec("trl") is not None


# --- measuring ----------------------------------------------------------------------------------


def gradients(loss: Callable[[Case], Tensor], inputs: Case) -> list[Tensor]:
    """Return the gradients of `hidden` and `student_head`; none if the loss has no gradient."""
    live = replace(
        inputs,
        hidden=inputs.hidden.requires_grad_(),
        student_head=inputs.student_head.requires_grad_(),
    )
    value = loss(live)
    return (
        list(torch.autograd.grad(value, (live.hidden, live.student_head)))
        if value.requires_grad
        else []
    )


def gradient_error(
    loss: Callable[[Case], Tensor], reference: Callable[[Case], Tensor], inputs: Case
) -> float:
    """Return the largest relative gradient error against a reference in float32."""
    wide = {
        name: x.float()
        for name, x in vars(inputs).items()
        if is_tensor(x) and x.is_floating_point()
    }
    exact = gradients(reference, replace(inputs, **wide))
    result = gradients(loss, inputs)
    pairs = zip(result, exact, strict=True)
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(
    loss: Callable[[Case], Tensor], inputs: Case, device: str, repeats: int
) -> tuple[float, float]:
    """Return the median milliseconds of forward and backward, and the extra MiB.

    Extra memory is without the gradients themselves. On CUDA a call before that makes kernels,
    workspaces and tables, which do not count.
    """
    if device == "cuda":
        gradients(loss, inputs)
    with extra_memory(device) as peak:
        result = gradients(loss, inputs)
        mebibytes = peak() - sum(x.nbytes for x in result) / 2**20
    del result
    return milliseconds(lambda: gradients(loss, inputs), device, repeats), mebibytes


def print_table(rows: dict[str, Callable[[Case], Tensor]], inputs: Case, repeats: int) -> None:
    """Print time and memory of each implementation on a CPU."""
    matmul_time = milliseconds(lambda: matmul(inputs), "cpu", repeats)
    for name, loss in rows.items():
        if not is_available(loss, "cpu"):
            print(f"| {name} | not available here | | |")
            continue
        time_spent, mib = measure(loss, inputs, "cpu", repeats)
        print(
            f"| {name} | {time_spent:,.0f} ms | {time_spent / matmul_time:.2f} | {mib:,.0f} MiB |",
            flush=True,
        )


def print_errors() -> None:
    """Print the gradient errors of each implementation."""
    print("\n| largest relative gradient error | float32 | bfloat16 |\n|---|---|---|")
    cases = [
        make_case(256, 128, 8192, 32, "as in text", dtype, "cpu")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for name, loss in {**TOPK, **FULL}.items():
        if loss in REFERENCE and is_available(loss, "cpu"):
            errors = [gradient_error(loss, REFERENCE[loss], case) for case in cases]
            print(f"| {name} | {errors[0]:.0e} | {errors[1]:.0e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (("tokens", 512), ("hidden", 896), ("vocabulary", 151_936), ("k", 32)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    libraries = [f"{x} {version(x)}" for x in ("trl", "triton") if find_spec(x)]
    print(f"{cpu_name()}, one thread, python {platform.python_version()}, "
          f"torch {torch.__version__}, {', '.join(libraries)}")  # fmt: skip
    n, d, v, k = args.tokens, args.hidden, args.vocabulary, args.k
    print_errors()
    for ids in ("as in text", "all distinct"):
        inputs = make_case(n, d, v, k, ids, torch.float32, "cpu")
        rows = len(inputs.ids.unique())
        print(f"\nfloat32, N = {n}, D = {d}, V = {v:,}, K = {k}, ids {ids}: {rows:,} head rows")
        print("| forward and backward | time | in bare matmuls | extra memory |\n|---|---|---|---|")
        print_table(TOPK if ids == "as in text" else {**TOPK, **FULL}, inputs, args.repeats)


if __name__ == "__main__":
    main()
