"""verl: observe its distillation losses from within, and read its rollout dumps (verl 0.9.1).

verl computes the loss in worker processes, so the observer has to be there: put two lines into a
module that the workers import (`actor_rollout_ref.model.external_lib: my_observer`) and leave the
rest of the configuration as it is.

    from diagnostics.adapters.verl import install
    install("k1")    # the loss_mode of the run

Loss, gradient and verl's own metrics stay what they were; the panel's token means join them in
verl's logger under their usual names. With `records`, whole rows are kept for `opd diagnose`, which
has every metric and standard error.
Shapes: B responses, T response positions, K teacher ids.
"""

import json
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from diagnostics.core.partial import lacking
from diagnostics.core.totals import Accumulator, Mean, PositionMean
from diagnostics.errors import BrokenPackage, InvalidInput, MissingPackage
from diagnostics.metrics.consistency import sampler_ratio
from diagnostics.metrics.divergence import in_support, sampled_divergence
from diagnostics.metrics.repetition import repetition
from diagnostics.metrics.signal import sign_shares
from diagnostics.monitor import Metric, Monitor
from diagnostics.records.columns import number_of
from diagnostics.records.writer import rows_of, write

Loss = Callable[..., tuple[Tensor, dict[str, Any]]]
"""verl's distillation loss: (config, distillation_config, model_output, data)."""

TOKEN_MEANS = (
    "signal/negative_share",
    "signal/positive_share",
    "signal/negative_mass",
    "signal/positive_mass",
    "divergence/k1",
    "divergence/abs_ratio",
    "divergence/teacher_prob",
    "divergence/outside_topk",
    "divergence/topk_teacher_mass",
    "repetition/repeated_share",
    "consistency/sampler_log_ratio",
    "consistency/sampler_log_ratio_square",
)
"""Means over supervised tokens. verl can only add and average, so only they are exact across
micro-batches and ranks: each hands in its sum over the global number of tokens."""


def install(base: str, records: str | Path | None = None, every: int = 1) -> None:
    """Observe verl's registered loss `base`, such as k1 or forward_kl_topk, in this process.

    records: a folder for record files of every `every`-th micro-batch.

    Raises:
      ImportError: verl is not there. ValueError: it has no loss of this name.
    """
    try:
        from verl.trainer.distillation.losses import (
            DISTILLATION_LOSS_REGISTRY,
            get_distillation_loss_fn,
        )
    except ImportError as error:
        kind = MissingPackage if getattr(error, "name", None) == "verl" else BrokenPackage
        raise kind(f"verl with distillation losses (0.9) is needed here: {error}") from error
    loss = get_distillation_loss_fn(base)
    if not hasattr(loss, "unobserved"):
        DISTILLATION_LOSS_REGISTRY[base] = observed(loss, records, every)


