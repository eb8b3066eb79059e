"""What an objective needs from scoring, from the teacher and from the trainer, as data."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What the loss of an objective reads, and when it is valid.

    Derived from what the parts of an objective declare; never from its functions, which may be
    wrapped.
    """

    support: str
    """Ids on which both models are compared: "none", "teacher" or "student" (top-K of that model),
    "union" or "intersection" of the two, or "full" for the whole vocabulary.
    """
    support_k: int
    """K, the ids per model of a top-K support."""
    sampled_logp: bool
    """Whether the loss reads the student's log-probability of the sampled token, with gradient."""
    teacher_sampled_logp: bool
    """Whether credit or loss read the teacher's log-probability of the sampled token."""
    normalised: bool
    """Whether the student's values must be true log-probabilities. Where False, raw logits of the
    same ids give the same loss and gradient.
    """
    distributions: bool
    """Whether credit or baseline read statistics of whole next-token distributions."""
    whole_groups: bool
    """Whether the credit of a response reads other responses of the step, as a baseline or a reward
    over the rollouts of a prompt does. It is then wrong on a part of the step.
    """
    on_policy: bool
    """Whether the loss is wrong on tokens that were sampled before the student moved."""
    own_samples: bool
    """Whether the loss estimates a mean over tokens that the student samples, so that on another
    policy's tokens it needs the ratio of the two.
    """
    teacher: bool
    """Whether the loss reads a teacher at all."""
