"""Losses with what their author claims that they estimate."""

from tests.opd.objectives.audit.bank import right, right_sampled

REFUTED = [
    (right.k3_direct, "token_reverse_kl"),
    (right.forward_kl_by_kl_div, "token_reverse_kl"),
    (right_sampled.k2, "sequence_reverse_kl"),
    (right.jsd_near_the_student, "token_jsd(0.9)"),
    (right.teacher_topk_renormalised, "token_reverse_kl"),
]
"""Pairs of a loss and a claim that is false: faulty, without any code."""
TRUE = [
    (right_sampled.k2, "token_reverse_kl"),
    (right_sampled.cost_to_go, "sequence_reverse_kl"),
    (right.jsd_near_the_student, "token_jsd(0.1)"),
    (right.teacher_topk_with_the_rest, "topk_reverse_kl(bucket, teacher)"),
]
"""Pairs of a loss and a claim that is true."""