def observed(loss: Loss, records: str | Path | None = None, every: int = 1) -> Loss:
    """The same loss, with the token means of the panel in its metrics.

    For losses of one's own: `register_distillation_loss(...)(observed(my_loss))`.
    """
    monitor = Monitor(PANEL)
    calls = count()

    def watched(
        config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        from verl.utils.metric import AggregationType
        from verl.utils.metric import Metric as Number

        found, metrics = loss(
            config=config,
            distillation_config=distillation_config,
            model_output=model_output,
            data=data,
        )
        batch = batch_of(model_output, data).checked()
        # verl averages over ranks and adds over micro-batches, hence the factor.
        scale = float(data["dp_size"]) / float(data["batch_num_tokens"])
        sums = token_sums(monitor.measure(batch))
        host = torch.stack([*sums.values()]).tolist()  # one sync for all
        shares = {
            name: Number(AggregationType.SUM, x * scale) for name, x in zip(sums, host, strict=True)
        }
        number = next(calls)
        if records is not None and number % every == 0:
            rank = os.environ.get("RANK", "0")
            rows = zip(rows_of(batch), _prompts(data), strict=True)
            file = Path(records) / f"rank{rank}_{os.getpid()}_{number:07d}.jsonl"
            write(file, ({**row, "prompt_tokens": prompt} for row, prompt in rows))
        return found, {**metrics, **shares}

    watched.unobserved = loss  # type: ignore[attr-defined]
    return watched


def token_sums(totals: dict[str, Accumulator]) -> dict[str, Tensor]:
    """The sum over tokens behind each of `TOKEN_MEANS` that was measured."""
    sums: dict[str, Tensor] = {}
    for name in TOKEN_MEANS:
        total = totals.get(name)
        if isinstance(total, Mean | PositionMean):
            sums[name] = total.total.flatten()[0]
    return sums


def sampled_tokens(mask: Tensor, rollout_logp: Tensor | None) -> Tensor:
    """(B, T) bool: what the student sampled, supervised or not, as far as verl's data tell.

    Where response_mask is 0 an agent loop writes a log-probability of exactly 0 for the text of
    tools and environments; any other number is a token of the student that a rule takes out of the
    loss (`opd.integrations.verl.agent_loop`). Without rollout_log_probs the mask alone is known.

    Args:
      mask: (B, T) bool, verl's response_mask. rollout_logp: (B, T), 0 behind each response.
    """
    return mask if rollout_logp is None else mask | (rollout_logp != 0)


def batch_of(
    model_output: dict[str, Any], data: Any, *, unsupervised: bool = False
) -> ScoredRollouts:
    """What a micro-batch of verl's actor knows, as a `ScoredRollouts` that lacks the rest.

    It holds what response_mask counts, since verl divides by that; with `unsupervised` also the
    other tokens that were sampled (`sampled_tokens`), which ratios and costs to go need.

    With one teacher log-probability a token (loss modes k1, k2, ...) it is the sampled token's;
    with K (forward_kl_topk) they make a support without the student's side, and the sampled
    token's is unknown, as is the student's where verl trains on nothing but a top-K. `ended` is
    never known; the sampler is where verl kept rollout_log_probs.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    mask = _padded(data["response_mask"]).bool()
    zeros = torch.zeros(mask.shape, device=mask.device)

    sampler = data.get("rollout_log_probs", None)
    sampler = None if sampler is None else _padded(sampler).float()
    sampled = sampled_tokens(mask, sampler) if unsupervised else mask

    def response(values: Tensor) -> Tensor:
        x = no_padding_2_padding(values, data).detach().float()
        return torch.where(sampled if x.dim() == 2 else sampled[..., None], x, 0.0)

    teacher = response(data["teacher_logprobs"])
    single = teacher.shape[-1] == 1
    student = model_output.get("log_probs")
    lost = {"ended"} | ({"sampler_logp"} if sampler is None else set())
    lost |= {"student_logp"} if student is None else set()
    support = None
    if not single:
        lost |= {"teacher_logp"}
        ids = no_padding_2_padding(data["teacher_ids"], data).long() * sampled[..., None]
        no_student = torch.zeros_like(teacher)
        support = Support(ids=ids, student_logp=no_student, teacher_logp=teacher, source="teacher")
        support = lacking(support, ["student_logp"], "verl's loss has")
    batch = ScoredRollouts(
        tokens=_padded(data["responses"]).long() * sampled,
        mask=mask,
        sampled_mask=sampled if unsupervised else None,
        student_logp=zeros if student is None else response(student),
        teacher_logp=teacher[..., 0] if single else zeros,
        sampler_logp=zeros if sampler is None else torch.where(sampled, sampler, 0.0),
        prompt=torch.tensor([*map(number_of, _prompts(data))], device=mask.device),
        ended=mask.new_zeros(len(mask)),
        support=support,
    )
    return lacking(batch, lost, "verl's loss has")


def rollout_rows(
    path: str | Path, tokenize: Callable[[str], list[int]]
) -> Iterator[dict[str, Any]]:
    """Records of the files that verl's `trainer.rollout_data_dir` holds, one row a response.

    Rows hold prompt, prompt_tokens, tokens, reward, step, and task where there is a data_source;
    no log-probabilities: `opd diagnose --student S --teacher T` adds them. The dumps hold decoded
    text without special tokens, so `tokenize` (without adding any) may cut it differently from what
    was sampled, ends are lost, and every check of the sampler is void.

    Args:
      path: a file N.jsonl, or a folder of them.

    Raises:
      ValueError: a row lacks input, output or score.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl"), key=_step_first) if path.is_dir() else [path]
    if not files:
        raise InvalidInput(f"{path} holds no .jsonl files")
    for file in files:
        with open(file) as lines:
            for i, line in enumerate(lines, 1):
                raw = json.loads(line)
                lost = [name for name in ("input", "output", "score") if name not in raw]
                if lost:
                    raise InvalidInput(f"{file} row {i}: no field {', '.join(lost)} in a verl dump")
                row = {
                    "prompt": f"{raw.get('step', 0)}: {raw['input']}",
                    "prompt_tokens": tokenize(raw["input"]),
                    "tokens": tokenize(raw["output"]),
                    "reward": raw["score"],
                    "step": raw.get("step"),
                }
                yield row | ({"task": raw["data_source"]} if "data_source" in raw else {})


def teacher_support(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-1, B-4 of a support without the student's side: samples outside, and the teacher's mass.

    outside_topk = mean 1[y not in S], topk_teacher_mass = mean Q_S, as in `support_mass`.
    Access: the teacher's top-K. Healthy: outside small and flat, the mass near 1.
    """
    outside = ~in_support(batch)
    support = batch.support
    mass = outside * 0.0 if support is None else support.teacher_logp.exp().sum(-1)
    return {
        "divergence/outside_topk": PositionMean.of(outside, batch.mask, batch.prompt),
        "divergence/topk_teacher_mass": PositionMean.of(mass, batch.mask, batch.prompt),
    }


PANEL: dict[str, Metric] = {
    "sign_shares": sign_shares,
    "sampled_divergence": sampled_divergence,
    "teacher_support": teacher_support,
    "repetition": repetition,
    "sampler_ratio": sampler_ratio,
}


def _padded(x: Tensor) -> Tensor:
    return x.to_padded_tensor(0) if x.is_nested else x


def _prompts(data: Any) -> list[list[int]]:
    """The prompts' ids without padding."""
    prompts = data["prompts"]
    if prompts.is_nested:
        return [row.tolist() for row in prompts.unbind()]
    real = data["attention_mask"][:, : prompts.shape[1]].bool()
    return [row[own].tolist() for row, own in zip(prompts, real, strict=True)]


def _step_first(file: Path) -> tuple[int, str]:
    return (int(file.stem) if file.stem.isdigit() else -1, file.name)
