"""The scout: measurements of a pair before training, and a forecast from a bank of runs."""
