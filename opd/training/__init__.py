"""The training loop: run setup, steps, updates, checkpoints and rollout prefetching."""
