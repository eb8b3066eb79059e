"""Records on disk: rows, saved batches, token dumps, rollouts of other trainers, run folders."""
