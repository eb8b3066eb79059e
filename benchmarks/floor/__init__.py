"""The floor of a training step: the time of its bare matrix products."""
