"""Math reward for verl's logs, set by `reward.custom_reward_function.path`.

With use_task_rewards=False the reward is logged but not trained on.
"""

from typing import Any

from opd.data.grading.graders import make_grader


def compute_score(data_source: str, solution_str: str, ground_truth: str, **_: Any) -> float:
    """Return 1 for a correct math answer, otherwise 0; other tasks always get 0."""
    if data_source != "math":
        return 0.0
    return make_grader("math")(solution_str, ground_truth).reward
