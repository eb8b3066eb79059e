"""Own-prefix baseline (B-8): teacher certainty on its own and on student prefixes."""

from math import hypot

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import compute
from diagnostics.metrics.divergence import uncertainty


def own_prefix_gap(on_student: ScoredRollouts, on_teacher: ScoredRollouts) -> dict[str, float]:
    """B-8: Compute the teacher's certainty on its own prefixes minus that on student prefixes.

    Both by position bin.

    Access: L2 of two batches, the second sampled by the teacher, both scored by the same pair; not
    a metric of one batch.
    Source: 2605.30833.
    Healthy: about 0. A gap of teacher_max that grows with position while the teacher's own stays
    flat is drift of the student; if both fall alike, length is the cause. Late bins hold only the
    responses that reached them: compare where both hold many (`tokens_by_position`).

    Args:
        on_student: Rollouts sampled by the student.
        on_teacher: Rollouts sampled by the teacher.

    Returns:
        divergence/own_prefix_NAME: Mean of NAME over responses that the teacher sampled minus the
            same over those that the student sampled, for teacher_max and teacher_entropy, overall
            and for every bin that both reach; "_se" is the root of both squared errors (for the
            same prompts, whose means are correlated, an upper bound).
    """
    student_prefix, teacher_prefix = (
        compute(uncertainty(batch)) for batch in (on_student, on_teacher)
    )
    gaps = {}
    for name in student_prefix:
        if (
            name.startswith(("divergence/teacher_max", "divergence/teacher_entropy"))
            and name in teacher_prefix
        ):
            key = name.replace("divergence/", "divergence/own_prefix_", 1)
            pair = teacher_prefix[name], student_prefix[name]
            gaps[key] = hypot(*pair) if name.endswith("_se") else pair[0] - pair[1]
    return gaps
