"""Seeds of all random generators of a run, derived from integers that identify their purpose."""

ROLLOUT, EVALUATION, PROBE, CONTROL, CONTINUATION, ORDER, WRITER, CALIBRATION, RECOVERY = range(9)
"""Purposes of seeds: the rollouts of a step, an evaluation, the gradient probe's own rollouts, the
own-prefix baseline, the continuation probe, the order of tasks, who writes a response, the interval
of a calibration error, and what is perturbed."""


def derive_seed(*keys: int) -> int:
    """Derive a 62-bit seed from integers, different for every tuple (splitmix64 rounds)."""
    state = 0
    for key in keys:
        state = (state ^ key) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 2
