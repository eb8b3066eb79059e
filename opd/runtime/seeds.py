"""Seeds of everything random in a run, derived from words that say what it is for."""

ROLLOUT, EVALUATION, PROBE, CONTROL, CONTINUATION, ORDER = range(6)
"""What noise is for: a step's rollouts, an evaluation, the gradient probe's own rollouts, the
own-prefix control, the continuation probe, and which task's turn it is."""


def derive(*words: int) -> int:
    """A 62-bit seed from integers, different for every tuple (splitmix64 rounds)."""
    state = 0
    for word in words:
        state = (state ^ word) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 2
