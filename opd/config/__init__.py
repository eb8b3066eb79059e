"""Settings of a run, their validation, and recipes."""
