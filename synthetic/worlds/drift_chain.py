"""The drift chain: a small world in which the three published failure modes have closed forms.

States: an informed block, where the teacher differs from the student; an uninformed block, where it
is flat, copies the student or is sure of tokens of its own, entered now and then; and a loop.
Tokens: ordinary ones, which move at random within a block; `loop`, which enters the loop and
repeats it, and which the teacher likes to repeat as much as the student does; and `special`, a tag
that the student writes and the teacher all but forbids. Responses may end, but not in the loop.
(arXiv 2603.25562, section 2.2: lopsided one-token signals, a teacher that is lost on the student's
prefixes, special tokens that poison the loss.)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from synthetic.worlds.mdp import TabularMDP, ending


@dataclass(frozen=True, kw_only=True)
class DriftChainConfig:
    """Probabilities are of the student unless they say teacher."""

    informed: int = 6
    """States of the informed block; the uninformed block has as many."""
    ordinary: int = 6
    """Ordinary tokens."""
    horizon: int = 64
    distance: float = 0.7
    """Of the teacher from the student on ordinary tokens in the informed block."""
    enter: float = 0.02
    """The loop token outside the loop."""
    stay: float = 0.97
    """The loop token in the loop."""
    teacher_enter: float = 0.015
    teacher_stay: float = 0.97
    special: float = 0.02
    teacher_special: float = math.exp(-20)
    drift: float = 0.02
    """An ordinary token leads from the informed to the uninformed block; it never leads back."""
    uninformed: Literal["flat", "copies", "sure"] = "flat"
    """The teacher there is flat, copies the student, or is sure of tokens of its own."""
    sureness: float = 3.0
    """Standard deviation of a sure teacher's logits."""
    stop: float = 0.0
    """Every token but the loop token ends the response; a loop never ends by itself."""


@dataclass(frozen=True, eq=False)
class DriftChain:
    """mdp with student and teacher logits (S, A), and who is who."""

    mdp: TabularMDP
    student: Tensor
    teacher: Tensor
    informed: slice
    uninformed: slice
    loop: int
    loop_token: int
    special_token: int


def drift_chain(knobs: DriftChainConfig, generator: torch.Generator) -> DriftChain:
    """Draw the ordinary tokens' moves and both policies; everything else follows from the knobs."""
    n, ordinary = knobs.informed, knobs.ordinary
    s, a, loop = 2 * n + 1, ordinary + 2, 2 * n
    informed, uninformed = slice(0, n), slice(n, 2 * n)
    weights = torch.rand(2 * n, a, n, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum(-1, keepdim=True)
    transition = torch.zeros(s, a, s, dtype=torch.float64)
    transition[informed, :, informed] = (1 - knobs.drift) * weights[informed]
    transition[informed, :, uninformed] = knobs.drift * weights[informed]
    transition[uninformed, :, uninformed] = weights[uninformed]
    transition[loop, :, informed] = 1 / n
    transition[:, ordinary] = 0
    transition[:, ordinary, loop] = 1
    start = torch.zeros(s, dtype=torch.float64)
    start[informed] = 1 / n

    student = _policy(torch.randn(s, ordinary, generator=generator, dtype=torch.float64))
    offset = torch.randn(s, ordinary, generator=generator, dtype=torch.float64)
    teacher = _policy(student.log() + knobs.distance * offset)
    teacher[loop] = student[loop]
    teacher[uninformed] = {
        "flat": torch.full_like(student, 1 / ordinary),
        "copies": student,
        "sure": _policy(knobs.sureness * offset),
    }[knobs.uninformed][uninformed]
    mdp = TabularMDP(transition, start, knobs.horizon)
    ours = _with(student, loop, knobs.enter, knobs.stay, knobs.special)
    theirs = _with(teacher, loop, knobs.teacher_enter, knobs.teacher_stay, knobs.teacher_special)
    if knobs.stop:
        stop = torch.full((s, a), knobs.stop, dtype=torch.float64)
        stop[:, ordinary] = 0
        mdp = ending(mdp, stop)
        # nothing is emitted at the end state
        ours, theirs = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (ours, theirs))
    return DriftChain(
        mdp=mdp,
        student=ours,
        teacher=theirs,
        informed=informed,
        uninformed=uninformed,
        loop=loop,
        loop_token=ordinary,
        special_token=ordinary + 1,
    )


def _policy(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _with(ordinary: Tensor, loop: int, enter: float, stay: float, special: float) -> Tensor:
    """(S, A) log-probabilities: the two further tokens first, the ordinary ones share the rest."""
    looping = torch.full((len(ordinary), 1), enter, dtype=torch.float64)
    looping[loop] = stay
    tag = torch.full_like(looping, special)
    tag[loop] = special * (1 - stay)
    return torch.cat([ordinary * (1 - looping - tag), looping, tag], -1).log()
