"""verl: observation of its distillation losses (verl 0.9.1); its dumps: `diagnostics.formats.verl`.

verl computes the loss in worker processes, so the observer must be installed there: put two lines
into a module that the workers import (`actor_rollout_ref.model.external_lib: my_observer`) and keep
the rest of the configuration.

    from diagnostics.adapters.verl import install
    install("k1")    # the loss_mode of the run

Loss, gradient and verl's own metrics are unchanged; the panel's token means are added to verl's
logger under their usual names. With `records`, whole rows are saved for `opd diagnose`, which
computes every metric and standard error.
Shapes: B responses, T response positions, K teacher ids.
"""

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from diagnostics.core.totals import Accumulator, Mean, PositionMean
from diagnostics.errors import BrokenPackage, MissingPackage
from diagnostics.metrics.consistency import sampler_ratio
from diagnostics.metrics.divergence import sampled_divergence, sampled_in_support
from diagnostics.metrics.repetition import repetition
from diagnostics.metrics.signal import sign_shares
from diagnostics.missing import Missing
from diagnostics.monitor import Metric, Monitor
from diagnostics.records.columns import integer_id
from diagnostics.records.writer import batch_rows, save_records

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
"""Means over supervised tokens. verl can only add and average, so only these are exact across
micro-batches and ranks: each micro-batch reports its sum over the global number of tokens.
"""


def install(loss_name: str, records: str | Path | None = None, record_interval: int = 1) -> None:
    """Observe a registered loss of verl, such as k1 or forward_kl_topk, in this process.

    Args:
        loss_name: Name in verl's registry.
        records: A folder for record files.
        record_interval: Micro-batches between record files.

    Raises:
        MissingPackage: Verl is not installed.
        BrokenPackage: Verl cannot be imported, or has no distillation losses.
        ValueError: Verl has no loss of this name.
    """
    try:
        from verl.trainer.distillation.losses import (
            DISTILLATION_LOSS_REGISTRY,
            get_distillation_loss_fn,
        )
    except ImportError as error:
        error_type = MissingPackage if getattr(error, "name", None) == "verl" else BrokenPackage
        raise error_type(f"verl with distillation losses (0.9) is required: {error}") from error
    loss = get_distillation_loss_fn(loss_name)
    if not hasattr(loss, "original_loss"):
        DISTILLATION_LOSS_REGISTRY[loss_name] = observe_loss(loss, records, record_interval)


