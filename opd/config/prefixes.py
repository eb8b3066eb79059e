"""The setting `prefixes`: who writes the responses that a step trains on.

student | teacher | dataset | mixed:SHARE | mixed:START-END | mixed:SHARE:dataset | replay:AGE
"""

import re
from dataclasses import dataclass

from diagnostics.errors import InvalidInput

FORMS = "student, teacher, dataset, mixed:SHARE[:dataset], mixed:START-END[:dataset] or replay:AGE"
NUMBER = r"\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+"
MIXED = re.compile(rf"mixed:({NUMBER})(?:-({NUMBER}))?(?::(teacher|dataset))?")
REPLAY = re.compile(r"replay:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """Who writes the responses of a run."""

    partner: str = ""
    """Who writes the responses that are not the student's own: "teacher", "dataset" or, where all
    are its own, ""."""
    first_share: float = 1.0
    """Probability at the first step that a response is the student's own."""
    last_share: float = 1.0
    """The same at the last step; linear in between."""
    replay_age: int = 0
    """Number of further steps that are taken on every set of responses."""

    @property
    def reads_data(self) -> bool:
        """Whether some responses are given by the data."""
        return self.partner == "dataset"

    @property
    def samples_teacher(self) -> bool:
        """Whether some responses are sampled from the teacher."""
        return self.partner == "teacher"

    @property
    def has_own(self) -> bool:
        """Whether some responses are the student's own."""
        return max(self.first_share, self.last_share) > 0

    @property
    def is_changing(self) -> bool:
        """Whether the share of the student's own responses changes from step to step."""
        return self.first_share != self.last_share

    @property
    def is_on_policy(self) -> bool:
        """Whether every response is sampled from the student that is trained on it."""
        return not self.partner and not self.replay_age

    def own_share(self, step: int, steps: int) -> float:
        """Return the probability that a response of a step is the student's own.

        Args:
            step: Step of the run, from 0.
            steps: Number of steps of the run.

        Returns:
            The share, which reaches `last_share` at the last step.
        """
        progress = min(1.0, step / max(1, steps - 1))
        return self.first_share + (self.last_share - self.first_share) * progress


ON_POLICY = Prefixes()
"""Every response is the student's own and used once."""


def parse_prefixes(text: str) -> Prefixes:
    """Parse the setting.

    Args:
        text: See the module.

    Returns:
        What it says.

    Raises:
        InvalidInput: It has no such form, or a number is out of range.
    """
    if text == "student":
        return ON_POLICY
    if text in ("teacher", "dataset"):
        return Prefixes(partner=text, first_share=0.0, last_share=0.0)
    if match := MIXED.fullmatch(text):
        first = float(match[1])
        last = first if match[2] is None else float(match[2])
        if max(first, last) > 1:
            raise InvalidInput(
                f"prefixes is {text!r}; the share of the student's own responses must lie in "
                "[0, 1], such as mixed:0.5"
            )
        if first == last and first in (0, 1):
            plain = "student" if first else match[3] or "teacher"
            raise InvalidInput(f"prefixes is {text!r}, which mixes nothing; set it to {plain}")
        return Prefixes(partner=match[3] or "teacher", first_share=first, last_share=last)
    if match := REPLAY.fullmatch(text):
        if int(match[1]) < 1:
            raise InvalidInput(
                f"prefixes is {text!r}, which uses responses once; set it to student, or to "
                "replay:1 or more"
            )
        return Prefixes(replay_age=int(match[1]))
    raise InvalidInput(f"prefixes is {text!r}; it must be {FORMS}")
