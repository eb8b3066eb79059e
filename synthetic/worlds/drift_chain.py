"""Drift chain: a small world in which the three published failure modes have closed forms.

States: an informed block, where the teacher differs from the student; an uninformed block, entered
occasionally, where the teacher is flat, copies the student or is confident in tokens of its own;
and a loop. Tokens: ordinary ones, which move at random within a block; `loop`, which enters the
loop and repeats it, and which the teacher repeats as readily as the student; and `special`, a tag
that the student writes and the teacher gives almost no probability. Responses may end, but not in
the loop. (arXiv 2603.25562, section 2.2: imbalanced one-token signals, an unreliable teacher on the
student's prefixes, special tokens that distort the loss.)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from synthetic.worlds.mdp import TabularMDP, with_end_state


@dataclass(frozen=True, kw_only=True)
class DriftChainConfig:
    """Settings of a drift chain; probabilities are the student's unless the name says teacher."""

    informed: int = 6
    """Number of states of the informed block; the uninformed block has as many."""
    ordinary: int = 6
    """Number of ordinary tokens."""
    horizon: int = 64
    """Number of steps."""
    distance: float = 0.7
    """Standard deviation of teacher minus student logits of ordinary tokens, informed block."""
    enter: float = 0.02
    """Probability of the loop token outside the loop."""
    stay: float = 0.97
    """Probability of the loop token in the loop."""
    teacher_enter: float = 0.015
    """The teacher's probability of the loop token outside the loop."""
    teacher_stay: float = 0.97
    """The teacher's probability of the loop token in the loop."""
    special: float = 0.02
    """Probability of the special tag outside the loop; in the loop it is multiplied by 1 - stay."""
    teacher_special: float = math.exp(-20)
    """The teacher's probability of the special tag outside the loop."""
    drift: float = 0.02
    """Probability that an ordinary token leaves the informed for the uninformed block for good."""
    uninformed: Literal["flat", "copies", "sure"] = "flat"
    """The teacher there: "flat", "copies" the student, or "sure" of tokens of its own."""
    sureness: float = 3.0
    """Standard deviation of a "sure" teacher's logits."""
    stop: float = 0.0
    """Probability that a token other than the loop token ends the response; loops never end."""


@dataclass(frozen=True, eq=False)
class DriftChain:
    """A drift chain with student and teacher, and the indices of its blocks and tokens."""

    mdp: TabularMDP
    """The world."""
    student: Tensor
    """(S, A) logits."""
    teacher: Tensor
    """(S, A) logits."""
    informed: slice
    """States of the informed block."""
    uninformed: slice
    """States of the uninformed block."""
    loop: int
    """State of the loop."""
    loop_token: int
    """Id of the loop token."""
    special_token: int
    """Id of the special tag."""


def drift_chain(config: DriftChainConfig, generator: torch.Generator) -> DriftChain:
    """Draw a chain: the ordinary tokens' transitions and both policies are random.

    Args:
        config: Settings of the chain.
        generator: Source of randomness.

    Returns:
        The chain.
    """
    n, ordinary = config.informed, config.ordinary
    s, a, loop = 2 * n + 1, ordinary + 2, 2 * n
    informed, uninformed = slice(0, n), slice(n, 2 * n)
    weights = torch.rand(2 * n, a, n, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum(-1, keepdim=True)
    transition = torch.zeros(s, a, s, dtype=torch.float64)
    transition[informed, :, informed] = (1 - config.drift) * weights[informed]
    transition[informed, :, uninformed] = config.drift * weights[informed]
    transition[uninformed, :, uninformed] = weights[uninformed]
    transition[loop, :, informed] = 1 / n
    transition[:, ordinary] = 0
    transition[:, ordinary, loop] = 1
    start = torch.zeros(s, dtype=torch.float64)
    start[informed] = 1 / n

    student = _policy(torch.randn(s, ordinary, generator=generator, dtype=torch.float64))
    offset = torch.randn(s, ordinary, generator=generator, dtype=torch.float64)
    teacher = _policy(student.log() + config.distance * offset)
    teacher[loop] = student[loop]
    teacher[uninformed] = {
        "flat": torch.full_like(student, 1 / ordinary),
        "copies": student,
        "sure": _policy(config.sureness * offset),
    }[config.uninformed][uninformed]
    mdp = TabularMDP(transition, start, config.horizon)
    student_logits = _add_loop_and_special(student, loop, config.enter, config.stay, config.special)
    teacher_logits = _add_loop_and_special(
        teacher, loop, config.teacher_enter, config.teacher_stay, config.teacher_special
    )
    if config.stop:
        stop_probability = torch.full((s, a), config.stop, dtype=torch.float64)
        stop_probability[:, ordinary] = 0
        mdp = with_end_state(mdp, stop_probability)
        # nothing is emitted at the end state
        student_logits, teacher_logits = (
            torch.cat([x, torch.zeros_like(x[:1])]) for x in (student_logits, teacher_logits)
        )
    return DriftChain(
        mdp=mdp,
        student=student_logits,
        teacher=teacher_logits,
        informed=informed,
        uninformed=uninformed,
        loop=loop,
        loop_token=ordinary,
        special_token=ordinary + 1,
    )


def _policy(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _add_loop_and_special(
    ordinary: Tensor, loop: int, enter: float, stay: float, special: float
) -> Tensor:
    """Return (S, A) log-probabilities with the loop token and the special tag added.

    The two added tokens take their probabilities first; the ordinary ones share the remaining mass.
    """
    loop_column = torch.full((len(ordinary), 1), enter, dtype=torch.float64)
    loop_column[loop] = stay
    special_column = torch.full_like(loop_column, special)
    special_column[loop] = special * (1 - stay)
    return torch.cat(
        [ordinary * (1 - loop_column - special_column), loop_column, special_column], -1
    ).log()