def observe_loss(loss: Loss, records: str | Path | None = None, record_interval: int = 1) -> Loss:
    """Wrap a loss so that its metrics include the token means of the panel.

    For a custom loss: `register_distillation_loss(...)(observe_loss(my_loss))`.

    Args:
        loss: Verl's distillation loss.
        records: A folder for record files.
        record_interval: Micro-batches between record files.

    Returns:
        The wrapped loss.
    """
    monitor = Monitor(PANEL)
    calls = count()

    def observed_loss(
        config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        from verl.utils.metric import AggregationType
        from verl.utils.metric import Metric as VerlMetric

        loss_value, metrics = loss(
            config=config,
            distillation_config=distillation_config,
            model_output=model_output,
            data=data,
        )
        batch = batch_from_verl(model_output, data).validate()
        # verl averages over ranks and adds over micro-batches, hence the factor
        scale = float(data["dp_size"]) / float(data["batch_num_tokens"])
        sums = token_sums(monitor.measure(batch))
        host = torch.stack([*sums.values()]).tolist()  # a single sync
        shares = {
            name: VerlMetric(AggregationType.SUM, x * scale)
            for name, x in zip(sums, host, strict=True)
        }
        call_index = next(calls)
        if records is not None and call_index % record_interval == 0:
            rank = os.environ.get("RANK", "0")
            rows = zip(batch_rows(batch), _prompts(data), strict=True)
            file = Path(records) / f"rank{rank}_{os.getpid()}_{call_index:07d}.jsonl"
            save_records(file, ({**row, "prompt_tokens": prompt} for row, prompt in rows))
        return loss_value, {**metrics, **shares}

    observed_loss.original_loss = loss  # type: ignore[attr-defined]
    return observed_loss


def token_sums(totals: dict[str, Accumulator]) -> dict[str, Tensor]:
    """Return the sum over tokens behind each of `TOKEN_MEANS` that was measured."""
    sums: dict[str, Tensor] = {}
    for name in TOKEN_MEANS:
        total = totals.get(name)
        if isinstance(total, Mean | PositionMean):
            sums[name] = total.total.flatten()[0]
    return sums


def sampled_tokens(mask: Tensor, rollout_logp: Tensor | None) -> Tensor:
    """Return (B, T) bool: what the student sampled, supervised or not, as far as verl's data show.

    Where response_mask is 0 an agent loop writes a log-probability of exactly 0 for the text of
    tools and environments; any other number is a token of the student that a mask rule removes from
    the loss (`opd.integrations.verl.agent_loop`). Without rollout_log_probs only the mask is known.

    Args:
        mask: (B, T) bool, verl's response_mask.
        rollout_logp: (B, T), 0 after each response.

    Returns:
        The mask of sampled tokens.
    """
    return mask if rollout_logp is None else mask | (rollout_logp != 0)


def batch_from_verl(
    model_output: dict[str, Any], data: Any, *, unsupervised: bool = False
) -> ScoredRollouts:
    """Build the `ScoredRollouts` of a micro-batch of verl's actor; other fields are missing.

    The batch holds the tokens in response_mask, since verl divides by their number; with
    `unsupervised` also the other sampled tokens (`sampled_tokens`), which ratios and costs to go
    need.

    With one teacher log-probability per token (loss modes k1, k2, ...) it is that of the sampled
    token; with K (forward_kl_topk) they form a support without the student's side, and the sampled
    token's is missing, as is the student's if verl trains on a top-K only. `ended` is always
    missing; the sampler's is present if verl kept rollout_log_probs.

    Args:
        model_output: Output of verl's actor.
        data: Verl's micro-batch.
        unsupervised: Include sampled tokens outside the loss.

    Returns:
        The batch.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    mask = _padded(data["response_mask"]).bool()
    missing: Any = Missing("verl's loss has")

    sampler_logp = data.get("rollout_log_probs", None)
    sampler_logp = None if sampler_logp is None else _padded(sampler_logp).float()
    sampled = sampled_tokens(mask, sampler_logp) if unsupervised else mask

    def response(values: Tensor) -> Tensor:
        x = no_padding_2_padding(values, data).detach().float()
        return torch.where(sampled if x.dim() == 2 else sampled[..., None], x, 0.0)

    teacher = response(data["teacher_logprobs"])
    has_single_logp = teacher.shape[-1] == 1
    student = model_output.get("log_probs")
    support = None
    if not has_single_logp:
        ids = no_padding_2_padding(data["teacher_ids"], data).long() * sampled[..., None]
        support = Support(ids=ids, student_logp=missing, teacher_logp=teacher, source="teacher")
    return ScoredRollouts(
        tokens=_padded(data["responses"]).long() * sampled,
        mask=mask,
        sampled_mask=sampled if unsupervised else None,
        student_logp=missing if student is None else response(student),
        teacher_logp=teacher[..., 0] if has_single_logp else missing,
        sampler_logp=missing if sampler_logp is None else torch.where(sampled, sampler_logp, 0.0),
        prompt=torch.tensor([*map(integer_id, _prompts(data))], device=mask.device),
        ended=missing,
        support=support,
    )


def teacher_support(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Compute B-1 and B-4 for a support without the student's side.

    outside_topk = mean 1[y not in S], topk_teacher_mass = mean Q_S, as in `support_mass`.
    Access: the teacher's top-K. Healthy: outside small and flat, the mass near 1.

    Args:
        batch: The batch.

    Returns:
        The accumulators.
    """
    outside = ~sampled_in_support(batch)
    support = batch.support
    mass = outside * 0.0 if support is None else support.teacher_logp.exp().sum(-1)
    return {
        "divergence/outside_topk": PositionMean.from_values(outside, batch.mask, batch.prompt),
        "divergence/topk_teacher_mass": PositionMean.from_values(mass, batch.mask, batch.prompt),
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
    """Return the ids of each prompt without padding."""
    prompts = data["prompts"]
    if prompts.is_nested:
        return [row.tolist() for row in prompts.unbind()]
    not_padding = data["attention_mask"][:, : prompts.shape[1]].bool()
    return [row[row_mask].tolist() for row, row_mask in zip(prompts, not_padding, strict=True)]
