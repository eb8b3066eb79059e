"""Metrics of scored rollouts; each returns accumulators that merge over batches and ranks."""
