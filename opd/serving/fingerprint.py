"""Whether a server or an engine has the expected model: log-probabilities of fixed probe tokens.

Two computations with the same weights differ by rounding; with other weights they differ by several
nats. Does not import torch.
"""

import random

import numpy as np
from numpy.typing import ArrayLike

from diagnostics.errors import OperationFailed

TEACHER_TOLERANCE = 0.25
"""Mean difference in nats between two answers of the same teacher server: bfloat16 in batches of
other sizes differs by a few hundredths."""
WEIGHTS_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.03}
"""By dtype: mean difference in nats between vLLM and the student with the same weights."""


def probe_tokens(vocabulary: int, count: int) -> list[int]:
    """Draw the same random token ids on every call; the last one is the largest id.

    Args:
        vocabulary: Number of ids; a model with fewer rejects the probe.
        count: Number of tokens.

    Returns:
        `count` ids.
    """
    generator = random.Random(0)
    return [generator.randrange(vocabulary) for _ in range(count - 1)] + [vocabulary - 1]


def check_same_model(
    actual: ArrayLike, expected: ArrayLike, *, tolerance: float, problem: str, remedy: str
) -> None:
    """Compare two sets of log-probabilities of the same tokens.

    Args:
        actual: (n,) log-probabilities of the server or engine.
        expected: (n,) log-probabilities of the model that it should have.
        tolerance: Largest mean absolute difference, in nats.
        problem: Beginning of the message, such as "URL is another model".
        remedy: End of the message.

    Raises:
        OperationFailed: They differ by more than the tolerance, or one of them is not a number.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    gap = float(np.abs(actual - expected).mean())
    if not gap <= tolerance:
        raise OperationFailed(
            f"{problem}: log-probabilities of {len(actual)} tokens differ by {gap:.2g} nats on "
            f"average; the tolerance for numerical noise is {tolerance:g} nats. {remedy}"
        )
