"""Own-prefix control (B-8): is the teacher lost, or is the text merely long?"""

from math import hypot

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import read
from diagnostics.metrics.divergence import uncertainty


def own_prefix_gap(on_student: ScoredRollouts, on_teacher: ScoredRollouts) -> dict[str, float]:
    """B-8: the teacher's certainty on its own prefixes minus that on the student's, by position.

    divergence/own_prefix_NAME = mean of NAME over responses that the teacher sampled minus the same over
    those that the student sampled, for teacher_max and teacher_entropy, whole and for every bin
    that both reach, with "_se", the root of both squared errors (for the same prompts, whose means
    go together, an upper bound).
    Access: L2 of two batches, the second sampled by the teacher, both scored by the same pair; not
    a metric of one batch. Source: 2605.30833.
    Healthy: about 0. A gap of teacher_max that grows with position while the teacher's own stays
    flat is drift of the student; both falling alike is length. Late bins hold the responses that
    got there: compare where both hold many (`tokens_by_position`).
    """
    ours, own = (read(uncertainty(batch)) for batch in (on_student, on_teacher))
    found = {}
    for name in ours:
        if (
            name.startswith(("divergence/teacher_max", "divergence/teacher_entropy"))
            and name in own
        ):
            key = name.replace("divergence/", "divergence/own_prefix_", 1)
            both = own[name], ours[name]
            found[key] = hypot(*both) if name.endswith("_se") else both[0] - both[1]
    return found
