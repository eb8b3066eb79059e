"""The teacher's own accuracy as the ceiling of a student, and the share of its lead that is closed.

Shapes: M problems.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.stats import Array, gain_interval, t_critical
from opd.evaluation.statistics import decode_outcomes


def ceiling_metrics(
    student: Mapping[str, Any], teacher: Mapping[str, Any], start: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the teacher's accuracy beside the student's and, with a start, the share closed.

    Args:
        student: Results of the student (`opd.evaluation.evaluate.evaluation_result`).
        teacher: Results of the teacher on the same problems.
        start: Results of the student before training; None if it is not known.

    Returns:
        `teacher/accuracy` with its interval; `teacher/gap`, teacher - student, with a paired one;
        `teacher/closed` and its interval, or `teacher/closed/undefined` with the reason
        (`closed_share`).
    """
    accuracies = [decode_outcomes(dict(result)).mean(1) for result in (student, teacher)]
    gap = accuracies[1] - accuracies[0]
    low, high = gain_interval(gap)
    metrics: dict[str, Any] = {
        "teacher/accuracy": teacher["accuracy"],
        "teacher/low": teacher["low"],
        "teacher/high": teacher["high"],
        "teacher/gap": float(gap.mean()),
        "teacher/gap/low": low,
        "teacher/gap/high": high,
    }
    if start is None:
        return metrics
    start_accuracy = decode_outcomes(dict(start)).mean(1)
    return metrics | closed_share(accuracies[0] - start_accuracy, accuracies[1] - start_accuracy)


def closed_share(gain: Array, lead: Array) -> dict[str, Any]:
    """Return the share mean(gain) / mean(lead) of the teacher's lead that is closed.

    The interval is Fieller's (1954, J. R. Stat. Soc. B 16): all r for which mean(gain - r lead) is
    compatible with 0 at 5 %, by a paired t test over problems, whose variances have two problems
    more, as those of `diagnostics.stats.gain_interval`. It is an interval only where the lead
    itself is clearly above 0. The share is 0 for the student before training and 1 for the teacher,
    and may lie outside.

    Args:
        gain: (M,) student - start, of each problem.
        lead: (M,) teacher - start, of each problem.

    Returns:
        `teacher/closed`, `teacher/closed/low`, `teacher/closed/high`; or
        `teacher/closed/undefined`, the reason why there is no such share.
    """
    lead_low, lead_high = gain_interval(lead)
    interval = f"{lead.mean():+.3f} [{lead_low:+.3f}, {lead_high:+.3f}]"
    if len(lead) < 3:
        return {"teacher/closed/undefined": f"{len(lead)} problems; evaluate at least 3"}
    deviations = gain - gain.mean(), lead - lead.mean()
    scale = t_critical(len(lead) - 1) ** 2 / (len(lead) * (len(lead) + 1))
    # roots of (mean(gain) - r mean(lead))^2 = t^2 var(gain - r lead) / M, a r^2 - 2 b r + c = 0
    a = lead.mean() ** 2 - scale * (np.square(deviations[1]).sum() + 2 * added_square(lead))
    b = gain.mean() * lead.mean() - scale * (deviations[0] * deviations[1]).sum()
    c = gain.mean() ** 2 - scale * (np.square(deviations[0]).sum() + 2 * added_square(gain))
    if lead_low <= 0 or a <= 0:
        reason = f"the teacher is not clearly better than the start: {interval}"
        return {"teacher/closed/undefined": reason}
    root = math.sqrt(max(0.0, b * b - a * c))
    return {
        "teacher/closed": float(gain.mean() / lead.mean()),
        "teacher/closed/low": float((b - root) / a),
        "teacher/closed/high": float((b + root) / a),
    }


def added_square(differences: Array) -> float:
    """Return the mean square of the changes among (M,) differences and of one whole problem."""
    return float((np.square(differences).sum() + 1) / (np.count_nonzero(differences) + 1))
