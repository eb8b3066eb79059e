"""verl's reward, for its logs alone: our math grader (`reward.custom_reward_function.path`).

A distillation with use_task_rewards=False trains on no reward.
"""

from typing import Any

from opd.data.grading.graders import make_grader


def compute_score(data_source: str, solution_str: str, ground_truth: str, **_: Any) -> float:
    """1 for a right answer and 0 for any other; 0 for tasks that are not math."""
    if data_source != "math":
        return 0.0
    return make_grader("math")(solution_str, ground_truth).reward
