"""The training loop: setup, steps, updates, checkpoints, prefetched rollouts."""
