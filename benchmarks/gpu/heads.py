"""Measurements: time and memory of head and loss, and of the teacher's top-K, beside the rivals."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.result import Measurement, Omission, Row, SkipPart
from benchmarks.gpu.setting import Setting
from benchmarks.head import FULL, TOPK, Case, is_available, make_case, matmul, measure
from benchmarks.timing import milliseconds
from opd.models.lm_head import LmHead, two_stage_topk

WIDTHS = (896, 2048, 3584)
TOKENS, VOCABULARY, K = 8192, 151_936, 32
BYTES_PER_LOGIT = 24
"""What the dense full-vocabulary loss of both models keeps per logit, at most."""
MATMUL = "bare hidden @ head.T"


def measure_heads(width: int, setting: Setting) -> Iterator[Row]:
    """Measure every implementation on ids as in text, and those that matter on distinct ids."""
    if setting.toy and width > WIDTHS[0]:
        raise SkipPart(f"toy sizes are those of d = {WIDTHS[0]}")
    n, d, v, k = setting.choose((16, 24, 300, 4), (TOKENS, width, VOCABULARY, K))
    repeats = setting.choose(1, 5)
    fitting = setting.fitting(n, BYTES_PER_LOGIT * v)
    note = "" if fitting == n else f"N = {fitting:,} of {n:,}: what fits the memory"
    for ids in ("as in text", "all distinct"):
        dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
        inputs = make_case(fitting, d, v, k, ids, dtype, setting.device)
        rows = len(inputs.ids.unique())
        label = f"d = {d}, N = {fitting:,}, ids {ids} ({rows:,} rows)"
        bare = milliseconds(partial(matmul, inputs), setting.device, repeats)
        yield Measurement(f"{label}: {MATMUL}", bare, "ms", note=note)
        for name, loss in (TOPK if ids == "as in text" else {**TOPK, **FULL}).items():
            if name == MATMUL:
                continue
            yield measure_loss(f"{label}: {name}", loss, inputs, bare, setting)


def measure_loss(
    subject: str, loss: Callable[[Case], Tensor], inputs: Case, bare: float, setting: Setting
) -> Row:
    """Measure one implementation; what fails or does not fit is reported and does not stop."""
    if not is_available(loss, setting.device):
        return Omission(subject, "not installed, or not for this device")
    try:
        time_spent, mebibytes = measure(loss, inputs, setting.device, setting.choose(1, 5))
    except torch.OutOfMemoryError as error:
        return Omission(subject, f"out of memory: {str(error).partition('. ')[0]}")
    except Exception as error:
        if subject.partition(": ")[2].startswith("ours"):
            raise
        return Omission(subject, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return Measurement(subject, time_spent, "ms", mebibytes, time_spent / bare, "of the matmul")


def measure_topk(setting: Setting) -> Iterator[Row]:
    """Measure the stages of the teacher's exact top-K, with its head's product."""
    n, d, v, k = setting.choose((8, 24, 3_000, 4), (2048, 2048, VOCABULARY, K))
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    inputs = make_case(n, d, v, k, "all distinct", dtype, setting.device)
    head = LmHead(inputs.teacher_head, v)
    logits = head.logits(inputs.teacher_hidden)
    half = logits.to(dtype)
    time_of = partial(milliseconds, device=setting.device, repeats=setting.choose(1, 5))

    def product() -> Tensor:
        with torch.no_grad():
            return inputs.teacher_hidden @ inputs.teacher_head.T

    def product_and_topk() -> tuple[Tensor, Tensor]:
        return two_stage_topk(head.logits(inputs.teacher_hidden), k)

    bare = time_of(product)
    stages: dict[str, Callable[[], object]] = {
        "head's product, float32 sums": lambda: head.logits(inputs.teacher_hidden),
        f"torch.topk, {dtype}": lambda: half.topk(k, -1),
        f"two-stage top-K, {dtype}": lambda: two_stage_topk(half, k),
        "two-stage top-K, float32": lambda: two_stage_topk(logits, k),
        "maximum only (reading the logits once), float32": lambda: logits.amax(-1),
        "logsumexp, float32": lambda: logits.logsumexp(-1),
        "head's product and two-stage top-K (target 1.8)": product_and_topk,
    }
    label = f"N = {n:,}, d = {d}, V = {v:,}, K = {k}"
    yield Measurement(f"{label}: bare product", bare, "ms")
    for name, work in stages.items():
        spent = time_of(work)
        yield Measurement(f"{label}: {name}", spent, "ms", None, spent / bare, "of the product")
