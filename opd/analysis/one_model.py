"""Numbers of files that hold only one model's log-probabilities, or tokens alone.

The metrics of the catalogue compare two models. Where a side is missing, these give the numbers
that need the other one only, under the names of the catalogue.
"""

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Accumulator, Mean, PositionMean
from diagnostics.metrics.divergence import sampled_in_support
from diagnostics.metrics.repetition import repeated_ngram_mask
from diagnostics.missing import missing_fields
from diagnostics.monitor import Metric


def repeated_share(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Compute the share of repeated n-grams, as `repetition` without costs."""
    repeated = repeated_ngram_mask(batch.tokens, batch.sampled)
    return {"repetition/repeated_share": Mean.from_values(repeated, batch.sampled, batch.prompt)}


def one_sided_support(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Compute the share of samples outside a support and its mass, as `support_mass` of one model.

    Args:
        batch: The batch; its support has the log-probabilities of one model.

    Returns:
        divergence/outside_topk, divergence/topk_ROLE_mass; for a student's support "student_topk".
    """
    support = batch.support
    if support is None:
        return {}
    name = "topk" if support.source == "teacher" else f"{support.source}_topk"
    is_teacher = "student_logp" in missing_fields(support)
    role, logp = (
        ("teacher", support.teacher_logp) if is_teacher else ("student", support.student_logp)
    )
    probability = logp.exp() if support.present is None else logp.exp() * support.present
    outside = (~sampled_in_support(batch)).to(probability.dtype)
    return {
        f"divergence/outside_{name}": PositionMean.from_values(
            outside, batch.sampled, batch.prompt
        ),
        f"divergence/{name}_{role}_mass": PositionMean.from_values(
            probability.sum(-1), batch.sampled, batch.prompt
        ),
    }


def one_model_panel(batch: ScoredRollouts) -> dict[str, Metric]:
    """Return the metrics of this module that such a batch needs besides the catalogue's."""
    panel: dict[str, Metric] = {}
    if missing_fields(batch).keys() & {"student_logp", "teacher_logp"}:
        panel["repeated_share"] = repeated_share
    has_one_side = batch.support is not None and len(missing_fields(batch.support)) == 1
    if has_one_side:
        panel["one_sided_support"] = one_sided_support
    return panel
